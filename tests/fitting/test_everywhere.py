"""The same adapter under compilation, half precision, accumulated gradients, every stage, and beside other adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tuning import QUIET, Classifier, Language, classifier, data_of, fit, points, same, trainer, weights

from lightning_peft import adapters, export_checkpoint, load_adapter, load_from_checkpoint, save_adapter
from lightning_peft.callbacks import PEFT, AdapterEMA, LoRA

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def lora(**options: Any) -> LoRA:
    return LoRA(**({"r": 2, "backbone": "net"} | options))


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The trained weights, under the names they have where nothing is compiled."""
    named = {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters()}
    return {name: p.detach().clone() for name, p in named.items() if p.requires_grad}


def inputs() -> Tensor:
    return next(iter(points()))[0]


# -- torch.compile --------------------------------------------------------------------------------------------------


class Compiling(Classifier):
    """Compiles its network in `configure_model`, after the adapter was put on it."""

    backend = "eager"

    def configure_model(self) -> None:
        self.net = torch.compile(self.net, backend=self.backend)  # type: ignore[assignment]


def compiled(way: str, backend: str) -> tuple[Classifier, Any]:
    """A module, and what to give the Trainer, which may be the module compiled."""
    if way == "in configure_model":
        module: Classifier = Compiling()
        module.backend = backend  # type: ignore[attr-defined]
        return module, module
    module = Classifier()
    if way == "the whole module":
        return module, torch.compile(module, backend=backend)
    if way == "the backbone, adapted before":
        torch.manual_seed(5)  # as fit does
        lora(target_modules=["linear", "input"]).apply(module)
    if way == "the backbone in place":
        assert module.net is not None
        module.net.compile(backend=backend)
    elif way == "each block":
        assert module.net is not None
        for index, block in enumerate(module.net.blocks):  # type: ignore[arg-type]
            module.net.blocks[index] = torch.compile(block, backend=backend)  # type: ignore[index]
    else:
        module.net = torch.compile(module.net, backend=backend)  # type: ignore[assignment]
    return module, module


WAYS = (
    "the whole module",
    "the backbone",
    "the backbone, adapted before",
    "the backbone in place",
    "each block",
    "in configure_model",
)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_module_trains_the_same_adapter_and_is_loaded_where_nothing_is_compiled(
    tmp_path: Path, way: str, backend: str
) -> None:
    plain, callback = classifier(), lora(target_modules=["linear", "input"])
    fit(plain, callback)
    module, given = compiled(way, backend)
    torch.manual_seed(5)
    made = trainer(callback)
    made.fit(given, points())
    assert trained(module).keys() == trained(plain).keys()
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(module)[name], value, rtol=1e-5, atol=1e-6)
    made.save_checkpoint(tmp_path / "a.ckpt")
    assert same(trained(load_from_checkpoint(Classifier, tmp_path / "a.ckpt")), trained(module))
    if backend == "eager":
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / "folder")
        backbone = classifier().net
        load_adapter(backbone, tmp_path / "folder", name="lora")
        assert same(trained(nn.ModuleDict({"net": backbone})), without_head(trained(module)))


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def test_an_adapter_trained_uncompiled_goes_on_compiled(tmp_path: Path) -> None:
    whole = classifier()
    fit(whole, lora(), max_epochs=2, max_steps=-1)
    fit(classifier(), lora(), max_epochs=1, max_steps=-1).save_checkpoint(tmp_path / "a.ckpt")
    module = classifier()
    module.net = torch.compile(module.net, backend="eager")
    fit(module, lora(), max_epochs=2, max_steps=-1, ckpt_path=tmp_path / "a.ckpt")
    for name, value in trained(whole).items():
        torch.testing.assert_close(trained(module)[name], value, rtol=1e-5, atol=1e-6)


def test_scaling_and_swapping_an_adapter_act_on_compiled_code() -> None:
    module = classifier().eval()
    lora().apply(module)
    stack = adapters(module)
    made = {key: torch.randn_like(value) for key, value in stack.tensors(stack["lora"]).items()}
    run = torch.compile(module.net, backend="eager")
    with torch.no_grad():
        base = run(inputs())
        stack.load_tensors(stack["lora"], made, "another adapter")
        swapped, expected = run(inputs()), module.net(inputs())
        assert torch.equal(swapped, expected) and not torch.equal(swapped, base)
        stack.scale(0.5)
        assert torch.equal(run(inputs()), module.net(inputs())) and not torch.equal(run(inputs()), swapped)
        stack.enable(False)
        assert torch.equal(run(inputs()), base)


