"""Head offsets trained from zero: how many, where, and that they are the second step of LoFiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close
from statements import Module, Statements
from statements import trainer as statements_trainer
from tiny_models import tiny
from torch import Tensor
from tuning import QUIET, Language, base_weights, fit, one_sentence

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import ITI, HeadOffsets, LayerOffsets

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

HEADS = [(0, 1), (1, 0), (2, 3)]


@pytest.mark.parametrize(("kind", "size"), [("llama", 8), ("wide_llama", 16), ("gpt2", 8), ("gpt_neox", 8), ("opt", 8)])
@pytest.mark.parametrize("heads", [None, HEADS])
def test_there_are_heads_times_head_dim_parameters_and_only_they_move(kind: str, size: int, heads: Any) -> None:
    module = Language(kind)
    before = base_weights(module)
    fit(module, HeadOffsets(heads=heads))
    count = 3 * 4 if heads is None else len(heads)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == count * size
    stack = adapters(module)
    assert all(value.any(1).all() for value in stack.tensors(stack["head_offsets"]).values())
    now = base_weights(module)
    assert all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("kind", "ends", "attentions"),
    [("bert", "attention.output.dense", 3), ("t5", "Attention.o", 3 + 2 * 3), ("vit", "o_proj", 3)],
)
def test_other_architectures_attentions_are_found_by_structure(kind: str, ends: str, attentions: int) -> None:
    config: Any = HeadOffsets().make_config(tiny(kind))
    assert len(config.target_modules) == attentions and config.head_dim == 8
    assert all(name.endswith(ends) for name in config.target_modules)


def test_untrained_it_changes_nothing_and_trained_it_is_saved_scaled_and_merged(tmp_path: Path, tokens: Tensor) -> None:
    module = Language("llama")
    base = module.model(input_ids=tokens).logits.detach()
    callback = HeadOffsets()
    callback.apply(module)
    assert torch.equal(module.model(input_ids=tokens).logits, base)
    fit(module, callback, max_steps=8)
    moved = module.model(input_ids=tokens).logits.detach()
    assert not close(moved, base, 1e-3)
    stack = adapters(module)
    stack.merge()
    assert close(module.model(input_ids=tokens).logits.detach(), moved)
    stack.scale(0.0)
    assert torch.equal(module.model(input_ids=tokens).logits, base)
    stack.scale(1.0)
    save_adapter(module, tmp_path)
    again = tiny("llama")
    load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=tokens).logits, moved)


@pytest.mark.parametrize("positions", ["answer", "generated"])
def test_offsets_of_answers_leave_what_comes_before_alone(positions: Any) -> None:
    module = Module()
    statements_trainer(HeadOffsets(positions=positions)).fit(module, Statements(truth=1).loader())
    stack = adapters(module)
    assert all(value.any() for value in stack.tensors(stack["head_offsets"]).values())
    with pytest.raises(ValueError, match='only positions="all" can be merged'):
        stack.merge()
    row = Statements().rows[0]
    ids, labels = row["input_ids"][None], row["labels"][None]
    moved = module.backbone(input_ids=ids, labels=labels).logits
    expected = tiny("llama")(input_ids=ids).logits
    first = 1 if positions == "answer" else 2
    assert torch.equal(moved[:, :first], expected[:, :first]) and not close(moved[:, first:], expected[:, first:], 1e-4)


def test_what_iti_computes_can_be_trained_further_on_the_same_heads() -> None:
    """Both are head offsets: the same tuner, computed or trained."""
    trained, computed = HeadOffsets(heads=HEADS), ITI(num_heads=3)
    module = Module()
    statements_trainer(computed).fit(module, Statements().loader())
    chosen = [
        (layer, head) for layer, heads in enumerate(adapters(module).parts[0].config.heads.values()) for head in heads
    ]
    assert type(adapters(module).parts[0].config) is type(trained.make_config(tiny("llama"))) and len(chosen) == 3


@pytest.mark.parametrize("callback", [HeadOffsets, LayerOffsets])
def test_answers_of_an_encoder_decoder_are_trained_in_its_decoder(callback: Any) -> None:
    module = Language("t5")
    fit(module, callback(positions="answer"))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("model.decoder.") for name in trained)
    assert any(parameter.any() for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "callback", [HeadOffsets(heads=[(0, 1)], positions="answer"), LayerOffsets(layers=[0, 3], positions="answer")]
)
def test_answers_in_an_encoder_are_one_sentence(callback: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^The answer of an encoder-decoder such as T5.* for 1 sites in its enc"
    ) as error:
        fit(Language("t5"), callback)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": [(0, 4)]}, "There is no head 4 in layer 0: the model has 3 layers of 4 heads."),
        ({"heads": [(3, 0)]}, "There is no head 0 in layer 3: the model has 3 layers of 4 heads."),
        ({"heads": []}, "heads must be pairs of a layer and a head, got []."),
        ({"positions": "some"}, 'positions must be "all", "answer" or "generated", got \'some\'.'),
    ],
)
def test_heads_that_are_not_there_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit(Language(), HeadOffsets(**options))
    assert message in str(error.value) and one_sentence(str(error.value))
