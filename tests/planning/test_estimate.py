"""The plan's numbers against a fit that really happens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tuning import QUIET, Classifier, ConfiguredClassifier, Language, SetupClassifier, fit, one_sentence, python

from lightning_peft.backbone.quantization import is_quantized, weight_bytes
from lightning_peft.backbone.shapes import shapes_only
from lightning_peft.callbacks import ITI, PEFT, BitFit, Composite, LoRA, Pfeiffer, QLoRA, Quantize, TopLayers
from lightning_peft.planning.activation_bytes import kept_for_backward
from lightning_peft.planning.estimate import Plan, plan

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def ia3() -> PEFT:
    from peft import IA3Config

    return PEFT(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))


METHODS: dict[str, Any] = {
    "lora": lambda: LoRA(r=4),
    "dora": lambda: LoRA(r=2, variant="dora", target_modules=["down_proj"]),
    "lora of the last block": lambda: LoRA(r=16, layers=[2]),
    "ia3": ia3,
    "bitfit": lambda: BitFit(add_missing=True),
    "pfeiffer": lambda: Pfeiffer(),
    "top layers": lambda: TopLayers(1),
    "qlora": lambda: QLoRA(r=4),
    "composite": lambda: Composite({"a": LoRA(r=2, within="attention"), "b": LoRA(r=1, within="mlp")}),
}


def planned(cls: type[L.LightningModule], callback: L.Callback, *args: Any, **options: Any) -> Plan:
    with shapes_only():
        module = cls(*args)
    return plan(module, [callback], **options)


def storage_bytes(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in {id(t): t for t in tensors}.values())


@pytest.mark.parametrize("method", METHODS)
def test_counts_and_bytes_are_those_of_a_fit(method: str, tmp_path: Path) -> None:
    found = planned(Language, METHODS[method](), batch_size=4, length=9)
    module = Language()
    saver = ModelCheckpoint(tmp_path, filename="whole")
    trainer = fit(module, METHODS[method](), saver, enable_checkpointing=True)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert found.trainable == sum(p.numel() for p in trained)
    packed = {id(m.weight): m.in_features * m.out_features for m in module.modules() if is_quantized(m)}
    assert found.parameters == sum(packed.get(id(p), p.numel()) for p in module.parameters())
    assert found.trainable_bytes == found.gradient_bytes == storage_bytes(trained)
    frozen = [p for p in module.parameters() if not p.requires_grad and id(p) not in packed]
    assert found.frozen_bytes == storage_bytes([*frozen, *module.buffers()]) + weight_bytes(module)
    state = trainer.optimizers[0].state.values()
    assert found.optimizer == "AdamW"
    assert found.optimizer_bytes == sum(v.nbytes for values in state for v in values.values())
    assert found.checkpoint_bytes == pytest.approx((tmp_path / "whole.ckpt").stat().st_size, rel=0.04)
    trainer.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    assert found.weights_only_bytes == pytest.approx((tmp_path / "light.ckpt").stat().st_size, rel=0.04)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", method) for method in METHODS]
    + [(kind, method) for kind in ("gpt2", "opt", "gpt_neox") for method in ("lora", "lora of the last block")],
)
def test_the_bound_on_activations_holds_and_is_near(method: str, kind: str) -> None:
    bound = planned(Language, METHODS[method](), kind, batch_size=4, length=9).activation_bytes
    kept = []

    class Measured(Language):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            held: dict[int, Any] = {}
            own = {t.untyped_storage()._cdata for t in [*self.parameters(), *self.buffers()]}

            def note(tensor: torch.Tensor) -> torch.Tensor:
                held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                # padded on the left, which takes more than no padding
                mask = torch.ones_like(batch[0]).index_fill(1, torch.tensor([0]), 0)
                loss = self.model(input_ids=batch[0], attention_mask=mask, labels=batch[0]).loss
            kept.append(sum(s.nbytes() for i, s in held.items() if i not in own))
            return loss

    fit(Measured(kind), METHODS[method](), max_steps=1)
    assert bound is not None and 0.9 * bound <= kept[0] <= bound


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_rows_and_tokens_add_up(precision: str) -> None:
    def kept(rows: int, length: int) -> int:
        options: dict[str, Any] = {"batch_size": rows, "length": length, "precision": precision}
        return planned(Language, LoRA(r=4), **options).activation_bytes or 0

    assert kept(4, 16) - kept(2, 16) == 2 * (kept(2, 16) - kept(1, 16)) > 0
    assert kept(2, 32) - kept(2, 16) > 2 * (kept(2, 16) - kept(2, 8)), "linear, and attention's mask quadratic"


def test_quantising_makes_the_frozen_weights_smaller_and_nothing_else() -> None:
    with shapes_only():
        module = Language()
    int8 = plan(module, [Quantize("int8"), LoRA(r=4)], batch_size=4, length=9)
    full = planned(Language, LoRA(r=4), batch_size=4, length=9)
    assert int8.frozen_bytes < full.frozen_bytes
    assert (int8.parameters, int8.trainable) == (full.parameters, full.trainable)
    assert int8.activation_bytes == full.activation_bytes


def test_adapters_are_listed_where_they_go() -> None:
    found = planned(Language, METHODS["composite"]())
    assert [adapter.name for adapter in found.adapters] == ["composite-a", "composite-b"]
    assert found.adapters[0].modules == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 3}
    assert found.adapters[1].modules == {"gate_proj": 3, "up_proj": 3, "down_proj": 3}
    assert sum(adapter.parameters for adapter in found.adapters) == found.trainable


@pytest.mark.parametrize("cls", [Classifier, SetupClassifier, ConfiguredClassifier])
def test_a_hand_written_module_is_planned_wherever_it_builds_its_backbone(cls: type[Classifier]) -> None:
    built = {Classifier: "__init__", SetupClassifier: "setup", ConfiguredClassifier: "configure_model"}[cls]
    found = planned(cls, LoRA(r=2, backbone="net", target_modules=["linear"]), built)
    assert found.adapters[0].modules == {"linear": 3}
    assert found.trainable == 3 * 2 * 16 + found.outside and found.outside == 27
    assert found.activation_bytes is None and "example_input_array" in found.notes[-1]


class Example(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 1, 10)


def test_an_example_input_gives_the_bound_for_any_module() -> None:
    callback = LoRA(r=2, backbone="net", target_modules=["linear"])
    one, four = (planned(Example, callback, batch_size=n).activation_bytes for n in (1, 4))
    assert one is not None and four == 4 * one


class Sgd(Classifier):
    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)}


class Broken(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)


def test_the_optimizer_is_the_modules_own() -> None:
    found = planned(Sgd, LoRA(r=2, backbone="net", target_modules=["linear"]))
    assert (found.optimizer, found.optimizer_bytes) == ("SGD", found.trainable_bytes)


def test_an_optimizer_that_cannot_be_made_is_taken_for_adamw_and_this_is_said() -> None:
    found = planned(Broken, LoRA(r=2, backbone="net", target_modules=["linear"]))
    assert found.optimizer == "AdamW" and found.optimizer_bytes >= 2 * found.trainable_bytes
    assert any("AdamW is assumed" in note for note in found.notes)


def test_an_edit_trains_nothing_but_is_saved() -> None:
    found = planned(Language, ITI(num_heads=3))
    assert (found.trainable, found.gradient_bytes, found.optimizer_bytes, found.activation_bytes) == (0, 0, 0, 0)
    assert found.adapters[0].modules == {"o_proj": 3} and "without gradients" in found.notes[0]


class Looks(LoRA):
    def make_config(self, backbone: Any) -> Any:
        self.r = int(next(backbone.parameters()).sum().item())


@pytest.mark.parametrize(
    ("cls", "callback", "said"),
    [
        (Language, L.Callback(), "No callback adapts"),
        (Language, LoRA(target_modules=["q_prj"]), "nearest names"),
        (Language, LoRA(backbone="encoder"), "has no submodule"),
        (Classifier, LoRA(), "cannot be told"),
        (Language, Looks(), "Looks cannot be planned"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(cls: Any, callback: L.Callback, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        planned(cls, callback)
    assert one_sentence(str(caught.value))


def test_a_module_with_values_is_refused() -> None:
    with pytest.raises(ValueError, match="has values"):
        plan(Language(), [LoRA()])


def test_what_is_kept_is_counted_once_and_weights_are_not() -> None:
    with torch.device("meta"):
        layer, x = torch.nn.Linear(8, 4, bias=False), torch.empty(5, 8)
    assert kept_for_backward(layer, x) == 5 * 8 * 4
    both = torch.nn.Sequential(layer, torch.nn.Sigmoid())
    assert kept_for_backward(both, x) == 5 * 8 * 4 + 5 * 4 * 4
    assert kept_for_backward(both, x, precision="bf16-mixed") == (5 * 8 + 5 * 4) * 2
    assert kept_for_backward(both.requires_grad_(False), x) == 0


def test_transformers_is_as_before_after_shapes_only(tiny_folder: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

    folder, before = tiny_folder("llama"), PreTrainedModel.__dict__["from_pretrained"]
    with pytest.raises(KeyError), shapes_only():
        assert AutoModelForCausalLM.from_pretrained(folder).device.type == "meta"
        raise KeyError
    with pytest.raises(ValueError, match="quantise by the callback"), shapes_only():
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert PreTrainedModel.__dict__["from_pretrained"] is before
    assert AutoModelForCausalLM.from_pretrained(folder).device.type == "cpu"


BIG = """
import re
import sys
from pathlib import Path
from lightning_peft.callbacks import LoRA
from lightning_peft.planning.estimate import plan
from lightning_peft.models import CausalLM
from lightning_peft.backbone.quantization import is_quantized, weight_bytes
from lightning_peft.backbone.shapes import shapes_only

with shapes_only():
    module = CausalLM(sys.argv[1], dtype="bfloat16")
found = plan(module, [LoRA(r=8)], batch_size=8, length=2048, whole_batch=True)
# not getrusage's peak, which begins with what the process held that started this one
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(found.frozen_bytes, found.trainable, found.activation_bytes, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory where Linux says it")
def test_seven_billion_parameters_are_planned_from_their_config_without_being_allocated(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # its defaults are LLaMA-7B's
    assert os.listdir(tmp_path) == ["config.json"]
    frozen, trainable, activations, peak = map(int, python(BIG, tmp_path).split()[-4:])
    assert frozen == pytest.approx(2 * 6.7384e9, rel=1e-3)
    assert trainable == 32 * 2 * 8 * (4096 + 4096)
    assert activations > 5e10, "tens of gigabytes, none of which is there"
    assert peak * 1024 < 1e9, "what the imports take"
