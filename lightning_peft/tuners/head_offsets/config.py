"""The configuration of a head-offsets adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft.config import PeftConfig
from torch import Tensor

from lightning_peft.positions import check_policy
from lightning_peft.stack.gates import check_gate
from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets

# what the vector of a head is, in an adapter that chooses heads by training (LoFiT)
OFF, OFFSET, SCALE = 0, 1, 2

_VECTORS, _ROLES = ".head_offsets", ".head_offsets_roles"


@dataclass
class HeadOffsetsConfig(WithCard, PeftConfig):
    """A vector for each of some attention heads, added to the input of the attention output projection.

    With the projection's input `z [B, T, H * head_dim]`, head `h` becomes `z_h + alpha * offset_h` at the positions
    of the policy. Computed, this is inference-time intervention (Li et al. 2023, arXiv:2306.03341); trained from
    zero, it is the second step of LoFiT (Yin et al. 2024, arXiv:2406.01563).

    Args:
        target_modules: the output projections, by name or suffix; a string is a regular expression.
        head_dim: width of one head; the projection's input width must be a multiple of it. Where layers have heads of
            different widths: for each target's full name its own.
        heads: for each target's full name, the heads (0-based) that have an offset, in place of `target_modules`;
            None means every head of every target.
        parameters: what is trained: the `"offsets"`; or `"gains"`, one factor for each head, of directions that are
            kept beside them; or `"lofit"`, where the vector of each head is first a scale, `z_h + alpha * scale_h *
            z_h`, and then an offset or nothing.
        alpha: the strength, multiplied onto every offset.
        positions: `"answer"` (from the last prompt token on), `"generated"` (new tokens only), `"prompt"` or `"all"`,
            or a window of one of them, such as `"answer[0:3]"`; see `lightning_peft.tokens`.
        gate: None, `"adaptive"` or `"conditional"`: each head's strength by a probe of its own, see
            `lightning_peft.stack.gates`.
        beta: of an adaptive gate.
        threshold: of a conditional one.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    head_dim: int | dict[str, int] | None = field(default=None)
    heads: dict[str, list[int]] | None = field(default=None)
    parameters: str = field(default="offsets")
    alpha: float = field(default=1.0)
    positions: str = field(default="answer")
    gate: str | None = field(default=None)
    beta: float = field(default=0.0)
    threshold: float = field(default=0.5)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("HEAD_OFFSETS")
        check_policy(self.positions)
        check_gate(self.gate, self.threshold)
        if self.parameters not in ("offsets", "gains", "lofit"):
            raise ValueError(f'parameters must be "offsets", "gains" or "lofit", got {self.parameters!r}.')
        if self.heads is not None:
            if self.layers_to_transform is not None:
                raise ValueError(
                    "heads are given by the full names of their modules, so leave out layers_to_transform."
                )
            self.target_modules = sorted(self.heads)
        order_targets(self)

    def head_size(self, name: str) -> int:
        """Return the width of the heads of the projection with this full name; 0 where none is given."""
        size = self.head_dim.get(name) if isinstance(self.head_dim, dict) else self.head_dim
        return size or 0

    def compacted(self, tensors: Mapping[str, Tensor]) -> tuple[HeadOffsetsConfig, dict[str, Tensor]]:
        """Return this adapter as it is written to a folder: once its heads are chosen, the offsets of those alone.

        Args:
            tensors: under the keys of a saved peft folder.

        Returns:
            The configuration and the tensors of an adapter that computes the same.
        """
        roles = {key.removesuffix(_ROLES): value for key, value in tensors.items() if key.endswith(_ROLES)}
        if not roles or any((value == SCALE).any() for value in roles.values()):
            return self, dict(tensors)
        chosen: dict[str, list[int]] = {}
        compact = {key: value for key, value in tensors.items() if not key.endswith((_VECTORS, _ROLES))}
        for key, role in roles.items():
            name, is_offset = key.removeprefix("base_model.model."), role == OFFSET
            if is_offset.any():
                heads = range(len(role)) if self.heads is None else sorted(self.heads[name])
                chosen[name] = [head for head, keep in zip(heads, is_offset.tolist(), strict=True) if keep]
                compact[key + _VECTORS] = tensors[key + _VECTORS][is_offset]
        config = copy.deepcopy(self)
        config.parameters, config.heads, config.target_modules = "offsets", chosen, sorted(chosen)
        return config, compact
