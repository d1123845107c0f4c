"""The frozen trunk of a model: the blocks below the first trained one, and how to run the model without them.

The output of the trunk's last block is kept for every row. In a call whose rows are all known, the blocks of the trunk
hand their input on, and the last of them returns the kept states. The model computes everything else (embeddings,
masks, rotary angles) as ever, so nothing need be known of its architecture. In any other call, and wherever the kept
states may be the wrong ones, the trunk is computed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.fitting.trunk.conditions import (
    TrunkError,
    below_first_trained,
    check_adapters,
    check_past,
    frozen_tensors,
    leaves_of,
    what_acts,
)
from lightning_peft.fitting.trunk.keys import NotHashable, row_keys
from lightning_peft.fitting.trunk.rows import RowStore
from lightning_peft.replaced import replaced


@dataclass
class _Call:
    """One call of the model."""

    entry: nn.Module  # the outermost module of it
    arguments: dict[str, Any]
    keys: list[bytes] = field(default_factory=list)
    states: Tensor | None = None  # what to give instead of computing the trunk
    computed: Tensor | None = None  # what the trunk gave
    random_state: Any = None  # before the first call that may be kept


class Trunk:
    """The blocks below the first trained one, patched in place until `remove`.

    Args:
        module: the module around the backbone; the modules between it and the blocks are watched for calls.
        backbone: the frozen model.
        store: where states are kept.
        announce: called once, after the first call, with its rows and the bytes their states take.
        full: called once, when the store has no more room.

    Raises:
        TrunkError: there are no blocks, the first is trained, or something in the trunk is not deterministic. What
            shows in a forward call only is found in the first one with gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        backbone: nn.Module,
        store: RowStore,
        announce: Callable[[int, int], None] = lambda rows, size: None,
        full: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self._announce, self._full = store, announce, full
        self.backbone = backbone
        self.blocks, self.first_trained = below_first_trained(backbone)
        check_adapters(self.blocks, backbone)
        stack = self.blocks[-1].stack
        self._first_stack = stack == self.blocks[0].stack
        # blocks of an earlier stack (stages, an encoder) run: what stands between two stacks may reshape
        self._skipped = [block.module for block in self.blocks if block.stack == stack]
        self._frozen = frozen_tensors(backbone, self.blocks)
        self._layers = [m for block in self.blocks for m in block.module.modules() if hasattr(m, "active_adapters")]
        self._forms: dict[nn.Module, int | None] = {}  # the length of a block's tuple, None where it gives a tensor
        self._call: _Call | None = None
        self._checked = self._checking = self._warned_full = False
        self._unpadded: bool | None = None
        self.hits = self.misses = 0  # rows
        self._handles: list[Any] = []
        self._install(module)

    def remove(self) -> None:
        """Put everything back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._call = None

    # -- watching calls ----------------------------------------------------------------------------------------------

    def _install(self, module: nn.Module) -> None:
        entries = _modules_above(module, self._skipped[0])
        compiled = [m for m in (*entries, *self._skipped) if type(m).__name__ == "OptimizedModule"]
        if compiled or any(m._compiled_call_impl is not None for m in (*entries, *self._skipped)):
            raise TrunkError(
                f"{type(self.backbone).__name__} is compiled, and a compiled model cannot leave blocks out."
            )
        if patched := [m for m in self._skipped if "forward" in m.__dict__]:
            raise TrunkError(
                f"The forward of {type(patched[0]).__name__} is replaced on the instance by something else."
            )
        for entry in entries:
            self._handles.append(entry.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(entry.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        for norm in (m for m in self.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            self._handles.append(norm.register_forward_pre_hook(self._before_norm))
        for block in self._skipped:
            self._handles.append(replaced(block, "forward", functools.partial(self.run, block)))

    def _before_norm(self, norm: nn.modules.batchnorm._BatchNorm, args: Any) -> None:
        below = self._call is not None and self._call.states is None and self._call.computed is None
        if below and (norm.training or norm.running_mean is None):
            name = next(name for name, module in self.backbone.named_modules() if module is norm)
            raise TrunkError(
                f"{name} takes its statistics from the batch and stands below {self.first_trained}, so what that "
                "block is given depends on the other rows: put it in evaluation mode."
            )

    def _enter(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._call is not None:
            return None
        call = _Call(entry, _named(entry, args, kwargs))
        if _needs_blocks(entry, call.arguments):
            return None
        first = not self._checked
        if first and not torch.is_grad_enabled():
            return None
        if first:
            check_past(call.arguments, self.backbone)
        if not self._key(call):
            return None  # a module inside this one may be called with something that has rows
        self._call = call
        if first:
            call.random_state = _random_state()
            return None
        if not all(key in self.store for key in call.keys):
            return None
        self.hits += len(call.keys)
        call.states = self._read(call)
        if "use_cache" in _parameters(type(entry).forward):
            kwargs = kwargs | {"use_cache": False}  # a cache without the trunk's blocks would be of no use
        return args, kwargs

    def _leave(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self._call
        if call is None or call.entry is not entry or self._checking:
            return
        self._call = None
        if call.computed is None:
            return
        if not self._checked:
            self._check_replacement(call, args, kwargs, output)
            self._checked = True
            rows = call.computed.shape[0]
            self._unpadded = self._first_stack and (m := _mask(call)) is not None and m.shape == call.computed.shape[:2]
            if self._key(call):
                self._keep(call)
                self._announce(rows, self.store.bytes)
        else:
            self._keep(call)

    # -- what is kept ------------------------------------------------------------------------------------------------

    def _key(self, call: _Call) -> bool:
        """Set the keys of a call's rows; return False where they cannot be known."""
        rows = next((v.shape[0] for v in call.arguments.values() if isinstance(v, Tensor) and v.dim()), 0)
        try:
            call.keys = row_keys(call.arguments, rows, self._real(call), self._context(call))
        except NotHashable:
            return False
        return bool(call.keys)

    def _context(self, call: _Call) -> bytes:
        """Return what besides the row determines the trunk's result: its weights, adapters and precision."""
        adapters = [(m.active_adapters, m.merged, sorted(getattr(m, "scaling", {}).items())) for m in self._layers]
        device = self._frozen[0].device.type if self._frozen else "cpu"
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        versions = [tensor._version for tensor in self._frozen]
        return repr((type(call.entry).__name__, versions, adapters, precision)).encode()

    def _real(self, call: _Call) -> Tensor | None:
        mask = _mask(call) if self._unpadded else None
        return None if mask is None else mask.bool()

    @torch.no_grad()
    def _keep(self, call: _Call) -> None:
        states, real = call.computed, self._real(call)
        if states is None or len(states) != len(call.keys):
            return
        self.misses += len(call.keys)
        for row, key in enumerate(call.keys):
            if key not in self.store:
                stored = self.store.put(key, states[row] if real is None else states[row][real[row]])
                if not stored and not self._warned_full:
                    self._warned_full = True
                    self._full()

    @torch.no_grad()
    def _read(self, call: _Call) -> Tensor:
        """Return the states of a call's rows, zero where they are padded."""
        rows, real = [self.store.get(key) for key in call.keys], self._real(call)
        device = next((t.device for t in call.arguments.values() if isinstance(t, Tensor)), None)
        if real is None or bool(real.all()):
            return torch.stack(rows).to(device, self._dtype)
        states = torch.zeros(*real.shape, *rows[0].shape[1:], dtype=self._dtype, device=device)
        states[real] = torch.cat(rows).to(device, self._dtype)
        return states

    # -- running the blocks ------------------------------------------------------------------------------------------

    def run(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a block of the trunk by its own `forward`, or return the stand-in for its result."""
        call = self._call
        if call is None:
            return forward(*args, **kwargs)
        last = block is self._skipped[-1]
        if call.states is not None:
            states = call.states if last else _hidden(args, kwargs)
            form = self._forms[block]
            return states if form is None else (states, *[None] * (form - 1))
        output = forward(*args, **kwargs)
        if not self._checked:
            self._forms[block] = _form(block, output)
        if last:
            states = _hidden((output,) if isinstance(output, Tensor) else output, {})
            if states.requires_grad:
                self._check_frozen(states)
            if not self._checked and not _same_random_state(call.random_state):
                raise TrunkError(
                    f"Dropout or other chance acts below the first trained block of {type(self.backbone).__name__}, "
                    f"{self.first_trained}, so its states cannot be kept: {what_acts(self.blocks, self.backbone)}."
                )
            call.computed, self._dtype = states.detach(), states.dtype
        return output

    # -- what the first call shows -----------------------------------------------------------------------------------

    def _check_frozen(self, states: Tensor) -> None:
        names = {id(parameter): name for name, parameter in self.backbone.named_parameters()}
        for leaf in leaves_of(states):
            if isinstance(leaf, nn.Parameter):
                raise TrunkError(
                    f"{names.get(id(leaf), 'a parameter outside the backbone')} is trained and stands below "
                    f"{self.first_trained}, so what that block is given changes with every step and cannot be kept."
                )

    def _check_replacement(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Call the model again without its trunk: where something above reads more than the trunk's last states, the
        result is another one."""
        entry, before, buffers = call.entry, _random_state(), {b: b.clone() for b in call.entry.buffers()}
        _set_random_state(call.random_state)
        self._call, self._checking = _Call(entry, {}, states=call.computed), True
        try:
            with torch.no_grad():
                again = entry(*args, **kwargs)
        finally:
            self._call, self._checking = None, False
            _set_random_state(before)
            for buffer, value in buffers.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)  # running statistics saw the batch twice
        for one, other in zip(_tensors(output), _tensors(again), strict=False):
            if one.shape != other.shape or not torch.allclose(
                other.float(), one.float(), rtol=1e-3, atol=1e-3 * float(one.detach().abs().max() if one.numel() else 0)
            ):
                raise TrunkError(
                    f"{type(entry).__name__} gives another result without the blocks below {self.first_trained}: "
                    "something above reads what they compute inside, so they cannot be left out."
                )


