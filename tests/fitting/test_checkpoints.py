"""A checkpoint holds what was trained and no more, comes back bit for bit, and is refused where it does not belong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor, nn
from tuning import (
    BUILT,
    QUIET,
    Classifier,
    ConfiguredClassifier,
    Language,
    SetupClassifier,
    classifier,
    fit,
    moved,
    one_sentence,
    points,
    python,
    same,
    trainer,
    weights,
)

from lightning_peft import adapters, export_checkpoint, load_adapter, load_from_checkpoint, save_adapter
from lightning_peft.callbacks import PEFT, LoRA
from lightning_peft.fitting.checkpoints import AdapterCheckpointMixin
from lightning_peft.stack.adapter_files.folder import AdapterError

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class MixedClassifier(AdapterCheckpointMixin, Classifier):
    """A classifier whose own `load_from_checkpoint` brings its adapters back."""


class MixedLanguage(AdapterCheckpointMixin, Language):
    """A language model of the same kind."""


def lora(**options: Any) -> LoRA:
    return LoRA(**({"r": 2, "backbone": "net"} | options))


def language_lora(**options: Any) -> LoRA:
    return LoRA(**({"r": 2, "target_modules": ["q_proj", "v_proj"]} | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that several tests read and none changes."""
    return saved(tmp_path_factory.mktemp("trained"))


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def saved(folder: Path, module: L.LightningModule | None = None, callback: Any = None, **options: Any) -> Path:
    """The checkpoint of a fitted classifier."""
    module = classifier() if module is None else module
    fit(module, callback or lora()).save_checkpoint(folder / "trained.ckpt", **options)
    return folder / "trained.ckpt"


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def outputs(module: Classifier) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module(points().dataset.tensors[0])


# -- what is in the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_file_holds_the_adapter_and_the_head_and_no_backbone_weight(tmp_path: Path, weights_only: bool) -> None:
    module = classifier()
    checkpoint = read(saved(tmp_path, module, weights_only=weights_only))
    expected = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == expected
    assert all("lora_" in name or name.startswith("head.") for name in expected)
    assert ("optimizer_states" in checkpoint) is not weights_only


def test_the_file_is_small(tmp_path: Path) -> None:
    module = Language()
    module.model.resize_token_embeddings(20_000)
    path = saved(tmp_path, module, language_lora())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    state = read(path)["optimizer_states"][0]["state"]
    assert sum(t["exp_avg"].numel() for t in state.values()) == trained
    assert path.stat().st_size < 3 * 4 * trained + 40_000 < 4 * module.model.num_parameters() / 20


def test_what_was_unfrozen_and_what_stands_outside_is_kept(tmp_path: Path) -> None:
    class Unfrozen(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.tensor(7))

        def on_fit_start(self) -> None:
            pass

    module = Unfrozen()
    LoRA(r=2, bias="lora_only", backbone="net").apply(module)
    fit(module, LoRA(r=2, bias="lora_only", backbone="net")).save_checkpoint(tmp_path / "kept.ckpt")
    state = read(tmp_path / "kept.ckpt")["state_dict"]
    assert {"seen", "net.input.bias", "net.blocks.0.linear.bias", "head.weight"} <= set(state)
    assert "net.input.weight" not in state


def test_a_module_without_adapters_is_saved_as_ever(tmp_path: Path) -> None:
    module = classifier()
    fit(module).save_checkpoint(tmp_path / "plain.ckpt")
    checkpoint = read(tmp_path / "plain.ckpt")
    assert same(checkpoint["state_dict"], weights(module)) and "lightning_peft" not in checkpoint


