"""The configuration of a LoRTA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig
from torch import Tensor

from lightning_peft.stack.adapter_files.typed_values import AdapterError
from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.lorta.places import FUSED, Group, Place, Tensors
from lightning_peft.tuners.targets import order_targets

TENSORS = ("lorta_A", "lorta_B", "lorta_layers", "lorta_heads", "lorta_matrices")
_ROOT = "base_model.model."


@dataclass
class LoRTAConfig(WithCard, PeftConfig):
    """One CP tensor of rank r for the updates of all attention matrices.

    Head h of the queries (m = 0), keys (1), values (2) of layer l has `y_h + alpha/r ((x A) ∘ c) B` with
    `c = C_l[l] ∘ C_h[h] ∘ C_m[m]`; the output projection (3) has `y + alpha/r Σ_h ((x_h Bᵀ) ∘ c) Aᵀ`. A `[d, r]`,
    B `[r, d_h]`, C_l `[L, r]`, C_h `[H, r]` and C_m `[4, r]` are shared by all. With grouped queries keys and values
    have the first rows of C_h. Hounie et al. 2024, arXiv:2410.04060. Trained parameters: `r (d + d_h + L + H + 4)`, for
    each group of matrices of other widths, heads or head sizes.

    Args:
        target_modules: matrices that give queries, keys or values, and output projections, by name or suffix; a string
            is a regular expression. Default: those of all attentions.
        r: the rank.
        alpha: the strength times r.
        dropout: on the matrices' inputs, in training.
        init_scale: A is drawn as Kaiming-uniform with `a = √5`, the three C with `a = √5 * init_scale`; B is zero.
        fused: how one matrix for queries, keys and values orders its outputs: `"concatenated"` (all queries, all keys,
            all values) or `"interleaved"` (those of each head). Default: as it is known of the model, else an error.
        num_heads: for models without a configuration, how many query heads there are.
        places: where each adapted matrix stands in the tensor, by its full name; found when the adapter is made.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    implies: ClassVar[Mapping[str, tuple[str, ...]]] = {
        setting: ("places",) for setting in ("target_modules", "fused", "num_heads", "layers_to_transform")
    }

    target_modules: list[str] | str | None = field(default=None)
    r: int = field(default=8)
    alpha: float = field(default=8.0)
    dropout: float = field(default=0.0)
    init_scale: float = field(default=0.0)
    fused: str | None = field(default=None)
    num_heads: int | None = field(default=None)
    places: dict[str, dict[str, Any]] | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("LORTA")
        order_targets(self)
        # what a model tells: an adapter that has it goes on as it is; not a field itself
        self.by_default: frozenset[str] = frozenset({"places"} if self.places is None else ())
        if self.r < 1:
            raise ValueError(f"The rank r must be at least 1, got {self.r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        if self.fused not in (None, *FUSED):
            raise ValueError(f"fused must be one of {', '.join(FUSED)}, got {self.fused!r}.")
        for name, values in (self.places or {}).items():
            if Place.from_json(name, values).layer >= len(self.places or {}):
                raise ValueError(
                    f"{name} has a place in layer {values['layer']}, but there are fewer matrices than that."
                )

    @property
    def scaling(self) -> float:
        """Return `alpha / r`."""
        return self.alpha / self.r

    def place(self, name: str) -> Place:
        """Return where a matrix stands.

        Raises:
            ValueError: it stands nowhere.
        """
        if self.places is None or name not in self.places:
            raise ValueError(f"This LoRTA adapter has no place for {name}, so it is for another model.")
        return Place.from_json(name, self.places[name])

    def shapes(self, group: Group) -> dict[str, tuple[int, int]]:
        """Return the shapes of the tensors that a group of matrices shares, by their names."""
        places = (Place.from_json(name, values) for name, values in (self.places or {}).items())
        layers = 1 + max(place.layer for place in places if place.group == group)
        sides = (group.width, self.r), (self.r, group.head_dim), (layers, self.r), (group.heads, self.r), (4, self.r)
        return dict(zip(TENSORS, sides, strict=True))

    def lora_factors(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the LoRA of rank r that computes the same, from the tensors of a saved folder; no model is needed.

        Returns:
            For the key of each matrix, `base_model.model.<name>`, A `[r, inputs]` and B `[outputs, r]`, the scaling in
            B.

        Raises:
            AdapterError: tensors are missing, or there are others, such as those of a module that is trained whole.
        """
        if not self.places:
            raise AdapterError("This LoRTA adapter does not say where its matrices stand in its tensor.")
        shared: dict[Group, Tensors] = {}
        used: set[str] = set()
        for name in self.places:
            keys = [f"{_ROOT}{name}.{tensor}" for tensor in TENSORS]
            if keys[0] in tensors and tensors.keys() >= set(keys):
                shared[self.place(name).group] = Tensors(*(tensors[key].float() for key in keys))
                used |= {*keys}
        if left := sorted(tensors.keys() - used):
            raise AdapterError(
                f"This LoRTA adapter holds {left[0]} besides its tensor, which no plain LoRA has: merge it."
            )
        factors = {}
        for name in self.places:
            place = self.place(name)
            if place.group not in shared:
                raise AdapterError(f"This LoRTA adapter lacks the tensors that {name} shares.")
            a, b = place.low_rank(shared[place.group])
            factors[_ROOT + name] = (a.contiguous(), self.scaling * b)
        return factors
