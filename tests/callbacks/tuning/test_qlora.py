"""QLoRA as a callback: the paper's defaults, and the paged optimizer in the place of the module's own."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR
from tuning import QUIET, Classifier, Language, classifier, data_of, fit, one_sentence, same, trainer, weights

from lightning_peft import adapters
from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.quantization import is_quantized, quantized_layers
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks import LoRA, QLoRA, Quantize

pytestmark = [
    pytest.mark.filterwarnings(warning)
    for warning in (*QUIET, "ignore:Paged optimizers are not supported on CPU", "ignore:.*is_gradient_check")
]

KINDS = ("paged_adamw_8bit", "paged_adamw_32bit")
EPOCH = {"max_steps": -1, "max_epochs": 1}
TWO = {"max_steps": -1, "max_epochs": 2}


class Scheduled(Language):
    """Two groups of AdamW, each with its own settings, and a warm-up in two phases."""

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": parameters[:4], "lr": 0.02, "weight_decay": 0.1},
            {"params": parameters[4:], "betas": (0.8, 0.99)},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01, eps=1e-7)
        phases: list[Any] = [LinearLR(optimizer, 0.5, total_iters=2), LambdaLR(optimizer, lambda step: 0.9**step)]
        scheduler = SequentialLR(optimizer, phases, milestones=[2])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Record(L.Callback):
    """Each step's learning rates."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def qlora(**options: Any) -> QLoRA:
    """r=128 gives each matrix 4,096 values, which is where 8-bit moments begin."""
    return QLoRA(**({"r": 128, "dropout": 0.0} | options))


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in weights(module).items() if ".lora_" in name}


# -- the defaults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_by_default_it_is_the_papers(kind: str) -> None:
    module = Language(kind)
    QLoRA().apply(module)
    part = adapters(module).parts[0]
    assert (part.config.r, part.config.lora_alpha, part.config.lora_dropout) == (64, 16, 0.1)
    linear = {name for name, m in tiny(kind).named_modules() if is_linear(m) and name != "lm_head"}
    assert set(part.injection.places()) == linear == {name for name, _ in quantized_layers(module.model)}
    for _, layer in quantized_layers(module.model):
        assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested


def test_the_number_of_parameters_is_r_times_inputs_plus_outputs() -> None:
    module = Language("gpt2")
    QLoRA(r=3).apply(module)
    shapes = [m.weight.shape for n, m in tiny("gpt2").named_modules() if is_linear(m) and n != "lm_head"]
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 3 * sum(map(sum, shapes))


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"target_modules": ["q_proj"]}, {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}),
        ({"layers": Layers(last=1), "within": "attention"}, {f"model.layers.2.self_attn.{p}_proj" for p in "qkvo"}),
        ({"layers": [0], "within": "mlp"}, {f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")}),
    ],
)
def test_where_it_goes_is_chosen_as_in_lora(options: Any, places: set[str]) -> None:
    module = Language()
    QLoRA(**options).apply(module)
    assert set(adapters(module).parts[0].injection.places()) == places
    assert len(list(quantized_layers(module.model))) == 21  # the base is quantised all the same


def test_it_is_quantize_and_lora() -> None:
    one, two = Language(), Language()
    targets = [name for name, m in tiny("llama").named_modules() if is_linear(m) and name != "lm_head"]
    fit(one, QLoRA(r=2, dropout=0.0))
    fit(two, Quantize(), LoRA(r=2, target_modules=targets, name="qlora"))
    assert same(weights(one), weights(two))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_any_module_in_any_type(quant_type: Any) -> None:
    module = classifier("configure_model")
    fit(module, QLoRA(r=2, quant_type=quant_type, skip_modules=["input"], backbone="net"))
    assert not is_quantized(module.net.input.base_layer) and is_quantized(module.net.blocks[0].linear.base_layer)
    assert all(value.any() for value in trained(module).values())


