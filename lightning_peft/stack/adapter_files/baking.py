"""Write an edit into a model for good: a transformers folder that loads and runs without this package."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.files.atomic import new_folder
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.adapter_files.bases import check_new, save_tokenizer
from lightning_peft.stack.adapter_files.bias_flags import Flag, find_flags, turned_on
from lightning_peft.stack.adapter_files.divergence import Divergence, divergence
from lightning_peft.stack.adapter_files.example_inputs import find_probe, outputs
from lightning_peft.stack.adapter_files.model_card import write_written_card, written_parts
from lightning_peft.stack.adapter_files.verifying import HALF, Reference, Verification, digest, reference
from lightning_peft.stack.adapter_files.verifying import verify as verify_folder
from lightning_peft.stack.stack import OtherBaseWarning, find_stacks, stack_of
from lightning_peft.stack.steering import reposition, steering


@dataclass(frozen=True)
class Baked:
    """The result of baking.

    Args:
        cls: the name of the model's class.
        changed: the parameters that hold the edit.
        flags: settings of the configuration that give the architecture these parameters.
        zeros: the further parameters that the settings bring along, all zero.
        positions: those the adapter was made for; baked, they are all.
        divergence: of the model with the adapter as it was saved from the baked one; None where there was nothing to
            measure on.
        verification: how the folder was compared with the edit at every position; None where that was not asked for.
    """

    cls: str
    changed: tuple[str, ...]
    flags: tuple[Flag, ...]
    zeros: tuple[str, ...]
    positions: tuple[str, ...]
    divergence: Divergence | None
    verification: Verification | None


def bake(
    model: nn.Module,
    adapter: str | Path,
    output: str | Path,
    batches: Iterable[Mapping[str, Tensor]] = (),
    tokenizer: str | None = None,
    verify: bool = True,
    strict_base: bool = True,
) -> Baked:
    """Bake a saved edit, or a stack that ends in one, into a transformers model, and save that.

    Head offsets become the bias `W_o · offset`, found by running the projection on the offset: exact for Linear and
    Conv1D, on top of a LoRA (merged too), and for layers that transformers quantised. A bias acts at every token, so
    the result is the model with the edit at `positions="all"`. Where the architecture has no such bias by default, a
    setting of its configuration that gives it one is turned on, and every other parameter this brings along is written
    as zero. The folder is then loaded and compared with the edit at every position, weights and outputs, and appears
    under its name only if it is the same: in float32 to 1e-5 of the largest output, in half precision to three times
    what rounding the base does; a quantised one is compared with its own layers given the biases.

    Args:
        model: a transformers model without adapters. It is the same afterwards, bit for bit.
        adapter: a folder that `load_adapter` reads.
        output: where to write; must be new or empty.
        batches: texts to measure on what acting at every position changes; see `divergence`.
        tokenizer: a folder or a name on the hub whose tokenizer or processor, where it has one, is written too.
        verify: compare. The written model is loaded beside the given one, its weights mapped from the files where that
            is on a CPU, and one in half precision is float32 meanwhile; leave it out for what is too large for this.
        strict_base: refuse an adapter made for another base model, instead of warning once.

    Raises:
        AdapterError: the adapter cannot be read or is for another base.
        ValueError: the adapter cannot be written into weights, the architecture has no place for it, the model is not
            transformers', has adapters or was quantised in place, or `output` is not empty.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> from lightning_peft import bake, save_adapter
        >>> from lightning_peft.editing import head_offsets_config, head_sites
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> part = stack_of(model).add(head_offsets_config(head_sites(model), [(1, 0)]), "edit", computed=True)
        >>> for offsets in stack_of(model).tensors(part).values():
        ...     _ = offsets.fill_(0.5)
        >>> folder = tempfile.mkdtemp()
        >>> _ = save_adapter(model, f"{folder}/edit")
        >>> stack_of(model).remove("edit")
        >>> made = bake(model, f"{folder}/edit", f"{folder}/baked")
        >>> made.changed, [str(flag) for flag in made.flags]
        (('model.layers.1.self_attn.o_proj.bias',), ['attention_bias'])
        >>> AutoModelForCausalLM.from_pretrained(f"{folder}/baked").config.attention_bias
        True
    """
    output = Path(output)
    check_new(output)
    _check_model(model)
    with everywhere(model, adapter, strict_base) as positions:
        changed = changes(model)
        flags, added = find_flags(model, changed.keys() - own_parameters(model).keys())
        measured = divergence(model, batches, lambda: acting(positions), nullcontext)
    zeros = {name: _zero_bias(model, name) for name in sorted(added - changed.keys())}
    new, quantised = changed | zeros, getattr(model.config, "quantization_config", None) is not None
    expected: Reference | None = None
    saved: Any = model
    with new_folder(output) as folder:
        with _written(model, new), turned_on(model.config, flags):
            saved.save_pretrained(folder)
            if verify and quantised:
                expected = _merged(model, new)
        if verify and expected is None:
            expected = _edited(model, adapter, changed, zeros)
        verification = verify_folder(folder, type(model), saved.dtype, expected) if expected is not None else None
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        were = tuple(dict.fromkeys(positions.values()))
        notes = _notes(were, flags, measured, verification)
        write_written_card(folder, written_parts(adapter), saved.config._name_or_path, type(model).__name__, notes)
    return Baked(type(model).__name__, tuple(sorted(changed)), flags, tuple(zeros), were, measured, verification)


def _notes(
    positions: tuple[str, ...], flags: tuple[Flag, ...], moved: Divergence | None, verification: Verification | None
) -> list[str]:
    """Return what the model's card says of how it was baked."""
    where = f"The edit acts at every token; as it was saved, at {', '.join(positions) or 'all'} positions"
    notes = [f"{where}{f': {moved}' if moved is not None else ''}."]
    notes += [f"Turned on for it: {', '.join(map(str, flags))}."] if flags else []
    return [*notes, f"{verification}." if verification else "Not verified."]