def test_the_modules_own_hooks_still_run(tmp_path: Path) -> None:
    class Hooked(Classifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["note"] = "mine"

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.note = checkpoint["note"]

    path = saved(tmp_path, Hooked())
    module = Hooked()
    trainer(lora()).test(module, points(), ckpt_path=path)
    assert module.note == "mine"


# -- resuming -------------------------------------------------------------------------------------------------------

RESUME = """
import sys
import torch
from tuning import Language, classifier, fit, weights
from lightning_peft.callbacks import LoRA

kind, path, result = sys.argv[1:]
torch.manual_seed(99)  # nothing may hang on the seed
module = Language() if kind == "language" else classifier(kind)
backbone = "model" if kind == "language" else "net"
fit(module, LoRA(r=2, backbone=backbone), max_steps=-1, max_epochs=2, ckpt_path=path)
torch.save(weights(module), result)
"""


@pytest.mark.parametrize("kind", ["language", "configure_model"])
def test_training_on_in_a_new_process_equals_training_through(tmp_path: Path, kind: str) -> None:
    def made() -> tuple[L.LightningModule, LoRA]:
        if kind == "language":
            return Language(), LoRA(r=2, backbone="model")
        return classifier(kind), LoRA(r=2, backbone="net")

    whole, callback = made()
    fit(whole, callback, max_steps=-1, max_epochs=2)
    half, callback = made()
    fit(half, callback, max_steps=-1, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    assert moved(weights(half), weights(whole))
    python(RESUME, kind, tmp_path / "half.ckpt", tmp_path / "resumed.pt")
    assert same(torch.load(tmp_path / "resumed.pt", weights_only=True), weights(whole))


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("built", BUILT)
def test_test_restores_the_adapter_wherever_the_backbone_is_built(
    tmp_path: Path, built: str, weights_only: bool
) -> None:
    module = classifier(built)
    path = saved(tmp_path, module, weights_only=weights_only)
    restored = classifier(built)
    trainer(lora()).test(restored, points(), ckpt_path=path)
    assert same(weights(restored), weights(module))
    assert torch.equal(outputs(restored), outputs(module))


@pytest.mark.parametrize("save_weights_only", [False, True])
def test_best_is_the_best_epochs_adapter(tmp_path: Path, save_weights_only: bool) -> None:
    class Losses(L.Callback):
        def __init__(self) -> None:
            self.states: list[tuple[float, dict[str, Tensor]]] = []

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.states.append((float(trainer.callback_metrics["val_loss"]), weights(pl_module)))

    module, losses = classifier(), Losses()
    module.__dict__["configure_optimizers"] = lambda: torch.optim.SGD(module.parameters(), lr=0.01, maximize=True)
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=save_weights_only)
    made = trainer(lora(), losses, best, max_epochs=3, max_steps=-1, enable_checkpointing=True)
    made.fit(module, points(), points())
    loss, state = min(losses.states, key=lambda pair: pair[0])
    assert moved(state, weights(module))
    assert made.test(module, points(), ckpt_path="best") == [{"test_loss": pytest.approx(loss)}]
    assert same(weights(module), state)
    assert Path(best.best_model_path).stat().st_size < 40_000
    assert "net.conv.weight" not in read(Path(best.best_model_path))["state_dict"]


def test_the_last_checkpoint_of_a_stack_restores_both_parts(tmp_path: Path) -> None:
    ia3 = peft.IA3Config(target_modules=["linear"], feedforward_modules=[])

    def stack() -> list[L.Callback]:
        return [lora(bias="lora_only"), PEFT(ia3, backbone="net", name="ia3")]

    for kind in (Classifier, MixedClassifier):
        module = kind()
        fit(module, *stack()).save_checkpoint(tmp_path / "stack.ckpt")
        restored = kind()
        trainer(*stack()).test(restored, points(), ckpt_path=tmp_path / "stack.ckpt")
        assert same(weights(restored), weights(module))
        assert [part.name for part in adapters(restored).parts] == ["lora", "ia3"]


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)])
def test_resuming_with_averaged_weights(tmp_path: Path, averaging: Callable[[], L.Callback]) -> None:
    whole, half, resumed = classifier(), classifier(), classifier()
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fit(whole, lora(), averaging(), max_steps=-1, max_epochs=4)
    fit(half, lora(), averaging(), keep, max_steps=-1, max_epochs=4, enable_checkpointing=True)
    path = tmp_path / "epoch=1.ckpt"
    assert "net.conv.weight" not in read(path)["state_dict"]
    fit(resumed, lora(), averaging(), max_steps=-1, max_epochs=4, ckpt_path=path)
    assert moved(weights(whole), weights(resumed)) == set()


# -- loading without a Trainer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Classifier, MixedClassifier, ConfiguredClassifier])
def test_load_from_checkpoint_of_any_module(tmp_path: Path, kind: type[Classifier]) -> None:
    module = kind("configure_model") if kind is ConfiguredClassifier else kind()
    path = saved(tmp_path, module)
    restored = load_from_checkpoint(kind, path)
    assert same(weights(restored), weights(module))
    assert torch.equal(outputs(restored), outputs(module))


@pytest.mark.parametrize("strict", [None, True])
def test_a_module_with_the_mixin_has_it_as_its_own(tmp_path: Path, strict: bool | None) -> None:
    module = MixedClassifier()
    path = saved(tmp_path, module)
    restored = MixedClassifier.load_from_checkpoint(path, strict=strict)
    assert same(weights(restored), weights(module))
    fit(restored, lora())
    assert moved(weights(restored), weights(module))


