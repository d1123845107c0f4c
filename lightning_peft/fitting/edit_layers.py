"""What the callbacks share that compute layer offsets: where they read, what they install."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.editing.capture import Capture, Site
from lightning_peft.editing.contrast import LayerEdit, check_statements, data_hash, site_probes
from lightning_peft.editing.layers import layer_offsets_config
from lightning_peft.editing.selection import Selection
from lightning_peft.fitting.adapter_callback import EditOptions
from lightning_peft.fitting.edit import Edit, from_rank_zero, gather
from lightning_peft.positions import check_policy
from lightning_peft.stack.gates import check_gate
from lightning_peft.stack.stack import AdapterStack

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig  # as in lora.py


class EditLayers(Edit):
    """Base of the edits that move what layers give.

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
        **options: Unpack[EditOptions],
    ) -> None:
        check_policy(positions)
        Selection(sites=sites, layers=_fixed(layers))
        super().__init__(**options)
        self.sites, self.layers, self.alpha, self.positions = sites, layers, alpha, positions
        self.gate: dict[str, Any] = {}
        self.edit_: LayerEdit | None = None
        self._read: list[Site] = []
        self._targets: list[str] = []

    def default_layers(self, count: int) -> str:
        """Which of so many sites are edited by default: the middle one."""
        return f"{count // 2}:{count // 2 + 1}"

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        if self.positions != "all" and getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"Where an answer begins is not known in an encoder-decoder such as {type(backbone).__name__}: use "
                'positions="all".'
            )
        self._read = self.find_sites(backbone, self.sites)
        self._targets = [site.name for site in self._read]
        return self.config_of(self._read)

    def find_sites(self, backbone: nn.Module, sites: str) -> list[Any]:
        """The sites that are read."""
        layers = _fixed(self.layers)
        if layers is None:
            layers = self.default_layers(len(Selection(sites=sites).find(backbone)))
        return Selection(sites=sites, layers=layers).find(backbone)

    def config_of(self, sites: list[Any], **options: Any) -> Any:
        """The adapter's configuration on these sites."""
        options = {"operation": self.operation, **self.gate} | options
        return layer_offsets_config(sites, self.alpha, self.positions, **options)

    def install(self, stack: AdapterStack, trainer: L.Trainer, edit: LayerEdit) -> None:
        """Put the edit in the stack in place of the zero offsets."""
        self.edit_ = edit
        record = {"method": type(self).__name__, "positions": self.positions, **self.gate, **edit.record}
        part = stack[self.name]
        config = part.config
        stack.remove(self.name)
        if edit.vectors.dim() == 3:
            config.tokens = edit.vectors.shape[1]  # type: ignore[attr-defined]
        part = stack.add(config, self.name, computed=True, record=record)
        values = {"layer_offsets": edit.vectors, "layer_offsets_probe": edit.probe}
        for live, tensor in stack.live(part).items():
            site, _, kind, _ = live.rsplit(".", 3)
            given = values[kind]
            assert given is not None
            # one vector for all targets, or one for each
            tensor.copy_(given[self._targets.index(site) if len(given) > 1 else 0])
        trainer.lightning_module.log("edited_parameters", float(edit.vectors.numel()), rank_zero_only=True)


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
        **options: Unpack[EditOptions],
    ) -> None:
        check_gate(gate, threshold)
        super().__init__(sites, layers, alpha, positions, **options)
        self.gate = {"gate": gate, "beta": beta, "threshold": threshold}
        self.C = C
        self._capture: Capture | None = None
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    @abstractmethod
    def vectors(self, activations: Tensor, truth: Tensor, question_id: Tensor) -> Tensor:
        """`[S, width]` from `[N, S, width]`, `[N]` and `[N]`."""

    def begin(self, stack: AdapterStack) -> None:
        self._rows = []
        self._capture = Capture(stack.backbone, self._read).__enter__()

    def observe(self, batch: Mapping[str, Tensor]) -> None:
        assert self._capture is not None
        read = self._capture(batch["input_ids"], batch.get("attention_mask"))
        self._rows.append((read, batch["truth"].cpu(), batch["question_id"].cpu()))

    def compute(self, stack: AdapterStack, trainer: L.Trainer) -> None:
        rows = gather(trainer, *(torch.cat(column) for column in zip(*self._rows, strict=True)))
        self.install(stack, trainer, from_rank_zero(trainer, lambda: self._edit(*rows)))

    def _edit(self, activations: Tensor, truth: Tensor, question_id: Tensor) -> LayerEdit:
        check_statements(activations, truth)
        vectors = self.vectors(activations, truth, question_id)
        record = {
            "layers": [site.name for site in self._read],
            "norms": [float(norm) for norm in vectors.norm(dim=-1)],
            "statements": len(truth),
            "questions": len(question_id.unique()),
            "data_hash": data_hash(activations.float(), truth.long(), question_id.long()),
        }
        probe = None if self.gate["gate"] is None else site_probes(activations, truth, self.C)
        return LayerEdit(vectors, record, probe)

    def end(self) -> None:
        self._rows = []
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
            self._capture = None


def _fixed(layers: Sequence[int] | str | None) -> tuple[int, ...] | str | None:
    return layers if layers is None or isinstance(layers, str) else tuple(layers)
