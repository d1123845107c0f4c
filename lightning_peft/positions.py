"""The tokens of a call that an edit touches.

A tuner layer sees only `x [B, T, ·]`. Rules on that shape ("one token, so we are decoding") break with cached
prefixes, chunked prefill and `use_cache=False`. So each tracked model carries one `Positions` object: a forward
pre-hook reads that call's attention mask, cache and position ids, and layers ask it for the mask of their policy.
What is known of a call belongs to the thread (or asyncio task) that makes it, so that several may call one model at a
time; the object belongs to the model and is copied with it. A policy is a selection in the language of
`lightning_peft.tokens`, such as `"answer"` or `"generated[0:5]"`.

`start [B]` is the position id of the token whose output is the first to be edited: the last prompt token, since its
output predicts the first answer token. It comes from the first of these that is known:

1. an explicit context, `answering(model, start=...)` or `answering(model, mask=...)` (scorers);
2. the batch's `prompt_end`, set by the callbacks for the length of a step;
3. the call's `labels` (the first that is not -100, minus one), else the batch's, for calls of their shape `[B, T]`;
4. `generate` on the tracked model (real prompt length minus one, fixed once per call); it reads prompts, of which the
   batch's labels say nothing;
5. a call without a cached past: plain text, where every position is an answer position.

The prompt of an encoder-decoder is in its encoder, whose tokens a start counts, and all tokens of its decoder are the
answer, the first being the last of its prompt.

The fifth is right for cross-entropy and KL on texts, and `plain_text(model)` says that it is meant. For the scorer of
somebody else, which puts prompt and answer into one call, it is most often wrong; so without `plain_text` a
`PlainTextWarning` says, once a process, that every token is edited. A call with a past and none of these is an error:
where its answer began cannot be known.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.per_thread import PerThread
from lightning_peft.prompt_end import mentions_answers, prompt_end, token_labels
from lightning_peft.replaced import Handle, replaced
from lightning_peft.tokens import Tokens

Policy = Literal["answer", "generated", "all"]
POLICIES: tuple[str, ...] = ("answer", "generated", "all")

_ATTRIBUTE = "_lightning_peft_positions"


def check_policy(policy: str) -> None:
    """Check that positions are such as an edit can have.

    Raises:
        ValueError: an unknown selection, or one counted from the end of a text, which an edit cannot see coming.
    """
    if Tokens.parse(policy).needs_end:
        raise ValueError(
            f"positions {policy!r} are counted from the end of a text, which is not known while it is generated: count "
            "from the beginning of a phase, e.g. 'answer[0:3]', or from the end of the prompt, 'prompt[-3:]'."
        )


class PositionsError(RuntimeError):
    """The positions an edit applies to cannot be known for this call."""


class PlainTextWarning(UserWarning):
    """An edit limited to answers acts on every token of a call, since nothing says where the answer begins."""


_warned = False  # in this process


# a compiler runs it while it compiles, and leaves no trace of it in what it makes
@torch.compiler.assume_constant_result
def _warn_of_plain_text(policy: str, model: str) -> None:
    global _warned
    if _warned:
        return
    warnings.warn(
        f"An edit limited to {policy!r} positions acts on every token of a call of {model}, since nothing says where "
        "the answer begins: give prompt_end or labels in the batch, or labels in the call, or make the call within "
        "lightning_peft.answering(model, start=last_prompt_position); where every token is meant, within "
        'lightning_peft.plain_text(model), or let the edit act at positions="all". lm-evaluation-harness tells where '
        "answers begin with its model type lightning-peft (lightning-peft lm-eval). This is said once a process.",
        PlainTextWarning,
        stacklevel=2,
    )
    _warned = True


@dataclass(frozen=True, eq=False)
class _CallContext:
    """Facts about calls, known before they are made: `answering`'s start and mask, the batch's and `generate`'s start.

    `labels [B, T]` are the batch's, -100 outside its answers. `prompt` is empty for a `generate` without a prompt of
    tokens. `plain` is True where a text with no other sign of an answer is plain text.
    """

    start: Tensor | None = None
    mask: Tensor | None = None
    batch: Tensor | None = None
    labels: Tensor | None = None
    prompt: Tensor | None = None
    plain: bool | None = None

    @property
    def lacks_prompt(self) -> bool:
        return self.prompt is not None and not len(self.prompt)


@dataclass
class _Call:
    """One forward call: `position_ids [B, T]`, `real [B, T]` (not padding), `start [B]` (or `[B, T]`), its past.

    Of an encoder-decoder, the call of the one or the other; `around` is the one that goes on after its decoder's.
    """

    position_ids: Tensor
    real: Tensor
    start: Tensor | None
    context: _CallContext
    has_past: bool
    decodes: bool = False
    around: _Call | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, bool] = field(default_factory=dict)


# asyncio's tasks share a thread
_NO_CONTEXT = _CallContext()
_CONTEXTS: ContextVar[Mapping[Positions, _CallContext]] = ContextVar("_CONTEXTS", default={})  # noqa: B039 - never changed in place


class Positions:
    """The positions of the current call of one model. `track` makes them; tuner layers read them through `mask`.

    Args:
        model: the backbone whose `forward` is called.
    """

    exist: ClassVar[bool] = False  # in this process: else no model need be searched for them

    def __new__(cls, *_: object) -> Positions:
        Positions.exist = True  # of copies and what is unpickled too
        return super().__new__(cls)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.borrowed = 0  # by how many contexts, besides the layers of adapters
        self._running: PerThread[_Call] = PerThread()
        self._compiled: PerThread[_CallContext] = PerThread()  # as `_CONTEXTS`, for compiled code
        self._recalled: dict[int, _Call] = {}  # by the backward pass that runs some of its blocks again
        self._arguments = _arguments(model)
        self._handles: list[RemovableHandle | Handle] = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, always_call=True),
        ]
        decoder = _decoder(model)
        self._decodes = decoder is not None
        if decoder is not None:
            self._handles.append(decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True))
            self._handles.append(decoder.register_forward_hook(self.after_decoder, always_call=True))
        if callable(getattr(type(model), "generate", None)):
            self._handles.append(replaced(model, "generate", self.generate))

    def remove(self) -> None:
        """Take the hooks and the replaced `generate` off the model."""
        for handle in self._handles:
            handle.remove()

    @property
    def _context(self) -> _CallContext:
        # compiled code cannot read a context variable
        return (self._compiled.get() if torch.compiler.is_compiling() else _CONTEXTS.get().get(self)) or _NO_CONTEXT

    @contextmanager
    def giving(self, plain: bool = False, **values: Tensor | None) -> Iterator[None]:
        """Note these values for the calls that the thread or task makes inside; `_CallContext` has their names."""
        outer = self._context
        self._set_context(replace(outer, plain=plain or outer.plain, **values))
        try:
            yield
        finally:
            self._set_context(outer)

    def note_batch(self, start: Tensor | None, labels: Tensor | None = None) -> None:
        """Note where the answers of the batch begin, `[B]`, or its labels, `[B, T]`, until the next is noted.

        None forgets it.
        """
        self._set_context(replace(self._context, batch=start, labels=labels))

    def _set_context(self, context: _CallContext) -> None:
        others = {positions: known for positions, known in _CONTEXTS.get().items() if positions is not self}
        known = any(value is not None for value in vars(context).values())
        _CONTEXTS.set({**others, self: context} if known else others)
        self._compiled.set(context)

    @property
    def _call(self) -> _Call | None:
        """The call that runs, or the one whose blocks a backward pass runs again, in whatever thread."""
        if self._recalled and not torch.compiler.is_compiling():
            recalled = self._recalled.get(torch._C._current_graph_task_id())
            if recalled is not None:
                return recalled
        return self._running.get()

    def mask(self, policy: str) -> Tensor:
        """Return the tokens of the current call that `policy` edits, bool `[B, T]`; computed once a call.

        Raises:
            PositionsError: outside a forward call of the tracked model, or where the start of the answer is unknown.
        """
        call = self._call
        if call is None:
            self._check_prompt(self._context)
            if self._decodes and self._context.prompt is not None:
                raise PositionsError(
                    f"`generate` of {type(self.model).__name__} runs its encoder apart, where an edit limited to "
                    f"{policy!r} positions has no answer: edit the sites of its decoder, or let the edit act at "
                    'positions="all".'
                )
            raise PositionsError(
                f"An edit limited to {policy!r} positions ran outside {type(self.model).__name__}.forward, so its "
                "positions are unknown; call the backbone itself, not one of its submodules."
            )
        if policy not in call.masks:
            call.masks[policy] = self._make(call, policy)
        return call.masks[policy]

    @property
    def generation(self) -> object | None:
        """An object that stands for the running call of `generate`, the same in all its steps; None outside of one."""
        call = self._call
        return None if call is None else call.context.prompt

    @property
    def by_mask(self) -> bool:
        """True where the edited tokens of the current call were given themselves, not where they begin."""
        call = self._call
        return call is not None and call.context.mask is not None

    def everywhere(self, policy: str) -> bool:
        """Return whether `policy` is known to edit every token of the current call, so that no mask is needed.

        The mask's values are looked at once a call, and only within `generate`, whose steps look at values anyway.
        """
        if policy == "all":
            return True
        call = self._call
        if call is None or call.context.prompt is None or torch.compiler.is_compiling():
            return False
        if policy not in call.whole:
            call.whole[policy] = bool(self.mask(policy).all())
        return call.whole[policy]

    @staticmethod
    def _check_prompt(context: _CallContext) -> None:
        if context.lacks_prompt:
            raise PositionsError(
                "`generate` was called without a prompt of tokens, so where the answer begins is unknown: pass "
                'input_ids or inputs_embeds, or let the edit act at positions="all".'
            )

    def _make(self, call: _Call, policy: str) -> Tensor:
        if policy == "all":
            return call.real
        if call.context.mask is not None:
            return call.context.mask.to(call.real.device, torch.bool) & call.real
        tokens = Tokens.parse(policy)
        start = call.start
        if start is None and tokens.needs_start:
            self._check_prompt(call.context)
            if call.has_past:
                raise PositionsError(
                    "The call continues a cached past but nothing says where the answer began; use `generate`, or "
                    "`with lightning_peft.positions.answering(model, start=...)`."
                )
            if not call.context.plain:
                _warn_of_plain_text(policy, type(self.model).__name__)
            # plain text is an answer from its first token on, and has no prompt
            start = call.position_ids.new_full(call.position_ids.shape[:1], 0 if tokens.phase == "answer" else -1)
        return tokens.mask(call.position_ids, start) & call.real

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read this call's tokens, mask, cache and position ids; a forward pre-hook."""
        arguments = dict(zip(self._arguments, args, strict=False)) | kwargs
        call = self._read(arguments, self._context)
        if call is not None and call.context.mask is None:
            # labels of an encoder-decoder are its decoder's tokens
            labels = None if self._decodes else arguments.get("labels")
            call.start = self._start(call.context, call.position_ids, labels)
        self._run(call)

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read what goes into an encoder-decoder's decoder, every token of which is the answer; a forward pre-hook."""
        around = self._running.get()
        call = self._read(dict(zip(_arguments(module), args, strict=False)) | kwargs, self._context)
        if call is None:
            return
        mask = self._context.mask
        if mask is not None and call.context.mask is None and (around is None or around.context.mask is None):
            raise _wrong_mask(mask, call.real)
        call.start, call.decodes, call.around = torch.zeros_like(call.position_ids[:, 0]), True, around
        self._run(call)

    def _read(self, arguments: Mapping[str, Any], context: _CallContext) -> _Call | None:
        """Return the call of some tokens, its start left open; None where there are no tokens.

        Raises:
            PositionsError: an explicit mask of another shape, unless it may be the decoder's.
        """
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):  # not a token model: only edits of all positions can apply
            return None
        batch, length = tokens.shape[:2]
        past: Any = arguments.get("past_key_values")
        past_length = int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0
        attention = arguments.get("attention_mask")
        if not (isinstance(attention, Tensor) and attention.dim() == 2):
            attention = None
        real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        if attention is not None:
            real = attention[:, -length:].to(tokens.device, torch.bool)

        position_ids = arguments.get("position_ids")
        if isinstance(position_ids, Tensor) and position_ids.dim() <= 2 and position_ids.shape[-1] == length:
            position_ids = position_ids.to(tokens.device).expand(batch, length)
        elif attention is not None:
            position_ids = (attention.long().cumsum(-1) - 1).clamp(min=0)[:, -length:].to(tokens.device)
        else:
            position_ids = (past_length + torch.arange(length, device=tokens.device)).expand(batch, length)

        if context.mask is not None and context.mask.shape != (batch, length):
            if not self._decodes:
                raise _wrong_mask(context.mask, real)
            context = replace(context, mask=None)
        return _Call(position_ids, real, None, context, past_length > 0)

    def _run(self, call: _Call | None) -> None:
        """Let this be the running call, in a backward pass that runs a whole forward pass again too."""
        self._running.set(call)
        if self._recalled and call is not None and not torch.compiler.is_compiling():
            backward = torch._C._current_graph_task_id()
            if backward in self._recalled:
                self._recalled[backward] = call

    def _start(self, context: _CallContext, position_ids: Tensor, labels: Any) -> Tensor | None:
        batch, length = position_ids.shape
        for start in (context.start, context.batch):
            if start is not None:
                return self._rows(start, batch, length, position_ids.device)
        if labels is None and context.prompt is None and not self._decodes:
            labels = context.labels
        if isinstance(labels, Tensor) and labels.shape == position_ids.shape:
            answered = labels != -100
            first = (answered.long().argmax(-1) - 1).clamp(min=0)
            start = position_ids.gather(1, first[:, None].to(position_ids.device)).squeeze(1)
            # a row without any label has no answer: nothing of it is edited
            return start.masked_fill(~answered.any(-1).to(start.device), torch.iinfo(torch.long).max)
        if context.prompt is not None and not context.lacks_prompt:
            return self._rows(context.prompt, batch, length, position_ids.device)
        return None

    @staticmethod
    def _rows(start: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
        """Return a start for each row or token; beams and returned sequences repeat a prompt's rows side by side."""
        start = (start if start.dim() == 2 else start.reshape(-1)).to(device)
        if batch % len(start) or start.shape[1:] not in ((), (1,), (length,)):
            sizes = " x ".join(map(str, start.shape))
            raise PositionsError(f"{sizes} answer starts were given for a call of {batch} rows of {length} tokens.")
        return start.repeat_interleave(batch // len(start), dim=0)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the call, so that nothing stale is read; a forward hook.

        While gradients are recorded it is kept: checkpointed blocks run again in the backward pass. Other calls may
        come in between, so it is recalled when the gradient of its output arrives.
        """
        if not torch.is_grad_enabled():
            self._running.set(None)
        else:
            self._recall_from(output, self._running.get())

    def after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        """Go back to the call of the whole model, as `after_forward` forgets that; a forward hook."""
        call = self._running.get()
        if call is None or not call.decodes:
            return
        if torch.is_grad_enabled():
            self._recall_from(output, call)
        self._run(call.around)

    def _recall_from(self, output: Any, call: _Call | None) -> None:
        """Let the call be recalled when the gradient of its output arrives."""
        if call is None or torch.compiler.is_compiling():
            return
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._recall(call))

    def _recall(self, call: _Call) -> None:
        """Let the blocks that this backward pass runs again see the call they belong to.

        The call is kept by the pass: passes of several threads share autograd's own, and one may run in several.
        """
        backward = torch._C._current_graph_task_id()
        if backward not in self._recalled:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._forget, backward))
        self._recalled[backward] = call
        self._running.set(call)

    def _forget(self, backward: int) -> None:
        self._recalled.pop(backward, None)

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `generate`, which is `original`, with the prompt's real length noted first."""
        with self.giving(prompt=self._prompt_lengths(args, kwargs) - 1):
            return original(*args, **kwargs)

    def _prompt_lengths(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the number of tokens of each prompt, `[B]`; empty where the prompt is not tokens."""
        prompt, embedded = args[0] if args else None, kwargs.get("inputs_embeds")
        for name in ("inputs", "input_ids"):
            prompt = kwargs.get(name) if prompt is None else prompt
        prompt = embedded if prompt is None else prompt
        if prompt is None or (prompt is not embedded and (prompt.dim() != 2 or prompt.is_floating_point())):
            return torch.empty(0, dtype=torch.long)
        mask = kwargs.get("attention_mask")
        if mask is None and prompt.dim() == 2:
            # as transformers does: without a mask, pad tokens are padding unless padding is also an end token
            config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
            pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
            end = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
            ends = end if isinstance(end, list | tuple) else [end]
            if pad is not None and pad not in ends:
                mask = prompt != pad
        if mask is None:
            return torch.full((prompt.shape[0],), prompt.shape[1], device=prompt.device)
        return mask.long().sum(-1)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's `forward`, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _decoder(model: nn.Module) -> nn.Module | None:
    """Return the decoder of an encoder-decoder of transformers; None of any other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def _wrong_mask(mask: Tensor, real: Tensor) -> PositionsError:
    return PositionsError(
        f"The explicit position mask has shape {tuple(mask.shape)} but this call has {tuple(real.shape)}."
    )


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


def note_batch(noted: list[Positions], module: nn.Module, batch: Any) -> list[Positions]:
    """Let a module's tracked models know where the answers of a batch begin, for the calls to come.

    Args:
        noted: what the last call returned; these forget their batch.
        module: a module that is or contains the tracked backbone.
        batch: a mapping with `prompt_end [B]`, or with `labels [B, T]`, or anything else.

    Raises:
        ValueError: see `lightning_peft.prompt_end`.
    """
    for positions in noted:
        positions.note_batch(None)
    # to look for them may be to walk through all modules, which a step without answers need not pay for
    noted = tracked(module) if mentions_answers(batch) else []
    if noted:
        start = prompt_end(batch)
        labels = token_labels(batch) if start is None else None
        for positions in noted:
            positions.note_batch(start, labels)
    return noted


@contextmanager
def answering_batch(module: nn.Module, batch: Any) -> Iterator[None]:
    """Say, for the calls inside, where the answers of a batch begin: by its `prompt_end`, else by its labels.

    Without either, or without a tracked model in `module`, this does nothing.
    """
    affected = tracked(module) if mentions_answers(batch) else []
    start = prompt_end(batch) if affected else None
    with ExitStack() as stack:
        for positions in affected:
            if start is not None:
                stack.enter_context(positions.giving(start=start, mask=None))
            else:  # behind what the call itself says, as in a batch that a callback notes
                stack.enter_context(positions.giving(labels=token_labels(batch)))
        yield


@contextmanager
def calling(module: nn.Module, **tokens: Any) -> Iterator[None]:
    """Note the inputs of a call that bypasses the tracked model's own `forward`, such as one of its trunk alone.

    Args:
        module: a module that is or contains the tracked backbone; without one this does nothing.
        **tokens: `input_ids [B, T]`, `attention_mask`, `position_ids`, as `forward` would get them.
    """
    affected = tracked(module)
    with ExitStack() as stack:
        for positions in affected:
            stack.enter_context(positions.giving(plain=True))  # what is read inside a model is no score of an answer
            positions.before_forward(positions.model, (), tokens)
        try:
            yield
        finally:
            for positions in affected:
                positions._running.set(None)


@contextmanager
def answering(module: nn.Module, start: Tensor | None = None, mask: Tensor | None = None) -> Iterator[None]:
    """Say, for the calls inside, where the answers begin. Without a tracked model in `module` it does nothing.

    Only the thread (or asyncio task) that enters it is concerned.

    Args:
        module: a module that is or contains the tracked backbone.
        start: `[B]` position ids of the last prompt tokens; `[B, T]`, for calls of exactly that shape, where a row is
            packed with several texts: for each token that of its text. Of an encoder-decoder's encoder; all tokens of
            its decoder are the answer.
        mask: bool `[B, T]`, the edited tokens themselves, for calls of exactly that shape; of an encoder-decoder, of
            its encoder's tokens or its decoder's, whichever have it.
    """
    if (start is None) == (mask is None):
        raise ValueError("Give either the start or the mask of the answers, not both and not neither.")
    with ExitStack() as stack:
        for positions in tracked(module):
            stack.enter_context(positions.giving(start=start, mask=mask))
        yield


@contextmanager
def plain_text(module: nn.Module) -> Iterator[None]:
    """Say that calls inside are of plain text, unless their labels or anything else says where an answer begins.

    Every position is then one of an answer, as without this, and no `PlainTextWarning` is given. Labels of the batch
    that a callback has noted are those of another text.

    Args:
        module: a module that is or contains the tracked backbone; without one this does nothing.
    """
    with ExitStack() as stack:
        for positions in tracked(module):
            stack.enter_context(positions.giving(plain=True, labels=None))
        yield


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model's output, however nested."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
