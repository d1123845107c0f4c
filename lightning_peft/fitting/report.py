"""A table, printed once at the start, of what was injected where."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.modules import base_modules, is_matrix
from lightning_peft.stack.injection.head_training import saved_heads
from lightning_peft.stack.stack import AdapterStack


def summary(module: nn.Module, stack: AdapterStack) -> dict[str, float]:
    """Return numbers for the logger: trainable parameters (count and percent of all) and adapter bytes."""
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    size = sum(t.numel() * t.element_size() for part in stack.parts for t in stack.tensors(part).values())
    return {
        "trainable_parameters": float(trainable),
        "trainable_percent": 100.0 * trainable / max(1, total),
        "adapter_bytes": float(size),
    }


def print_table(module: nn.Module, stack: AdapterStack) -> None:
    """Print the adapters of a stack: method, where, parameters."""
    from rich.console import Console
    from rich.table import Table

    numbers = summary(module, stack)
    table = Table(title=f"Adapters on {type(stack.backbone).__name__}", title_justify="left")
    for column in ("adapter", "method", "injected into", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for part in stack.parts:
        modules = part.injection.places()
        places = {name.rsplit(".", 1)[-1] for name in modules}
        count = sum(t.numel() for t in stack.tensors(part).values())
        method = type(part.config).__name__.removesuffix("Config")
        table.add_row(part.name, method, f"{len(modules)} × {', '.join(sorted(places))}", f"{count:,}")
    table.caption = (
        f"{numbers['trainable_parameters']:,.0f} trainable parameters ({numbers['trainable_percent']:.3f} %), "
        f"{numbers['adapter_bytes']:,.0f} bytes{_about_head(stack)}"
    )
    Console().print(table)


def _about_head(stack: AdapterStack) -> str:
    """Describe the heads inside the backbone that are trained whole; where there are none, its last layer."""
    if heads := sorted(saved_heads(part.config for part in stack.parts)):
        return f"; trained whole: {', '.join(heads)}"
    layers = [name for name, module in base_modules(stack.backbone) if is_matrix(module)]
    if not layers or hasattr(stack.backbone, "config"):
        return ""
    return f"; no head is trained whole (if {layers[-1]} was built anew, train_head={layers[-1]!r} does)"
