"""What every tuning callback shares: frozen means frozen, nothing fails silently, and what the user is told."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from tuning import (
    QUIET,
    Block,
    Classifier,
    Language,
    base_weights,
    classifier,
    data_of,
    fit,
    moved,
    one_sentence,
    points,
    python,
    same,
    trainer,
    weights,
)

from lightning_peft import adapters
from lightning_peft.callbacks import PEFT, LoRA

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

METHODS = {
    "lora": peft.LoraConfig(r=2, target_modules=["linear"]),
    "ia3": peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["linear"], rank_dropout=0.1),
    "adapters of layer norm": peft.LNTuningConfig(target_modules=["norm"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["linear"]),
}


def lora(**options: Any) -> LoRA:
    return LoRA(**({"r": 2, "backbone": "net"} | options))


def head_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


# -- any method, any module -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_any_in_place_method_of_peft_trains(method: str) -> None:
    module = classifier()
    before = weights(module)
    made = trainer(PEFT(METHODS[method], backbone="net"), max_steps=1)
    made.fit(module, points())
    part = adapters(module)["default"]
    injected = {
        f"net.{name}": value.clone()
        for name, value in zip(
            adapters(module).keys(part).values(), adapters(module).tensors(part).values(), strict=True
        )
    }
    fit(module, PEFT(METHODS[method], backbone="net"))
    assert moved(injected, weights(module))
    frozen = {name for name in before if name.startswith("net.") and name in weights(module)} - set(injected)
    assert moved({name: before[name] for name in frozen}, weights(module)) == set()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_transformers_model_in_a_module_of_ones_own(kind: str) -> None:
    module = Language(kind)
    before = base_weights(module)
    made = trainer(LoRA(r=2), max_steps=8)
    batch = next(iter(data_of(module)))
    with torch.no_grad():
        first = module.training_step(batch, 0)
    made.fit(module, data_of(module), data_of(module))
    assert made.callback_metrics["val_loss"] < first
    assert same(before, base_weights(module))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=2), "transformers model that takes inputs_embeds, and Net"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2), "transformers model that takes past_key_values, and N"),
        (lambda: peft.AdaptionPromptConfig(), "knows the attention of llama, mistral, gpt2, not that of this module"),
        (lambda: peft.XLoraConfig(), "needs a transformers model whose config has use_cache=False"),
    ],
)
def test_what_a_backbone_cannot_have_is_one_sentence(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fit(Classifier(), PEFT(config(), backbone="net"))
    assert one_sentence(str(error.value))


def test_the_configuration_given_is_not_changed() -> None:
    config = peft.LoraConfig(r=2, target_modules=["linear", "input"])
    before = copy.deepcopy(config.to_dict())
    fit(classifier(), PEFT(config, backbone="net"))
    assert config.to_dict() == before


def test_modules_to_save_are_trained_whole_and_the_original_is_kept() -> None:
    config = peft.LoraConfig(r=2, target_modules=["linear"], modules_to_save=["conv"])
    module = classifier()
    fit(module, PEFT(config, backbone="net"))
    original = classifier().net.conv.weight
    assert torch.equal(module.net.conv.original_module.weight, original)
    assert not torch.equal(module.net.conv.modules_to_save["default"].weight, original)


# -- frozen means frozen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [False, True])
def test_everything_frozen_is_bit_equal_after_training_with_weight_decay(dropout: bool) -> None:
    module = classifier()
    before = base_weights(module)
    made = fit(module, lora(backbone_dropout=dropout), max_epochs=2, max_steps=-1)
    assert made.optimizers[0].param_groups[0]["weight_decay"] == 0.1
    assert same(head_only(before), head_only(base_weights(module)))  # statistics of BatchNorm among them
    assert "net.blocks.0.norm.running_mean" in before


class Found(Classifier):
    """A classifier whose learning rate and batch size can be found."""

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate, self.batch_size = 0.01, 2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)

    def train_dataloader(self) -> Any:
        return points(64, self.batch_size)

    def val_dataloader(self) -> Any:
        return points()


@pytest.mark.filterwarnings("ignore:.*in eval mode")
@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=10, min_lr=1e-4, max_lr=1e-2),
        lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1),
    ],
    ids=["learning rate", "batch size"],
)
def test_finders_that_train_first_leave_the_backbone_alone(tmp_path: Path, finder: Any) -> None:
    module = Found()
    before = base_weights(module)
    trainer(finder(), lora(), default_root_dir=tmp_path).fit(module)
    assert same(head_only(before), head_only(base_weights(module)))
    assert all(value.any() for name, value in weights(module).items() if "lora_B" in name)


def test_statistics_would_move_without_the_callback() -> None:
    module = classifier()
    before = base_weights(module)
    fit(module)
    assert {"net.blocks.0.norm.running_mean", "net.blocks.0.linear.weight"} <= moved(before, base_weights(module))


class Modes(L.Callback):
    """Notes, during the training batch, which modules are in training mode."""

    def __init__(self) -> None:
        self.training: list[set[str]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.training.append({name for name, m in pl_module.named_modules() if m.training})


def test_dropout_of_frozen_parts_is_inactive_and_the_adapters_active() -> None:
    module, modes = classifier(), Modes()
    made = trainer(lora(dropout=0.1), modes, max_epochs=2, max_steps=-1, num_sanity_val_steps=1)
    made.fit(module, points(), points())
    assert len(modes.training) == 8
    for training in modes.training:
        assert {n for n, m in module.named_modules() if isinstance(m, nn.Dropout) and n in training} == {
            n for n in training if n.endswith("lora_dropout.lora")
        }
        assert not any(name.endswith(("norm", ".dropout", "base_layer")) for name in training)
        assert {"net.input.lora_dropout.lora", "head", ""} <= training


def test_dropout_of_an_earlier_adapter_is_inactive_too() -> None:
    module, modes = classifier(), Modes()
    fit(module, lora(dropout=0.5, name="first"))
    fit(module, lora(dropout=0.5, name="second"), modes)
    assert "net.input.lora_dropout.second" in modes.training[0]
    assert "net.input.lora_dropout.first" not in modes.training[0]


def test_dropout_of_frozen_parts_is_kept_where_asked() -> None:
    module, modes = classifier(), Modes()
    made = trainer(lora(backbone_dropout=True), modes, max_epochs=2, max_steps=-1, num_sanity_val_steps=1)
    made.fit(module, points(), points())
    for training in modes.training:
        assert {f"net.blocks.{i}.dropout" for i in range(3)} <= training
        assert not any(name.endswith("norm") for name in training)


def test_the_loss_of_a_frozen_backbone_is_deterministic_and_with_dropout_it_is_not() -> None:
    losses = {}
    for dropout in (False, True):
        module = classifier()
        fit(module, lora(backbone_dropout=dropout), max_steps=1)
        batch = next(iter(points()))
        losses[dropout] = {module.training_step(batch, 0).item() for _ in range(4)}
    assert len(losses[False]) == 1 and len(losses[True]) > 1


def test_a_saved_copy_of_a_whole_module_is_in_training_mode() -> None:
    config = peft.LoraConfig(r=2, target_modules=["input"], modules_to_save=["blocks.1"])
    module, modes = classifier(), Modes()
    fit(module, PEFT(config, backbone="net"), modes)
    copied = "net.blocks.1.modules_to_save.default"
    assert {f"{copied}.dropout", f"{copied}.norm"} <= modes.training[0]
    assert "net.blocks.1.original_module.dropout" not in modes.training[0]


def test_nothing_is_said_of_modules_in_evaluation_mode() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(classifier(), lora())
        fit(Language(), LoRA(r=2))
    assert not [str(w.message) for w in caught if "eval mode" in str(w.message)]


# -- gradient checkpointing -----------------------------------------------------------------------------------------


class Visits:
    """Counts each block's forward and backward calls."""

    def __init__(self, blocks: Any) -> None:
        self.forward, self.backward = [0] * len(blocks), [0] * len(blocks)
        for index, block in enumerate(blocks):
            # hooks on the block itself would be outside the checkpoint
            block.mlp.register_forward_pre_hook(lambda *_, i=index: self._add(self.forward, i))
            block.mlp.register_full_backward_hook(lambda *_, i=index: self._add(self.backward, i))

    @staticmethod
    def _add(counts: list[int], index: int) -> None:
        counts[index] += 1


