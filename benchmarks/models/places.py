"""Whether the places that the package found are the right ones, by names and by what runs there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ENDS = re.compile(
    r"\.(o_proj|out_proj|c_proj|dense|wo|o|out_lin|to_out|linear_out|fc_out|attn_out|proj_out|output_proj|final_linear"
    r"|attention_output|dense_out|attn\.proj|attention\.out|attn\.out)$"
)


def wrong_heads(model: nn.Module, names: Sequence[str], inputs: Mapping[str, Tensor]) -> list[str]:
    """Return those sites that neither are called as an attention's last projection is, nor give what it gives."""
    doubtful = [name for name in names if not _ENDS.search(name)]
    return [name for name in doubtful if not _ends_a_module(model, name, inputs)]


@torch.no_grad()
def _ends_a_module(model: Any, name: str, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether the output of a module is also that of the one around it."""
    outputs: dict[str, Tensor] = {}
    around = name.rpartition(".")[0]
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: outputs.__setitem__(path, _first(output))
        )
        for path in (name, around)
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    own, outer = outputs.get(name), outputs.get(around)
    return (
        own is not None
        and outer is not None
        and own.numel() == outer.numel()
        and torch.equal(own.flatten(), outer.flatten())
    )


def missed_blocks(model: nn.Module, names: Sequence[str]) -> str:
    """Return what is wrong with the blocks found: they should be all of one list, as long as the text's layers are."""
    try:
        text: Any = model.config.get_text_config(decoder=True)
        layers = getattr(text, "num_hidden_layers", None)
    except Exception:
        layers = None
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (layers is None or len(module) == layers)
    }
    stacks = {name.rpartition(".")[0] for name in names}
    if len(stacks) == 1 and lists.get(next(iter(stacks))) == len(names):
        return ""
    return f"{len(names)} of {layers} layers, in {', '.join(sorted(stacks))}"


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple | list) else output
    return first