@contextmanager
def everywhere(model: nn.Module, adapter: str | Path, strict_base: bool = True) -> Iterator[dict[Adapter, str]]:
    """Put a saved adapter on the model for a while, its edits at every position; yield the positions as saved.

    Afterwards it is the same bit for bit, whatever was merged meanwhile.
    """
    before = [
        (module, key, parameter, parameter.data)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        with evaluating(model), steering(model, adapter, strict_base=strict_base) as parts:
            positions = {part: part.config.positions for part in parts if hasattr(part.config, "positions")}
            for part in positions:
                reposition(part, "all")
            yield positions
    finally:
        for module, key, parameter, data in before:
            module._parameters[key] = parameter
            if parameter.data.data_ptr() != data.data_ptr():  # a LoRA is taken out of the weights by subtraction
                parameter.data = data


@contextmanager
def acting(positions: Mapping[Adapter, str]) -> Iterator[None]:
    """Let the edits act at these positions for a while; afterwards at every one, as in `everywhere`."""
    for part, where in positions.items():
        reposition(part, where)
    try:
        yield
    finally:
        for part in positions:
            reposition(part, "all")


@torch.no_grad()
def changes(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that merging the model's adapters would change or add, by their names without adapters.

    Raises:
        ValueError: an adapter cannot be merged, or one of two names of the same parameter would change alone.
    """
    before = {name: (parameter, parameter.data) for name, parameter in own_parameters(model).items()}
    stack = stack_of(model)
    stack.merge()
    after = {name: parameter.data for name, parameter in own_parameters(model).items()}
    changed = {
        name: value.clone()
        for name, value in after.items()
        if (value.any() if name not in before else not torch.equal(value, before[name][1]))
    }
    stack.unmerge()
    moved = {before[name][0] for name in changed if name in before}
    if alone := [name for name, (parameter, _) in before.items() if parameter in moved and name not in changed]:
        raise ValueError(
            f"{alone[0]} is the same weight as another that the adapter changes, and would change with it."
        )
    return changed


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's own parameters, by their names without adapters; a shared one under each of its names."""
    return {
        f"{name}.{key}".lstrip("."): parameter
        for name, module in base_modules(model)
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def _check_model(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"A {type(model).__name__} is not a transformers model, which no transformers folder can hold: call "
            "lightning_peft.adapters(module).merge() and save what you need of module.state_dict()."
        )
    if find_stacks(model):
        raise ValueError("The model has adapters: save them all as one stack, and bake that into a bare model.")
    if any(is_quantized(module) for module in model.modules()) and not getattr(
        model.config, "quantization_config", None
    ):
        raise ValueError(
            "The model was quantised in place, which transformers cannot load: bake into the full model, or into one "
            "that from_pretrained quantised."
        )


def _zero_bias(model: nn.Module, name: str) -> Tensor:
    whole: Any = model
    module = whole.get_submodule(name.rpartition(".")[0])
    dtype = module.weight.dtype if module.weight.is_floating_point() else whole.dtype
    size = getattr(module, "out_features", module.weight.shape[-1])  # of a norm as many as it scales
    return torch.zeros(size, dtype=dtype, device=module.weight.device)


@contextmanager
def _written(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the model's parameters these values for a while; add those that do not exist."""
    parameters = own_parameters(model)
    before = {name: parameters[name].data for name in values if name in parameters}
    try:
        for name, value in values.items():
            if name in parameters:
                parameters[name].data = value
            else:
                _set(model, name, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for name in values:
            if name in parameters:
                parameters[name].data = before[name]
            else:
                _set(model, name, None)


def _set(model: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    module, _, key = name.rpartition(".")
    setattr(model.get_submodule(module), key, parameter)


def _merged(model: Any, added: Mapping[str, Tensor]) -> Reference:
    """Return the reference of a quantised model with the biases in it: its layers would round the edit itself."""
    probe = find_probe(model)
    values = [] if probe is None else outputs(model, probe)
    weights = {name: digest(value) for name, value in added.items() if value.is_floating_point()}
    return Reference(probe, values, weights, torch.finfo(model.dtype).eps ** 0.5)


def _edited(model: Any, adapter: str | Path, changed: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> Reference:
    """Return the reference of the model with the adapter everywhere, in float32; restore the model afterwards."""
    dtype = model.dtype
    dtypes = {name: value.dtype for name, value in {**own_parameters(model), **changed, **zeros}.items()}
    with _precision(model) as change, ExitStack() as adapted:

        def load(dtype: torch.dtype) -> Any:
            change(dtype)
            return model

        def adapt(model: Any) -> None:
            change(dtype)  # in which the base is the one that the adapter was made for
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OtherBaseWarning)
                # whether the base is the adapter's has been checked
                adapted.enter_context(everywhere(model, adapter, strict_base=False))
            change(torch.float32)

        def expected(model: Any) -> dict[str, Tensor]:
            merged = changes(model)
            adapted.close()
            return {**own_parameters(model), **zeros, **merged}

        return reference(load, adapt, expected, dtypes, dtype)


@contextmanager
def _precision(model: nn.Module) -> Iterator[Callable[[torch.dtype], None]]:
    """Yield a function that turns the model's half-precision tensors to float32 and back, without loss."""
    dtypes: dict[Tensor, torch.dtype] = {}

    def change(dtype: torch.dtype) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            if dtype not in HALF and tensor.dtype in HALF:
                dtypes[tensor] = tensor.dtype
                tensor.data = tensor.data.to(dtype)
            elif dtype in HALF and tensor in dtypes:
                tensor.data = tensor.data.to(dtypes[tensor])

    try:
        yield change
    finally:
        change(HALF[0])