def checkpointed(kind: str, on: bool, **options: Any) -> tuple[Language, Visits]:
    module = Language(kind)
    if on:
        module.model.activation_checkpointing_enable(**options)
    blocks = module.model.model.layers if kind == "llama" else module.model.transformer.h
    return module, Visits(blocks)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_backward_does_not_visit_blocks_below_the_first_adapter(kind: str) -> None:
    module, visits = checkpointed(kind, on=True)
    fit(module, LoRA(r=2, layers=[2]), max_steps=1)
    assert visits.backward == [0, 0, 1]
    assert visits.forward == [1, 1, 2]  # only the block with gradients is run again


@pytest.mark.parametrize("layers", [[2], [0, 1, 2]])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_checkpointing_changes_no_gradient(kind: str, layers: list[int]) -> None:
    class Gradients(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    found = {}
    for on in (False, True):
        module, gradients = Language(kind), Gradients()
        if on:
            module.model.activation_checkpointing_enable()
        fit(module, LoRA(r=2, layers=layers), gradients, max_steps=2)
        found[on] = gradients.found
    assert found[True] and same(found[True], found[False])


def test_reentrant_checkpointing_still_gets_its_input_gradients() -> None:
    module, visits = checkpointed("llama", on=True, activation_checkpointing_kwargs={"use_reentrant": True})
    fit(module, LoRA(r=2, layers=[2]), max_steps=1)
    assert all(value.any() for name, value in weights(module).items() if "lora_B" in name)
    assert visits.forward == [2, 2, 2]


def test_dropout_in_a_checkpointed_frozen_block_is_off_unless_asked_for() -> None:
    losses = {}
    for dropout in (False, True):
        module = Language("opt")  # its blocks call dropout as a function
        module.model.activation_checkpointing_enable()
        fit(module, LoRA(r=2, backbone_dropout=dropout), max_steps=1)
        batch = next(iter(data_of(module)))
        losses[dropout] = {module.training_step(batch, 0).item() for _ in range(3)}
    assert len(losses[False]) == 1 and len(losses[True]) > 1


def test_a_checkpointed_module_can_be_copied_and_pickled() -> None:
    module = Language()
    module.model.activation_checkpointing_enable()
    fit(module, LoRA(r=2), max_steps=-1, max_epochs=2)
    module.trainer = None
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        block = copied.model.model.layers[0]
        assert block._gradient_checkpointing_func.block is block
        assert isinstance(
            block._gradient_checkpointing_func.checkpoint, functools.partial
        )  # wrapped once, not each epoch
        copied.training_step(next(iter(data_of(module))), 0).backward()


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", [lambda: StochasticWeightAveraging(swa_lrs=0.01), EMAWeightAveraging])
def test_weight_averaging_placed_first_is_one_sentence(averaging: Any) -> None:
    with pytest.raises(ValueError, match=r"comes before LoRA .* put LoRA first in the list of callbacks\.$") as error:
        fit(classifier(), averaging(), lora())
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    "averaging", [lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), EMAWeightAveraging]
)
def test_weight_averaging_placed_after_averages_the_adapter_only(averaging: Any) -> None:
    module = classifier()
    before = base_weights(module)
    fit(module, lora(), averaging(), max_epochs=3, max_steps=-1)
    assert same(head_only(before), head_only(base_weights(module)))
    assert all(value.any() for name, value in weights(module).items() if "lora_B" in name)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_a_launcher_that_would_lose_the_adapter_is_one_sentence(strategy: str) -> None:
    callback, module = lora(), classifier()
    made = trainer(callback, strategy=strategy, devices=2)  # nothing is launched before fit
    with pytest.raises(ValueError, match=r'use strategy="ddp", or call LoRA\.apply\(module\) before fit\.$') as error:
        callback.setup(made, module, "fit")
    assert one_sentence(str(error.value))
    callback.apply(module)
    callback.setup(made, module, "fit")


