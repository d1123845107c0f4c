"""`predict` leaves its answers in a file: a row for each example, in the data's order, whatever returned them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import BasePredictionWriter
from talkers import PROMPTS, make_base
from torch import Tensor
from torch.utils.data import DataLoader
from tuning import python

from lightning_peft.callbacks import Steer
from lightning_peft.cli import main
from lightning_peft.data.batches import as_dataset, padded
from lightning_peft.generation import AdaptedModel, PredictionWriter, answers, load
from lightning_peft.models import CausalLM, Seq2SeqLM

NEW = 6


def trainer(*callbacks: L.Callback, folder: Path) -> L.Trainer:
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, **quiet)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loader(rows: Sequence[dict[str, Any]], tokenizer: Any, size: int = 2) -> DataLoader:
    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ends = {"prompt_end": torch.tensor([row["prompt_end"] for row in batch])} if "prompt_end" in batch[0] else {}
        return padded([{n: v for n, v in row.items() if n != "prompt_end"} for row in batch], tokenizer) | ends

    return DataLoader(as_dataset(list(rows)), batch_size=size, collate_fn=collate)


@pytest.mark.parametrize("kind", ["prompts", "prompt_end", "labels"])
def test_prompts_are_answered_under_the_adapter_up_to_where_answers_begin(
    talker: Path, tmp_path: Path, kind: str
) -> None:
    module = CausalLM(str(talker / "base"))
    rows = []
    for prompt in PROMPTS:
        ids = module.tokenizer(prompt)["input_ids"]
        more = [] if kind == "prompts" else module.tokenizer(" It is")["input_ids"]
        row: dict[str, Any] = {"input_ids": ids + more}
        row |= {"labels": [-100] * len(ids) + more} if kind == "labels" else {}
        rows.append(row | ({"prompt_end": len(ids) - 1} if kind == "prompt_end" else {}))
    writer = PredictionWriter(max_new_tokens=NEW)
    run = trainer(Steer(talker / "edit"), writer, folder=tmp_path)
    run.predict(module, loader(rows, module.tokenizer))
    expected = answers(load(talker / "edit"), PROMPTS, max_new_tokens=NEW)
    assert writer.written == tmp_path / "predictions.jsonl"
    assert rows_of(writer.written) == [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, expected, strict=True)]
    logits = module.predict_step({"input_ids": torch.tensor([[3, 4]])}, 0)
    assert logits.shape == (1, 2, module.backbone.config.vocab_size), "afterwards it predicts as it did"


def test_an_encoder_decoder_answers_whole_prompts(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = Seq2SeqLM(str(make_base(tmp_path / "base", tiny_tokenizer, "t5")))
    ids = [module.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    writer = PredictionWriter(tmp_path / "own.jsonl", max_new_tokens=NEW)
    trainer(writer, folder=tmp_path).predict(module, loader(rows, module.tokenizer))
    expected = answers(AdaptedModel(module.backbone, module.tokenizer), PROMPTS, max_new_tokens=NEW)
    assert [row["answer"] for row in rows_of(tmp_path / "own.jsonl")] == expected


class Labelled(NamedTuple):
    text: str
    score: float


class Returning(L.LightningModule):
    """Returns for each batch what it was given."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.returned(batch)


@pytest.mark.parametrize(
    ("returned", "first"),
    [
        (lambda batch: [f"number {int(n)}" for n in batch], {"answer": "number 0"}),
        (lambda batch: [Labelled("yes", 0.5) for _ in batch], {"answer": "yes", "score": 0.5}),
        (lambda batch: batch * 2, {"prediction": 0}),
        (lambda batch: torch.stack([batch / 2, batch], 1), {"prediction": [0.0, 0.0]}),
        (lambda batch: [float(n) for n in batch], {"prediction": 0.0}),
    ],
)
def test_what_another_module_returns_is_written_in_order(returned: Any, first: dict[str, Any], tmp_path: Path) -> None:
    writer = PredictionWriter()
    trainer(writer, folder=tmp_path).predict(Returning(returned), DataLoader(as_dataset(list(range(5))), batch_size=2))
    rows = rows_of(tmp_path / "predictions.jsonl")
    assert len(rows) == writer.count == 5 and rows[0] == first


