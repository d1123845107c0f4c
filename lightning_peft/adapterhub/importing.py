"""An adapter that AdapterHub saved, as a folder of this package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.adapterhub.bottlenecks import bottlenecks
from lightning_peft.adapterhub.configs import methods
from lightning_peft.adapterhub.folder import SavedAdapter, read_adapter, read_head, unread_files
from lightning_peft.adapterhub.heads import with_head
from lightning_peft.adapterhub.hidden_states import hidden_states, in_generation
from lightning_peft.adapterhub.low_rank import low_rank
from lightning_peft.adapterhub.options import BottleneckOptions, Options, PrefixOptions, ReftOptions
from lightning_peft.adapterhub.part import Part
from lightning_peft.adapterhub.places import Places
from lightning_peft.adapterhub.prefixes import prefixes
from lightning_peft.adapterhub.tensors import Tensors
from lightning_peft.stack.adapter_files.bases import check_new
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.adapter_files.saving import write_described
from lightning_peft.stack.stack import find_stacks, stack_of

if TYPE_CHECKING:
    from lightning_peft.stack.adapter import Adapter


@dataclass(frozen=True)
class Imported:
    """What was written.

    Args:
        folder: the folder.
        parts: the names of its adapters and the peft types they have, innermost first.
        notes: what is not in it, or otherwise than it was, a sentence each.
    """

    folder: Path
    parts: dict[str, str]
    notes: tuple[str, ...]


def import_adapterhub(model: nn.Module, folder: str | Path, output: str | Path, token_gates: bool = False) -> Imported:
    """Write an adapter that AdapterHub's `save_adapter` saved as a folder that `load_adapter` reads.

    LoRA and IA3 become peft's own types, which peft reads without this package. The adapted model computes what it
    computed in AdapterHub. The model is not changed.

    Args:
        model: the base model, of transformers, in the class that will be adapted.
        folder: with `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`, of which tensors alone
            are read.
        output: a folder to write, new or empty.
        token_gates: import adapters with AdapterHub's `use_gating`, such as UniPELT: there a gate is the mean over all
            tokens of a row, here each token has its own, so that they are equal on rows of one token alone.

    Returns:
        What was written.

    Raises:
        AdapterError: a file is missing, damaged or foreign, an option has no equal here, or the adapter is for another
            model; nothing was written.
        ValueError: the model has adapters, or the output is not empty.

    Example:
        >>> import json, pathlib, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_peft import import_adapterhub
        >>> model = BertModel(BertConfig(vocab_size=40, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> config = {"architecture": "lora", "r": 2, "alpha": 4, "attn_matrices": ["q"]}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps({"name": "task", "config": config}))
        >>> lora = "encoder.layer.0.attention.self.query.loras.task"
        >>> save_file({f"{lora}.lora_A": torch.ones(2, 8), f"{lora}.lora_B": torch.ones(8, 2)},
        ...           folder / "adapter.safetensors")
        >>> import_adapterhub(model, folder, folder / "imported").parts
        {'lora': 'LORA'}
    """
    folder, output = Path(folder), Path(output)
    check_new(output)
    saved, head = read_adapter(folder), read_head(folder)
    places = Places(model)
    _check_model(model, saved)
    options = methods(saved)
    if any(method.use_gating for method in options) and not token_gates:
        raise AdapterError(
            f"{folder} has AdapterHub's option use_gating=True, whose gates are means over the tokens of a row; here a "
            "token has its own, which is equal on rows of one token alone: ask for these by token_gates=True "
            "(--token-gates)."
        )
    tensors = Tensors(saved.tensors, saved.name, places.architecture.prefix, str(folder))
    parts = translated(options, tensors, places, model)
    tensors.check_used()
    parts, notes = with_head(parts, head, model)
    with _on_model(model, parts, str(folder)) as adapters:
        described = stack_of(model).describe()
        base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        write_described(described, [part.tensors for part in parts], output, base)
        written = {adapter.name: str(adapter.config.peft_type).removeprefix("PeftType.") for adapter in adapters}
    unread = [f"{name} in {folder} was not read." for name in unread_files(folder)]
    return Imported(output, written, (*_otherwise(options, model), *notes, *unread))


def translated(options: Sequence[Options], tensors: Tensors, places: Places, model: nn.Module) -> list[Part]:
    """Return an adapter's methods as adapters of this package, innermost first; no name comes twice.

    Raises:
        AdapterError: as `import_adapterhub`.
    """
    config: Any = model.config
    parts: list[Part] = []
    for method in options:
        if isinstance(method, BottleneckOptions):
            parts += bottlenecks(method, tensors, places)
        elif isinstance(method, PrefixOptions):
            parts += prefixes(method, tensors, places, config)
        elif isinstance(method, ReftOptions):
            parts += hidden_states(method, tensors, places, model)
        else:
            parts += low_rank(method, tensors, places)
    # as in AdapterHub what adapts a matrix is inside what reads its output, both are inside the attention, and all are
    # inside the block
    parts.sort(key=lambda part: (part.name == "reft", part.name == "prefix", part.name.startswith("adapter")))
    names = [part.name for part in parts]
    return [
        Part(f"{part.name}-{names[:i].count(part.name) + 1}", part.config, part.tensors)
        if names.count(part.name) > 1
        else part
        for i, part in enumerate(parts)
    ]


def _check_model(model: nn.Module, saved: SavedAdapter) -> None:
    config: Any = model.config
    if find_stacks(model):
        raise ValueError("The model has adapters already: import into a bare one.")
    if saved.model_type and saved.model_type != config.model_type:
        raise AdapterError(
            f"{saved.folder} was made for a model of the type {saved.model_type}, and the base is {config.model_type}."
        )


@contextmanager
def _on_model(model: nn.Module, parts: Sequence[Part], source: str) -> Iterator[list[Adapter]]:
    """Put the adapters on the model for a while, which checks that they fit it; afterwards it is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    stack, adapters = stack_of(model), []
    try:
        for part in parts:
            adapters.append(stack.add(part.config, part.name))
            stack.load_tensors(adapters[-1], part.tensors, source)
        yield adapters
    finally:
        for adapter in reversed(adapters):
            stack.remove(adapter.name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _otherwise(options: Sequence[Options], model: nn.Module) -> Iterator[str]:
    """Say what is different where the adapter is trained further, or texts are generated."""
    for method in options:
        if isinstance(method, ReftOptions):
            yield from in_generation(method, model)
            if method.dropout:
                yield (
                    f"AdapterHub's option dropout={method.dropout} of ReFT drops hidden states themselves in training; "
                    "here it drops what they change by."
                )
        if isinstance(method, BottleneckOptions) and method.phm_layer and not method.learn_phm:
            yield "AdapterHub's option learn_phm=False is left out: here the shared matrices would be trained too."
        if isinstance(method, PrefixOptions) and method.dropout:
            yield f"AdapterHub's option dropout={method.dropout} of the prefix acts in training alone, and is left out."
        if isinstance(method, PrefixOptions) and not method.flat:
            yield "The prefix was computed from its reparametrisation, without which it would be trained further."
