"""AdapterHub's LoRA and IA3 as peft's, and LoRA behind a gate as a linear bottleneck of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.adapterhub.options import LowRankOptions
from lightning_peft.adapterhub.part import ROOT, Part
from lightning_peft.adapterhub.places import Place, Places
from lightning_peft.adapterhub.tensors import Tensors
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.stack.adapter_files.folder import AdapterError

_LETTERS = "qkv"


@dataclass(frozen=True)
class _Matrix:
    """A matrix to adapt.

    Args:
        place: its names.
        inputs: its features.
        outputs: likewise.
        thirds: where it gives queries, keys and values, those that are adapted, by number; else empty.
    """

    place: Place
    inputs: int
    outputs: int
    thirds: tuple[int, ...] = ()

    @property
    def theirs(self) -> str:
        return f"{self.place.theirs}.loras"

    @property
    def blocks(self) -> int:
        """How many adapters AdapterHub has there in one."""
        return len(self.thirds) or 1

    @property
    def adapted(self) -> int:
        """How many outputs are adapted."""
        return self.outputs // 3 * len(self.thirds) if self.thirds else self.outputs

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """Return values of the adapted outputs `[adapted, …]` as those of all outputs, the rest filled."""
        if not self.thirds:
            return values
        pieces = dict(zip(self.thirds, values.chunk(len(self.thirds)), strict=True))
        return torch.cat([pieces.get(i, torch.full_like(values[: self.outputs // 3], fill)) for i in range(3)])


def low_rank(options: LowRankOptions, tensors: Tensors, places: Places) -> list[Part]:
    """Return LoRA or IA3 as one adapter.

    GPT-2 has queries, keys and values in one matrix, and AdapterHub an adapter for each that is asked for: as one LoRA
    they have the sum of their ranks, and zeros where one does not act on another's outputs.

    Raises:
        AdapterError: an option has no equal here, or a tensor is missing or of another shape.
    """
    if options.composition_mode not in ("add", "scale"):
        raise AdapterError(
            f"AdapterHub's option composition_mode={options.composition_mode!r} is neither add nor scale."
        )
    if unknown := [letter for letter in options.attn_matrices if letter not in _LETTERS]:
        raise AdapterError(f"AdapterHub's option attn_matrices has {unknown[0]!r}, which is none of q, k and v.")
    matrices = _matrices(options, places)
    if not matrices:
        raise AdapterError(f"{tensors.source} adapts no matrix: its options leave out all.")
    if options.composition_mode == "scale":
        return [_ia3(options, tensors, matrices, places)]
    if options.r < 1:
        raise AdapterError(f"AdapterHub's option r must be at least 1, got {options.r}.")
    return [(_gated if options.use_gating else _lora)(options, tensors, matrices, places)]


def _matrices(options: LowRankOptions, places: Places) -> list[_Matrix]:
    letters = [letter for letter in _LETTERS if letter in options.attn_matrices] if options.selfattn_lora else []
    kinds = [*(["qkv"] if places.architecture.fused and letters else letters)]
    kinds += [kind for kind in ("intermediate", "output") if getattr(options, f"{kind}_lora")]
    matrices = []
    for kind in kinds:
        thirds = tuple(_LETTERS.index(letter) for letter in letters) if kind == "qkv" else ()
        for place in places.matrices(kind, options.leave_out):
            matrices.append(_Matrix(place, *matrix_shape(places.modules[place.ours]), thirds))
    return matrices


def _lora(options: LowRankOptions, tensors: Tensors, matrices: list[_Matrix], places: Places) -> Part:
    from peft import LoraConfig

    kept = {}
    for matrix in matrices:
        down, up = _factors(options, tensors, matrix)
        kept[f"{ROOT}{matrix.place.ours}.lora_A.weight"], kept[f"{ROOT}{matrix.place.ours}.lora_B.weight"] = down, up
    blocks = min(matrix.blocks for matrix in matrices)
    others = {matrix.place.ours: matrix.blocks for matrix in matrices if matrix.blocks != blocks}
    settings: dict[str, Any] = {
        "r": options.r * blocks,
        "lora_alpha": options.alpha * blocks,
        "lora_dropout": float(options.dropout),
        "target_modules": [matrix.place.ours for matrix in matrices],
        "rank_pattern": {name: options.r * several for name, several in others.items()},
        "alpha_pattern": {name: options.alpha * several for name, several in others.items()},
        "fan_in_fan_out": _transposed(matrices, places),
    }
    return Part("lora", LoraConfig(**settings), kept)


def _gated(options: LowRankOptions, tensors: Tensors, matrices: list[_Matrix], places: Places) -> Part:
    """Return LoRA behind a gate, which takes the place of the scaling alpha / r."""
    from lightning_peft.tuners.bottleneck import BottleneckConfig

    if len({matrix.blocks for matrix in matrices}) > 1:
        raise AdapterError("AdapterHub's option use_gating goes with attention's matrices alone, or with none of them.")
    kept = {}
    for matrix in matrices:
        ours = f"{ROOT}{matrix.place.ours}.bottleneck"
        kept[f"{ours}.down.weight"], kept[f"{ours}.up.weight"] = _factors(options, tensors, matrix)
        weight = tensors.take(f"{matrix.theirs}.gate.weight", (matrix.blocks, matrix.inputs))
        bias = tensors.take(f"{matrix.theirs}.gate.bias", (matrix.blocks,))
        if not (torch.equal(weight, weight[:1].expand_as(weight)) and torch.equal(bias, bias[:1].expand_as(bias))):
            raise AdapterError(
                f"AdapterHub's option use_gating gave queries and values of {matrix.place.ours} different gates, and "
                "they are one matrix, which has one gate here."
            )
        kept[f"{ours}.gate.weight"], kept[f"{ours}.gate.bias"] = weight[:1], bias[:1]
    config = BottleneckConfig(
        target_modules=[matrix.place.ours for matrix in matrices],
        size=options.r * matrices[0].blocks,
        activation="linear",
        biases=False,
        placement="parallel",
        gate=True,
        dropout=float(options.dropout),
    )
    return Part("low_rank", config, kept)


def _factors(options: LowRankOptions, tensors: Tensors, matrix: _Matrix) -> tuple[Tensor, Tensor]:
    """Return A `[rank, inputs]` and B `[outputs, rank]`, where the rank is that of all blocks."""
    down = tensors.take(f"{matrix.theirs}.lora_A", (options.r * matrix.blocks, matrix.inputs))
    up = tensors.take(f"{matrix.theirs}.lora_B", (matrix.adapted, options.r))
    return down, matrix.spread(torch.block_diag(*up.chunk(matrix.blocks)), 0.0)


def _ia3(options: LowRankOptions, tensors: Tensors, matrices: list[_Matrix], places: Places) -> Part:
    from peft import IA3Config

    if options.r != 1 or options.dropout or options.use_gating:
        raise AdapterError(
            "AdapterHub's option composition_mode='scale' goes with r=1 and without dropout and use_gating, not with "
            f"r={options.r}, dropout={options.dropout}, use_gating={options.use_gating}."
        )
    kept = {}
    for matrix in matrices:
        vector = tensors.take(f"{matrix.theirs}.lora_B", (matrix.adapted, 1))
        kept[f"{ROOT}{matrix.place.ours}.ia3_l"] = matrix.spread(vector, 1.0) * options.alpha
    config = IA3Config(
        target_modules=[matrix.place.ours for matrix in matrices],
        feedforward_modules=[],
        fan_in_fan_out=_transposed(matrices, places),
    )
    return Part("ia3", config, kept)


def _transposed(matrices: list[_Matrix], places: Places) -> bool:
    """Return whether the matrices are kept transposed, as GPT-2's are."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(places.modules[matrix.place.ours], Conv1D) for matrix in matrices)