@pytest.mark.parametrize(
    "returned", [lambda batch: torch.zeros(len(batch), 2, 3), lambda batch: None, lambda b: {1: 2}]
)
def test_what_is_no_row_an_example_is_not_written(returned: Any, tmp_path: Path) -> None:
    writer = PredictionWriter()
    trainer(writer, folder=tmp_path).predict(Returning(returned), DataLoader(as_dataset(list(range(5))), batch_size=2))
    assert writer.written is None and writer.skipped is not None and "predict_step returns" in writer.skipped
    assert not list(tmp_path.glob("*.jsonl"))


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(talker: Path, tmp_path: Path) -> list[str]:
    """`predict` of questions in a file, with a saved edit on."""
    data = tmp_path / "questions.jsonl"
    rows = [{"question": prompt, "right": "It is", "wrong": "It"} for prompt in ("Who is he?", "What", "It", "Q")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    init: dict[str, Any] = {"path": str(data), "batch_size": 2, "val_fraction": 0.5, "chat": False}
    config = {
        "model": {"class_path": "CausalLM", "init_args": {"pretrained": str(talker / "base")}},
        "data": {"class_path": "Choices", "init_args": init},
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {"class_path": "lightning_peft.callbacks.Steer", "init_args": {"adapter": str(talker / "edit")}}
            ],
        },
    }
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(config))
    return ["predict", "--config", str(tmp_path / "predict.yaml")]


@pytest.mark.parametrize("named", [[], ["--predictions", "{}/own.jsonl"], ["--predictions={}/own.jsonl"]])
def test_predict_writes_a_file_and_says_where(
    recipe: list[str], talker: Path, tmp_path: Path, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*recipe, *(option.format(tmp_path) for option in named)])
    path = tmp_path / ("own.jsonl" if named else "predictions.jsonl")
    assert f"Wrote 2 answers or predictions to {path}." in capsys.readouterr().out
    rows = rows_of(path)
    expected = answers(load(talker / "edit"), [row["prompt"] for row in rows], max_new_tokens=256)
    assert [row["answer"] for row in rows] == expected and len({row["prompt"] for row in rows}) == 2


class Silent(BasePredictionWriter):
    """A writer of somebody's own."""

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(self, *_: Any) -> None:
        pass


def test_another_writer_is_left_to_itself(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*recipe, f"--trainer.callbacks+={__name__}.Silent"])
    assert "Wrote" not in capsys.readouterr().out and not (tmp_path / "predictions.jsonl").exists()


def test_rows_without_prompts_are_a_sentence(talker: Path, tmp_path: Path, recipe: list[str]) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"It is {n}"}) + "\n" for n in range(4)))
    given = ["--data", "Texts", f"--data.path={tmp_path / 'texts.jsonl'}"]
    with pytest.raises(SystemExit, match=r"texts\.jsonl has no prompts, so there is nothing to predict\.$"):
        main([*recipe, *given])


def test_help_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "--predictions PATH" in capsys.readouterr().out


TWO = """
import sys
import lightning as L
import torch
from torch.utils.data import DataLoader
from lightning_peft.generation import PredictionWriter

class Doubling(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def predict_step(self, batch, batch_idx):
        return batch * 2

if __name__ == "__main__":
    writer = PredictionWriter(sys.argv[1])
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, callbacks=[writer])
    trainer.predict(Doubling(), DataLoader(list(range(7)), batch_size=2), return_predictions=False)
"""


def test_two_processes_write_one_file_in_the_datas_order(tmp_path: Path) -> None:
    python(TWO, tmp_path / "two.jsonl")
    assert [row["prediction"] for row in rows_of(tmp_path / "two.jsonl")] == [0, 2, 4, 6, 8, 10, 12]
    assert [path.name for path in tmp_path.iterdir()] == ["two.jsonl"]