def _needs_blocks(entry: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Return whether a call returns states from inside the blocks, or is to be continued."""
    config = getattr(entry, "config", None)
    flags = ("output_hidden_states", "output_attentions")
    if any(arguments.get(name, getattr(config, name, None)) for name in flags):
        return True
    past = arguments.get("past_key_values")
    return not torch.is_grad_enabled() and (past is not None or bool(arguments.get("use_cache")))


def _modules_above(root: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Return callable modules from `root` (left out) to the list of a block (included), outermost first."""
    (name,) = [name for name, module in root.named_modules() if module is block][:1]
    path = name.split(".")[:-1]
    above = [root.get_submodule(".".join(path[: i + 1])) for i in range(len(path))]
    return [module for module in above if not isinstance(module, nn.ModuleList)]


def _named(entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    names = _parameters(type(entry).forward)
    return {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(args)} | kwargs


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _mask(call: _Call) -> Tensor | None:
    """Return the call's padding mask `[B, T]`, where it has one that is as long as its tokens."""
    mask = call.arguments.get("attention_mask")
    tokens = call.arguments.get("input_ids")
    tokens = call.arguments.get("inputs_embeds") if tokens is None else tokens
    if isinstance(mask, Tensor) and isinstance(tokens, Tensor) and mask.shape == tokens.shape[:2]:
        return mask
    return None


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states a block takes or returns: the first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _form(block: nn.Module, output: Any) -> int | None:
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple) and isinstance(output[0], Tensor) and all(rest is None for rest in output[1:]):
        return len(output)
    raise TrunkError(
        f"{type(block).__name__} gives more than its hidden states (as T5's blocks hand on their position bias), so it "
        "cannot be left out."
    )


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


def _same_random_state(states: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states, _random_state(), strict=True))
