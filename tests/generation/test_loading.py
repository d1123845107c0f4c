"""Whatever training, editing, exporting or merging leaves is loaded to talk to, and computes the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from talkers import PROMPTS, loaded, make_base

from lightning_peft import bake, load_adapter
from lightning_peft.callbacks import PEFT
from lightning_peft.generation import AdaptedModel, answers, load
from lightning_peft.models import CausalLM, SequenceClassifier
from lightning_peft.stack.adapter_files.merging import merge_pretrained

NEW = 6


def written(adapted: AdaptedModel) -> list[str]:
    return answers(adapted, PROMPTS, max_new_tokens=NEW)


def by_hand(base: Path, adapter: Path | None) -> list[str]:
    """What transformers' own `generate` writes, each prompt alone."""
    from transformers import AutoTokenizer

    model, tokenizer = loaded(base), AutoTokenizer.from_pretrained(base)
    if adapter is not None:
        load_adapter(model, adapter)
        model.eval()
    texts = []
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**encoded, do_sample=False, max_new_tokens=NEW)
        texts.append(tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.fixture(scope="module")
def checkpoint(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the LoRA in `talker`, as Lightning writes it."""
    from peft import LoraConfig

    from lightning_peft.stack.adapter_files.folder import read_folder
    from lightning_peft.stack.stack import adapters

    module = CausalLM(str(talker / "base"))
    config, tensors, _ = read_folder(talker / "lora")
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = None
    PEFT(config).apply(module)
    stack = adapters(module)
    stack.load_tensors(stack.parts[0], tensors, "the test")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    path = tmp_path_factory.mktemp("checkpoint") / "lora.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return path


@pytest.mark.parametrize("name", ["edit", "everywhere", "lora", "plain", "soft", "stack"])
def test_a_folder_answers_as_transformers_generates_with_it(talker: Path, name: str) -> None:
    adapted = load(talker / name)
    assert written(adapted) == by_hand(talker / "base", talker / name) != by_hand(talker / "base", None)
    with adapted.as_base():
        assert written(adapted) == by_hand(talker / "base", None)


def test_a_checkpoint_answers_as_the_folder_of_its_adapter_and_names_its_base(talker: Path, checkpoint: Path) -> None:
    adapted = load(checkpoint)
    assert adapted.name == str(talker / "base") and written(adapted) == written(load(talker / "lora"))


def test_merged_and_baked_models_answer_as_their_adapters(talker: Path, tmp_path: Path) -> None:
    merge_pretrained(talker / "lora", tmp_path / "merged", str(talker / "base"), "auto", verify=False)
    bake(loaded(talker / "base"), talker / "everywhere", tmp_path / "baked", verify=False)
    for name in ("merged", "baked"):
        shutil.copy(talker / "base" / "tokenizer.json", tmp_path / name)
        shutil.copy(talker / "base" / "tokenizer_config.json", tmp_path / name)
    assert written(load(tmp_path / "merged")) == written(load(talker / "lora"))
    whole = load(tmp_path / "baked")
    assert written(whole) == written(load(talker / "everywhere"))
    assert whole.parts == [] and whole.strengths() == {}
    for turn in (lambda: whole.scale(2.0), whole.enable, lambda: whole.as_base().__enter__()):
        with pytest.raises(ValueError, match=r"baked is a whole model without adapters: there is no dial"):
            turn()
    for given in ({"scale": 2.0}, {"base": talker / "base"}):
        with pytest.raises(ValueError, match=r"is a whole model and no adapter: leave the (scale|base) out\.$"):
            load(tmp_path / "baked", **given)


def test_an_encoder_decoder_answers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tiny_tokenizer, "t5")
    model = load(base).model
    adapted = AdaptedModel(model, tiny_tokenizer)
    expected = []
    for prompt in PROMPTS:
        ids = model.generate(**tiny_tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=NEW)
        expected.append(tiny_tokenizer.decode(ids[0], skip_special_tokens=True))
    assert written(adapted) == expected and any(expected)


def test_a_tokenizer_that_was_saved_beside_the_adapter_is_taken(talker: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(talker / "lora", tmp_path / "lora")
    own = AutoTokenizer.from_pretrained(talker / "base")
    own.chat_template = "{{ 'A: ' }}"
    own.save_pretrained(tmp_path / "lora")
    assert load(tmp_path / "lora").tokenizer.chat_template == "{{ 'A: ' }}"


# -- strength --------------------------------------------------------------------------------------------------------


def test_strength_is_each_parts_and_is_turned_back(talker: Path) -> None:
    adapted = load(talker / "stack", scale={"edit": 0.5})
    assert adapted.strengths() == {"lora": 1.0, "edit": 0.5}
    adapted.scale(2.0, "lora")
    adapted.enable(False)
    assert adapted.strengths() == {"lora": 0.0, "edit": 0.0} and written(adapted) == by_hand(talker / "base", None)
    adapted.enable()
    assert adapted.strengths() == {"lora": 2.0, "edit": 0.5}
    adapted.scale(1.0)
    assert written(adapted) == written(load(talker / "stack"))
    adapted.scale(0, "edit")
    assert written(adapted) == written(load(talker / "lora"))
    with pytest.raises(ValueError, match=r"^There is no adapter 'eidt'; the nearest names are edit\.$"):
        adapted.scale(1.0, "eidt")


def test_the_dial_of_a_tuned_adapter_is_its_scaling(talker: Path) -> None:
    adapted, reference = load(talker / "lora", scale=3.0), loaded(talker / "base")
    [part] = load_adapter(reference, talker / "lora")
    for layer in part.scaling:
        layer.scaling["default"] *= 3.0  # type: ignore[index, operator]
    ids = torch.arange(3, 20)[None]
    assert torch.equal(adapted.model(ids).logits, reference.eval()(ids).logits)


def test_a_method_without_a_dial_says_so_and_is_on_or_off(talker: Path) -> None:
    adapted = load(talker / "soft")
    on = written(adapted)
    with pytest.raises(
        ValueError, match=r"^Adapter 'default' \(PromptTuningConfig\) has no dial, it is on \(1\) or off"
    ):
        adapted.scale(2.0)
    adapted.scale(0)
    assert written(adapted) == by_hand(talker / "base", None)
    adapted.scale(1)
    assert written(adapted) == on


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_in_few_bits_is_talked_to(talker: Path, kind: Any) -> None:
    from lightning_peft.backbone.quantization import Quantization, quantize

    adapted = load(talker / "stack", quantize=kind)
    base = loaded(talker / "base")
    quantize(base, Quantization(kind))
    ids = torch.arange(3, 20)[None]
    assert written(adapted) and adapted.strengths() == {"lora": 1.0, "edit": 1.0}
    with adapted.as_base():
        assert torch.equal(adapted.model(ids).logits, base(ids).logits)


# -- what cannot be loaded -------------------------------------------------------------------------------------------


WRONG = {
    "nothing": ("nowhere", {}, "nowhere"),
    "no adapter": (".", {}, "is neither an adapter's folder"),
    "a vector for llama.cpp": ("edit.gguf", {}, "is a control vector for llama.cpp"),
    "another base": ("lora", {"base": "{other}"}, "was made for another base model"),
    "a base that is not there": ("lora", {"base": "nowhere"}, "nowhere is neither a folder with"),
    "no such dtype": ("lora", {"dtype": "float33"}, "dtype must be auto or name a torch dtype"),
    "no such device": ("lora", {"device": "tpu9"}, "There is no device 'tpu9' here"),
    "no number": ("lora", {"scale": float("nan")}, "The scale must be a finite number"),
    "no such part": ("stack", {"scale": {"iti": 1.0}}, "There is no adapter 'iti'"),
    "no tokenizer": ("lora", {"base": "{bare}"}, "has no tokenizer that can be loaded"),
    "no template": ("lora", {"base": "{plain}", "chat": True}, "has no chat template, being no chat model"),
}


@pytest.fixture(scope="module")
def others(talker: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("others")
    loaded(talker / "base").save_pretrained(folder / "bare")
    shutil.copytree(talker / "base", folder / "plain")
    (folder / "plain" / "chat_template.jinja").unlink()
    return {
        "other": make_base(folder / "other", tiny_tokenizer, "gpt2"),
        "bare": folder / "bare",
        "plain": folder / "plain",
    }


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_loaded_is_said(talker: Path, others: dict[str, Path], case: str) -> None:
    source, given, sentence = WRONG[case]
    options = {name: value.format(**others) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(talker / source, **options)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_whose_base_is_gone_says_who_named_it(talker: Path, tmp_path: Path) -> None:
    shutil.copytree(talker / "lora", tmp_path / "lora")
    config = (tmp_path / "lora" / "adapter_config.json").read_text().replace(str(talker / "base"), "/gone/base")
    (tmp_path / "lora" / "adapter_config.json").write_text(config)
    with pytest.raises(
        ValueError, match=r"^/gone/base is neither .* names it as its base: give another with --base\.$"
    ):
        load(tmp_path / "lora")


def test_an_adapter_for_a_sibling_is_loaded_where_one_insists(talker: Path, tmp_path: Path) -> None:
    sibling = loaded(talker / "base")
    with torch.no_grad():
        sibling.model.layers[0].mlp.up_proj.weight.add_(0.01)
    shutil.copytree(talker / "base", tmp_path / "sibling")
    sibling.save_pretrained(tmp_path / "sibling")
    with pytest.raises(ValueError, match="made for another base model"):
        load(talker / "lora", tmp_path / "sibling")
    with pytest.warns(UserWarning, match="made for another base model"):
        assert written(load(talker / "lora", tmp_path / "sibling", strict_base=False))


def test_what_does_not_write_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tiny_tokenizer, template=None)
    module = SequenceClassifier(str(base), num_labels=2)
    with pytest.raises(ValueError, match=r"^LlamaModel does not write text"):
        AdaptedModel(module.backbone, module.tokenizer)  # type: ignore[arg-type]