def test_a_module_with_an_adapter_can_be_sent_to_another_process() -> None:
    module = classifier()
    lora().apply(module)
    sent = pickle.loads(pickle.dumps(module))
    assert same(weights(sent), weights(module))
    assert adapters(sent).backbone is sent.net


class Data(L.LightningDataModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        return points()


@pytest.mark.parametrize("kind", ["images", "statements"])
def test_a_data_module_may_have_a_kind_of_its_own(kind: str) -> None:
    module = classifier()
    trainer(lora()).fit(module, Data(kind))
    assert "lora" in adapters(module)


# -- what is told ---------------------------------------------------------------------------------------------------


def test_the_logger_gets_the_numbers(tmp_path: Path) -> None:
    module = classifier()
    made = fit(module, lora(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    rows = (Path(made.logger.log_dir) / "metrics.csv").read_text().splitlines()
    logged = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    count = 2 * (16 + 8) + 3 * 2 * (8 + 8) + (8 * 3 + 3)
    total = sum(p.numel() for p in module.parameters())
    assert float(logged["trainable_parameters"]) == count
    assert float(logged["trainable_percent"]) == pytest.approx(100 * count / total)
    assert float(logged["adapter_bytes"]) == 4 * (count - 27)


def test_the_table_says_what_was_injected_where(capsys: pytest.CaptureFixture[str]) -> None:
    fit(classifier(), lora(), PEFT(METHODS["ia3"], backbone="net", name="second"), enable_model_summary=True)
    printed = capsys.readouterr().out
    assert "Adapters on Net" in printed
    assert "4 × input, linear" in printed and "3 × linear" in printed
    assert "195 trainable parameters" in printed
    fit(classifier(), lora(), enable_model_summary=False)
    assert "Adapters on" not in capsys.readouterr().out


def test_a_module_written_by_somebody_else_needs_no_change() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(10, 8), Block(), nn.Linear(8, 3))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Plain()
    before = base_weights(module)
    fit(module, LoRA(r=2))
    assert same(before, base_weights(module))
    assert all(value.any() for name, value in weights(module).items() if "lora_B" in name)


# -- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_spawned_run_keeps_an_adapter_applied_before(tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"
    script.write_text(
        """
import json
from tuning import classifier, fit, weights
from lightning_peft.callbacks import LoRA

if __name__ == "__main__":
    module = classifier()
    LoRA(r=2, backbone="net").apply(module)
    fit(module, LoRA(r=2, backbone="net"), strategy="ddp_spawn", devices=1)
    print(json.dumps([bool(v.any()) for n, v in weights(module).items() if "lora_B" in n]))
"""
    )
    assert json.loads(python(script).splitlines()[-1]) == [True] * 4
