"""LoRA as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

import lightning as L
import torch
from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.targets import Layers, Within, beside_experts, choose_with_experts
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.data_init import look
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.stack.injection.eva import Inputs

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


_INITS = (True, False, "gaussian", "orthogonal", "mica", "eva", "pissa", "olora", "loftq")


class LoRA(AdapterCallback):
    """Low-rank adaptation: `y = W x + (alpha / r) B A x`, with W frozen and B zero at the start.

    Hu et al. 2021, arXiv:2106.09685. Trainable parameters: `r * (inputs + outputs)` for each adapted matrix.

    Args:
        r: the rank.
        alpha: the scaling is `alpha / r`.
        dropout: dropout on the input of A, in training.
        target_modules: names of the modules to adapt (or suffixes; a string is a regular expression). Default: peft's
            choice for the model's type, else every linear layer of the backbone, or every convolution of a net of
            those. `"all-linear"` is every linear layer whatever the type.
        layers: which blocks to adapt: numbers (0-based), or a rule such as `Layers(last=4)`; default all. Needs the
            backbone's blocks in a numbered list; each block that is named must exist.
        within: adapt only modules in `"attention"`, or only those in the `"mlp"`.
        variant: `"lora"`, `"rslora"` (scaling `alpha / sqrt(r)`), `"dora"` (magnitude and direction apart) or `"alora"`
            (it acts on the tokens from the last `invocation_tokens` on; causal language models).
        init: True (the paper's), `"gaussian"`, `"orthogonal"`, `"mica"` (B the weakest directions of W, and frozen), or
            `"eva"` (A the strongest directions of the layer's inputs, from training batches at the start of fit). These
            leave W alone; `"pissa"`, `"olora"` and `"loftq"` (on CUDA) take A and B out of it, so that the adapter
            cannot be switched off or taken out; loading does it again, on the pristine base.
        bias: `"none"`, `"all"` or `"lora_only"`: which biases are trained too.
        invocation_tokens: for `variant="alora"`: token ids.
        init_batches: for `init="eva"`: how many training batches to look at.
        target_parameters: names (or ends of names) of parameters to adapt besides, such as the fused experts of a
            mixture, `["experts.gate_up_proj", "experts.down_proj"]`; r is then each expert's rank. Default: the experts
            where `within="mlp"` asks for the feed-forward parts, or `"all-linear"` for those of some `layers`. Peft
            adapts parameters with `variant="lora"` or `"rslora"`, and without dropout.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: an argument out of its range; at fit start with `"eva"`, manual optimization or a layer that no
            batch reaches.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoRA
        >>> trainer = L.Trainer(callbacks=[LoRA(r=8, alpha=16)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "lora"
    law_examples: Mapping[str, LawExample] = {
        "LoRA": LawExample({"r": 2, "alpha": 4}),
        "rsLoRA": LawExample({"r": 2, "alpha": 4, "variant": "rslora"}),
        "DoRA": LawExample({"r": 2, "alpha": 4, "variant": "dora"}),
        "LoRA of the last layer's MLP": LawExample({"r": 2, "alpha": 4, "layers": Layers(last=1), "within": "mlp"}),
    }

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        variant: Literal["lora", "rslora", "dora", "alora"] = "lora",
        init: bool | str = True,
        bias: Literal["none", "all", "lora_only"] = "none",
        invocation_tokens: list[int] | None = None,
        init_batches: int = 16,
        target_parameters: list[str] | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if r < 1:
            raise ValueError(f"The rank r must be at least 1, got {r}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if variant not in ("lora", "rslora", "dora", "alora"):
            raise ValueError(f'variant must be "lora", "rslora", "dora" or "alora", got {variant!r}.')
        if (variant == "alora") != bool(invocation_tokens):
            raise ValueError('variant="alora" goes with invocation_tokens, and they with it.')
        if init not in _INITS and not str(init).startswith("pissa_niter_"):
            raise ValueError(f"init must be one of {', '.join(map(repr, _INITS))}, got {init!r}.")
        if init_batches < 1:
            raise ValueError(f"init_batches must be at least 1, got {init_batches}.")
        super().__init__(**options)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules, self.target_parameters = target_modules, target_parameters
        self.layers, self.within = layers, within
        self.variant, self.init, self.bias = variant, init, bias
        self.invocation_tokens, self.init_batches = invocation_tokens, init_batches
        if variant == "alora":
            self.exempt = {"merge": "it acts on some tokens only"}

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from peft import LoraConfig

        if self.init == "loftq" and not torch.cuda.is_available():
            raise ValueError('peft computes init="loftq" on CUDA alone, and there is none: use another init.')
        chosen = choose_with_experts(backbone, self.target_modules, self.target_parameters, self.layers, self.within)
        modules, parameters = beside_experts(backbone, *chosen)
        if parameters and (self.dropout or self.variant not in ("lora", "rslora")):
            raise ValueError(
                f"{parameters[0]} is adapted as a parameter, which peft can do without dropout and by the variants "
                f"lora and rslora alone, not with dropout={self.dropout} and variant={self.variant!r}: change these, "
                "or name target_modules without it."
            )
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=modules,
            target_parameters=parameters or None,
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            task_type="CAUSAL_LM" if self.variant == "alora" else None,
            alora_invocation_tokens=self.invocation_tokens,
            init_lora_weights=True if self.init == "eva" else self.init,  # type: ignore[arg-type]
            loftq_config={"loftq_bits": 4, "loftq_iter": 1} if self.init == "loftq" else {},
            bias=self.bias,
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        chosen = choose_with_experts(backbone, self.target_modules, self.target_parameters, self.layers, self.within)
        modules, experts = counts.shapes(backbone, *chosen)
        magnitudes = sum(outputs for _, outputs in modules) if self.variant == "dora" else 0
        return sum(self.r * (i + o) for i, o in modules) + magnitudes + sum(self.r * e * (i + o) for e, i, o in experts)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        assert self.stack is not None
        part = self.stack[self.name]
        if self.init == "eva" and "eva" not in part.record and trainer.ckpt_path is None:
            layers = list(part.injection.layers())
            inputs = Inputs([layer for layer in layers if self.name in layer.lora_A])
            with self.stack.disabled():
                batches = look(trainer, pl_module, inputs, self.init_batches)
            inputs.set(self.name)
            part.record["eva"] = {"batches": batches}
