"""MAM, UniPELT and the prefix they hold, as callbacks: their parts, their size, and the laws with all parts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, ROOT, Language, base_weights, fit, moved, one_sentence, weights

from lightning_peft import adapters
from lightning_peft.callbacks import MAM, AttentionPrefix, LoRA, UniPELT
from lightning_peft.testing import check_adaptation
from lightning_peft.testing.architectures import ARCHITECTURES
from lightning_peft.testing.models import rough

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
KINDS = ("llama", "wide_llama", "gpt2", "gpt_neox", "opt", "bert", "t5", "vit")
# the widths of all keys and of all queries, and where there are three matrices that is the values' width too
KEYS = {"llama": 16, "wide_llama": 32}
FUSED = ("gpt2", "gpt_neox")


class Around(L.LightningModule):
    """A LightningModule with a backbone and nothing else."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.model = backbone


def prefix_count(kind: str, length: int, gate: bool) -> int:
    return (9 if kind == "t5" else 3) * (2 * length * KEYS.get(kind, 32) + 1 + 33 * gate)


def parallel_count(kind: str, m: int) -> int:
    return (6 if kind == "t5" else 3) * (2 * 32 * m + m + 32)


def low_rank_count(kind: str, r: int) -> int:
    queries = {"wide_llama": 64}.get(kind, 32)
    outputs = [3 * 32] if kind in FUSED else [queries, KEYS.get(kind, 32)]
    return (9 if kind == "t5" else 3) * sum(r * (32 + out) + 33 for out in outputs)


