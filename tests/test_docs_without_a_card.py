"""What the page on methods without a card says of peft's and of this package's under another name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TrainableTokensConfig
from test_docs import run
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tuning import QUIET, Language, fit, one_sentence, texts, trainer

from lightning_peft import AdapterError, adapters, load_adapter, save_adapter
from lightning_peft.callbacks import PEFT

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:.*")]

IDS = next(iter(texts()))[0]
IDS[0, 4:6] = torch.tensor([1, 2])  # the invocation of the page's activated LoRA, in one row


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return run("without-a-card.md", Path())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def written(model: Any) -> Tensor:
    return model.eval().generate(input_ids=IDS[:, :7], max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("activated", None), ("tokens", 3 * 32), ("tokens_and_lora", None), ("upper_blocks", None), ("one_vector", 64)],
)
def test_each_is_trained_saved_loaded_by_both_and_writes_the_same(
    name: str, parameters: int | None, page: dict[str, Any], tmp_path: Path
) -> None:
    module = Language()
    before = float(module.training_step([IDS], 0))
    trainer(copy.deepcopy(page[name]), max_steps=8, max_epochs=-1).fit(
        module, DataLoader(TensorDataset(IDS), batch_size=4)
    )
    assert float(module.eval().training_step([IDS], 0)) < before
    if parameters:
        assert sum(p.numel() for p in module.model.parameters() if p.requires_grad) == parameters
    expected, text = logits(module.model), written(module.model)
    save_adapter(module, tmp_path)
    ours, plain = Language().model, PeftModel.from_pretrained(Language().model, str(tmp_path))
    load_adapter(ours, tmp_path)
    for loaded in (ours, plain):
        assert torch.equal(logits(loaded), expected) and torch.equal(written(loaded), text)
    with adapters(module).disabled():
        assert torch.equal(logits(module.model), logits(Language().model))


def test_activated_lora_leaves_what_is_before_its_tokens_and_rows_without_them(page: dict[str, Any]) -> None:
    module, base = Language(), logits(Language().model)
    copy.deepcopy(page["activated"]).apply(module)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    changed = (logits(module.model) != base).any(-1)
    assert not changed[1:].any() and not changed[0, :4].any() and changed[0, 4:].all()
    with pytest.raises(ValueError, match="cannot be merged"):
        adapters(module).merge()


def test_a_training_in_which_nothing_invokes_the_adapter_is_warned_of(page: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"holds the invocation tokens \[1, 2\] one after another, so adapter 'lora'"):
        fit(Language(), copy.deepcopy(page["activated"]), max_steps=1)


def test_no_row_moves_but_those_of_the_trained_tokens(page: dict[str, Any]) -> None:
    module = Language()
    fit(module, copy.deepcopy(page["tokens"]), max_steps=4)
    expected = logits(module.model)
    adapters(module).merge()
    torch.testing.assert_close(logits(module.model), expected)
    rows = module.model.get_input_embeddings().base_layer.weight != Language().model.get_input_embeddings().weight
    assert rows.any(1).nonzero().flatten().tolist() == [3, 4, 5]


def test_rows_that_were_added_at_random_are_another_base(tmp_path: Path) -> None:
    def resized(seed: int) -> Language:
        module = Language()
        torch.manual_seed(seed)
        module.model.resize_token_embeddings(66)
        return module

    module = resized(1)
    fit(module, PEFT(TrainableTokensConfig(token_indices=[64, 65])), max_steps=2)
    save_adapter(module, tmp_path)
    load_adapter(resized(1).model, tmp_path)
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(resized(2).model, tmp_path)


@pytest.mark.parametrize("token", [9999, -1])
def test_a_token_that_the_vocabulary_has_not_is_one_sentence(token: int) -> None:
    with pytest.raises(ValueError, match=r"TrainableTokensConfig cannot .*out of bounds") as error:
        PEFT(TrainableTokensConfig(token_indices=[token])).apply(Language())
    assert one_sentence(str(error.value))


def test_no_block_below_the_upper_ones_has_an_adapter(page: dict[str, Any]) -> None:
    module = Language()
    copy.deepcopy(page["upper_blocks"]).apply(module)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained and all(".layers.2." in name for name in trained)


def test_one_vector_does_not_begin_at_the_base(page: dict[str, Any]) -> None:
    module, base = Language(), logits(Language().model)
    copy.deepcopy(page["one_vector"]).apply(module)
    assert 0 < float((logits(module.model) - base).abs().max()) < 0.01


def test_the_parameters_of_adapter_fusion_and_of_one_bottleneck_in_bert_base() -> None:
    width, blocks, size = 768, 12, 48
    assert 21e6 < blocks * (3 * width**2 + 2 * width) < 21.5e6
    assert 0.85e6 < blocks * (2 * width * size + width + size) < 0.95e6