# -- precision ------------------------------------------------------------------------------------------------------

METHODS = {
    "lora": peft.LoraConfig(r=2, target_modules=["linear"]),
    "dora": peft.LoraConfig(r=2, target_modules=["linear"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["linear"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["linear"]),
    "adapters of layer norm": peft.LNTuningConfig(target_modules=["norm"]),
    "a module trained whole": peft.LoraConfig(r=2, target_modules=["linear"], modules_to_save=["conv"]),
}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_half_precision(method: str, precision: str) -> None:
    module = classifier()
    start = trainer(PEFT(METHODS[method], backbone="net"), precision=precision, max_steps=0)
    start.fit(module, points())
    before = trained(module)
    fit(module, PEFT(METHODS[method], backbone="net"), precision=precision)
    assert before and all(not torch.equal(before[name], value) for name, value in trained(module).items())
    assert all(torch.isfinite(value).all() for value in trained(module).values())


@pytest.mark.parametrize("kind", ["net", "llama", "gpt2"])
def test_under_true_half_precision_the_base_is_half_and_the_adapter_is_not(kind: str) -> None:
    module = classifier() if kind == "net" else Language(kind)
    base = {name: value.bfloat16() for name, value in weights(module).items() if value.is_floating_point()}
    fit(module, LoRA(r=2, backbone="net" if kind == "net" else None), precision="bf16-true")
    stack = adapters(module)
    assert {value.dtype for value in stack.tensors(stack["lora"]).values()} == {torch.float32}
    for name, value in weights(module).items():
        if "lora_" not in name and not name.startswith("head.") and value.is_floating_point():
            assert torch.equal(value, base[name.replace(".base_layer", "")])


def test_small_steps_are_not_rounded_away_in_half_precision() -> None:
    class Slow(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    module = Slow()
    fit(module, lora(), precision="bf16-true")
    first = trained(module)
    fit(module, lora(), precision="bf16-true")  # nor when the module is converted once more
    names = [name for name in first if "lora_A" in name]
    before, after = (torch.cat([state[name].flatten() for name in names]) for state in (first, trained(module)))
    assert (before != after).float().mean() > 0.8
    assert (before.bfloat16() == after.bfloat16()).float().mean() > 0.8  # steps that bfloat16 cannot take


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_in_half_precision_goes_on_exactly(tmp_path: Path, precision: str) -> None:
    through, on = classifier(), classifier()
    options: dict[str, Any] = {"precision": precision, "max_steps": -1}
    fit(through, lora(), max_epochs=2, **options)
    fit(classifier(), lora(), max_epochs=1, **options).save_checkpoint(tmp_path / "a.ckpt")
    fit(on, lora(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt", **options)
    assert same(trained(through), trained(on))
    tested = classifier()
    trainer(lora(), precision=precision).test(tested, points(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights(tested)[name], value) for name, value in saved.items())


def test_the_precision_plugin_is_left_as_it_was() -> None:
    made = trainer(lora(), precision="bf16-true")
    made.fit(classifier(), points())
    assert "convert_module" not in vars(made.precision_plugin)
    failing = trainer(lora(target_modules=["nothing"]), precision="bf16-true")
    with pytest.raises(ValueError, match="No module of the backbone"):
        failing.fit(classifier(), points())
    assert "convert_module" not in vars(failing.precision_plugin)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["net", "llama"])
def test_accumulated_gradients_are_those_of_one_big_batch(kind: str) -> None:
    found = {}
    for size, accumulated in ((8, 1), (4, 2)):
        module = classifier() if kind == "net" else Language(kind)
        loader = DataLoader(data_of(module).dataset, size)
        torch.manual_seed(5)
        callback = LoRA(r=2, backbone="net" if kind == "net" else None)
        trainer(callback, accumulate_grad_batches=accumulated, max_epochs=3, max_steps=-1).fit(module, loader)
        found[accumulated] = trained(module)
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-3, atol=1e-5)


class Found(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.learning_rate, self.batch_size = 1e-7, 2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> Any:
        return points(64, self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*in eval mode")
def test_what_the_finders_find_is_used_and_the_adapter_starts_afresh(tmp_path: Path) -> None:
    module, start = Found(), classifier()
    torch.manual_seed(5)
    lora().apply(start)
    rate = LearningRateFinder(num_training_steps=20, min_lr=1e-4, max_lr=1e-1)
    made = trainer(
        rate, BatchSizeFinder(max_trials=2, steps_per_trial=1), lora(), default_root_dir=tmp_path, max_steps=0
    )
    torch.manual_seed(5)
    made.fit(module)
    assert module.learning_rate > 1e-7 and module.batch_size == 4
    assert made.optimizers[0].param_groups[0]["lr"] == module.learning_rate
    assert same(without_head(trained(module)), without_head(trained(start)))  # trials leave no trace


@pytest.mark.parametrize("average", [AdapterEMA, EMAWeightAveraging])
def test_averaging_beside_gradient_accumulation_and_half_precision(average: Any) -> None:
    module = classifier()
    fit(
        module,
        lora(),
        average(decay=0.5),
        accumulate_grad_batches=2,
        precision="bf16-mixed",
        max_epochs=2,
        max_steps=-1,
    )
    assert all(value.any() for name, value in trained(module).items() if "lora_B" in name)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_restores_the_checkpoint_it_is_given(tmp_path: Path, stage: str, weights_only: bool) -> None:
    module = classifier()
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=weights_only)
    fit(module, lora(), saved, enable_checkpointing=True, max_epochs=1, max_steps=-1)
    other = classifier()
    data = DataLoader(points().dataset, batch_size=4)
    getattr(trainer(lora()), stage)(other, data, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(weights(other), weights(module))


# -- several adapters -----------------------------------------------------------------------------------------------


def two() -> tuple[Classifier, Any, Any]:
    """Two trained adapters on one backbone, and what each does to its output alone."""
    module = classifier()
    fit(module, lora(name="first"))
    fit(module, lora(name="second", r=3, target_modules=["linear"]))
    module.eval()
    return module, adapters(module), module.net


@torch.no_grad()
def test_adapters_are_switched_weighted_and_deleted_without_a_trace(tmp_path: Path) -> None:
    module, stack, net = two()
    x = inputs()
    both = net(x)
    alone = {}
    for name in ("first", "second"):
        with stack.disabled("second" if name == "first" else "first"):
            alone[name] = net(x)
    with stack.disabled():
        base = net(x)
    assert torch.equal(base, classifier().eval().net(x)) and torch.equal(net(x), both)
    assert len({tuple(y.flatten().tolist()) for y in (both, base, *alone.values())}) == 4
    stack.scale(0.0, "second")
    torch.testing.assert_close(net(x), alone["first"])
    stack.scale(1.0, "second")
    assert torch.equal(net(x), both)
    save_adapter(module, tmp_path)
    stack.remove("second")
    assert torch.equal(net(x), alone["first"])
    stack.remove("first")
    assert torch.equal(net(x), base) and not any("lora" in name for name, _ in net.named_modules())
    load_adapter(net, tmp_path)
    assert torch.equal(net(x), both)


@torch.no_grad()
def test_the_weights_of_two_adapters_on_one_layer_add_up() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    stack_of_two = L.LightningModule()
    stack_of_two.net = layer
    for name in ("first", "second"):
        LoRA(r=2, backbone="net", name=name, init="gaussian").apply(stack_of_two)
    stack = adapters(stack_of_two)
    for part in stack.parts:
        stack.load_tensors(part, {k: torch.randn_like(v) for k, v in stack.tensors(part).items()}, "made up")
    x = torch.randn(4, 8)
    changes = {}
    with stack.disabled():
        base = layer(x)
    for name in ("first", "second"):
        with stack.disabled("second" if name == "first" else "first"):
            changes[name] = layer(x) - base
    stack.scale(0.7, "first")
    stack.scale(-0.2, "second")
    torch.testing.assert_close(layer(x), base + 0.7 * changes["first"] - 0.2 * changes["second"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_adapter_is_swapped_in_place_for_a_saved_one(tmp_path: Path) -> None:
    first, second = classifier(), classifier()
    fit(first, lora())
    fit(second, lora(), max_steps=6)
    save_adapter(second, tmp_path)
    parameters = {name: parameter for name, parameter in first.net.named_parameters()}
    saved = classifier()
    load_adapter(saved.net, tmp_path, name="lora")
    source = adapters(saved)
    stack = adapters(first)
    stack.load_tensors(stack["lora"], source.tensors(source["lora"]), "the saved adapter")
    assert torch.equal(first.eval().net(inputs()), second.eval().net(inputs()))
    assert all(parameters[name] is parameter for name, parameter in first.net.named_parameters())  # nothing is rebuilt


def test_a_copy_of_an_adapted_module_is_independent() -> None:
    module = classifier()
    fit(module, lora())
    module.trainer = None
    copied = copy.deepcopy(module)
    fit(copied, lora())
    assert not same(trained(module), trained(copied))
    assert adapters(copied).backbone is copied.net
