"""A fit that is stopped anywhere, once or twice, and resumed in new objects ends as the one that was not, bit for bit.

Hypothesis draws what is trained and how, and where it stops; `python tests/test_whole_fit.py 200` draws as
many.
"""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification
from tuning import QUIET, Net, trainer

from lightning_peft import load_from_checkpoint
from lightning_peft.callbacks import (
    IA3,
    IST,
    LTSFT,
    AdaLoRA,
    AdapterEMA,
    BitFit,
    Composite,
    DiffPruning,
    FullFineTuning,
    Houlsby,
    LoRA,
    LotteryTicket,
    SaRA,
)

pytestmark = [
    pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:The dirpath has changed", "error:The first of")
]

ROWS = 12
METHODS: dict[str, Callable[[], list[L.Callback]]] = {
    "LoRA": lambda: [LoRA(r=2, **WHERE)],
    "DoRA on all": lambda: [LoRA(r=2, variant="dora", target_modules="all-linear", **WHERE)],
    "FullFineTuning": lambda: [FullFineTuning(**WHERE)],
    "BitFit": lambda: [BitFit(**WHERE)],
    "Composite": lambda: [Composite({"low_rank": LoRA(r=2), "biases": BitFit()}, **WHERE)],
    "two callbacks": lambda: [LoRA(r=2, **WHERE), IA3(target_modules=IN_BOTH, feedforward_modules=IN_BOTH, **WHERE)],
    "three callbacks": lambda: [LoRA(r=2, **WHERE), LoRA(r=1, name="other", **WHERE), BitFit(**WHERE)],
    "LTSFT, in two phases": lambda: [LTSFT(density=0.1, full_steps=2, **WHERE)],
    "SaRA, with its second choice": lambda: [SaRA(density=0.2, progressive_iter=2, rank_min_dim=1, **WHERE)],
    "DiffPruning, in two phases": lambda: [DiffPruning(density=0.1, gate_steps=2, **WHERE)],
    "LotteryTicket, in three phases": lambda: [LotteryTicket(rounds=2, round_steps=1, **WHERE)],
    "AdaLoRA": lambda: [AdaLoRA(init_r=3, target_r=1, tinit=1, tfinal=1, delta_t=1, **WHERE)],
    "IST": lambda: [IST(LoRA(r=2), score_every_n_steps=1, **WHERE)],
    "IST, frozen": lambda: [IST(Houlsby(size=2, target_modules=IN_BOTH), "uniform", freeze=True, **WHERE)],
    "adapters, checkpointed": lambda: [Houlsby(size=2, target_modules=IN_BOTH, **WHERE)],
}
WHERE: dict[str, Any] = {"backbone": "net"}
IN_BOTH = r".*(blocks\.\d\.linear|output\.dense)"  # in the hand-written network and in BERT


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    method: str
    inside: bool  # the head stands inside the backbone
    ema: bool
    accumulate: int
    batches: int  # in an epoch
    epochs: int
    schedule: bool
    clip: float | None

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.batches // self.accumulate)


