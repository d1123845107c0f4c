"""LoRETTA's two forms as callbacks: a LoRA of tensor trains, and adapters of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.targets import Layers, choose_targets
from lightning_peft.callbacks.tuning.bottleneck import Activation, Bottleneck, Init, Scaling
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig

__all__ = ["LoRETTAAdp", "LoRETTARep"]


class BesideNorms(AdapterCallback):
    """An adapter beside which the backbone's norms may be trained, as weight deltas called `<name>-norms`."""

    train_norms: bool
    layers: Layers | list[int] | None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}-norms") if self.train_norms else (self.name,)

    def make_configs(self, backbone: nn.Module) -> dict[str, PeftConfig]:
        configs = [self.make_config(backbone)]
        if self.train_norms:
            from lightning_peft.tuners.loretta.norms import choose_norms
            from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

            configs.append(WeightDeltasConfig(target_parameters=choose_norms(backbone, self.layers)))
        return dict(zip(self.names, configs, strict=True))

    def _norms(self, backbone: nn.Module) -> int:
        """Return the number of parameters of the norms, where they are trained."""
        norms = [module for module in backbone.modules() if "Norm" in type(module).__name__ and self.train_norms]
        return sum({id(p): p.numel() for norm in norms for p in norm.parameters(recurse=False)}.values())


class LoRETTARep(BesideNorms):
    """A LoRA whose matrices are tensor trains: `y = W x + (alpha / r) B A x`, B zero at the start.

    Yang et al. 2024, arXiv:2402.11417, LoRETTA_rep. The widths of A and B are cut into factors near 8; a train has a
    core for each, and a matrix's entry is a product of one slice of every core. Trainable parameters:
    `Σ r_{k-1} n_k r_k` for A and for B of each adapted matrix, n_k the factors and r_k the ranks between the cores, at
    most `tensor_rank`; and those of the norms, where they are trained.

    Args:
        r: the rank, the width between A and B.
        alpha: the scaling is `alpha / r`.
        dropout: on the input of A, in training.
        tensor_rank: the largest rank between two cores.
        train_norms: train the norms too, those of `layers`, or all; the paper does. Without them the adapter is a plain
            LoRA in another form: it is merged, combined and served as one.
        target_modules: names of the linear layers to adapt (or suffixes; a string is a regular expression). Default:
            what gives the queries and the values of every attention.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: a rank or the dropout is out of its range; at `setup`, in one sentence, the backbone has no
            attention, or no norms.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoRETTARep
        >>> trainer = L.Trainer(callbacks=[LoRETTARep(r=8)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "loretta_rep"
    law_examples: Mapping[str, LawExample] = {
        "LoRETTARep": LawExample({"r": 4, "tensor_rank": 3, "dropout": 0.0}, ("attention",)),
        "LoRETTARep(train_norms=True)": LawExample(
            {"r": 4, "tensor_rank": 3, "dropout": 0.0, "train_norms": True}, ("attention", "norms")
        ),
    }

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.05,
        tensor_rank: int = 5,
        train_norms: bool = False,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        for name, rank in (("r", r), ("tensor_rank", tensor_rank)):
            if rank < 1:
                raise ValueError(f"The rank {name} must be at least 1, got {rank}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        super().__init__(**options)
        self.r, self.alpha, self.dropout, self.tensor_rank = r, alpha, dropout, tensor_rank
        self.train_norms, self.target_modules, self.layers = train_norms, target_modules, layers
        if dropout:
            self.exempt = {"resume": "what is dropped is drawn anew: checkpoints hold no random state"}

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.loretta import LoRETTAConfig
        from lightning_peft.tuners.loretta.model import query_and_value

        if self.target_modules is None:
            targets: list[str] | str = query_and_value(backbone, self.layers)
        else:
            targets = choose_targets(backbone, self.target_modules, self.layers)
        return LoRETTAConfig(
            target_modules=targets,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            tensor_rank=self.tensor_rank,
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        from lightning_peft.tuners.tensor_train import train_shape

        adapted = counts.query_and_value(backbone)
        pairs = [pair for inputs, outputs in adapted for pair in ((inputs, self.r), (self.r, outputs))]
        return sum(train_shape(*pair, self.tensor_rank).count() for pair in pairs) + self._norms(backbone)


class LoRETTAAdp(BesideNorms, Bottleneck):
    """Houlsby's adapters whose matrices are tensor trains: `y + s * up(f(down(y)))`, y the part's output.

    Yang et al. 2024, arXiv:2402.11417, LoRETTA_adp: after each attention and each feed-forward part. Trainable
    parameters: for each part the biases, `m + d`, and `Σ r_{k-1} n_k r_k` for down and for up, see `LoRETTARep`; d is
    the output's width and m the bottleneck's. And those of the norms, where they are trained.

    Args:
        size: width of the bottleneck.
        tensor_rank: the largest rank between two cores.
        activation: f.
        scaling: see `Houlsby`.
        init: `"lora"` and `"mam"` begin with `up` zero; `"glorot"` draws its cores as the authors do.
        dropout: on the adapter's output, in training.
        train_norms: train the norms too, see `LoRETTARep`; the paper does.
        target_modules: see `Houlsby`.
        layers: see `Houlsby`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: as `Houlsby`; a rank is out of its range, or the backbone has no norms.

    Example:
        >>> from lightning_peft.callbacks import LoRETTAAdp
        >>> LoRETTAAdp(train_norms=True).names
        ('loretta_adp', 'loretta_adp-norms')
    """

    default_name = "loretta_adp"
    law_examples: Mapping[str, LawExample] = {
        "LoRETTAAdp": LawExample({"size": 4, "tensor_rank": 3}, ("mlp",)),
        "LoRETTAAdp(train_norms=True)": LawExample(
            {"size": 4, "tensor_rank": 3, "train_norms": True}, ("mlp", "norms")
        ),
    }

    def __init__(
        self,
        size: int = 64,
        tensor_rank: int = 5,
        activation: Activation = "relu",
        scaling: Scaling = 1.0,
        init: Init = "lora",
        dropout: float = 0.0,
        train_norms: bool = False,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if tensor_rank < 1:
            raise ValueError(f"The rank tensor_rank must be at least 1, got {tensor_rank}.")
        settings = {"size": size, "activation": activation, "scaling": scaling, "tensor_rank": tensor_rank}
        super().__init__({**settings, "init": init, "dropout": dropout}, True, target_modules, layers, **options)
        self.train_norms = train_norms

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return super().trainable_parameters(backbone) + self._norms(backbone)

    def _added(self, inputs: int, outputs: int) -> int:
        from lightning_peft.tuners.tensor_train import train_shape

        size, rank = self.options["size"], self.options["tensor_rank"]
        trains = train_shape(outputs, size, rank).count() + train_shape(size, outputs, rank).count()
        scales = {"channel": outputs, "learned": 1}.get(self.options["scaling"], 0)
        return trains + size + outputs + scales
