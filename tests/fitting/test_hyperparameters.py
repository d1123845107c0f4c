"""Hyperparameters that are no plain values do not keep a checkpoint from being read, and a backbone is none of them."""

from __future__ import annotations

import enum
import functools
import warnings
from collections import defaultdict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tuning import QUIET, Net, one_sentence, points, trainer

from lightning_peft import export_checkpoint, load_adapter, load_from_checkpoint
from lightning_peft.callbacks import LoRA
from lightning_peft.fitting.checkpoint_files import outside_backbones
from lightning_peft.stack.adapter_files.folder import AdapterError

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:Attribute 'backbone'")]


class Kind(enum.Enum):
    A = 1


class Loud(enum.StrEnum):
    B = "b"


Pair = namedtuple("Pair", "a b")


@dataclass
class Settings:
    where: Path
    rate: float = 0.1


class Sum:
    """A class whose making is noticed."""

    made = 0

    def __new__(cls, *_: Any) -> Sum:
        Sum.made += 1
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        Sum.made += 1


class Dotted(dict[str, Any]):
    """A dict of the user's own."""


class Free(L.LightningModule):
    """Takes anything as an argument and does not look at it."""

    def __init__(self, backbone: nn.Module | None = None, extra: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(9)
        self.head = nn.Linear(8, 3)
        self.net = Net() if backbone is None else backbone
        self.__dict__["extra"] = extra  # a module is not to be a part of this one

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Needing(Free):
    """Cannot be made without its arguments."""

    def __init__(self, backbone: nn.Module, extra: Any) -> None:
        super().__init__(backbone, extra)


class Whole(Free):
    """Takes all its arguments as one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._hparams_name = None
        self.save_hyperparameters(settings)
        self.extra = settings["extra"]


OBJECTS: dict[str, tuple[Any, str]] = {  # a value -> the name of its type
    "a path": (Path("somewhere"), "pathlib.PosixPath"),
    "an enum": (Kind.A, f"{__name__}.Kind"),
    "an enum of strings": (Loud.B, f"{__name__}.Loud"),
    "a class": (torch.optim.AdamW, "torch.optim.adamw.AdamW"),
    "a function": (torch.nn.functional.relu, "torch.nn.functional.relu"),
    "a partial": (functools.partial(torch.optim.AdamW, lr=0.1), "functools.partial"),
    "a named tuple": (Pair(1, 2), f"{__name__}.Pair"),
    "a dataclass": (Settings(Path("a")), f"{__name__}.Settings"),
    "a path in a list in a dict": ({"a": [1, (Path("b"),)]}, "pathlib.PosixPath"),
    "numpy's number": (np.float64(0.5), "numpy._core.multiarray.scalar"),
    "an array": (np.ones(3), "numpy._core.multiarray._reconstruct"),
    "a dict of another class": (Dotted(a=1), f"{__name__}.Dotted"),
    "a dict with a default": (defaultdict(list, a=[1]), "collections.defaultdict"),
    "an object": (Sum(), f"{__name__}.Sum"),
}
PLAIN = [None, 1, 0.5, "text", [1, {"a": (2, "b")}], {"w": torch.ones(3)}, torch.ones(2), torch.float16, {1, 2}, b"ab"]


def saved(folder: Path, module: L.LightningModule) -> Path:
    """A checkpoint of the module with an adapter that has been moved, without training it."""
    LoRA(r=2, backbone="net").apply(module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    fitted = trainer()
    fitted.strategy.connect(module)
    fitted.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def outputs(module: Any) -> Tensor:
    with torch.no_grad():
        return module.eval().head(module.net(points().dataset.tensors[0]))


@contextmanager
def nothing_said() -> Iterator[None]:
    """Within, there is no warning of this package's."""
    with warnings.catch_warnings(record=True) as given:
        yield
    assert not [w for w in given if "does not hold" in str(w.message) or "written without" in str(w.message)]


@pytest.mark.parametrize("case", OBJECTS)
def test_an_object_among_them_is_named_and_all_else_is_read(case: str, tmp_path: Path) -> None:
    value, kind = OBJECTS[case]
    module = Free(extra=value)
    path = saved(tmp_path, module)
    Sum.made = 0
    with pytest.warns(UserWarning, match=rf"does not hold 'extra', which was a {kind}: Free is made without it"):
        loaded = load_from_checkpoint(Free, path)
    assert torch.equal(outputs(loaded), outputs(module)) and loaded.extra is None
    assert outside_backbones(path) == ["head.weight", "head.bias"]
    net = Net()
    load_adapter(net, export_checkpoint(path, tmp_path / "adapter"))
    assert torch.equal(net.eval()(points().dataset.tensors[0]), module.net(points().dataset.tensors[0]))
    assert Sum.made == 0, "nothing was made of what the file names"
    with nothing_said():
        given = load_from_checkpoint(Free, path, extra=value)
    assert torch.equal(outputs(given), outputs(module)) and given.extra is value


def test_a_class_that_needs_it_says_so_and_takes_it(tmp_path: Path) -> None:
    path = saved(tmp_path, Needing(Net(), Path("a")))
    with pytest.raises(
        AdapterError, match=r"does not hold 'backbone', which was a tuning\.Net, and Needing needs it"
    ) as e:
        load_from_checkpoint(Needing, path)
    assert one_sentence(str(e.value).replace(str(path), "file").replace("tuning.Net", "Net"))
    with pytest.raises(
        AdapterError, match=r"does not hold 'extra', which was a pathlib\.PosixPath, and Needing needs it"
    ):
        load_from_checkpoint(Needing, path, backbone=Net())
    assert load_from_checkpoint(Needing, path, backbone=Net(), extra=3).extra == 3


def test_one_argument_that_holds_them_all_must_be_given(tmp_path: Path) -> None:
    path = saved(tmp_path, Whole({"extra": Kind.A, "rate": 1}))
    with pytest.raises(
        AdapterError, match=r"does not hold 'extra', .* give load_from_checkpoint the argument settings\."
    ):
        load_from_checkpoint(Whole, path)
    assert load_from_checkpoint(Whole, path, settings={"extra": 5, "rate": 1}).extra == 5


def test_with_trust_they_are_what_they_were(tmp_path: Path) -> None:
    path = saved(tmp_path, Free(extra=Settings(Path("a"))))
    with nothing_said():
        assert load_from_checkpoint(Free, path, trust=True).extra == Settings(Path("a"))


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_and_tensors_are_kept(value: Any, tmp_path: Path) -> None:
    with nothing_said():
        loaded = load_from_checkpoint(Free, saved(tmp_path, Free(extra=value)))
    assert repr(loaded.extra) == repr(value)


def test_a_trainer_that_cannot_read_them_says_which_and_can_be_told_to(tmp_path: Path) -> None:
    module = Free(extra=Kind.A)
    path = saved(tmp_path, module)
    with pytest.raises(AdapterError, match=rf"holds hyper_parameters\.extra, a {__name__}\.Kind: .*weights_only=False"):
        trainer(LoRA(r=2, backbone="net")).test(Free(), points(), ckpt_path=path, verbose=False)
    again = Free()
    trainer(LoRA(r=2, backbone="net")).test(again, points(), ckpt_path=path, weights_only=False, verbose=False)
    assert torch.equal(outputs(again), outputs(module))


HEAVY: dict[str, Callable[[nn.Module], Any]] = {
    "the backbone": lambda net: net,
    "in a list": lambda net: [net],
    "another module": lambda net: nn.Linear(200, 200),
    "in an object": lambda net: functools.partial(print, net),
    "its parameters": lambda net: list(net.parameters()),
    "its weights": lambda net: net.state_dict(),
    "a view of one": lambda net: {"w": net.input.weight.detach()[:1]},
    "an optimizer": lambda net: torch.optim.AdamW(nn.Linear(200, 200).parameters()),
}


@pytest.mark.parametrize("case", HEAVY)
def test_a_module_or_its_weights_never_land_in_the_checkpoint(case: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "heavy").mkdir()
    net = Net()
    size = saved(tmp_path / "plain", Free(Net())).stat().st_size
    module = Free(net, HEAVY[case](net))
    with pytest.warns(UserWarning, match="written without 'backbone', 'extra', hyperparameters that hold a module or"):
        path = saved(tmp_path / "heavy", module)
    assert path.stat().st_size < size + 500
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {}, "any reader reads it"
    assert module.hparams.keys() == {"backbone", "extra"}, "the module keeps them"
    with pytest.warns(UserWarning, match=r"does not hold 'backbone', which was a tuning\.Net: Free is made without it"):
        loaded = load_from_checkpoint(Free, path)
    assert torch.equal(outputs(loaded), outputs(module))
    again = Free(Net())
    trainer(LoRA(r=2, backbone="net")).test(again, points(), ckpt_path=path, verbose=False)
    assert torch.equal(outputs(again), outputs(module))


def test_a_checkpoint_that_has_the_backbone_in_it_is_read_all_the_same(tmp_path: Path) -> None:
    """As one that was written before backbones were left out."""
    module = Free()
    path = saved(tmp_path, module)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["backbone"] = Net()
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="does not hold 'backbone', which was a "):
        assert torch.equal(outputs(load_from_checkpoint(Free, path)), outputs(module))
    exported = load_file(export_checkpoint(path, tmp_path / "adapter") / "adapter_model.safetensors")
    assert len(exported) == 8 and all("lora_" in key for key in exported)


def test_hyperparameters_of_the_data_are_left_out_too(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def __init__(self, embedding: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return points()

    fitted = trainer(LoRA(r=2, backbone="net"))
    fitted.fit(Free(), datamodule=Data(nn.Linear(200, 200)))
    with pytest.warns(UserWarning, match="written without 'embedding'"):
        fitted.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"] == {}
