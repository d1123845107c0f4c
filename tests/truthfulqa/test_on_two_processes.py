"""Two processes measure what one does, whatever the sampler repeats so that each has as many batches.

`python test_on_two_processes.py MODEL FOLDER` runs every case on two processes and leaves what each found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_peft.callbacks import LoRA
from lightning_peft.models import CausalLM
from lightning_peft.truthfulqa import SampleWriter, SideEffects, TruthfulQADataModule, read_samples

ROOT = Path(__file__).parents[2]
LIMIT = 180  # seconds; idle, it takes about 12
CASES: dict[str, dict[str, Any]] = {
    # three batches of questions, two of simple ones, two of text: seven, so one is repeated
    "all": {"questions_per_batch": 4, "side_effects": SideEffects(tokens=192, capability=2, length=12)},
    "alone": {"questions_per_batch": 64},  # one batch, which both processes get
    "apart": {"questions_per_batch": 64, "side_effects": SideEffects(tokens=24, capability=0, length=12)},  # one each
}


class Batches(Callback):
    """Counts the batches this process was given."""

    def __init__(self) -> None:
        self.questions, self.count = 0, 0

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: dict[str, Any], *_: Any) -> None:
        self.count += 1
        self.questions += len(set(batch["group"].tolist())) if "mc2" in batch else 0


def evaluate(model: Path, folder: Path, devices: int) -> None:
    for case, arguments in CASES.items():
        module = CausalLM(str(model))
        LoRA(r=2, target_modules=["q_proj"]).apply(module)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        counted = Batches()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
            callbacks=[SampleWriter(folder / case), counted],
        )
        data = TruthfulQADataModule("package", limit=20, primer="", **arguments)
        logged = trainer.test(module, data, verbose=False)[0]
        torch.save((logged, counted.count, counted.questions), folder / f"{case}.{trainer.global_rank}")
        data.questions_per_batch, data.batch_size = 1, 4
        torch.save(trainer.validate(module, data, verbose=False)[0], folder / f"{case}.val.{trainer.global_rank}")


@pytest.fixture(scope="module")
def folders(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    model = tiny_folder("llama")
    evaluate(model, one, devices=1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(model), str(two)]
    with open(two / "log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the second process is in the first one's group
        log.seek(0)
        assert code == 0, log.read()[-5000:]
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_what_one_does(folders: tuple[Path, Path], case: str) -> None:
    one, batches, questions = torch.load(folders[0] / f"{case}.0")
    two = [torch.load(folders[1] / f"{case}.{rank}") for rank in range(2)]
    assert {"mc0", "mc1", "mc2", "mc3"} <= set(one)
    for logged, _, _ in two:
        assert logged == pytest.approx(one, abs=1e-5) and set(logged) == set(one)
    given = sum(count for _, count, _ in two)
    assert given == batches + batches % 2 and two[0][1] == two[1][1]
    repeated = sum(count for _, _, count in two) - questions
    assert repeated == {"all": 4, "alone": 10, "apart": 0}[case], "or nothing was there to be removed"
    assert [count for _, _, count in two] == {"all": [6, 8], "alone": [10, 10], "apart": [10, 0]}[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_validate_what_one_does(folders: tuple[Path, Path], case: str) -> None:
    """Two batches of answers, one of each of two questions, and what the case asks for; where that is an odd number,
    answers are repeated, and the loss alone counts them twice."""
    one = torch.load(folders[0] / f"{case}.val.0")
    assert {"val_loss", "val_mc0", "val_mc2"} <= set(one)
    two = [torch.load(folders[1] / f"{case}.val.{rank}") for rank in range(2)]
    assert two[0] == two[1] and set(two[0]) == set(one)
    if case == "apart":
        assert two[0].pop("val_loss") == pytest.approx(one.pop("val_loss"), rel=0.1)
    assert two[0] == {name: pytest.approx(value, abs=1e-5) for name, value in one.items() if name in two[0]}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("task", ["mc1", "mc2"])
def test_two_processes_write_each_sample_once(folders: tuple[Path, Path], case: str, task: str) -> None:
    one, two = (read_samples(folder / case / f"samples_truthfulqa_{task}.jsonl") for folder in folders)
    assert [sample["doc_id"] for sample in one] == [sample["doc_id"] for sample in two] and len(one) == 10
    for first, second in zip(one, two, strict=True):
        scores = [[float(response[0]) for response in sample["filtered_resps"]] for sample in (first, second)]
        assert scores[1] == pytest.approx(scores[0], abs=1e-4)
        assert first["doc_hash"] == second["doc_hash"] and first["arguments"] == second["arguments"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate(Path(sys.argv[1]), Path(sys.argv[2]), devices=2)
