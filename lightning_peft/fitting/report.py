"""What an adaptation trains or computes, in true numbers: a table at the start of fit, and words for its end."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lightning_peft.backbone.modules import base_modules, is_matrix
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.injection.head_training import saved_heads
from lightning_peft.stack.stack import AdapterStack


def summary(module: nn.Module, stack: AdapterStack, edits: Mapping[str, int] | None = None) -> dict[str, float]:
    """Return numbers for the logger: trainable parameters (count and percent of all) and adapter bytes.

    Args:
        module: the LightningModule.
        stack: its adapters.
        edits: how many numbers each adapter has that fit computes; then it trains nothing.
    """
    edits = edits or {}
    total = parameters_of(module)
    trainable = 0 if edits else sum(p.numel() for p in module.parameters() if p.requires_grad)
    size = sum(t.numel() * t.element_size() for p in stack.parts if p.name not in edits for t in _tensors(stack, p))
    sizes = {p.name: max((t.element_size() for t in _tensors(stack, p)), default=0) for p in stack.parts}
    return {
        "trainable_parameters": float(trainable),
        "trainable_percent": 100.0 * trainable / max(1, total),
        "adapter_bytes": float(size + sum(count * sizes[name] for name, count in edits.items())),
    }


def print_table(module: nn.Module, stack: AdapterStack, edits: Mapping[str, int] | None = None) -> None:
    """Print the adapters of a stack: method, where, how many numbers.

    Args:
        module, stack, edits: as of `summary`.
    """
    from rich.console import Console
    from rich.table import Table

    edits = edits or {}
    numbers = summary(module, stack, edits)
    table = Table(title=f"Adapters on {type(stack.backbone).__name__}", title_justify="left")
    heading = "numbers" if any(part.computed for part in stack.parts) else "parameters"
    for column in ("adapter", "method", "injected into", heading):
        table.add_column(column, justify="right" if column == heading else "left")
    for part in stack.parts:
        modules = part.injection.places()
        places = {name.rsplit(".", 1)[-1] for name in modules}
        count = edits.get(part.name, sum(t.numel() for t in _tensors(stack, part)))
        method = type(part.config).__name__.removesuffix("Config")
        table.add_row(part.name, method, f"{len(modules)} × {', '.join(sorted(places))}", f"{count:,}")
    trained = f"{numbers['trainable_parameters']:,.0f} trainable parameters ({numbers['trainable_percent']:.3f} %)"
    if edits:
        trained = f"{sum(edits.values()):,} numbers are computed and nothing is trained"
    table.caption = f"{trained}, {numbers['adapter_bytes']:,.0f} bytes{_about_head(stack)}"
    Console().print(table)


def parameters_of(module: nn.Module) -> int:
    """Return how many parameters a module has; of weights packed in 4 bits, those that they stand for."""
    total = 0
    for parameter in module.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        total += parameter.numel() if shape is None else shape.numel()
    return total


def describe_trained(module: nn.Module, stack: AdapterStack, names: Collection[str]) -> list[str]:
    """Say of each adapter that is trained how many parameters it has, where, and of what is trained beside them.

    Args:
        module: the LightningModule, its parameters flagged as they are trained.
        stack: its adapters.
        names: of the adapters that are trained.
    """
    matrices = {name for name, part in base_modules(stack.backbone) if is_matrix(part)}
    total, lines, counted = max(1, parameters_of(module)), [], 0
    for part in (stack[name] for name in names):
        count = sum(p.numel() for p in stack.parameters(part).values() if p.requires_grad)
        places, counted = part.injection.places(), counted + count
        kind = ("matrix", "matrices") if set(places) <= matrices else ("module", "modules")
        where = f" in {len(places)} {kind[len(places) != 1]}" if places else ""
        lines.append(f"{part.name}: {count:,} parameters trained{where}, {_percent(count, total)}")
    beside = sum(p.numel() for p in module.parameters() if p.requires_grad) - counted
    return [*lines, f"outside of adapters: {beside:,} parameters trained"] if beside > 0 else lines


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.2g} % of all"


def _tensors(stack: AdapterStack, part: Adapter) -> list[Tensor]:
    return list(stack.tensors(part).values())


def _about_head(stack: AdapterStack) -> str:
    """Describe the heads inside the backbone that are trained whole; where there are none, its last layer."""
    if heads := sorted(saved_heads(part.config for part in stack.parts)):
        return f"; trained whole: {', '.join(heads)}"
    layers = [name for name, module in base_modules(stack.backbone) if is_matrix(module)]
    if not layers or hasattr(stack.backbone, "config"):
        return ""
    return f"; no head is trained whole (if {layers[-1]} was built anew, train_head={layers[-1]!r} does)"