class Task(L.LightningModule):
    """Whose rows follow from the epoch and the number of the batch, so that data begin where training does."""

    def __init__(self, inside: bool, batches: int, schedule: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(1)
        self.inside, self.batches, self.schedule = inside, batches, schedule
        torch.manual_seed(0)
        if inside:
            sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
            self.net: nn.Module = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes, num_labels=3))
            self.rows = torch.randint(1, 20, (ROWS, 2, 5), generator=generator)
            torch.manual_seed(torch.seed())  # a head of its own in every process
            self.net.classifier.reset_parameters()
        else:
            self.net, self.head = Net(), nn.Linear(8, 3)
            self.rows = torch.randn(ROWS, 2, 1, 10, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits if self.inside else self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        row = (self.current_epoch * self.batches + batch_idx + 5 * self.global_rank) % ROWS
        return nn.functional.cross_entropy(self(self.rows[row]), torch.tensor([row % 3, 1]))

    def configure_optimizers(self) -> Any:
        made = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        if not self.schedule:
            return made
        return [made], [{"scheduler": torch.optim.lr_scheduler.StepLR(made, 1, 0.7), "interval": "step"}]


def fit(run: Run, folder: Path, ckpt_path: Path | None = None, **options: Any) -> tuple[Task, dict[str, Any]]:
    """Train, keeping a checkpoint of every step; the module and the last checkpoint. Options go to the Trainer."""
    torch.manual_seed(2)
    module = Task(run.inside, run.batches, run.schedule)
    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    average = [AdapterEMA(decay=0.5)] if run.ema else []
    fitting = trainer(
        *METHODS[run.method](),
        *average,
        every,
        enable_checkpointing=True,
        max_epochs=run.epochs,
        max_steps=-1,
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=run.clip,
        **options,
    )
    torch.manual_seed(3)
    nothing: Any = DataLoader(torch.zeros(run.batches, 1), batch_size=1)  # type: ignore[arg-type]
    fitting.fit(module, nothing, ckpt_path=ckpt_path, weights_only=True)
    assert fitting.global_step == run.steps
    fitting.save_checkpoint(folder / "last.ckpt")
    return module, torch.load(folder / "last.ckpt", weights_only=True)


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in a checkpoint, by its path."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: t for key, inner in items for name, t in tensors(inner, f"{path}/{key}").items()}


def same(whole: dict[str, Any], other: dict[str, Any]) -> None:
    """Two checkpoints hold the same weights, averages, masks, optimizer states and schedules, bit for bit."""
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        expected, found = tensors(whole[part]), tensors(other[part])
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
        assert expected.keys() == found.keys()


def check(run: Run, cuts: tuple[int, ...]) -> None:
    """Stop after each of these steps, resume in new objects, and compare with the run that was never stopped."""
    with tempfile.TemporaryDirectory() as made:
        module, whole = fit(run, Path(made, "whole"))
        folder = Path(made, "whole")
        for number, cut in enumerate(cuts):
            path, folder = folder / f"step={cut}.ckpt", Path(made, f"part {number}")
            _, last = fit(run, folder, path)
        same(whole, last)
        loaded = load_from_checkpoint(Task, folder / "last.ckpt").eval()
        assert torch.equal(loaded(loaded.rows[0]), module.eval()(module.rows[0])) or run.ema


RUNS = st.builds(
    Run,
    method=st.sampled_from(sorted(METHODS)),
    inside=st.booleans(),
    ema=st.booleans(),
    accumulate=st.integers(1, 3),
    batches=st.integers(1, 4),
    epochs=st.integers(3, 4),
    schedule=st.booleans(),
    clip=st.sampled_from([None, 0.1]),
)


def stops(run: Run) -> st.SearchStrategy[tuple[int, ...]]:
    """One stop or two. Lightning itself miscounts after a second one if both are at an epoch's last step."""
    once = st.tuples(st.integers(1, run.steps - 1))
    each = run.steps // run.epochs
    twice = [(a, b) for a, b in itertools.combinations(range(1, run.steps), 2) if each > 1 and (a % each or b % each)]
    return once | st.sampled_from(twice) if twice else once


FITS = RUNS.flatmap(lambda run: st.tuples(st.just(run), stops(run)))


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(FITS)
def test_a_stopped_fit_ends_as_one_that_was_not(drawn: tuple[Run, tuple[int, ...]]) -> None:
    check(*drawn)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_goes_on(method: str) -> None:
    """Stopped in the middle of an epoch."""
    run = Run(method, inside=True, ema=True, accumulate=2, batches=3, epochs=2, schedule=True, clip=None)
    check(run, (1,))


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    many = settings(max_examples=int(sys.argv[1]), deadline=None, suppress_health_check=list(HealthCheck))
    many(given(FITS)(lambda drawn: check(*drawn)))()
    print(f"{sys.argv[1]} fits end as those that were not stopped.")