# -- the paged optimizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_paged_optimizer_has_the_groups_and_the_schedule_of_the_modules_own(kind: Any) -> None:
    own, paged = Record(), Record()
    fit(Scheduled(), qlora(), own, max_steps=4)
    made = fit(Scheduled(), qlora(paged_optimizer=kind), paged, max_steps=4)
    assert own.rates == paged.rates and len({tuple(rates) for rates in own.rates}) > 2
    optimizer = made.optimizers[0]
    assert type(optimizer).__name__ == {"paged_adamw_8bit": "PagedAdamW8bit"}.get(kind, "PagedAdamW32bit")
    first, second = optimizer.param_groups
    assert (first["weight_decay"], first["betas"], first["eps"]) == (0.1, (0.9, 0.999), 1e-7)
    assert (second["weight_decay"], second["betas"], second["eps"]) == (0.01, (0.8, 0.99), 1e-7)
    assert made.lr_scheduler_configs[0].scheduler.optimizer is optimizer


def test_schedulers_do_not_warn_of_the_swap() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Scheduled(), qlora(paged_optimizer="paged_adamw_32bit"), max_steps=3)
    assert not [w for w in caught if "lr_scheduler" in str(w.message) and "optimizer.step" in str(w.message)]


def test_in_32_bits_it_makes_the_steps_of_adamw() -> None:
    own, paged = Scheduled(), Scheduled()
    fit(own, qlora())
    fit(paged, qlora(paged_optimizer="paged_adamw_32bit"))
    for name, value in trained(own).items():
        torch.testing.assert_close(trained(paged)[name], value, rtol=1e-3, atol=2e-4)


def test_in_8_bits_the_moments_have_a_byte_each() -> None:
    made = fit(Language(), qlora(paged_optimizer="paged_adamw_8bit"))
    states = made.optimizers[0].state
    large = {parameter for parameter in states if parameter.numel() >= 4096}
    assert large and all(states[p][key].dtype == torch.uint8 for p in large for key in ("state1", "state2"))


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_trained_in_one_go(kind: Any, tmp_path: Any) -> None:
    whole, path = Scheduled(), tmp_path / "half.ckpt"
    end = fit(whole, qlora(paged_optimizer=kind), **TWO)
    fit(Scheduled(), qlora(paged_optimizer=kind), **EPOCH).save_checkpoint(path)
    resumed = Scheduled()
    again = fit(resumed, qlora(paged_optimizer=kind), **TWO, ckpt_path=path)
    assert same(trained(whole), trained(resumed))
    for one, two in zip(end.optimizers[0].state.values(), again.optimizers[0].state.values(), strict=True):
        assert one["step"] == two["step"] and torch.equal(one["state1"], two["state1"])


def test_an_optimizer_made_before_the_adapter_is_repaired_and_paged() -> None:
    class Early(Classifier):
        """As LightningCLI does: the optimizer holds all there was when it was made."""

        def __init__(self) -> None:
            super().__init__()
            self.made = torch.optim.AdamW(self.parameters(), lr=0.01)

        def configure_optimizers(self) -> Any:
            return self.made

    module = Early()
    made = fit(module, QLoRA(r=2, paged_optimizer="paged_adamw_32bit", backbone="net"))
    held = {id(p) for group in made.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    assert all(value.any() for value in trained(module).values())


def test_a_second_fit_pages_its_own_optimizer() -> None:
    module, callback = Language(), qlora(paged_optimizer="paged_adamw_8bit")
    first, second = fit(module, callback), fit(module, callback)
    assert first.optimizers[0] is not second.optimizers[0]
    assert type(first.optimizers[0]) is type(second.optimizers[0])


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), r"^paged_optimizer takes the place of .* has SGD: give it AdamW"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), r"^The paged AdamW has no amsgrad: "),
        (lambda p: torch.optim.AdamW(p, maximize=True), r"^The paged AdamW has no maximize: "),
    ],
)
def test_what_cannot_be_paged_is_refused_before_the_first_step(make: Any, message: str) -> None:
    module, record = Language(), Record()
    module.configure_optimizers = lambda: make([p for p in module.parameters() if p.requires_grad])  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message) as error:
        trainer(qlora(paged_optimizer="paged_adamw_8bit"), record).fit(module, data_of(module))
    assert one_sentence(str(error.value)) and not record.rates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paged_optimizer": "adamw"}, r"^paged_optimizer must be one of paged_adamw_8bit, paged_adamw_32bit, got"),
        ({"quant_type": "int4"}, r'^quant_type must be "nf4", "fp4" or "int8", got \'int4\'\.$'),
        ({"r": 0}, r"^The rank r must be at least 1, got 0\.$"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        QLoRA(**options)
    assert one_sentence(str(error.value))
