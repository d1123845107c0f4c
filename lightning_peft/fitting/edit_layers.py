"""The base of callbacks that compute layer offsets: where they read, what they install."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor, nn

from lightning_peft.backbone.layers import LayerSite
from lightning_peft.editing.contrast import LayerEdit, check_statements, data_hash, site_probes
from lightning_peft.editing.layers import layer_offsets_config
from lightning_peft.editing.selection import Selection
from lightning_peft.fitting.reading_edit import ReadingEdit, ReadingOptions
from lightning_peft.positions import check_policy
from lightning_peft.stack.computed import ComputedAdapter, saved_key
from lightning_peft.stack.gates import check_gate

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig  # as in lora.py


class EditLayers(ReadingEdit[LayerSite]):
    """Base of the edits that move the outputs of layers.

    Args:
        sites: `"block"` (the residual stream behind it), `"attention"` or `"mlp"`.
        layers: which, by number or as a window such as `"8:16"`; None: `default_layers`.
        alpha: the strength.
        positions: see `lightning_peft.tokens`.

    Attributes:
        edit_: the computed `LayerEdit` after `fit`.
    """

    operation = "add"

    def __init__(
        self,
        sites: str,
        layers: Sequence[int] | str | None,
        alpha: float,
        positions: str,
        **options: Unpack[ReadingOptions],
    ) -> None:
        check_policy(positions)
        Selection(sites=sites, layers=_fixed(layers))
        super().__init__(**options)
        self.sites, self.layers, self.alpha, self.positions = sites, layers, alpha, positions
        self.gate: dict[str, Any] = {}
        self.targets: Sequence[LayerSite] = []  # what is moved, by default what is read

    def default_layers(self, count: int) -> str:
        """Return which of so many sites are edited by default: the middle one."""
        return f"{count // 2}:{count // 2 + 1}"

    def find_sites(self, backbone: nn.Module) -> Sequence[LayerSite]:
        if self.positions != "all" and getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"Where an answer begins is not known in an encoder-decoder such as {type(backbone).__name__}: use "
                'positions="all".'
            )
        layers = _fixed(self.layers)
        if layers is None:
            layers = self.default_layers(len(Selection(sites=self.sites, within=self.within).find(backbone)))
        sites = Selection(sites=self.sites, layers=layers, within=self.within).find(backbone)
        self.targets = [site for site in sites if isinstance(site, LayerSite)]
        return self.targets

    def empty_config(self, sites: Sequence[LayerSite]) -> PeftConfig:
        return self._config(tokens=1)

    def edit(self, activations: Tensor, label: Tensor, group: Tensor, sites: Sequence[LayerSite]) -> ComputedAdapter:
        self.edit_ = edit = self.layer_edit(activations, label, group, sites)
        vectors = edit.vectors if edit.vectors.dim() == 3 else edit.vectors[:, None]
        record = {"method": type(self).__name__, "positions": self.positions, **self.gate, **edit.record}
        tensors = {}
        for i, site in enumerate(self.targets):
            for name, values in (("layer_offsets", vectors), ("layer_offsets_probe", edit.probe)):
                if values is not None:  # one for each target, or one for all
                    tensors[saved_key(site.name, f"layer_edits.{name}")] = values[i if len(values) > 1 else 0]
        return ComputedAdapter(self._config(tokens=vectors.shape[1]), tensors, record)

    def layer_edit(self, activations: Tensor, label: Tensor, group: Tensor, sites: Sequence[LayerSite]) -> LayerEdit:
        """Compute the vectors; the arguments are those of `edit`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it computes.")

    def count(self, made: ComputedAdapter) -> int:
        return self.edit_.vectors.numel()

    def _config(self, tokens: int) -> PeftConfig:
        options = {"operation": self.operation, "tokens": tokens, **self.gate}
        return layer_offsets_config(self.targets, self.alpha, self.positions, **options)


class StatementLayers(EditLayers):
    """Base of those that read layers at the last token of labelled statements, and whose strength may be gated.

    Args:
        sites, layers, alpha, positions: as `EditLayers`.
        gate: None, `"adaptive"` or `"conditional"`, see `lightning_peft.stack.gates`.
        beta: of an adaptive gate.
        threshold: of a conditional one.
        C: inverse strength of the L2 penalty of a gate's probes.
    """

    def __init__(
        self,
        sites: str,
        layers: Sequence[int] | str | None,
        alpha: float,
        positions: str,
        gate: str | None = None,
        beta: float = 0.0,
        threshold: float = 0.5,
        C: float = 1.0,
        **options: Unpack[ReadingOptions],
    ) -> None:
        check_gate(gate, threshold)
        super().__init__(sites, layers, alpha, positions, **options)
        self.gate = {"gate": gate, "beta": beta, "threshold": threshold}
        self.C = C

    @abstractmethod
    def vectors(self, activations: Tensor, label: Tensor, group: Tensor) -> Tensor:
        """Return `[S, width]` from `[N, S, width]`, `[N]` and `[N]`."""

    def layer_edit(self, activations: Tensor, label: Tensor, group: Tensor, sites: Sequence[LayerSite]) -> LayerEdit:
        check_statements(activations, label)
        vectors = self.vectors(activations, label, group)
        record = {
            "layers": [site.name for site in sites],
            "norms": [float(norm) for norm in vectors.norm(dim=-1)],
            "statements": len(label),
            "questions": len(group.unique()),
            "data_hash": data_hash(activations.float(), label.long(), group.long()),
        }
        probe = None if self.gate["gate"] is None else site_probes(activations, label, self.C)
        return LayerEdit(vectors, record, probe)


def _fixed(layers: Sequence[int] | str | None) -> tuple[int, ...] | str | None:
    return layers if layers is None or isinstance(layers, str) else tuple(layers)
