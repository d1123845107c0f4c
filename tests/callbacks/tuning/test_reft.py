"""LoReFT, DiReFT and NoReFT as callbacks: on prompts they obey the laws, and what cannot be is one sentence."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from parity.with_pyreft import adapted, numbers
from tiny_models import tiny
from torch import Tensor, nn

from lightning_peft import adapters
from lightning_peft.callbacks import DiReFT, LoReFT, NoReFT
from lightning_peft.testing import check_adaptation
from lightning_peft.testing.architectures import ARCHITECTURES
from lightning_peft.testing.models import rough

# a citizen's calls are made without a batch, which alone says where prompts end
LAWS = [
    "identity",
    "frozen",
    "off",
    "merge",
    "round trip",
    "complete",
    "padding",
    "causality",
    "cache",
    "alive",
    "count",
]


class Prompts(L.LightningModule):
    """A language model on batches that say where their prompts end."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone = rough(kind)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        return self.backbone(input_ids=batch["input_ids"], attention_mask=mask, position_ids=places).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch)[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [LoReFT(r=2), DiReFT(r=2, share_weights=False, positions="prompt[0:2]+prompt[-2:]")])
def test_prompts_obey_the_laws(kind: str, method: LoReFT) -> None:
    batches: list[Any] = [batch | {"prompt_end": torch.tensor([3, 2, 3])} for batch in ARCHITECTURES[kind].batches]
    method.backbone = "backbone"

    def count(module: L.LightningModule) -> int:
        return 3 * (2 * 2 * 32 + 2) * (1 if method.share_weights else 2)

    outcomes = check_adaptation(lambda: Prompts(kind), method, batches, count=count, laws=LAWS)
    assert [outcome.law for outcome in outcomes if outcome.holds is None] == ["merge"]


@pytest.mark.parametrize("case", ["loreft", "loreft_apart", "noreft", "direft", "nodireft_apart"])
@torch.no_grad()
def test_generation_writes_what_pyreft_writes_with_and_without_cache(case: str) -> None:
    model, prompt = adapted(case), numbers()["input_ids"][:1, :7]
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    for cached in (True, False):
        assert torch.equal(model.generate(prompt, use_cache=cached, **options), numbers()[f"{case}.written"])


class Holder(L.LightningModule):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def config_of(callback: LoReFT, kind: str = "llama") -> Any:
    module = Holder(tiny(kind))
    callback.apply(module)
    return adapters(module).parts[0].config


def test_each_method_has_its_form_and_layers_are_chosen() -> None:
    forms = [
        (c.orthogonal, c.subtract) for c in map(config_of, (LoReFT(), NoReFT(), DiReFT(), DiReFT(orthogonal=True)))
    ]
    assert forms == [(True, True), (False, True), (False, False), (True, False)]
    assert config_of(LoReFT(layers=[0, 2])).target_modules == ["model.layers.0", "model.layers.2"]
    assert config_of(LoReFT(layers="1:")).target_modules == ["model.layers.1", "model.layers.2"]


def test_an_encoder_decoder_is_edited_everywhere_or_in_the_answer_of_its_decoder() -> None:
    with pytest.raises(ValueError, match=r"is in its encoder, .* 'prompt\[0:7\]' tokens are unknown there"):
        config_of(LoReFT(), "t5")
    with pytest.raises(ValueError, match="choose layers of the decoder"):
        config_of(LoReFT(positions="answer[0:2]", layers=[0]), "t5")
    assert len(config_of(LoReFT(positions="all"), "t5").target_modules) == 6
    answers = config_of(LoReFT(positions="answer[0:2]"), "t5").target_modules
    assert answers == [f"decoder.block.{number}" for number in range(3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "zeros"}, 'init must be "identity" or "paper", got \'zeros\''),
        ({"positions": "f7+l7"}, "positions must be one of all, prompt, answer, generated.* got 'f7'"),
        ({"positions": "all[-3:]"}, "are counted from the end of a text"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoReFT(**arguments)


def test_an_activation_needs_the_authors_start_where_something_is_subtracted() -> None:
    with pytest.raises(ValueError, match='init_reft_weights="paper"'):
        config_of(LoReFT(act_fn="relu"))
    method = LoReFT(act_fn="relu", init="paper")
    assert "identity" in method.exempt and config_of(method).activation == "relu"
    assert "identity" not in DiReFT(act_fn="relu").exempt and config_of(DiReFT(act_fn="relu")).activation == "relu"
