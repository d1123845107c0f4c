"""Texts beyond the context window end in one sentence with the counts, before the first step, in no IndexError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import tiny
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft.backbone.window import ContextWindowError, ContextWindowWarning
from lightning_peft.callbacks import ITI, LoRA
from lightning_peft.editing import head_sites
from lightning_peft.editing.capture import Capture
from lightning_peft.editing.collect import capture_tokens
from lightning_peft.models import CausalLM, SequenceClassifier
from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule
from lightning_peft.truthfulqa.generation import AnswerGenerator
from lightning_peft.truthfulqa.judges import LanguageModelJudge

LEARNT = ["gpt2", "opt", "bert"]  # tables of 128 positions
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def rows(*lengths: int) -> dict[str, torch.Tensor]:
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    labels = torch.full((len(lengths), width), -100)
    for row, length in enumerate(lengths):
        labels[row, length - 1] = 7
    return {"input_ids": torch.full((len(lengths), width), 7), "attention_mask": mask, "labels": labels}


def capture(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    with Capture(model, head_sites(model)) as reader:
        return reader(batch["input_ids"], batch["attention_mask"])


def judge(model: nn.Module, tokenizer: Any, words: int) -> Any:
    made = LanguageModelJudge.__new__(LanguageModelJudge)
    made.model, made.tokenizer, made.kind, made.batch_size, made._accepts, made._yes = (
        model,
        tokenizer,
        "truth",
        2,
        {},
        3,
    )
    return made.score(["Who?", "Who?"], ["He is.", " it" * words])


@pytest.mark.parametrize("kind", LEARNT)
def test_what_reads_texts_refuses_what_has_no_position(kind: str, tiny_tokenizer: Any) -> None:
    model, fits, long = tiny(kind), rows(128, 5), rows(129, 128, 200, 3)
    jobs: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "2 of 4 choices": lambda batch: ChoiceScorer(model).score(**batch),
        "2 of 4 texts to read": lambda batch: capture(model, batch),
    }
    if kind != "bert":
        jobs["2 of 4 prompts with their answers"] = lambda batch: AnswerGenerator(model, tiny_tokenizer).write(
            batch["input_ids"].flip(1), batch["attention_mask"].flip(1), max_new_tokens=1
        )
    for said, job in jobs.items():
        job(fits)
        with pytest.raises(ContextWindowError, match=rf"^{said} .* than the 128 tokens .*; the longest has 200: "):
            job(long)
    texts = [[7] * n for n in (129, 128, 200, 3)]
    with pytest.raises(ContextWindowError, match=r"^2 of 4 texts to read"):
        capture_tokens(model, head_sites(model), texts)
    with pytest.raises(ContextWindowError, match=r"^1 of 2 answers to judge"):
        judge(model, tiny_tokenizer, 200)


@pytest.mark.parametrize(("new", "refused"), [(29, False), (30, True)])
def test_an_answers_last_token_is_not_read_again(tiny_tokenizer: Any, new: int, refused: bool) -> None:
    model = tiny("gpt2")
    model.generation_config.eos_token_id = None  # nothing ends it early
    generator, batch = AnswerGenerator(model, tiny_tokenizer), rows(100, 90)
    arguments = batch["input_ids"].flip(1), batch["attention_mask"].flip(1), "message"
    if not refused:
        assert len(generator.write(*arguments, max_new_tokens=new)) == 2
        return
    with pytest.raises(ContextWindowError, match=r"1 of 2 prompts with their answers .*the longest has 129"):
        generator.write(*arguments, max_new_tokens=new)
    with pytest.raises(IndexError):  # it is not refused in vain
        model.generate(torch.full((1, 100), 7), max_new_tokens=new, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def narrow(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A model with a window of 16 tokens, in a folder."""

    def folder(kind: str) -> str:
        model, path = tiny(kind), tmp_path_factory.mktemp(kind)
        model.config.max_position_embeddings = 16
        type(model)(model.config).save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
        return str(path)

    return folder


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("job", ["fit", "edit", "validate", "test", "predict"])
def test_a_trainer_says_how_many_texts_are_too_long_before_the_first_batch(
    narrow: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, kind: str, job: str
) -> None:
    module = CausalLM(narrow(kind))
    data = TruthfulQADataModule("package", limit=12, few_shot=0, train="statements" if job == "edit" else "answers")
    trainer = L.Trainer(callbacks={"fit": [LoRA(r=2)], "edit": [ITI(num_heads=2)]}.get(job, []), **QUIET)
    run = getattr(trainer, "fit" if job == "edit" else job)
    what = {"fit": "training texts", "edit": "training texts", "validate": "validation texts", "test": "test texts"}
    sentence = rf"^\d+ of \d+ {what.get(job, 'prompts with their answers')} are longer than the 16 tokens that "
    if kind == "llama":
        with pytest.warns(ContextWindowWarning, match=f"{sentence}LlamaForCausalLM was trained for"):
            run(module, datamodule=data)
        return
    monkeypatch.setattr(type(module.backbone), "forward", lambda *_, **__: pytest.fail("the model was called"))
    with pytest.raises(ContextWindowError, match=f"{sentence}{type(module.backbone).__name__} can read"):
        run(module, datamodule=data)


def test_other_peoples_data_is_refused_with_the_first_batch_that_is_too_long(
    tiny_folder: Callable[[str], Path],
) -> None:
    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            batch = rows(100 + 50 * i)
            return {"input_ids": batch["input_ids"][0], "labels": torch.tensor(1)}

    module = SequenceClassifier(str(tiny_folder("bert")), num_labels=2)
    with pytest.raises(
        ContextWindowError, match=r"^1 of 1 texts of a batch are longer than the 128 tokens that BertModel"
    ):
        L.Trainer(**QUIET).fit(module, DataLoader(Rows()))
