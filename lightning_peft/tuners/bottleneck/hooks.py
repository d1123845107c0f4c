"""The hook by which adapters add to the residual stream, at the module that gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.tuners.output_hooks import ChangesOutput, add_output_hook

if TYPE_CHECKING:
    from lightning_peft.tuners.bottleneck.layer import BottleneckLayer


class StreamHook(ChangesOutput):
    """A forward hook: `h + b(h)` of a module's output h, or `N(s + b(N(s)))` of a norm N and its input s.

    One stands at each module, for all adapters there, in the order in which they came; copied and pickled with the
    module and the layers.

    Args:
        norm: whether the module is a norm of the sum that is added to.
    """

    def __init__(self, norm: bool) -> None:
        self.norm = norm
        self.adapters: list[tuple[BottleneckLayer, str]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        before = h = output if isinstance(output, Tensor) else output[0]
        total = args[0] if self.norm else None
        for layer, name in self.adapters:
            if (change := layer.stream_change(name, h)) is None:
                continue
            if total is None:
                h = h + change
            else:
                total = total + change
                h = module.forward(total)
        if h is before:
            return None  # it stays as it is
        return h if isinstance(output, Tensor) else (h, *output[1:])


def add_to_stream(site: nn.Module, layer: BottleneckLayer, adapter_name: str, norm: bool) -> None:
    """Let an adapter of a layer add to what a module gives."""
    hook = next((hook for _, hook in _hooks(site) if hook.norm == norm), None)
    if hook is None:
        add_output_hook(site, hook := StreamHook(norm))
    hook.adapters.append((layer, adapter_name))


def leave_stream(site: nn.Module, layer: BottleneckLayer, adapter_name: str) -> None:
    """Undo `add_to_stream`; without adapters the module has no hook again."""
    for key, hook in _hooks(site):
        hook.adapters = [(own, name) for own, name in hook.adapters if own is not layer or name != adapter_name]
        if not hook.adapters:
            del site._forward_hooks[key]


def _hooks(site: nn.Module) -> list[tuple[int, StreamHook]]:
    return [(key, hook) for key, hook in site._forward_hooks.items() if isinstance(hook, StreamHook)]
