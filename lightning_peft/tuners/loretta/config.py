"""The configuration of a LoRETTA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from peft.config import PeftConfig
from torch import Tensor

from lightning_peft.stack.adapter_files.typed_values import AdapterError
from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets
from lightning_peft.tuners.tensor_train import contract


@dataclass
class LoRETTAConfig(WithCard, PeftConfig):
    """A LoRA whose A and B are tensor trains: `y = W x + alpha/r * B A x`, B zero at the start.

    Yang et al. 2024, arXiv:2402.11417, where this is LoRETTA_rep. Trained parameters: `Σ r_{k-1} n_k r_k` for A and for
    B, see `lightning_peft.tuners.tensor_train`.

    Args:
        target_modules: the linear layers, by name or suffix; a string is a regular expression, or `"all-linear"`.
            Default: what gives the queries and the values of every attention.
        r: the rank of the product, so the width between A and B.
        alpha: the strength times r.
        dropout: on A's input, in training.
        tensor_rank: the largest rank between two cores of a train; it bounds the rank of the product too.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    r: int = field(default=8)
    alpha: float = field(default=16.0)
    dropout: float = field(default=0.05)
    tensor_rank: int = field(default=5)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("LORETTA")
        order_targets(self)
        for name in ("r", "tensor_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"The rank {name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")

    @property
    def scaling(self) -> float:
        """Return `alpha / r`."""
        return self.alpha / self.r

    def lora_factors(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the LoRA of rank r that computes the same, from the tensors of a saved folder; no model is needed.

        Returns:
            For the key of each matrix, `base_model.model.<name>`, A `[r, inputs]` and B `[outputs, r]` in float32, the
            scaling in B.

        Raises:
            AdapterError: cores are missing or do not fit together, or there are tensors of something else, such as
                norms that are trained whole.
        """
        trains: dict[str, dict[str, dict[int, Tensor]]] = {}
        for key, core in tensors.items():
            train, _, number = key.rpartition(".cores.")
            name, _, side = train.rpartition(".loretta_")
            if not name or side not in ("A", "B") or not number.isdecimal() or core.dim() != 3:
                raise AdapterError(f"This LoRETTA adapter holds {key}, which no plain LoRA has: merge it.")
            trains.setdefault(name, {}).setdefault(side, {})[int(number)] = core.float()
        factors = {}
        for name, sides in trains.items():
            a, b = (self._dense(sides.get(side, {}), f"{name}.loretta_{side}") for side in ("A", "B"))
            factors[name] = (a.reshape(-1, self.r).T.contiguous(), self.scaling * b.reshape(self.r, -1).T.contiguous())
        return factors

    def _dense(self, cores: Mapping[int, Tensor], train: str) -> Tensor:
        """Return the entries of a train, in order."""
        ordered = [cores[number] for number in sorted(cores)]
        whole = ordered and sorted(cores) == list(range(len(cores)))
        if not whole or any(a.shape[2] != b.shape[0] for a, b in pairwise(ordered)):
            raise AdapterError(f"The cores of {train} are not those of one tensor train: the file is damaged.")
        entries = contract(ordered).flatten()
        if len(entries) % self.r or ordered[0].shape[0] * ordered[-1].shape[2] != 1:
            raise AdapterError(f"The cores of {train} do not make a matrix of rank {self.r}: the file is damaged.")
        return entries
