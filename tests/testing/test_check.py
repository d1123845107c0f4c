"""The kit finds what is broken: for every law an adaptation that breaks it, and one that obeys them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_peft import adapters
from lightning_peft.callbacks import LoRA
from lightning_peft.replaced import replaced
from lightning_peft.testing import LAWS, LawBroken, check_adaptation
from lightning_peft.testing.architectures import ARCHITECTURES, TinyModule

LLAMA = ARCHITECTURES["llama"]


class Leaky(LoRA):
    """Moves a norm of the base while it trains."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        pl_module.backbone.model.norm.weight.data.mul_(1.001)  # type: ignore[union-attr, operator]


class Bypassed(TinyModule):
    """Reads a matrix without calling the layer that holds it."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        attention = self.backbone.model.layers[-1].self_attn

        def bypass(*_: Any) -> None:
            attention.v_proj.forward = lambda x: nn.functional.linear(x, attention.v_proj.weight)

        attention.register_forward_pre_hook(bypass)


class Scratching(LoRA):
    """Leaves a trace in the base."""

    def apply(self, module: L.LightningModule) -> Any:
        parts = super().apply(module)
        module.backbone.model.norm.weight.data.mul_(1.001)  # type: ignore[union-attr, operator]
        return parts


class Littering(LoRA):
    """Leaves a hook on the base."""

    def apply(self, module: L.LightningModule) -> Any:
        module.backbone.model.norm.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
        return super().apply(module)


class Grasping(LoRA):
    """Does not give back a method of the Trainer."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        replaced(trainer, "save_checkpoint", lambda original, *args: original(*args))


class Shy(LoRA):
    """Declares that it cannot be merged, although it can."""

    exempt = {"merge": "nobody has tried"}  # noqa: RUF012


class Noisy(TinyModule):
    """Trains with noise that no checkpoint remembers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * torch.rand(())


class Losing(LoRA):
    """Has no key for one of its tensors, as soon as it is trained."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        injection = adapters(pl_module)[self.name].injection
        keys = injection.keys()
        lost = next(key for key in keys if "lora_A" in key)
        injection.keys = lambda: {k: v for k, v in keys.items() if k != lost}  # type: ignore[method-assign]


class Distracted(LoRA):
    """Takes what the model was last called with for what is being computed, whoever called it."""

    def apply(self, module: L.LightningModule) -> Any:
        parts, noted = super().apply(module), {}
        backbone: Any = module.backbone

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            noted["rows"] = len(kwargs["input_ids"])

        backbone.register_forward_pre_hook(note, with_kwargs=True)
        backbone.lm_head.register_forward_hook(lambda _, args, logits: logits.roll(noted["rows"], -1))
        return parts


class Forgetful(TinyModule):
    """Generates something else with a cache."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        generate = self.backbone.generate
        self.backbone.generate = lambda *a, use_cache=True, **k: generate(*a, use_cache=use_cache, **k) + use_cache


def mixing_rows(module: L.LightningModule, batch: Any) -> Tensor:
    logits = module(batch)
    return logits - logits.mean(0)


def seeing_the_future(module: L.LightningModule, batch: Any) -> Tensor:
    logits = module(batch)
    adapted = any("lora" in name for name, _ in module.named_modules())
    return logits + logits.mean(1, keepdim=True) if adapted else logits


def shy_of_peft(module: L.LightningModule, batch: Any) -> Tensor:
    """Something else as soon as peft's own model stands around the backbone."""
    logits = module(batch)
    return logits + ("base_model" in dict(module.backbone.named_children()))  # type: ignore[union-attr]


def lora(kind: type[LoRA] = LoRA, **options: Any) -> LoRA:
    return kind(**({"r": 2, "backbone": "backbone"} | options))


def check(callback: LoRA, make: Callable[[], L.LightningModule] = LLAMA.make_module, **options: Any) -> Any:
    return check_adaptation(make, callback, LLAMA.batches, **options)


def test_lora_obeys_every_law() -> None:
    outcomes = check(lora(), count=lambda _: 2 * 3 * (64 + 48))
    assert [outcome.law for outcome in outcomes] == list(LAWS)
    assert all(outcome.holds for outcome in outcomes)


@pytest.mark.parametrize(
    ("law", "broken", "message"),
    [
        ("identity", lambda: check(lora(init=False)), "untrained and base outputs differ by"),
        ("frozen", lambda: check(lora(Leaky)), "training moved 1 frozen tensors, the first is backbone.model.norm"),
        (
            "alive",
            lambda: check(lora(), lambda: Bypassed("llama")),
            "never reaches 2 trained parameters, the first is ",
        ),
        ("off", lambda: check(lora(Scratching)), "disabled and base outputs differ by"),
        ("merge", lambda: check(lora(Shy)), "merging it raised nothing"),
        ("round trip", lambda: check(lora(Scratching)), "loaded and saved outputs differ by"),
        ("complete", lambda: check(lora(Losing)), "do not fit: 1 tensors are missing"),
        ("padding", lambda: check(lora(), outputs=mixing_rows), "a row padded and alone differ by"),
        ("causality", lambda: check(lora(), outputs=seeing_the_future), "outputs before the changed tokens differ by"),
        ("cache", lambda: check(lora(), lambda: Forgetful("llama")), "other tokens are generated"),
        ("threads", lambda: check(lora(Distracted)), "a thread that generates beside another writes other tokens"),
        (
            "restored",
            lambda: check(lora(Littering)),
            "after the adapters were taken off, _forward_hooks[",
        ),
        ("restored", lambda: check(lora(Grasping)), "save_checkpoint is still replaced on an instance"),
        (
            "citizen",
            lambda: check(lora(), outputs=shy_of_peft),
            "PeftModel.from_pretrained: outputs loaded and those expected differ by",
        ),
        ("count", lambda: check(lora(), count=lambda _: 7), "672 parameters are trainable, the formula says 7"),
        ("resume", lambda: check(lora(), lambda: Noisy("llama")), "resumed tensors differ"),
    ],
)
def test_a_broken_law_is_found_and_said(law: str, broken: Callable[[], Any], message: str) -> None:
    with pytest.raises(LawBroken) as error:
        broken()
    (line,) = [line for line in str(error.value).splitlines() if line.startswith(f"  {law}: ")]
    assert message in line


def test_what_does_not_apply_says_why() -> None:
    of = ARCHITECTURES["convolutional"]
    outcomes = check_adaptation(of.make_module, lora(), of.batches)
    reasons = {outcome.law: outcome.reason for outcome in outcomes if outcome.holds is None}
    assert reasons == {
        "causality": "the batch holds no tokens",
        "cache": "the base model does not generate",
        "threads": "the base model does not generate",
        "count": "no formula was given",
    }


def test_a_module_that_is_never_the_same_is_refused() -> None:
    class Random(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"^Two calls of make_module gave different weights in net\.weight: fix its"):
        check_adaptation(Random, LoRA(r=1), [torch.ones(2, 2)])
