"""A module may save its own state as it likes: what was trained is in the file all the same, and comes back from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from tuning import QUIET, Classifier, fit, one_sentence, points, trainer

from lightning_peft import adapters, export_checkpoint, load_adapter, load_from_checkpoint
from lightning_peft.callbacks import AdapterEMA, LoRA
from lightning_peft.stack.adapter_files.folder import AdapterError

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

State = dict[str, Any]


def without_net(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("net.")}


class Overridden(Classifier):
    """As Lightning's page on non-strict loading shows: the encoder is not saved."""

    def state_dict(self, *args: Any, **kwargs: Any) -> State:
        return without_net(super().state_dict(*args, **kwargs))


class OnlyTrainable(Classifier):
    def state_dict(self, *args: Any, **kwargs: Any) -> State:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}


class Empty(Classifier):
    def state_dict(self, *args: Any, **kwargs: Any) -> State:
        return {}


class Renamed(Classifier):
    """Saves its head, and all else, under other names, and reads them back."""

    def state_dict(self, *args: Any, **kwargs: Any) -> State:
        return {f"ours/{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        ours = {name.removeprefix("ours/"): v for name, v in state_dict.items() if name.startswith("ours/")}
        return super().load_state_dict(ours, strict=False)


class Hooked(Classifier):
    def on_save_checkpoint(self, checkpoint: State) -> None:
        checkpoint["state_dict"] = without_net(checkpoint["state_dict"])


class Emptied(Classifier):
    def on_save_checkpoint(self, checkpoint: State) -> None:
        del checkpoint["state_dict"]


class HookedByTorch(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self.drop)

    @staticmethod
    def drop(module: nn.Module, state: State, prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}net.")]:
            del state[name]


class SilentNet(Classifier):
    """Its network saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net.state_dict = lambda *args, **kwargs: kwargs.get("destination", {})  # type: ignore[union-attr]


class Dropping(Callback):
    """A callback that cleans up checkpoints."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: State) -> None:
        checkpoint["state_dict"] = without_net(checkpoint["state_dict"])


def lora() -> LoRA:
    return LoRA(r=2, backbone="net")


def trained(module: nn.Module) -> dict[str, Tensor]:
    stack = adapters(module)
    return {f"{part.name}/{key}": value.clone() for part in stack.parts for key, value in stack.tensors(part).items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


WAYS = [Overridden, OnlyTrainable, Empty, Renamed, Hooked, Emptied, HookedByTorch, SilentNet]


@pytest.mark.parametrize("cls", WAYS)
def test_what_was_trained_is_saved_and_comes_back(cls: type[Classifier], tmp_path: Path) -> None:
    module, path = cls(), tmp_path / "last.ckpt"
    fit(module, lora(), ModelCheckpoint(tmp_path, "last"), enable_checkpointing=True)
    expected = trained(module)
    assert any(value.any() for name, value in expected.items() if "lora_B" in name)
    assert equal(trained(load_from_checkpoint(cls, path)), expected)
    fresh = cls()
    trainer(lora()).validate(fresh, points(), ckpt_path=path, verbose=False)
    assert equal(trained(fresh), expected)
    resumed = cls()
    fit(resumed, lora(), ckpt_path=path, max_steps=4)
    assert not equal(trained(resumed), expected)
    export_checkpoint(path, tmp_path / "folder")
    backbone = cls().net
    load_adapter(backbone, tmp_path / "folder", "lora")  # type: ignore[arg-type]
    assert equal(trained(backbone), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [Overridden, Hooked])
def test_what_stands_outside_stays_as_the_module_gave_it(cls: type[Classifier], tmp_path: Path) -> None:
    class Own(cls):  # type: ignore[misc, valid-type]
        def state_dict(self, *args: Any, **kwargs: Any) -> State:
            state = super().state_dict(*args, **kwargs)
            return {name: value for name, value in state.items() if name != "head.bias"} | {"more": torch.ones(2)}

    module = Own()
    fit(module, lora()).save_checkpoint(tmp_path / "own.ckpt")
    state = torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if not name.startswith("net.")} == {"head.weight", "more"}
    assert state.keys() - {"head.weight", "more"} == {n for n, p in module.net.named_parameters("net") if "lora_" in n}
    assert equal(trained(load_from_checkpoint(Own, tmp_path / "own.ckpt")), trained(module))


def test_a_head_that_the_file_should_have_is_still_missed(tmp_path: Path) -> None:
    fit(Overridden(), lora()).save_checkpoint(tmp_path / "a.ckpt")

    class Larger(Overridden):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(8, 3)

    with pytest.raises(AdapterError, match=r"2 tensors are missing, the first is second\.bias\.$") as error:
        load_from_checkpoint(Larger, tmp_path / "a.ckpt")
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("cls", [Classifier, Overridden, Hooked])
def test_the_average_is_saved_where_the_module_leaves_weights_out(cls: type[Classifier], tmp_path: Path) -> None:
    module = cls()
    made = fit(module, lora(), AdapterEMA(0.5), ModelCheckpoint(tmp_path, "a"), enable_checkpointing=True)
    average = trained(module)  # after training, the average is in place
    assert equal(trained(load_from_checkpoint(cls, tmp_path / "a.ckpt")), average)
    current = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["AdapterEMA"]["current"]
    assert made.global_step == 3 and not any(torch.equal(v, current[f"net.{n}"]) for n, v in live(module).items())


def live(module: Classifier) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in module.net.named_parameters() if "lora_B" in n}  # type: ignore[union-attr]


