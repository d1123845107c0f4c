"""An edit as a llama.cpp control vector: a GGUF file of one vector a block, added to the block's output.

llama.cpp reads tensors `direction.<block>`, adds each to the residual stream after that block at every token, and has
nothing for the first block, number 0 (`llama_adapter_cvec` and `common_control_vector_load` of its source). So a
control vector computes what the edit does

- exactly, where the edit is a shift of a block's output: layer offsets of blocks or feed-forward parts, and head
  offsets where attention and feed-forward part stand side by side, as in GPT-NeoX, GPT-J, Phi and Cohere;
- approximately, where the feed-forward part of the same block reads the shifted stream (head offsets in GPT-2, LLaMA
  and most others): its response to the shift is lost, and a norm behind the projection (Gemma 2) is passed by;
- approximately for the first block, whose vector is added after the second.

Which of these holds is not looked up but measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.language_model import part_blocks
from lightning_peft.files.atomic import new_file
from lightning_peft.stack.adapter_files.baking import acting, changes, everywhere, own_parameters
from lightning_peft.stack.adapter_files.divergence import Divergence, divergence
from lightning_peft.stack.stack import stack_of


@dataclass(frozen=True)
class ControlVector:
    """The exported vectors, and how far they are from the edit.

    Args:
        vectors: block -> vector `[width]`, float32.
        first_moved: whether a vector of the first block was added to the second's.
        error: largest difference of the logits from those of the edit at every position, relative to the largest logit.
        positions: those the adapter was made for; exported, they are all.
        divergence: of the model with the adapter as it was saved from that with the vectors; None where there was
            nothing to measure on.
    """

    vectors: dict[int, Tensor]
    first_moved: bool
    error: float
    positions: tuple[str, ...]
    divergence: Divergence | None

    @property
    def exact(self) -> bool:
        return self.error <= 1e-5


def export_control_vector(
    model: nn.Module,
    adapter: str | Path,
    file: str | Path,
    batches: Iterable[Mapping[str, Tensor]] = (),
    strict_base: bool = True,
) -> ControlVector:
    """Write a saved edit as a control vector for llama.cpp, and measure how its effect differs from the edit's.

    llama.cpp loads the file by `--control-vector FILE`, and scales it by `--control-vector-scaled FILE:STRENGTH`.

    Args:
        model: a causal language model of transformers, without adapters. It is the same afterwards, bit for bit.
        adapter: a folder that `load_adapter` reads.
        file: where to write; a file there is replaced.
        batches: texts to measure on; see `divergence`.
        strict_base: refuse an adapter made for another base model, instead of warning once.

    Raises:
        AdapterError: the adapter cannot be read or is for another base.
        ValueError: the edit is no shift of the residual stream, as a LoRA is not, or the gguf package is not installed.
    """
    writer = _import_writer()
    with everywhere(model, adapter, strict_base) as positions:
        before = {name: parameter.data for name, parameter in own_parameters(model).items()}
        vectors, first_moved = _by_block(model, changes(model), before)
        tokens = torch.arange(8, device=next(model.parameters()).device)[None]
        stack = stack_of(model)

        @contextmanager
        def replaced() -> Iterator[None]:
            with stack.disabled(), adding(model, vectors):
                yield

        edited = _logits(model, tokens)
        with replaced():
            error = float((_logits(model, tokens) - edited).abs().max() / edited.abs().max())
        measured = divergence(model, batches, lambda: acting(positions), replaced)
    _write(writer, Path(file), vectors, model)
    return ControlVector(vectors, first_moved, error, tuple(dict.fromkeys(positions.values())), measured)


@contextmanager
def adding(model: nn.Module, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """Add each vector to its block's output for a while, at every token, as llama.cpp does."""

    def shift(vector: Tensor) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            x = output if isinstance(output, Tensor) else output[0]
            x = x + vector.to(x.device, x.dtype)
            return x if isinstance(output, Tensor) else (x, *output[1:])

        return after

    with ExitStack() as hooks:
        for block in part_blocks(model):
            if block.number in vectors:
                hook = block.module.register_forward_hook(shift(vectors[block.number]))
                hooks.callback(hook.remove)
        yield


def _by_block(
    model: nn.Module, changed: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> tuple[dict[int, Tensor], bool]:
    """Return the shift of the residual stream that changed biases make, by block."""
    model_blocks = part_blocks(model)
    if len({block.stack for block in model_blocks}) != 1 or len(model_blocks) < 2:
        raise ValueError(f"{type(model).__name__} is not one stack of blocks, which alone llama.cpp's vectors are for.")
    places = {f"{span.last}.bias": block.number for block in model_blocks for span in block.spans()}
    if strange := sorted(changed.keys() - places.keys()):
        raise ValueError(
            f"The adapter changes {strange[0]}, which is no shift of the residual stream: a control vector cannot hold "
            "it; merge it into its base and convert that."
        )
    vectors: dict[int, Tensor] = {}
    first_moved = False
    for name, value in changed.items():
        shift = value.float() - (before[name].float() if name in before else 0.0)
        first_moved |= places[name] == 0
        number = max(places[name], 1)
        vectors[number] = vectors.get(number, torch.zeros_like(shift)) + shift
    if not vectors:
        raise ValueError("The adapter shifts nothing: all of its offsets are zero.")
    return dict(sorted(vectors.items())), first_moved


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits.float()


def _import_writer() -> Any:
    try:
        from gguf import GGUFWriter
    except ModuleNotFoundError as error:
        raise ValueError("A control vector is a GGUF file, which needs `pip install lightning-peft[gguf]`.") from error
    return GGUFWriter


def _write(writer: Any, file: Path, vectors: Mapping[int, Tensor], model: Any) -> None:
    with new_file(file) as path:
        written = writer(path, "controlvector")
        written.add_string("controlvector.model_hint", str(model.config.model_type))
        written.add_int32("controlvector.layer_count", len(part_blocks(model)))
        for number, vector in vectors.items():
            written.add_tensor(f"direction.{number}", vector.cpu().numpy())
        written.write_header_to_file()
        written.write_kv_data_to_file()
        written.write_tensors_to_file()
        written.close()