def test_a_module_with_the_mixin_loads_checkpoints_without_adapters_too(tmp_path: Path) -> None:
    module = MixedClassifier()
    fit(module).save_checkpoint(tmp_path / "plain.ckpt")
    assert same(weights(MixedClassifier.load_from_checkpoint(tmp_path / "plain.ckpt")), weights(module))


def test_a_module_with_the_mixin_is_resumed_by_a_trainer_too(tmp_path: Path) -> None:
    whole, half, resumed = MixedClassifier(), MixedClassifier(), MixedClassifier()
    fit(whole, lora(bias="lora_only"), max_steps=-1, max_epochs=2)
    fit(half, lora(bias="lora_only"), max_steps=-1, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, lora(bias="lora_only"), max_steps=-1, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(resumed), weights(whole))


def test_arguments_given_go_before_those_saved(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert load_from_checkpoint(Classifier, path, again=True).again
    assert not load_from_checkpoint(Classifier, path).again


def test_a_loaded_module_is_trained_on_by_the_same_callback(tmp_path: Path) -> None:
    module = load_from_checkpoint(Classifier, saved(tmp_path))
    before = weights(module)
    fit(module, lora())
    assert {name for name in before if "lora_" in name} < moved(before, weights(module))


# -- plain peft folders ---------------------------------------------------------------------------------------------


def trained_language(tmp_path: Path, kind: type[Language] = Language) -> tuple[Language, Path]:
    module = kind()
    path = saved(tmp_path, module, language_lora())
    return module, path


@pytest.mark.parametrize("way", ["export", "save"])
def test_peft_reads_the_folder_with_equal_logits(tmp_path: Path, tokens: Tensor, way: str) -> None:
    module, path = trained_language(tmp_path)
    folder = tmp_path / "adapter"
    if way == "export":
        assert export_checkpoint(path, folder) == folder
    else:
        save_adapter(module, folder)
    loaded = peft.PeftModel.from_pretrained(tiny("llama"), str(folder))
    expected = logits(module.model, tokens)
    assert torch.equal(logits(loaded, tokens), expected)
    assert not torch.equal(logits(tiny("llama"), tokens), expected)


def test_the_exported_folder_is_the_saved_one(tmp_path: Path) -> None:
    module, path = trained_language(tmp_path)
    export_checkpoint(path, tmp_path / "exported")
    save_adapter(module, tmp_path / "saved")
    assert same(*(load_file(tmp_path / f / "adapter_model.safetensors") for f in ("exported", "saved")))
    notes = [json.loads((tmp_path / f / "lightning_peft.json").read_text()) for f in ("exported", "saved")]
    assert notes[0] == notes[1]


def test_load_adapter_reads_the_folder_back(tmp_path: Path, tokens: Tensor) -> None:
    module, path = trained_language(tmp_path)
    backbone = tiny("llama")
    (part,) = load_adapter(backbone, export_checkpoint(path, tmp_path / "adapter"), "mine")
    assert part.name == "mine" and adapters(backbone).parts == [part]
    assert torch.equal(logits(backbone, tokens), logits(module.model, tokens))


def test_a_hand_written_backbone_goes_through_a_folder_as_well(tmp_path: Path) -> None:
    module = classifier()
    folder = export_checkpoint(saved(tmp_path, module), tmp_path / "adapter")
    restored = classifier()
    load_adapter(restored.net, folder)
    restored.head.load_state_dict(module.head.state_dict())
    assert torch.equal(outputs(restored), outputs(module))


def test_several_backbones_are_exported_by_name(tmp_path: Path) -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Sequential(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.other(self.net(x)))

    module = Two()
    fit(module, lora(), lora(backbone="other", name="second")).save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(AdapterError, match=r"adapters of several backbones, 'net', 'other': name one\.$"):
        export_checkpoint(tmp_path / "two.ckpt", tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"holds no adapters of 'third', but of 'net', 'other'\.$"):
        export_checkpoint(tmp_path / "two.ckpt", tmp_path / "adapter", backbone="third")
    export_checkpoint(tmp_path / "two.ckpt", tmp_path / "adapter", backbone="other")
    assert all("lora_" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    restored = load_from_checkpoint(Two, tmp_path / "two.ckpt")
    assert same(weights(restored), weights(module))


# -- what does not fit is one sentence ------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint, changed."""
    checkpoint = read(path)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def rename(state: dict[str, Tensor], old: str, new: str | None) -> None:
    value = state.pop(old)
    if new is not None:
        state[new] = value


A = "net.input.lora_A.lora.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing": (
        lambda c: rename(c["state_dict"], A, None),
        rf"do not fit: 1 tensors are missing, the first is {A}\.$",
    ),
    "unknown": (
        lambda c: c["state_dict"].update({"net.input.lora_C": torch.zeros(1)}),
        r"do not fit: 1 tensors are unknown, the first is net\.input\.lora_C\.$",
    ),
    "NaN": (
        lambda c: c["state_dict"][A].fill_(float("nan")),
        rf"{A} holds NaN or infinite values\.$",
    ),
    "integers": (
        lambda c: c["state_dict"].update({A: c["state_dict"][A].int()}),
        rf"{A} holds torch\.int32 where the model has torch\.float32\.$",
    ),
    "shape": (
        lambda c: c["state_dict"].update({A: torch.zeros(2, 3)}),
        rf"{A} has different shapes: \(2, 3\) in .*, \(2, 16\) in the module\.$",
    ),
    "no adapters": (
        lambda c: c.pop("lightning_peft") and None,
        r"holds no adapters: it was not written with a lightning_peft callback\.$",
    ),
    "other backbone": (
        lambda c: c["lightning_peft"]["backbones"].update({"body": c["lightning_peft"]["backbones"].pop("net")}),
        r"adapts 'body', which Classifier does not have\.$",
    ),
}
LOAD: dict[str, Callable[[Path], object]] = {
    "fit": lambda path: fit(classifier(), lora(), ckpt_path=path),
    "test": lambda path: trainer(lora()).test(classifier(), points(), ckpt_path=path),
    "load_from_checkpoint": lambda path: load_from_checkpoint(Classifier, path),
}


@pytest.mark.parametrize("load", LOAD)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, damage: str, load: str) -> None:
    change, message = DAMAGE[damage]
    path = changed(saved(tmp_path), change)
    with pytest.raises(AdapterError, match=message) as error:
        LOAD[load](path)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, r"^the checkpoint and adapter 'lora' have other settings: r: 2 != 4\.$"),
        (
            {"target_modules": ["linear"]},
            r"have other settings: target_modules: \['blocks.0.linear', .* != \['linear'\]\.$",
        ),
        ({"name": "other"}, r"^the checkpoint has no adapter 'other'; it has 'lora'\.$"),
    ],
    ids=["rank", "target", "name"],
)
def test_a_callback_with_other_settings_is_one_sentence(
    tmp_path: Path, options: dict[str, Any], message: str, weights_only: bool
) -> None:
    path = saved(tmp_path, weights_only=weights_only)
    with pytest.raises(AdapterError, match=message) as error:
        trainer(lora(**options)).test(classifier(), points(), ckpt_path=path)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("load", ["trainer", "load_from_checkpoint", "mixin"])
