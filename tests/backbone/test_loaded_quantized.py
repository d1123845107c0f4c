"""A model that transformers loaded in 4 or 8 bits computes the same, bit for bit, whatever this package does to it.

bitsandbytes repacks 4-bit weights for the kernels of some CPUs, and its own `state_dict()` then destroys them. Where
the CPU has no such kernel these tests hold without further ado.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from peft import AdaptionPromptConfig, LoraConfig
from statements import Module, Statements, trainer
from torch import Tensor, nn
from tuning import QUIET

from lightning_peft import adapters, export_checkpoint, load_adapter, load_from_checkpoint, save_adapter, steering
from lightning_peft import callbacks as c
from lightning_peft.backbone.fingerprint import fingerprint
from lightning_peft.backbone.modules import state_tensors
from lightning_peft.backbone.quantization import protect, quantized_layers, weight_bytes
from lightning_peft.fitting.report import print_table
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.methods import METHODS

bnb = pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:.*in eval mode", "ignore:.*cast")]

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": FOUR,
    "nf4 twice": FOUR | {"bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
DATA = Statements()
IDS = DATA.column("input_ids")[:4]
WHERE: dict[str, Any] = {"backbone": "backbone"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **sizes, **heads))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


class Loaded(Module):
    """A quantised language model, beside a quantised layer and a head that belong to no backbone."""

    def __init__(self, folder: str, kind: str, learning_rate: float = 0.01) -> None:
        from transformers import BitsAndBytesConfig, LlamaForCausalLM

        super().__init__(learning_rate=learning_rate)
        how = BitsAndBytesConfig(**KINDS[kind])
        self.backbone = LlamaForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})
        torch.manual_seed(1)
        self.beside = bnb.nn.LinearNF4(64, 64).to("cpu").requires_grad_(False)
        self.head = nn.Linear(64, 2)
        self.save_hyperparameters()


class Letters:
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [3 + ord(letter) % 60 for letter in text]}


@torch.no_grad()
def computed(module: Loaded) -> list[Tensor]:
    module.eval()
    return [module.backbone(input_ids=IDS).logits, module.beside(torch.ones(2, 64))]


def off(module: Loaded) -> list[Tensor]:
    stack = stack_of(module.backbone)
    with stack.disabled():
        return computed(module)


def layers(module: Loaded) -> dict[str, nn.Module]:
    return {name: layer for name, layer in quantized_layers(module) if name != "head"}


def packed(module: Loaded) -> dict[str, list[Tensor]]:
    """The stored weights, and what they stand for."""
    found = {}
    for name, layer in layers(module).items():
        weight: Any = layer.weight
        state = getattr(weight, "quant_state", None)
        values = [weight.data] if state is None else [weight.data, bnb.functional.dequantize_4bit(weight.data, state)]
        found[name] = [value.clone() for value in values]
    return found


def alike(one: dict[str, list[Tensor]], two: dict[str, list[Tensor]]) -> bool:
    return one.keys() == two.keys() and all(map(torch.equal, a, b) for n in one for a, b in [(one[n], two[n])])


# -- what the package is called with --------------------------------------------------------------------------------


def lora(**options: Any) -> c.LoRA:
    return c.LoRA(r=2, target_modules=["q_proj", "down_proj"], **WHERE, **options)


def look_ups(module: Loaded, path: Path) -> None:
    lora().apply(module)
    stack = adapters(module)
    part = stack["lora"]
    for found in (stack.keys(part), stack.tensors(part), stack.live(part), part.injection.places()):
        assert len(found) == 3 * 2 * (1 if found == part.injection.places() else 2)
    stack.describe()
    print_table(module, stack)
    fingerprint(module.backbone)
    assert weight_bytes(module.backbone) > 0
    for name, tensor in state_tensors(module).items():
        assert name in dict(module.named_parameters()) or name in dict(module.named_buffers()), tensor.shape


def dial(module: Loaded, path: Path) -> None:
    filled(module, path)
    stack = adapters(module)
    stack.scale(2.0)
    changed = computed(module)[0]
    stack.scale(0.0)
    assert not torch.equal(computed(module)[0], changed)
    with pytest.raises(ValueError, match="cannot be merged into quantised weights"):
        stack.merge()
    stack.enable(False)
    stack.enable(True)
    stack.train({"lora"})
    stack.freeze()


def filled(module: Loaded, path: Path) -> None:
    lora().apply(module)
    stack = adapters(module)
    for tensor in stack.tensors(stack["lora"]).values():
        tensor.normal_()
    save_adapter(module, path / "folder")


def folders(module: Loaded, path: Path) -> None:
    filled(module, path)
    stack = adapters(module)
    acting = computed(module)[0]
    stack.remove("lora")
    load_adapter(module.backbone, path / "folder", "again")
    assert torch.equal(computed(module)[0], acting)
    stack.remove("again")
    with steering(module.backbone, path / "folder", scale=0.5):
        assert not torch.equal(computed(module)[0], acting)


def peft_methods(module: Loaded, path: Path) -> None:
    stack = stack_of(module.backbone)
    for config in (
        AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        stack.add(config, "theirs")
        stack.describe()
        computed(module)
        stack.remove("theirs")


def one_method(name: str) -> Callable[[Loaded, Path], None]:
    def run(module: Loaded, path: Path) -> None:
        trainer(METHODS[name].make(), max_steps=2, max_epochs=-1).fit(module, DATA.loader())

    return run


def edit(make: Callable[[], Any]) -> Callable[[Loaded, Path], None]:
    def run(module: Loaded, path: Path) -> None:
        module.tokenizer = Letters()  # type: ignore[assignment]
        trainer(make()).fit(module, DATA.loader())
        save_adapter(module, path / "edit")
        adapters(module).remove(adapters(module).parts[-1].name)
        with steering(module.backbone, path / "edit", positions="all"):
            computed(module)

    return run


def training(module: Loaded, path: Path) -> None:
    saving = ModelCheckpoint(path, "a", save_last="link")
    made = trainer(lora(), c.AdapterEMA(0.5), saving, enable_checkpointing=True, num_sanity_val_steps=1)
    made.fit(module, DATA.loader(), DATA.loader())
    ours = computed(module)[0]
    back = load_from_checkpoint(type(module), path / "a.ckpt")
    assert torch.equal(computed(back)[0], ours)
    export_checkpoint(path / "a.ckpt", path / "exported")
    other = type(module)(**module.hparams)
    load_adapter(other.backbone, path / "exported")
    assert torch.equal(computed(other)[0], ours)


def resuming(module: Loaded, path: Path) -> None:
    saving = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    fresh = copy.deepcopy(module)  # bitsandbytes has rounded the scales of a model that it has used
    trainer(lora(), saving, enable_checkpointing=True, max_epochs=2).fit(fresh, DATA.loader(), DATA.loader())
    trainer(lora(), max_epochs=2).fit(module, DATA.loader(), DATA.loader(), ckpt_path=path / "epoch=0.ckpt")
    own, other = ({n: t for n, t in state_tensors(m).items() if "lora_" in n} for m in (module, fresh))
    assert own and all(torch.equal(own[name], other[name]) for name in own)


def averaging(module: Loaded, path: Path) -> None:
    """Lightning's own, which copies the module and loads whole states."""
    saving = ModelCheckpoint(path, "a")
    averages = [EMAWeightAveraging(decay=0.5) for _ in range(2)]
    fresh = type(module)(**module.hparams)
    trainer(lora(), averages[0], saving, enable_checkpointing=True).fit(fresh, DATA.loader())
    trainer(lora(), averages[1], max_epochs=2).fit(module, DATA.loader(), ckpt_path=path / "a.ckpt")