@pytest.mark.parametrize("cls", [Classifier, Overridden, Hooked])
def test_lightnings_averaging_resumes_where_the_module_leaves_weights_out(cls: Any, tmp_path: Path) -> None:
    def run(steps: int, path: Path | None = None) -> Classifier:
        module, saving = cls(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        averaging = EMAWeightAveraging(decay=0.5)
        fit(module, lora(), averaging, saving, max_steps=steps, max_epochs=9, ckpt_path=path, enable_checkpointing=True)
        return module

    through = run(8)
    (tmp_path / "step=4.ckpt").rename(tmp_path / "half.ckpt")
    assert equal(trained(run(8, tmp_path / "half.ckpt")), trained(through))


def test_a_callback_that_cleans_up_checkpoints_takes_nothing_away(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, lora(), Dropping()).save_checkpoint(tmp_path / "a.ckpt")
    assert equal(trained(load_from_checkpoint(Classifier, tmp_path / "a.ckpt")), trained(module))


@pytest.mark.parametrize("ours", [lambda: [lora()], lambda: [lora(), AdapterEMA()], lambda: [AdapterEMA(), lora()]])
def test_hooks_set_on_the_module_itself_are_called(ours: Callable[[], list[Callback]], tmp_path: Path) -> None:
    def hooked() -> tuple[Classifier, list[str]]:
        module, called = Classifier(), []
        module.on_save_checkpoint = lambda checkpoint: called.append("saved")  # type: ignore[method-assign]
        module.on_load_checkpoint = lambda checkpoint: called.append("loaded")  # type: ignore[method-assign]
        return module, called

    module, called = hooked()
    fit(module, *ours()).save_checkpoint(tmp_path / "a.ckpt")
    assert called == ["saved"]
    module, called = hooked()
    fit(module, *ours(), ckpt_path=tmp_path / "a.ckpt", max_steps=4)
    assert called == ["loaded"]


# -- reading back ---------------------------------------------------------------------------------------------------


class Losing(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: State, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint({**checkpoint, "state_dict": without_net(checkpoint["state_dict"])}, path)


class Replacing(Callback):
    """Sets a hook on the module after the adapter's callback has set its own."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.on_save_checkpoint = lambda checkpoint: None


@pytest.mark.parametrize("how", ["plugin", "hook", "background"])
def test_a_loss_that_nobody_can_mend_stops_the_run_at_its_first_checkpoint(how: str, tmp_path: Path) -> None:
    plugin = {"plugin": Losing(), "background": AsyncCheckpointIO(Losing())}.get(how)
    callbacks = [lora(), Replacing()] if how == "hook" else [lora()]
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    options: Any = {"plugins": [plugin]} if plugin else {}
    with pytest.raises(AdapterError, match=r"step=\d+\.ckpt lacks 8 of 8 trained tensors, the first is net\.") as error:
        fit(Classifier(), *callbacks, saving, max_steps=30, enable_checkpointing=True, **options)
    assert one_sentence(str(error.value))
    assert len(list(tmp_path.iterdir())) <= (1 if how != "background" else 20)


def test_only_the_first_checkpoint_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: read.append(file) or load(file, **options))
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    made = fit(Classifier(), lora(), saving, enable_checkpointing=True)
    assert len(list(tmp_path.iterdir())) == 3 and len(read) == 1
    assert "save_checkpoint" not in made.__dict__


def test_a_file_in_a_format_of_its_own_is_let_through(tmp_path: Path) -> None:
    class Text(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: State, path: Any, storage_options: Any = None) -> None:
            Path(path).write_text("\n".join(checkpoint["state_dict"]))

    made = fit(Classifier(), lora(), ModelCheckpoint(tmp_path, "a"), plugins=[Text()], enable_checkpointing=True)
    assert "lora_A" in (tmp_path / "a.ckpt").read_text() and "save_checkpoint" not in made.__dict__