def test_another_base_is_one_sentence(tmp_path: Path, load: str) -> None:
    path = saved(tmp_path, MixedClassifier())
    with pytest.raises(AdapterError, match=r"made for another base model: .* hold other values: ") as error:
        if load == "trainer":
            trainer(lora()).test(MixedClassifier(seed=1), points(), ckpt_path=path)
        elif load == "mixin":
            MixedClassifier.load_from_checkpoint(path, seed=1)
        else:
            load_from_checkpoint(Classifier, path, seed=1)
    assert one_sentence(str(error.value))


def test_a_checkpoint_of_a_plain_module_is_refused_by_the_callback(tmp_path: Path) -> None:
    fit(classifier()).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(AdapterError, match="holds no adapters"):
        trainer(lora()).test(classifier(), points(), ckpt_path=tmp_path / "plain.ckpt")
    with pytest.raises(AdapterError, match="holds no adapters"):
        load_from_checkpoint(Classifier, tmp_path / "plain.ckpt")
    with pytest.raises(AdapterError, match="holds no adapters"):
        export_checkpoint(tmp_path / "plain.ckpt", tmp_path / "adapter")


def test_a_backbone_built_in_setup_cannot_be_loaded_without_a_trainer(tmp_path: Path) -> None:
    path = saved(tmp_path, classifier("setup"))
    with pytest.raises(AdapterError, match="adapts 'net', which SetupClassifier does not have") as error:
        load_from_checkpoint(SetupClassifier, path)
    assert one_sentence(str(error.value))