def quantizing(module: Loaded, path: Path) -> None:
    kind = module.hparams["kind"]
    callback = c.Quantize("fp4" if kind == "fp4" else "nf4", double_quant=kind == "nf4 twice", **WHERE)
    assert len(callback.apply(module)) == 21
    lora().apply(module)


def generating(module: Loaded, path: Path) -> None:
    filled(module, path)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    mask = torch.ones_like(IDS)
    cached = module.backbone.generate(IDS, attention_mask=mask, **options)
    assert cached.shape == (4, IDS.shape[1] + 3)
    copied = copy.deepcopy(module)
    assert torch.equal(computed(copied)[0], computed(module)[0])


def saving_all(module: Loaded, path: Path) -> None:
    """What Lightning itself does for every checkpoint, and a user may do with the whole."""
    lora().apply(module)
    torch.save(module.state_dict(), path / "all.pt")
    if module.hparams["kind"] != "int8":  # which bitsandbytes cannot read into a layer that was used
        module.load_state_dict(torch.load(path / "all.pt"))


CALLS: dict[str, Callable[[Loaded, Path], None]] = {
    "look-ups": look_ups,
    "dial": dial,
    "folders": folders,
    "peft's methods": peft_methods,
    **{name: one_method(name) for name in ("DoRA", "UniPELT", "PromptTuning", "PrefixTuning", "BitFit")},
    "ITI": edit(lambda: c.ITI(num_heads=3, alpha=4.0, **WHERE)),
    "gated ITI": edit(lambda: c.ITI(num_heads=3, alpha=4.0, gate="adaptive", **WHERE)),
    "CAA": edit(lambda: c.CAA(multiplier=2.0, **WHERE)),
    "RepE": edit(lambda: c.RepE(coeff=2.0, **WHERE)),
    "ActAdd": edit(lambda: c.ActAdd("Love", "Hat", **WHERE)),
    "Ablation": edit(lambda: c.Ablation(**WHERE)),
    "LoFiT": edit(lambda: c.LoFiT(share=0.5, select_steps=1, **WHERE)),
    "training": training,
    "resuming": resuming,
    "averaging": averaging,
    "quantizing": quantizing,
    "generating": generating,
    "the whole state": saving_all,
}


