"""The callback that quantises a backbone before adapters are put on it."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_peft.backbone.quantization import Quantization, QuantType, mark, quantize
from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.fitting.find_backbone import building_hooks, find_backbone, forget, when_built


class Quantize(Callback):
    """Keep the backbone's linear layers in 4 or 8 bits (bitsandbytes), on CPU as on GPUs; adapters are trained on top.

    List it before the callback that adapts. Every `nn.Linear` (and GPT-2's `Conv1D`) of any module is replaced in
    place when the backbone is built, each weight moved to the Trainer's device as it is quantised; output embeddings,
    tied weights and heads of transformers models stay. A model that transformers has loaded with its own
    `BitsAndBytesConfig` is recognised, and its kind of quantisation checked. Dettmers et al. 2022, arXiv:2208.07339
    (int8); Dettmers et al. 2023, arXiv:2305.14314 (NF4, double quantisation).

    Args:
        quant_type: `"nf4"`, `"fp4"` or `"int8"`, see `Quantization`.
        double_quant: quantise the scales of 4-bit blocks as well: 4.127 instead of 4.5 bits a weight.
        compute_dtype: what 4-bit layers compute in, e.g. `"bfloat16"`; default, what they would compute in otherwise.
        threshold: of int8's outliers, see `Quantization`.
        skip_modules: names, or ends of names, of modules to leave in full precision.
        backbone: the submodule to quantise, found as by `AdapterOptions.backbone`.

    Raises:
        ValueError: at `setup`, in one sentence: it is listed after an adapter, the strategy shards weights, there is
            nothing to quantise, or the backbone is quantised in another way or has adapters on its full weights.
        ModuleNotFoundError: bitsandbytes is not installed.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoRA, Quantize
        >>> trainer = L.Trainer(callbacks=[Quantize("nf4"), LoRA(r=8)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    def __init__(
        self,
        quant_type: QuantType = "nf4",
        double_quant: bool = True,
        compute_dtype: str | None = None,
        threshold: float = 0.0,
        skip_modules: Sequence[str] | None = None,
        backbone: str | None = None,
    ) -> None:
        if isinstance(skip_modules, str):
            raise ValueError(f"skip_modules is a list of names, got {skip_modules!r}.")
        self.how = Quantization(quant_type, double_quant, compute_dtype, threshold)
        self.skip_modules = list(skip_modules or ())
        self.backbone = backbone
        self.quantized: list[str] = []  # names of the quantised layers, once they are

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, AdapterCallback):
                raise ValueError(
                    f"{type(callback).__name__} comes before Quantize and would adapt the full weights: put Quantize "
                    "first in the list of callbacks."
                )
        check_strategy(trainer)
        when_built(pl_module, self.backbone, lambda name: self.quantize(pl_module, name))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        forget(pl_module)

    def apply(self, module: L.LightningModule) -> list[str]:
        """Quantise now, without a Trainer, and return the names of the quantised layers."""
        name = find_backbone(module, self.backbone, final=not building_hooks(module))
        if name is None:
            raise ValueError(
                f"{type(module).__name__} may not have built its backbone yet: build it, then apply, or name it with "
                "the argument backbone."
            )
        return self.quantize(module, name)

    def quantize(self, module: nn.Module, backbone: str) -> list[str]:
        """Quantise one submodule of a module, or see that it is quantised as asked."""
        trainer = module._trainer if isinstance(module, L.LightningModule) else None
        device = None if trainer is None else trainer.strategy.root_device
        self.quantized = quantize(module.get_submodule(backbone), self.how, self.skip_modules, device)
        mark(module)  # the adapted backbone may be around the quantised one
        return self.quantized


def check_strategy(trainer: L.Trainer) -> None:
    """Raise `ValueError` where the Trainer would spread quantised weights over devices."""
    strategy = trainer.strategy
    shards = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    if shards or (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3):
        raise ValueError(
            f"{type(strategy).__name__} cannot shard weights quantised by bitsandbytes: use "
            'strategy="ddp", or do not quantise.'
        )