DESCRIPTION: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no object": (lambda c: c.update(lightning_peft=[]), r"adapters is not what .* it is \[\], not an object\.$"),
    "no backbones": (
        lambda c: _described(c, None).update(backbones={}),
        r"backbones is \{\}, not at least one backbone",
    ),
    "no parts": (
        lambda c: _described(c).update(parts=[]),
        r"backbones\.net\.parts is \[\], not parts of different names",
    ),
    "a list for a dict": (lambda c: _described(c, 0).update(keys=["a"]), r"parts\[0\]\.keys is \['a'\], not an object"),
    "no name": (lambda c: _described(c, 0).pop("name"), r"parts\[0\] has no name"),
    "a number for a name": (lambda c: _described(c, 0).update(name=7), r"parts\[0\]\.name is 7, not a str"),
    "no strength": (lambda c: _described(c, 0).update(strength=float("nan")), r"strength is nan, not a finite number"),
    "no fingerprint": (lambda c: _described(c).update(fingerprint=3), r"net\.fingerprint is 3, not an object"),
    "odd values": (
        lambda c: next(iter(_described(c)["fingerprint"]["samples"].values())).update(values=[[1.0]]),
        r"values\[0\] is \[1\.0\], not a float",
    ),
    "no dtype": (
        lambda c: next(iter(_described(c)["fingerprint"]["samples"].values())).update(dtype="load"),
        r"dtype is 'load', not a float dtype",
    ),
    "no method": (
        lambda c: _described(c, 0)["config"].update(peft_type="NOVEL"),
        "'lora' holds no peft configuration: ",
    ),
    "an object": (lambda c: _described(c).update(fingerprint=Path("a")), "not an object"),
    "no weights": (lambda c: c.update(state_dict=[]), r"is damaged: its state_dict is no dict\.$"),
    "a weight that is none": (
        lambda c: c["state_dict"].update(a=1),
        r"is damaged: 'a' of its state_dict is no tensor\.$",
    ),
}


def _described(checkpoint: dict[str, Any], part: int | None = -1) -> dict[str, Any]:
    """What a checkpoint says of its adapters, of their backbone, or of one of them."""
    whole = checkpoint["lightning_peft"]
    if part is None:
        return whole
    return whole["backbones"]["net"] if part < 0 else whole["backbones"]["net"]["parts"][part]


@pytest.mark.parametrize("way", ["load", "export"])
@pytest.mark.parametrize("damage", DESCRIPTION)
def test_a_description_of_other_types_is_one_sentence(trained: Path, tmp_path: Path, damage: str, way: str) -> None:
    change, message = DESCRIPTION[damage]
    path = tmp_path / "changed.ckpt"
    path.write_bytes(trained.read_bytes())
    changed(path, change)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=message) as error:
        load_from_checkpoint(Classifier, path) if way == "load" else export_checkpoint(path, tmp_path / "adapter")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_that_lacks_tensors_is_not_exported(tmp_path: Path) -> None:
    path = changed(saved(tmp_path), lambda c: rename(c["state_dict"], A, None))
    with pytest.raises(AdapterError, match=rf"is damaged: it lacks 1 tensors of its adapters, the first is {A}\.$"):
        export_checkpoint(path, tmp_path / "adapter")


@pytest.mark.parametrize("way", ["load", "export"])
def test_a_truncated_or_foreign_file_is_one_sentence(tmp_path: Path, way: str) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    foreign = r"file is no checkpoint, or the beginning of it is missing\.$"
    for content, message in (
        (whole[: len(whole) // 2], r"file is truncated or damaged\.$"),
        (whole[:-30], r"file is truncated or damaged\.$"),
        (b"not a checkpoint", foreign),
        (b"", foreign),
    ):
        path.write_bytes(content)
        with pytest.raises(AdapterError) as error:
            load_from_checkpoint(Classifier, path) if way == "load" else export_checkpoint(path, tmp_path / "adapter")
        said = str(error.value).replace(str(path), "file")
        assert one_sentence(said) and re.search(message, said)


FOLDER: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:200]), "is truncated or not a safetensors file"),
    "NaN": (lambda f: _rewrite(f, lambda key, value: (key, value * float("nan"))), "holds NaN or infinite values"),
    "unknown": (lambda f: _rewrite(f, lambda key, value: (key + "x", value)), "do not fit: 8 tensors are missing"),
}


def _rewrite(file: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    save_file(dict(change(key, value) for key, value in load_file(file).items()), file)


@pytest.mark.parametrize("damage", FOLDER)
def test_a_damaged_folder_is_refused_and_the_backbone_left_alone(tmp_path: Path, damage: str) -> None:
    folder = export_checkpoint(saved(tmp_path), tmp_path / "adapter")
    change, message = FOLDER[damage]
    change(folder / "adapter_model.safetensors")
    module = classifier()
    before = weights(module)
    with pytest.raises(AdapterError, match=message):
        load_adapter(module.net, folder)
    assert same(weights(module), before)


def test_an_exported_adapter_is_refused_by_another_base(tmp_path: Path) -> None:
    folder = export_checkpoint(saved(tmp_path), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="made for another base model"):
        load_adapter(classifier(seed=1).net, folder)