COUNTS: dict[str, Any] = {
    "AttentionPrefix": (lambda: AttentionPrefix(4), lambda kind: prefix_count(kind, 4, False)),
    "gated": (lambda: AttentionPrefix(4, gate=True), lambda kind: prefix_count(kind, 4, True)),
    "MAM": (
        lambda: MAM(prefix_length=4, size=8),
        lambda kind: prefix_count(kind, 4, False) + parallel_count(kind, 8),
    ),
    "UniPELT": (
        lambda: UniPELT(r=2, prefix_length=4, size=8),
        lambda kind: (
            prefix_count(kind, 4, True)
            + low_rank_count(kind, 2)
            + parallel_count(kind, 8)
            + (6 if kind == "t5" else 3) * 33
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", COUNTS)
def test_the_number_of_parameters_is_the_closed_formula(method: str, kind: str) -> None:
    make, count = COUNTS[method]
    module = Around(rough(kind))
    callback = make()
    callback.train_head = False
    callback.apply(module)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == count(kind)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("method", ["MAM", "UniPELT"])
def test_all_parts_at_once_obey_the_laws(method: str, kind: str) -> None:
    architecture = ARCHITECTURES[kind]
    make, count = COUNTS[method]
    callback = make()
    callback.backbone = "backbone"
    outcomes = check_adaptation(
        architecture.make_module, callback, architecture.batches, count=lambda module: count(kind)
    )
    assert all(o.holds for o in outcomes if o.law in ("identity", "frozen", "off", "round trip", "count", "resume"))


@pytest.mark.parametrize("make", [MAM, UniPELT])
def test_each_part_can_be_switched_off_and_scaled_by_itself(make: Any, tokens: Tensor) -> None:
    module = Language("llama")
    fit(module, make(size=4))
    model = module.model.eval()
    stack = adapters(module)

    @torch.no_grad()
    def run() -> Tensor:
        return model(tokens).logits

    whole, base = run(), tiny("llama").eval()(tokens).logits
    for part in stack.parts:
        with stack.disabled(part.name):
            without = run()
        stack.scale(0.0, part.name)
        assert torch.equal(run(), without) and not torch.equal(without, whole)
        stack.scale(1.0, part.name)
        assert torch.equal(run(), whole)
    with stack.disabled():
        assert torch.equal(run(), base)


@pytest.mark.parametrize("make", [AttentionPrefix, MAM, UniPELT])
def test_training_moves_the_parts_and_nothing_else(make: Any) -> None:
    module = Language("gpt2")
    before = base_weights(module)
    fit(module, make(layers=[0, 2]))
    after = {
        name: v for name, v in base_weights(module).items() if ".bottleneck" not in name and ".prefix_" not in name
    }
    assert after.keys() == before.keys() and not moved(before, after)
    mixed = {name.split(".")[3]: bool(v.any()) for name, v in weights(module).items() if ".prefix_mix" in name}
    assert mixed == {"0": True, "2": True}


def test_unipelt_has_lora_on_queries_and_values_or_on_the_matrix_for_all() -> None:
    llama, gpt2 = (UniPELT().make_configs(tiny(kind))["unipelt-low_rank"] for kind in ("llama", "gpt2"))
    assert {name.rsplit(".", 1)[-1] for name in llama.target_modules} == {"q_proj", "v_proj"}  # type: ignore[attr-defined]
    assert {name.rsplit(".", 1)[-1] for name in gpt2.target_modules} == {"c_attn"}  # type: ignore[attr-defined]
    assert (llama.size, llama.alpha, llama.gate) == (8, 1.0, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("alpha", "strength"), [(None, 1.0), (2, 0.5)])
def test_the_gate_stands_in_place_of_loras_scaling_unless_an_alpha_is_given(alpha: Any, strength: float) -> None:
    module = Language("llama")
    UniPELT(r=4, alpha=alpha, name="u").apply(module)
    for name in ("u-adapter", "u-prefix"):
        adapters(module).enable(False, name)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    layer: Any = module.model.get_submodule("model.layers.0.self_attn.v_proj")
    branch = layer.bottleneck["u-low_rank"]
    with torch.no_grad():
        branch.up.weight.normal_()
    gate = torch.sigmoid(x @ branch.gate.weight.T + branch.gate.bias)
    added = gate * (x @ branch.down.weight.T @ branch.up.weight.T)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + strength * added)


def test_a_gated_low_rank_part_with_an_open_gate_is_lora(tokens: Tensor) -> None:
    gated, lora = Language("llama"), Language("llama")
    UniPELT(r=2, alpha=3, name="u").apply(gated)
    stack = adapters(gated)
    stack.enable(False, "u-adapter")
    stack.enable(False, "u-prefix")
    LoRA(r=2, alpha=3).apply(lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for i in range(3):
            for name in ("q_proj", "v_proj"):
                ours: Any = gated.model.get_submodule(f"model.layers.{i}.self_attn.{name}")
                while not hasattr(ours, "bottleneck"):
                    ours = ours.base_layer  # the prefix stands around the queries
                theirs: Any = lora.model.get_submodule(f"model.layers.{i}.self_attn.{name}")
                branch = ours.bottleneck["u-low_rank"]
                branch.gate.bias.fill_(50.0)
                branch.up.weight.normal_()
                theirs.lora_A["lora"].weight.copy_(branch.down.weight)
                theirs.lora_B["lora"].weight.copy_(branch.up.weight)
    found, expected = (m.model.eval()(tokens).logits for m in (gated, lora))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, tiny("llama")(tokens).logits, atol=1e-2)


def test_a_prefix_at_full_weight_declares_that_it_is_no_identity() -> None:
    for make in (AttentionPrefix, MAM, UniPELT):
        assert set(make().exempt) == {"merge"} and set(make(init="paper").exempt) == {"merge", "identity"}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("attention_prefix", ("attention_prefix",)),
        ("mam", ("mam-parallel", "mam-prefix")),
        ("unipelt", ("unipelt-low_rank", "unipelt-adapter", "unipelt-prefix")),
    ],
)
def test_the_recipe_builds_the_callback(name: str, names: tuple[str, ...]) -> None:
    recipe = yaml.safe_load(Path(ROOT, "configs", f"{name}.yaml").read_text())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    built = parser.instantiate_classes(parser.parse_object({"callback": recipe["trainer"]["callbacks"][0]})).callback
    assert built.names == names


@pytest.mark.parametrize("kind", ["hand_written", "convolutional"])
@pytest.mark.parametrize("make", [AttentionPrefix, MAM, UniPELT])
def test_a_model_without_attention_of_transformers_is_one_sentence(make: Any, kind: str) -> None:
    module = Around(rough(kind))
    with pytest.raises(ValueError, match=r"has no block with an attention in it|shows no residual stream") as error:
        make(backbone="model").apply(module)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionPrefix(length=0), r"^The length of a prefix must be at least 1, got 0\.$"),
        (lambda: UniPELT(r=0), r"^The rank r must be at least 1, got 0\.$"),
    ],
)
def test_wrong_arguments_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
