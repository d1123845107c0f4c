"""IST: a step moves the adapters of the blocks drawn and no other, and the importance that draws them is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tuning import QUIET, Classifier, Language, fit, moved, one_sentence, same, texts, trainer, weights

from lightning_peft import adapters, export_checkpoint, load_adapter
from lightning_peft.callbacks import (
    IA3,
    IST,
    PEFT,
    AdaLoRA,
    AdapterEMA,
    BitFit,
    Compacter,
    Composite,
    LoRA,
    PromptTuning,
)
from lightning_peft.fitting.block_adapters import by_block, suppressed
from lightning_peft.stack.adapter_files.folder import AdapterError

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

HARMFUL, HELPFUL = 3, 8


class Residual(nn.Module):
    """`[B, 8] -> [B, 8]`, which passes its input on until it is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Blocks(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Regression(L.LightningModule):
    """Blocks fitted to a target; a head stands beside them where it is asked for."""

    def __init__(self, blocks: int = 12, rate: float = 0.05, head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.rate = Blocks(blocks), rate
        self.head = nn.Linear(8, 8) if head else nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.error = torchmetrics.MeanSquaredError()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        output = self.dropout(self.head(self.net(batch[0])))
        self.log("train_error", self.error(output.detach(), batch[1]))
        return nn.functional.mse_loss(output, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.rate, weight_decay=0.1)


def rows(count: int = 64, seed: int = 1) -> DataLoader:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(inputs, inputs.roll(1, 1)), 4)


def ist(method: Any = None, **options: Any) -> IST:
    return IST(method or LoRA(r=2), **({"backbone": "net", "score_every_n_steps": 2, "seed": 3} | options))


def train(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    torch.manual_seed(5)
    ckpt_path = options.pop("ckpt_path", None)
    made = trainer(*callbacks, **({"max_steps": 6} | options))
    made.fit(module, rows(), ckpt_path=ckpt_path)
    return made


class Noted(L.Callback):
    """Which blocks each step moved, and which were drawn for it."""

    def __init__(self, callback: IST) -> None:
        self.callback = callback
        self.moved: list[set[int]] = []
        self.drawn: list[set[int]] = []
        self.outside: list[set[str]] = []
        self.flags: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.step, self.before = trainer.global_step, weights(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > self.step:
            names = {name for name in moved(self.before, weights(pl_module)) if not name.startswith("error.")}
            inside = {name for name in names if ".blocks." in name}
            self.moved.append({int(name.split(".")[2]) for name in inside})
            self.outside.append(names - inside)
            self.drawn.append(set(self.callback.drawn))
        self.flags.append(all(p.requires_grad for n, p in pl_module.named_parameters() if "lora_" in n))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_moves_the_adapters_of_exactly_a_quarter_of_the_blocks(freeze: bool, accumulate: int) -> None:
    module, callback = Regression(head=True), ist(freeze=freeze)
    noted = Noted(callback)
    train(module, callback, noted, max_steps=8, accumulate_grad_batches=accumulate, gradient_clip_val=0.1)
    assert len(noted.moved) == 8 and all(len(blocks) == 3 for blocks in noted.moved)
    assert noted.moved == noted.drawn and len({tuple(sorted(blocks)) for blocks in noted.drawn}) > 4
    assert all(outside == {"head.weight", "head.bias"} for outside in noted.outside)
    assert all(noted.flags)  # whoever saves or averages sees all that is trained


def test_freezing_the_others_gives_the_same_weights_and_computes_no_gradients_for_them() -> None:
    def fitted(freeze: bool, norm: list[float]) -> dict[str, Tensor]:
        class Norms(L.Callback):
            def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                norm.append(sum(p.grad is not None for n, p in pl_module.named_parameters() if "lora_" in n))

        module = Regression()
        train(module, ist(freeze=freeze), Norms(), gradient_clip_val=0.05, accumulate_grad_batches=2)
        return weights(module)

    everywhere: list[float] = []
    drawn: list[float] = []
    assert same(fitted(False, everywhere), fitted(True, drawn))
    assert set(everywhere) == {24} and set(drawn) == {6}


def test_only_what_was_drawn_counts_in_the_norm_that_is_clipped() -> None:
    clipped: list[int] = []

    class Norm(Regression):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            clipped.append(sum(parameter.grad is not None for parameter in self.parameters()))

    train(Norm(), ist(), max_steps=3)
    assert clipped == [6, 6, 6]


def planted(seed: int, steps: int) -> IST:
    """IST on blocks one of whose adapters adds an error, one what the target wants, the others next to nothing."""
    module, callback = Toy(), IST(LoRA(r=1, alpha=1), backbone="net", score_every_n_steps=1, seed=seed)
    callback.apply(module)
    generator = torch.Generator().manual_seed(seed)
    stack = adapters(module)
    for name, value in stack.live(stack["lora"]).items():
        block = int(name.split(".")[1])
        value.zero_()
        if "lora_A" in name:
            value[0, 0 if block in (HARMFUL, HELPFUL) else 3] = 1.0
        elif block == HARMFUL:
            value[1, 0] = 2.5
        elif block == HELPFUL:
            value[2, 0] = 2.0
        else:
            value.copy_(0.02 * torch.randn(value.shape, generator=generator))
    inputs = torch.randn(16 * steps, 8, generator=generator)
    targets = inputs.clone()
    targets[:, 2] += 2.0 * inputs[:, 0]
    # a batch is scored before the step it is trained on, and nothing before the first step
    trainer(callback, max_steps=steps + 1).fit(module, DataLoader(TensorDataset(inputs, targets), 16))
    return callback


class Plain(Regression):
    """Without dropout, whose random numbers no checkpoint holds."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


class Numbered(Plain):
    """Whose rows follow from the number of the batch: Lightning begins an epoch's data anew where it resumes."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(batch_idx))
        return super().training_step([inputs, inputs.roll(1, 1)], batch_idx)


class Toy(Plain):
    """Its adapters stay as they were planted."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("seed", range(20))
def test_ten_scorings_find_the_block_that_harms(seed: int) -> None:
    assert int(planted(seed, 10).importance.argmax()) == HARMFUL


@pytest.mark.sampled(20)
@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_scorings_find_the_block_that_helps_too(seed: int) -> None:
    scores = planted(seed, 100).importance
    assert (int(scores.argmax()), int(scores.argmin())) == (HARMFUL, HELPFUL)
    assert scores[HARMFUL] > 3 and scores[HELPFUL] < -2


def test_where_all_losses_are_equal_no_importance_changes() -> None:
    class Constant(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return 1.5 + 0.0 * self.net(batch[0]).sum()

    callback = ist(score_every_n_steps=1)
    train(Constant(), callback)
    assert torch.equal(callback.importance, torch.zeros(12, dtype=torch.float64))


def test_uniform_sampling_never_reads_importance_and_never_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("read")

    for name in ("draw_trained", "draw_suppressed", "updated", "quiet_loss"):
        monkeypatch.setattr(f"lightning_peft.callbacks.tuning.ist.{name}", refuse)
    callback = ist(sampling="uniform", score_every_n_steps=1)
    noted = Noted(callback)
    train(Regression(), callback, noted)
    assert len(callback.importance) == 0 and all(len(blocks) == 3 for blocks in noted.moved)
    with pytest.raises(AssertionError, match="read"):
        train(Regression(), ist())


def test_scoring_leaves_no_trace() -> None:
    """Scalings, modes, metrics, random numbers and what is logged are those of a training that is never scored."""
    scalings: list[dict[str, Any]] = []

    class Scalings(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            scaled = {n: dict(m.scaling) for n, m in pl_module.named_modules() if hasattr(m, "scaling")}
            modes = {name: part.training for name, part in pl_module.named_modules()}
            metric = (pl_module.error.metric_state, pl_module.error.update_count, torch.get_rng_state().sum())
            scalings.append({"scaled": scaled, "modes": modes, "metric": str(metric)})

    patterned = peft.LoraConfig(r=2, target_modules=["linear"], alpha_pattern={"blocks.1.linear": 7}, lora_alpha=1)
    for every in (1, 100):
        # no share of the blocks is drawn by importance here, so that both trainings are the same
        callback = ist(PEFT(patterned), share=1.0, score_every_n_steps=every)
        module = Regression()
        train(module, callback, Scalings())
        scalings.append({"weights": {n: v.sum().item() for n, v in weights(module).items()}})
        assert (every == 1) == bool(callback.importance.abs().sum() > 0)
    half = len(scalings) // 2
    assert scalings[:half] == scalings[half:]
    assert scalings[0]["scaled"]["net.blocks.1.linear"] == {"default": 3.5}


def test_layers_without_a_scaling_are_turned_down_towards_where_they_start() -> None:
    module, callback = Language(), IA3()
    callback.apply(module)
    stack = adapters(module)
    blocks = by_block(stack, ("ia3",))
    with torch.no_grad():
        for block in blocks:
            for parameter in block.parameters.values():
                parameter.normal_()
    before = weights(module)
    with suppressed(stack, ("ia3",), blocks[1:2], 0.25):
        during = weights(module)
    changed = moved(before, during)
    assert changed == {f"model.{name}" for name in blocks[1].parameters}
    assert all(torch.allclose(during[name], 1 + 0.25 * (before[name] - 1)) for name in changed)
    assert same(before, weights(module))


def test_a_training_that_is_resumed_is_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole, callback = Numbered(), ist(score_every_n_steps=3)
    train(whole, callback, saved, max_steps=8, enable_checkpointing=True, accumulate_grad_batches=2)
    for step in (2, 3, 5):
        again, continued = Numbered(), ist(score_every_n_steps=3, seed=99)
        path = tmp_path / f"step={step}.ckpt"
        train(again, continued, max_steps=8, accumulate_grad_batches=2, ckpt_path=path)
        assert same(weights(whole), weights(again))
        assert torch.equal(callback.importance, continued.importance) and callback.drawn == continued.drawn
    with pytest.raises(AdapterError) as error:
        train(Numbered(), ist(LoRA(r=2, layers=[0, 1])), ckpt_path=tmp_path / "step=3.ckpt")
    assert one_sentence(str(error.value))


def test_it_is_the_methods_adapter_in_every_file(tmp_path: Path) -> None:
    module = Language()
    callback = IST(LoRA(r=3, variant="dora", name="mine", layers=[0, 2]), train_head=False, score_every_n_steps=1)
    assert (callback.name, callback.names, callback.method.train_head) == ("mine", ("mine",), False)
    fit(module, callback, AdapterEMA(0.5)).save_checkpoint(tmp_path / "some.ckpt")
    folder = export_checkpoint(tmp_path / "some.ckpt", tmp_path / "folder")
    config = peft.PeftConfig.from_pretrained(folder if isinstance(folder, Path) else tmp_path / "folder")
    assert isinstance(config, peft.LoraConfig) and (config.r, config.use_dora) == (3, True)
    fresh = Language()
    load_adapter(fresh, tmp_path / "folder")
    ids = next(iter(texts()))[0]
    assert torch.equal(fresh.eval().model(ids).logits, module.eval().model(ids).logits)
    plain = Language()
    fit(plain, LoRA(r=3, variant="dora", name="mine", layers=[0, 2]), max_steps=1)
    assert weights(plain).keys() == weights(module).keys()


BIASES = BitFit(add_missing=True)


@pytest.mark.parametrize(
    "method",
    [IA3(), BIASES, Compacter(reduction=2), LoRA(r=2, variant="dora"), Composite({"a": LoRA(r=1), "b": BIASES})],
    ids=lambda method: type(method).__name__,
)
def test_it_goes_around_any_method_that_adapts_blocks(method: Any) -> None:
    module, callback = Language(), IST(method, score_every_n_steps=1, freeze=True)
    fit(module, callback, max_steps=4)
    assert len(callback.blocks) == 3 and callback.importance.abs().sum() > 0


def test_importance_is_logged_at_each_scoring_and_told_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, callback, logger = Language(), IST(LoRA(r=2), score_every_n_steps=2, report=True), CSVLogger(tmp_path)
    fit(module, callback, max_steps=5, logger=logger)
    header, *lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert header.count("importance/model.layers.") == 3
    scored = [line for line in lines if line.split(",")[header.split(",").index("importance/model.layers.0")]]
    assert len(scored) == 2
    assert "matter most: model.layers." in capsys.readouterr().out


class ByHand(Regression):
    """Optimizes by hand, with the gradient kept until the batch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
        optimizer.step()


def test_a_module_that_optimizes_by_hand_is_drawn_for_but_not_scored() -> None:
    callback = ist(sampling="uniform")
    noted = Noted(callback)
    train(ByHand(), callback, noted)
    assert noted.moved == noted.drawn and all(len(blocks) == 3 for blocks in noted.moved)
    with pytest.raises(ValueError, match="optimizes by hand") as error:
        train(ByHand(), ist())
    assert one_sentence(str(error.value))


def test_what_cannot_be_done_is_one_sentence_at_the_start() -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: IST(sampling="random"), "sampling must be"),  # type: ignore[arg-type]
        (lambda: IST(share=0.0), "share must be in"),
        (lambda: IST(sets=1), "IST needs two sets"),
        (lambda: IST(AdaLoRA()), "AdaLoRA does so itself"),
        (lambda: IST(IST()), "IST does so itself"),
        (lambda: fit(Language(), IST(PromptTuning(2), sampling="uniform")), "stands in 0 of"),
        (lambda: fit(Language(), IST(LoRA(layers=[1]))), "stands in 1 of"),
        (lambda: fit(Language(), IST(PromptTuning(2))), "has no dial"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError) as error:
            make()
        assert message in str(error.value) and one_sentence(str(error.value))


def test_several_devices_cannot_be_left_waiting_for_frozen_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="freeze out, or use one device"):
        fit(Classifier(), ist(freeze=True))
