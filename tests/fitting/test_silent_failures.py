"""Nothing fails silently: each failure that other integrations pass over is provoked, and its one sentence read.

Most are provoked where their part is tested; `ELSEWHERE` says where, and is itself checked. The rest is here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from tuning import QUIET, ROOT, Classifier, Net, classifier, fit, one_sentence, points, trainer

from lightning_peft import adapters, load_adapter, load_from_checkpoint, save_adapter
from lightning_peft.callbacks import PEFT, LoRA
from lightning_peft.stack.adapter_files.folder import AdapterError

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

# what would pass unnoticed -> the test that provokes it
ELSEWHERE = {
    # training
    "LightningCLI's own optimizer holds no adapter": "callbacks/test_cli.py::test_the_clis_own_optimizer_trains_the_adapter_and_the_head",  # noqa: E501
    "an optimizer made in __init__ holds no adapter": "fitting/test_optimizers.py::test_an_optimizer_of_all_parameters_trains_the_adapter_and_nothing_frozen",  # noqa: E501
    "a weight in no optimizer, or in two": "fitting/test_optimizers.py::test_parameters_missing_or_held_twice_are_one_sentence",  # noqa: E501
    "nothing is trainable": "fitting/test_optimizers.py::test_nothing_trainable_is_one_sentence",
    "weight decay or BatchNorm moves frozen weights": "fitting/test_peft.py::test_everything_frozen_is_bit_equal_after_training_with_weight_decay",  # noqa: E501
    "dropout of frozen parts is on": "fitting/test_peft.py::test_dropout_of_frozen_parts_is_inactive_and_the_adapters_active",  # noqa: E501
    "backward runs through all frozen blocks": "fitting/test_peft.py::test_backward_does_not_visit_blocks_below_the_first_adapter",  # noqa: E501
    "learning-rate and batch-size finders move the base": "fitting/test_peft.py::test_finders_that_train_first_leave_the_backbone_alone",  # noqa: E501
    "half precision rounds the adapter's steps away": "fitting/test_everywhere.py::test_small_steps_are_not_rounded_away_in_half_precision",  # noqa: E501
    "a data module that yields something else": "fitting/test_batch_keys.py::test_only_a_batch_without_labels_and_without_a_loss_is_refused",  # noqa: E501
    # where it goes
    "an unknown target module among known ones": "callbacks/tuning/test_lora.py::test_an_unknown_target_names_the_nearest",  # noqa: E501
    "a block that does not exist": "callbacks/tuning/test_lora.py::test_layers_that_do_not_exist_are_one_sentence",
    "the head is taken for the backbone": "fitting/test_find_backbone.py::test_a_head_made_first_is_not_mistaken_for_the_backbone",  # noqa: E501
    "two candidates for the backbone": "fitting/test_find_backbone.py::test_two_transformers_models_are_not_guessed_between",  # noqa: E501
    "a second fit injects twice": "fitting/test_find_backbone.py::test_a_second_fit_trains_the_same_adapter_on",
    "a second fit with other settings": "fitting/test_find_backbone.py::test_a_second_fit_with_other_settings_says_what_differs",  # noqa: E501
    # other callbacks, strategies
    "weight averaging before the adapter": "fitting/test_peft.py::test_weight_averaging_placed_first_is_one_sentence",
    "weights-only checkpoints without the average": "callbacks/test_averaging.py::test_a_checkpoint_made_in_training_holds_the_average",  # noqa: E501
    "a launcher that spawns loses the adapter": "fitting/test_peft.py::test_a_launcher_that_would_lose_the_adapter_is_one_sentence",  # noqa: E501
    "each process begins with its own adapter": "fitting/test_strategies.py::test_every_process_begins_with_rank_zeros_adapter",  # noqa: E501
    "sharded before it is adapted": "fitting/test_strategies.py::test_what_cannot_be_sharded_is_one_sentence",
    "FSDP2 passes over keys it does not find": "fitting/test_strategies.py::test_a_checkpoint_that_does_not_fit_is_one_sentence",  # noqa: E501
    "what FSDP cannot clip, quantise or save": "fitting/test_strategies.py::test_what_the_first_fsdp_cannot_do_is_one_sentence",  # noqa: E501
    "DeepSpeed saves the whole backbone": "fitting/test_strategies.py::test_deepspeed_is_told_to_leave_frozen_weights_out",  # noqa: E501
    # checkpoints
    "weights-only checkpoints hold the backbone": "fitting/test_checkpoints.py::test_the_file_holds_the_adapter_and_the_head_and_no_backbone_weight",  # noqa: E501
    "a checkpoint with keys missing, unknown, misshapen or NaN": "fitting/test_checkpoints.py::test_a_damaged_checkpoint_is_one_sentence",  # noqa: E501
    "a checkpoint of another base": "fitting/test_checkpoints.py::test_another_base_is_one_sentence",
    "a checkpoint of other settings": "fitting/test_checkpoints.py::test_a_callback_with_other_settings_is_one_sentence",  # noqa: E501
    "a checkpoint without adapters": "fitting/test_checkpoints.py::test_a_checkpoint_of_a_plain_module_is_refused_by_the_callback",  # noqa: E501
    "a truncated or foreign file": "fitting/test_checkpoints.py::test_a_truncated_or_foreign_file_is_one_sentence",
    "code in a checkpoint": "fitting/test_nothing_runs.py::test_a_checkpoint_runs_nothing",
    "a resumed run that is not the same run": "fitting/test_checkpoints.py::test_training_on_in_a_new_process_equals_training_through",  # noqa: E501
    "a backbone that load_from_checkpoint cannot see": "fitting/test_checkpoints.py::test_a_backbone_built_in_setup_cannot_be_loaded_without_a_trainer",  # noqa: E501
    "an edit makes no optimizer step, so no checkpoint": "callbacks/edits/test_iti.py::test_a_checkpoint_is_written_and_restores_the_edit_bit_for_bit",  # noqa: E501
    # folders
    "a damaged adapter folder": "stack/adapter_files/test_folder.py::test_a_damaged_folder_is_one_sentence_and_leaves_the_model_alone",  # noqa: E501
    "a folder of another base": "stack/test_stack.py::test_another_base_is_refused_and_left_alone",
    "a crash leaves half a folder": "stack/adapter_files/test_replacing.py::test_old_or_new_is_there_whenever_the_writer_dies",  # noqa: E501
    # editing and data
    "activations that are NaN": "callbacks/edits/test_iti.py::test_activations_that_are_not_finite",
    "labels of one class only": "callbacks/edits/test_iti.py::test_data_without_both_labels",
    "an edit whose pass did not end": "callbacks/edits/test_iti.py::test_a_fit_that_ends_before_the_pass_does",
    "a data file with missing columns": "truthfulqa/test_questions.py::test_a_bad_csv_is_one_sentence",
}


@pytest.mark.parametrize("failure", ELSEWHERE)
def test_what_is_provoked_elsewhere_is_there(failure: str) -> None:
    path, name = ELSEWHERE[failure].split("::")
    tree = ast.parse((ROOT / "tests" / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def lora(**options: Any) -> LoRA:
    return LoRA(**({"r": 2, "backbone": "net"} | options))


def read(run: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """The one sentence that a run ends in."""
    with pytest.raises(kind) as error:
        run()
    assert one_sentence(str(error.value))
    return str(error.value)


# -- the adapter is not where the module computes -------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_end"])
def test_a_backbone_replaced_during_training(hook: str) -> None:
    class Replaces(Classifier):
        pass

    setattr(Replaces, hook, lambda self: setattr(self, "net", Net(0)))
    message = read(lambda: fit(Replaces(), lora(), max_epochs=2, max_steps=-1))
    assert message.startswith("Replaces has replaced the backbone that LoRA put its adapter on: ")


@pytest.mark.parametrize(("averaging", "built"), [("ema", "setup"), ("swa", "setup"), ("swa", "configure_model")])
def test_averaging_of_a_copy_made_before_the_backbone_was(averaging: str, built: str) -> None:
    callback = EMAWeightAveraging() if averaging == "ema" else StochasticWeightAveraging(0.01)
    message = read(lambda: fit(classifier(built), lora(), callback))
    assert "before its backbone is built: build it in __init__, or use AdapterEMA." in message


@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model"])
def test_an_adapter_that_peft_put_there_would_be_switched_off_and_never_saved(way: str) -> None:
    module = classifier()
    config = peft.LoraConfig(r=2, target_modules=["linear"])
    if way == "get_peft_model":
        module.net = peft.get_peft_model(module.net, config)
    else:
        peft.inject_adapter_in_model(config, module.net)
    message = read(lambda: fit(module, lora()))
    assert message.startswith("The backbone already carries an adapter of peft's own, 'default': merge it ")


def test_an_adapter_that_peft_merged_is_part_of_the_base() -> None:
    module = classifier()
    module.net = peft.get_peft_model(module.net, peft.LoraConfig(r=2, target_modules=["linear"])).merge_and_unload()
    fit(module, lora())
    assert len(adapters(module).parts) == 1


# -- what is trained changes during training ------------------------------------------------------------------------


class Changes(Classifier):
    """Trains other weights from the second epoch on."""

    trains = True

    def on_train_epoch_end(self) -> None:
        assert self.net is not None
        (self.net if self.trains else self).requires_grad_(self.trains)


def test_weights_unfrozen_in_training_would_be_in_no_optimizer() -> None:
    message = read(lambda: fit(Changes(), lora(), max_epochs=2, max_steps=-1))
    assert "trainable parameters are in no optimizer, the first is net." in message


def test_weights_unfrozen_under_ddp_would_differ_between_processes() -> None:
    strategy = DDPStrategy(process_group_backend="gloo")  # one process will do: none would average the gradients
    try:
        message = read(lambda: fit(Changes(), lora(), max_epochs=2, max_steps=-1, strategy=strategy))
    finally:
        torch.distributed.destroy_process_group()
    assert "weights were unfrozen after DDP was set up and would be trained differently in every process" in message


def test_freezing_everything_in_training_would_train_nothing() -> None:
    module = Changes()
    module.trains = False
    assert read(lambda: fit(module, lora(), max_epochs=2, max_steps=-1)) == "Nothing in Changes is trainable."


# -- initialisations that change the base ---------------------------------------------------------------------------

INITS = ["pissa", "olora"]


def changing(init: str) -> LoRA:
    return lora(init=init, target_modules=["linear"])


@pytest.mark.parametrize("init", INITS)
def test_they_are_resumed_loaded_and_exported_on_the_pristine_base(tmp_path: Path, init: str) -> None:
    whole, half, on = classifier(), classifier(), classifier()
    fit(whole, changing(init), max_epochs=2, max_steps=-1)
    fit(half, changing(init), max_epochs=1, max_steps=-1).save_checkpoint(tmp_path / "a.ckpt")
    fit(on, changing(init), max_epochs=2, max_steps=-1, ckpt_path=tmp_path / "a.ckpt")
    save_adapter(half, tmp_path / "folder")
    by_us, by_peft = Net(0).eval(), peft.PeftModel.from_pretrained(Net(0), tmp_path / "folder").eval()
    load_adapter(by_us, tmp_path / "folder")
    x = next(iter(points()))[0]
    with torch.no_grad():
        assert torch.equal(whole.eval().net(x), on.eval().net(x))
        expected = half.eval().net(x)
        assert torch.equal(load_from_checkpoint(Classifier, tmp_path / "a.ckpt").eval().net(x), expected)
        assert torch.equal(by_us(x), expected)
        torch.testing.assert_close(by_peft(x), expected)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda stack: stack.enable(False), "switched off"),
        (lambda stack: stack.disabled().__enter__(), "switched off"),
        (lambda stack: stack.scale(0.5), "scaled"),
        (lambda stack: stack.remove("lora"), "taken out"),
    ],
    ids=["enable", "disabled", "scale", "remove"],
)
@pytest.mark.parametrize("init", INITS)
def test_without_the_adapter_the_base_is_not_the_base(init: str, act: Any, words: str) -> None:
    module = classifier()
    changing(init).apply(module)
    message = read(lambda: act(adapters(module)))
    assert message.startswith(f"Adapter 'lora' was made by changing the base itself (init_lora_weights='{init}')")
    assert f"so it cannot be {words}: " in message


def test_a_checkpoint_of_more_adapters_would_change_the_base_twice(tmp_path: Path) -> None:
    outer = peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"])
    fit(classifier(), changing("pissa"), PEFT(outer, backbone="net", name="ia3")).save_checkpoint(tmp_path / "a.ckpt")
    made = trainer(changing("pissa"))
    message = read(lambda: made.test(classifier(), points(), ckpt_path=tmp_path / "a.ckpt", verbose=False))
    assert "so it cannot be taken out" in message


def test_a_random_change_of_the_base_cannot_be_repeated() -> None:
    message = read(lambda: fit(classifier(), changing("pissa_niter_2")))
    assert message.startswith("init_lora_weights='pissa_niter_2' changes the base by a decomposition drawn at random")


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_truncated_checkpoint_given_to_a_trainer(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "a.ckpt"
    fit(classifier(), lora()).save_checkpoint(path)
    path.write_bytes(path.read_bytes()[:3000])
    message = read(lambda: getattr(trainer(lora()), stage)(classifier(), points(), ckpt_path=path), AdapterError)
    assert message == f"{path} is truncated or damaged."


def test_an_error_in_training_is_left_as_it_is(tmp_path: Path) -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("of one's own")

    path = tmp_path / "a.ckpt"
    fit(classifier(), lora(), max_epochs=1, max_steps=-1).save_checkpoint(path)
    with pytest.raises(RuntimeError, match="of one's own"):
        fit(Fails(), lora(), ckpt_path=path, max_epochs=2, max_steps=-1)


def test_a_missing_checkpoint_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        fit(classifier(), lora(), ckpt_path=tmp_path / "nothing.ckpt")


def test_settings_of_an_adapter_given_twice() -> None:
    assert "other settings: r: 2 != 3." in read(lambda: fit(classifier(), lora(), lora(r=3)))
    module: L.LightningModule = classifier()
    fit(module, lora(), lora())  # the same, twice, is once
    assert len(adapters(module).parts) == 1