UNUSED = ("look-ups", "folders", "CAA", "training", "resuming", "quantizing", "the whole state")  # look at weights


@pytest.mark.parametrize(("call", "seen"), [*((call, True) for call in CALLS), *((call, False) for call in UNUSED)])
def test_nothing_that_is_called_changes_the_base(folder: Path, tmp_path: Path, call: str, seen: bool) -> None:
    expected = computed(Loaded(str(folder), "nf4"))
    module = Loaded(str(folder), "nf4")
    before = packed(module)
    if seen:
        computed(module)  # repacks the weights
    CALLS[call](module, tmp_path)
    assert all(map(torch.equal, off(module), expected))
    after = packed(module)
    if not seen:
        assert alike(before, after)
    for part in list(adapters(module).parts) if stack_of(module.backbone).parts else []:
        stack_of(module.backbone).remove(part.name)
    assert all(map(torch.equal, computed(module), expected)) and alike(after, packed(module))


@pytest.mark.parametrize("call", ["dial", "training", "averaging", "the whole state", "CAA"])
@pytest.mark.parametrize("kind", ["nf4 twice", "fp4", "int8"])
def test_nor_in_other_kinds(folder: Path, tmp_path: Path, call: str, kind: str) -> None:
    expected = computed(Loaded(str(folder), kind))
    module = Loaded(str(folder), kind)
    computed(module)
    CALLS[call](module, tmp_path)
    assert all(map(torch.equal, off(module), expected))


# -- layers alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [bnb.nn.LinearNF4, bnb.nn.LinearFP4, bnb.nn.Linear4bit])
@pytest.mark.parametrize("outputs", [64, 40])  # one that bitsandbytes repacks, one that it cannot
def test_a_gradient_passes_a_layer_that_was_used(cls: Any, outputs: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(cls(64, outputs).to("cpu")).eval()
    protect(module)
    x = torch.randn(3, 64)
    seen = module(x)
    weight = bnb.functional.dequantize_4bit(module[0].weight.data, module[0].weight.quant_state)
    x.requires_grad_(True)
    out = module(x)
    torch.testing.assert_close(out, x @ weight.T + module[0].bias)
    torch.testing.assert_close(out, seen, rtol=0.02, atol=0.02)  # the kernel computes in bfloat16
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * out.detach() @ weight)
    assert torch.equal(module(x.detach()), seen)


def test_weights_that_are_loaded_later_are_the_ones_computed_with() -> None:
    torch.manual_seed(0)
    one, two = (nn.Sequential(bnb.nn.LinearNF4(64, 64).to("cpu")).eval() for _ in range(2))
    protect(one)
    protect(two)
    x = torch.randn(3, 64)
    assert not torch.equal(one(x), two(x))
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(x), two(x))
