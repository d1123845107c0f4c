"""The positions of a model's calls: hooks that read each call, and the masks that layers ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.positions.call import Call, read_call, start_of, wrong_mask
from lightning_peft.positions.context import CallContext, Contexts
from lightning_peft.positions.decoder import decoder_of
from lightning_peft.positions.generation import config_of, generation_of
from lightning_peft.positions.past import StateLengths, leaves_state
from lightning_peft.positions.policies import PositionsError, warn_of_plain_text
from lightning_peft.positions.running import RunningCall
from lightning_peft.replaced import Handle, ReplacedMethod, replaced
from lightning_peft.tokens import Tokens

_ATTRIBUTE = "_lightning_peft_positions"


class Positions(Contexts):
    """The positions of the current call of one model. `track` makes them; tuner layers read them through `mask`.

    Args:
        model: the backbone whose `forward` is called.
    """

    exist: ClassVar[bool] = False  # in this process: else no model need be searched for them

    def __new__(cls, *_: object) -> Positions:
        Positions.exist = True  # of copies and what is unpickled too
        return super().__new__(cls)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.borrowed = 0  # by how many contexts, besides the layers of adapters
        self.running = RunningCall()
        self._lengths = StateLengths()
        self._arguments = _arguments(model)
        self._handles: list[RemovableHandle | Handle] = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, always_call=True),
        ]
        decoder = decoder_of(model)
        self._decodes = decoder is not None
        if decoder is not None:
            self._handles.append(decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True))
            self._handles.append(decoder.register_forward_hook(self.after_decoder, always_call=True))
        if callable(getattr(type(model), "generate", None)):
            self._handles.append(replaced(model, "generate", self.generate))

    def heed(self, outer: nn.Module) -> None:
        """Note the prompts of another model's `generate`, which runs this one as a part; a second time does nothing."""
        if all(getattr(handle, "owner", None) is not outer for handle in self._handles):
            self._handles.append(replaced(outer, "generate", self.generate))

    def remove(self) -> None:
        """Take the hooks and the replaced `generate` off the model."""
        for handle in self._handles:
            handle.remove()

    def mask(self, policy: str, prompts: bool = False) -> Tensor:
        """Return the tokens of the current call that `policy` edits, bool `[B, T]`; computed once a call.

        Args:
            policy: a selection in the language of `lightning_peft.tokens`.
            prompts: let a text of which nothing says where its prompt ends be a prompt as a whole, where the model
                does not generate, as a classifier. Of a model that does, such a text has no prompt.

        Raises:
            PositionsError: outside a forward call of the tracked model, or where the start of the answer is unknown.
        """
        call = self.running.seen
        if call is None:
            self._check_prompt(self.known)
            if self._decodes and self.known.generation is not None:
                raise PositionsError(
                    f"`generate` of {type(self.model).__name__} runs its encoder apart, where an edit limited to "
                    f"{policy!r} positions has no answer: edit the sites of its decoder, or let the edit act at "
                    'positions="all".'
                )
            raise PositionsError(
                f"An edit limited to {policy!r} positions ran outside {type(self.model).__name__}.forward, so its "
                "positions are unknown; call the backbone itself, not one of its submodules."
            )
        key = f"{policy} of prompts" if prompts else policy
        if key not in call.masks:
            call.masks[key] = self._make(call, policy, prompts)
        return call.masks[key]

    @property
    def generation(self) -> object | None:
        """An object that stands for the running call of `generate`, the same in all its steps; None outside of one."""
        call = self.running.seen
        return None if call is None else call.context.generation

    @property
    def by_mask(self) -> bool:
        """True where the edited tokens of the current call were given themselves, not where they begin."""
        call = self.running.seen
        return call is not None and call.context.mask is not None

    def everywhere(self, policy: str) -> bool:
        """Return whether `policy` is known to edit every token of the current call, so that no mask is needed.

        The mask's values are looked at once a call, and only within `generate`, whose steps look at values anyway.
        """
        if policy == "all":
            return True
        call = self.running.seen
        if call is None or call.context.generation is None or torch.compiler.is_compiling():
            return False
        if policy not in call.whole:
            call.whole[policy] = bool(self.mask(policy).all())
        return call.whole[policy]

    def nowhere(self, policy: str, prompts: bool = False) -> bool:
        """Return whether `policy` is known to edit no token of the current call; looked at as by `everywhere`."""
        call = self.running.seen
        if policy == "all" or call is None or call.context.generation is None or torch.compiler.is_compiling():
            return False
        key = f"none of {policy} of prompts" if prompts else f"none of {policy}"
        if key not in call.whole:
            call.whole[key] = not bool(self.mask(policy, prompts).any())
        return call.whole[key]

    @property
    def prompt_known(self) -> bool:
        """True where it is known which tokens of the current call are its prompt, or which are edited."""
        call = self.running.seen
        return call is not None and (call.start is not None or call.context.mask is not None or not self.generates)

    @property
    def generates(self) -> bool:
        """True where the model, or one of which it is a part, writes texts: an answer may then follow a prompt."""
        return any(isinstance(handle, ReplacedMethod) and handle.name == "generate" for handle in self._handles)

    @staticmethod
    def _check_prompt(context: CallContext) -> None:
        if context.generation is not None and context.generation.lacks_prompt:
            raise PositionsError(
                "`generate` was called without a prompt of tokens, so where the answer begins is unknown: pass "
                'input_ids or inputs_embeds, or let the edit act at positions="all".'
            )

    def _make(self, call: Call, policy: str, prompts: bool) -> Tensor:
        if policy == "all":
            return call.real
        if call.context.mask is not None:
            return call.context.mask.to(call.real.device, torch.bool) & call.real
        if call.position_ids is None:
            raise PositionsError(
                f"The call of {type(self.model).__name__} continues a state of which it is not known how many tokens "
                "it has read: make all calls of a text while the edit is on, each with the state that the last one "
                'returned, or let the edit act at positions="all".'
            )
        tokens = Tokens.parse(policy)
        start = call.start
        if start is None and tokens.needs_start:
            self._check_prompt(call.context)
            if call.past is not None and not call.past.empty:
                raise PositionsError(
                    "The call continues a cached past but nothing says where the answer began; use `generate`, or "
                    "`with lightning_peft.positions.answering(model, start=...)`."
                )
            if prompts and tokens.phase == "prompt" and not self.generates:
                read = call.read()
                assert read is not None
                return tokens.mask(call.position_ids, read - 1) & call.real
            if not call.context.plain:
                warn_of_plain_text(policy, type(self.model).__name__)
            # plain text is an answer from its first token on, and has no prompt
            start = call.position_ids.new_full(call.position_ids.shape[:1], 0 if tokens.phase == "answer" else -1)
        return tokens.mask(call.position_ids, start) & call.real

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read this call's tokens, mask, cache and position ids; a forward pre-hook."""
        arguments = dict(zip(self._arguments, args, strict=False)) | kwargs
        call = read_call(arguments, self.known, self._lengths, self._decodes)
        if call is not None and call.context.mask is None:
            call.start = (
                start_of(call) if self._decodes else start_of(call, arguments.get("labels"), call.context.labels)
            )
            if call.start is None and call.past is None:  # it cannot be told later, when layers have grown their caches
                call.past = self._lengths.past(arguments, len(call.real))
        self.running.begin(call)

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read what goes into an encoder-decoder's decoder, every token of which is the answer; a forward pre-hook."""
        around = self.running.here
        arguments = dict(zip(_arguments(module), args, strict=False)) | kwargs
        call = read_call(arguments, self.known, self._lengths, self._decodes)
        if call is None:
            return
        mask = self.known.mask
        if mask is not None and call.context.mask is None and (around is None or around.context.mask is None):
            raise wrong_mask(mask, call.real)
        call.start, call.decodes, call.around = call.real.new_zeros(len(call.real), dtype=torch.long), True, around
        self.running.begin(call)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the call, so that nothing stale is read; a forward hook.

        While gradients are recorded it is kept: checkpointed blocks run again in the backward pass. Other calls may
        come in between, so it is recalled when the gradient of its output arrives.
        """
        call = self.running.here
        if call is not None and not torch.compiler.is_compiling() and leaves_state(output):
            self._lengths.note(output, call.read())
        if not torch.is_grad_enabled():
            self.running.forget()
        else:
            self.running.recall_from(output, call)

    def after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        """Go back to the call of the whole model, as `after_forward` forgets that; a forward hook."""
        call = self.running.here
        if call is None or not call.decodes:
            return
        if torch.is_grad_enabled():
            self.running.recall_from(output, call)
        self.running.begin(call.around)

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `generate`, which is `original`, with its prompts noted first."""
        if self.known.generation is not None and getattr(config_of(self.model, args, kwargs), "is_assistant", False):
            return original(*args, **kwargs)  # the model's own drafts, of the answer that is written
        with self.giving(generation=generation_of(self.model, args, kwargs)):
            return original(*args, **kwargs)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's `forward`, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def track(model: nn.Module) -> Positions:
    """Return the model's `Positions`, made and hooked on at the first call.

    Args:
        model: the module whose `forward` takes `input_ids` (or `inputs_embeds`), and perhaps has `generate`.
    """
    existing = model.__dict__.get(_ATTRIBUTE)
    if isinstance(existing, Positions):
        return existing
    positions = model.__dict__[_ATTRIBUTE] = Positions(model)
    return positions


def untrack(model: nn.Module) -> None:
    """Take a model's `Positions` off again, once no layer in it and no context reads them."""
    positions = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(positions, Positions) or positions.borrowed:
        return
    if not any(module.__dict__.get("_positions") is positions for module in model.modules()):
        positions.remove()
        del model.__dict__[_ATTRIBUTE]


@contextmanager
def tracking(model: nn.Module) -> Iterator[Positions]:
    """Give the model's `Positions` for a while, to readers that are no layers."""
    positions = track(model)
    positions.borrowed += 1
    try:
        yield positions
    finally:
        positions.borrowed -= 1
        untrack(model)


def tracked(module: nn.Module) -> list[Positions]:
    """Return the `Positions` of every tracked model in `module`, itself included."""
    if not Positions.exist:
        return []
    candidates = (m.__dict__.get(_ATTRIBUTE) for m in module.modules())
    return [positions for positions in candidates if isinstance(positions, Positions)]
