"""Weight deltas: what parameters read as, for whoever reads them, and that nothing else of the model changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import add_lora, close
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor, nn
from tuning import Net, one_sentence, points

from lightning_peft import load_adapter, save_adapter
from lightning_peft.backbone.fingerprint import fingerprint
from lightning_peft.backbone.modules import base_modules
from lightning_peft.stack.stack import AdapterStack, stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
from lightning_peft.tuners.weight_deltas.config import pack, unpack
from lightning_peft.tuners.weight_deltas.masks import deltas, keep_largest

pytestmark = [pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*enable_nested_tensor")]


class Rooted(nn.Module):
    """A model that owns parameters itself, beside a recurrent layer and PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return self.encoder(self.lstm(x)[0])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def ids() -> Tensor:
    return torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(7))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "llama": (lambda: rough("llama"), lambda m: m(input_ids=ids()).logits),  # tied
    "gpt2": (lambda: rough("gpt2"), lambda m: m(input_ids=ids()).logits),  # Conv1D, tied
    "bert": (lambda: rough("bert"), lambda m: m(input_ids=ids()).logits),
    "t5": (lambda: rough("t5"), lambda m: m(input_ids=ids(), decoder_input_ids=ids()).logits),  # shared embeddings
    "vit": (lambda: rough("vit"), lambda m: m(pixel_values=normal(2, 3, 8, 8)).logits),  # parameters of a parent
    "net": (lambda: Net().eval(), lambda m: m(next(iter(points()))[0])),  # BatchNorm, Conv1d
    "rooted": (lambda: Rooted().eval(), lambda m: m(normal(2, 5, 8))),  # parameters of the root, LSTM, attention
}
kinds = pytest.mark.parametrize("kind", MODELS)


@torch.no_grad()
def run(kind: str, model: nn.Module) -> Tensor:
    return MODELS[kind][1](model)


def all_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def add(model: nn.Module, name: str = "delta", size: float = 0.1, seed: int = 3, **options: Any) -> AdapterStack:
    """A random delta on every parameter, or those named."""
    stack = stack_of(model)
    part = stack.add(WeightDeltasConfig(**({"target_parameters": ".*"} | options)), name)
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in stack.tensors(part).items():
        if ".values." in key:
            tensor.copy_(size * torch.randn(tensor.shape, generator=generator))
    return stack


@kinds
def test_a_zero_delta_changes_nothing_bit_for_bit(kind: str) -> None:
    model = MODELS[kind][0]()
    expected = run(kind, model)
    add(model, size=0.0)
    assert torch.equal(run(kind, model), expected)


@kinds
def test_the_model_computes_with_the_sum(kind: str) -> None:
    """A delta on every parameter acts as the same change of the parameters themselves does."""
    model, changed = MODELS[kind][0](), MODELS[kind][0]()
    names = all_of(model)
    add(model)
    found = {delta.full_name: delta for delta in deltas(model, "delta")}
    assert set(found) == set(names) == {n for n, _ in model.named_parameters() if "weight_deltas" not in n}
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.add_(found[name].value)
    assert torch.equal(run(kind, model), run(kind, changed))
    assert not close(run(kind, model), run(kind, MODELS[kind][0]()), 1e-3)


@kinds
def test_off_and_strength_zero_are_the_base_bit_for_bit(kind: str) -> None:
    model = MODELS[kind][0]()
    expected = run(kind, model)
    stack = add(model)
    acting = run(kind, model)
    with stack.disabled():
        assert torch.equal(run(kind, model), expected)
    stack.scale(0.0)
    assert torch.equal(run(kind, model), expected)
    stack.scale(1.0)
    assert torch.equal(run(kind, model), acting) and not torch.equal(acting, expected)


@kinds
def test_merged_is_the_same_and_unmerged_exactly_what_was(kind: str) -> None:
    model = MODELS[kind][0]()
    stack = add(model, alpha=0.5)
    before, acting = copy.deepcopy(model.state_dict()), run(kind, model)
    stack.merge()
    assert torch.equal(run(kind, model), acting)
    stack.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(kind, model), acting)


@kinds
def test_saved_and_loaded_it_is_bit_equal_here_and_in_peft(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind][0]()
    stack = add(model, alpha=0.7)
    save_adapter(model, tmp_path)
    again = MODELS[kind][0]()
    load_adapter(again, tmp_path)
    assert torch.equal(run(kind, again), run(kind, model))
    assert torch.equal(run(kind, PeftModel.from_pretrained(MODELS[kind][0](), tmp_path)), run(kind, model))
    tensors = stack.tensors(stack["delta"])
    assert len(tensors) == len(all_of(MODELS[kind][0]()))  # shared ones once
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size <= (tmp_path / "adapter_model.safetensors").stat().st_size <= size + 512 + 256 * len(tensors)


@kinds
def test_no_name_changes_and_removed_it_leaves_nothing(kind: str) -> None:
    model = MODELS[kind][0]()
    classes = {name: type(m) for name, m in model.named_modules()}
    state, base, expected = set(model.state_dict()), fingerprint(model), run(kind, model)
    stack = add(model)
    assert state == {name for name in model.state_dict() if "weight_deltas" not in name}
    assert fingerprint(model) == base and [name for name, _ in base_modules(model)] == list(classes)
    assert all(isinstance(model.get_submodule(name), cls) for name, cls in classes.items())
    stack.remove("delta")
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert set(model.state_dict()) == state and torch.equal(run(kind, model), expected)


@kinds
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_a_model_of_its_own(kind: str, copied: Any) -> None:
    model = MODELS[kind][0]()
    stack = add(model)
    twin, expected = copied(model), run(kind, model)
    assert torch.equal(run(kind, twin), expected)
    stack.scale(0.0)
    assert torch.equal(run(kind, twin), expected) and not torch.equal(run(kind, model), expected)


@kinds
def test_the_gradient_of_a_delta_is_that_of_its_parameter(kind: str) -> None:
    model, plain = MODELS[kind][0](), MODELS[kind][0]()
    add(model, size=0.0)
    for m in (model, plain):
        MODELS[kind][1](m).square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for delta in deltas(model, "delta"):
        expected = gradients[delta.full_name]
        assert (delta.value.grad is None) == (expected is None)
        if expected is not None:
            assert torch.equal(delta.value.grad, expected)
    assert all(p.grad is None for name, p in model.named_parameters() if "weight_deltas" not in name)


# -- who reads a parameter ------------------------------------------------------------------------------------------


def test_shared_parameters_have_one_delta_and_all_who_read_them_see_it() -> None:
    model = rough("llama")
    stack = add(model, target_parameters=["lm_head.weight"])  # the second name of a parameter is as good as the first
    (delta,) = deltas(model, "delta")
    assert delta.full_name == "model.embed_tokens.weight" and len(stack.tensors(stack["delta"])) == 1
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(embedding, delta.base + delta.value) and torch.equal(head, embedding)
    stack.merge()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_pytorchs_fast_path_of_attention_sees_the_deltas() -> None:
    model = Rooted().eval()
    add(model)
    x = normal(2, 5, 8)
    with torch.no_grad():
        fast = model(x)
    assert close(fast, model(x).detach(), 1e-5)  # with gradients the fast path is not taken


@pytest.mark.parametrize("kind", ["net", "rooted"])
def test_a_compiled_model_computes_the_same(kind: str) -> None:
    model = MODELS[kind][0]()
    add(model)
    expected = run(kind, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert close(run(kind, compiled), expected, 1e-6)
    stack_of(model).scale(-1.0)
    assert close(run(kind, compiled), run(kind, model), 1e-6) and not close(run(kind, compiled), expected, 1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_run_again_in_backward_see_the_deltas(checkpointing: bool) -> None:
    model = rough("llama")
    add(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    gradients = torch.cat([delta.value.grad.flatten() for delta in deltas(model, "delta")])
    plain = rough("llama").train()
    with torch.no_grad():
        for parameter, delta in zip(plain.parameters(), deltas(model, "delta"), strict=True):
            parameter.add_(delta.value)
    plain(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    assert close(gradients, expected)


# -- missing biases, precision, quantised bases ---------------------------------------------------------------------


def test_a_missing_bias_is_created_merged_and_taken_out_again() -> None:
    model = rough("llama")
    expected = run("llama", model)
    name = "model.layers.1.self_attn.v_proj"
    stack = add(model, target_parameters=[f"{name}.bias"], add_missing=True, size=1.0)
    acting = run("llama", model)
    assert not close(acting, expected, 1e-3)
    stack.merge()
    assert torch.equal(run("llama", model), acting) and f"{name}.bias" in model.state_dict()
    stack.unmerge()
    with stack.disabled():
        assert torch.equal(run("llama", model), expected) and model.get_submodule(name).bias is None
    stack.remove("delta")
    assert f"{name}.bias" not in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_deltas_in_float32_and_read_as_half(dtype: torch.dtype) -> None:
    model = rough("llama").to(dtype)
    add(model, size=1e-4)
    delta = deltas(model, "delta")[1]
    weight = model.get_submodule(delta.full_name.rpartition(".")[0]).weight
    assert delta.value.dtype == torch.float32 and weight.dtype == dtype
    assert torch.equal(weight, (delta.base.float() + delta.value).to(dtype))
    assert run("llama", model).dtype == dtype


def test_a_quantised_base_trains_its_biases_but_not_its_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("opt")
    linear = model.model.decoder.layers[0].fc1
    quantised = bnb.nn.Linear4bit(32, 48, quant_type="nf4")
    quantised.load_state_dict(linear.state_dict())
    model.model.decoder.layers[0].fc1 = quantised.to("cpu")
    before = run("llama", model)
    name = "model.decoder.layers.0.fc1"
    with pytest.raises(ValueError, match=rf"^{name}\.weight is quantised \(uint8\) and cannot have a delta") as error:
        stack_of(model).add(WeightDeltasConfig(target_parameters=[f"{name}.weight"]), "delta")
    assert one_sentence(str(error.value))
    stack = add(model, target_parameters=[f"{name}.bias"], size=1.0)
    moved = run("llama", model)
    assert not close(moved, before, 1e-3)
    stack.merge()
    assert torch.equal(run("llama", model), moved)


# -- masks ----------------------------------------------------------------------------------------------------------


def masked(pruned: bool, density: float) -> tuple[nn.Module, AdapterStack]:
    model = rough("llama")
    names = all_of(model)
    stack = add(model, masked=names, pruned=pruned)
    generator = torch.Generator().manual_seed(5)
    for delta in deltas(model, "delta"):
        delta.mask.copy_(torch.rand(delta.mask.shape, generator=generator) < density)
    return model, stack


@pytest.mark.parametrize("pruned", [False, True])
def test_where_a_mask_is_false_the_entry_is_the_bases_or_zero(pruned: bool) -> None:
    model, _ = masked(pruned, 0.5)
    for delta in deltas(model, "delta"):
        owner, _, own = delta.full_name.rpartition(".")
        effective = getattr(model.get_submodule(owner), own)
        outside = torch.zeros_like(delta.base) if pruned else delta.base
        assert torch.equal(effective, torch.where(delta.mask, delta.base + delta.value, outside))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_a_sparse_adapter_is_saved_small_and_loads_bit_equal(density: float, pruned: bool, tmp_path: Path) -> None:
    model, stack = masked(pruned, density)
    save_adapter(model, tmp_path)
    again = rough("llama")
    (part,) = load_adapter(again, tmp_path)
    assert torch.equal(run("llama", again), run("llama", model))
    assert torch.equal(run("llama", PeftModel.from_pretrained(rough("llama"), tmp_path)), run("llama", model))
    for strength in (0.5, -1.0):
        stack.scale(strength)
        stack_of(again).scale(strength)
        assert torch.equal(run("llama", again), run("llama", model))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    masks = [delta.mask for delta in deltas(model, "delta")]
    expected = [  # a value and an index, or a value and a bit for each entry, or all values
        4 * n if n == entries else 4 * n + (4 * n if 32 * n < entries else -(-entries // 8))
        for n, entries in ((int(mask.sum()), mask.numel()) for mask in masks)
    ]
    assert size == sum(expected)
    twice = tmp_path / "twice"
    save_adapter(again, twice)
    assert (part.config.kept is not None) == (density < 1.0)
    assert load_file(twice / "adapter_model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_a_loaded_sparse_adapter_trains_its_entries_only(density: float, tmp_path: Path) -> None:
    save_adapter(masked(False, density)[0], tmp_path)
    model = rough("llama")
    load_adapter(model, tmp_path)
    places = {k: v.clone() for k, v in model.state_dict().items() if ".indices." in k or ".bits." in k}
    parameters = [p for p in model.parameters() if p.requires_grad]
    before, optimizer = [p.detach().clone() for p in parameters], torch.optim.AdamW(parameters, lr=0.1)
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    pairs = list(zip(before, parameters, strict=True))
    assert pairs and all(not torch.equal(old, new) for old, new in pairs if len(old) and new.grad.any())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in places.items())


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_packed_truth_values_are_the_same_in_an_eighth_of_the_size(count: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack(pack(mask), count), mask) and len(pack(mask)) == -(-count // 8)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 20])
def test_exactly_as_many_are_kept_also_where_they_tie(count: int) -> None:
    scores = [torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 2.0]]), torch.full((14,), 2.0)]
    masks = keep_largest(scores, [torch.ones_like(s).bool() for s in scores], count)
    assert [m.shape for m in masks] == [s.shape for s in scores] and sum(int(m.sum()) for m in masks) == count
    kept = torch.cat([s[m] for s, m in zip(scores, masks, strict=True)]) if count else torch.ones(1) * 9
    left = torch.cat([s[~m] for s, m in zip(scores, masks, strict=True)])
    assert not len(left) or kept.min() >= left.max()


def test_what_is_not_a_number_is_never_ranked() -> None:
    with pytest.raises(ValueError, match=r"^No mask can be chosen: a trained weight is NaN or infinite\.$"):
        keep_largest([torch.tensor([1.0, float("nan")])], [torch.ones(2).bool()], 1)


# -- with other adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["delta", "lora"])
def test_deltas_and_lora_on_the_same_weights_add_up_in_either_order(first: str) -> None:
    model = rough("llama")
    targets = ["q_proj", "down_proj"]
    if first == "delta":
        add(model)
    add_lora(model, targets)
    if first == "lora":
        add(model)
    stack, both = stack_of(model), run("llama", model)
    before = copy.deepcopy(model.state_dict())
    other = rough("llama")
    add(other)
    stack_of(other).merge()
    add_lora(other, targets)  # takes the deltas out of the weights first
    stack_of(other).merge()
    assert close(run("llama", other), both)
    stack.merge()
    assert close(run("llama", model), both) and not torch.equal(run("llama", model), both)
    stack.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(run("llama", model), both)
    stack.remove("lora" if first == "delta" else "delta")
    assert not close(run("llama", model), both, 1e-3)


def test_an_initialisation_that_changes_weights_does_so_beneath_the_deltas() -> None:
    model = rough("llama")
    add(model)
    expected = run("llama", model)
    from peft import LoraConfig

    stack_of(model).add(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "lora")
    assert close(run("llama", model), expected)


def test_two_deltas_commute_and_what_is_added_can_be_subtracted() -> None:
    """theta0 + phi_A + phi_B, and A + B - B = A."""
    orders = []
    for order in (("a", "b"), ("b", "a")):
        model = rough("llama")
        for name in order:
            add(model, name=name, seed=ord(name))
        orders.append(run("llama", model))
    assert close(orders[0], orders[1])
    alone = rough("llama")
    add(alone, name="a", seed=ord("a"))
    stack = stack_of(model)
    stack.scale(0.0, "b")
    assert torch.equal(run("llama", model), run("llama", alone))
    stack.scale(1.0, "b")
    add(model, name="minus", seed=ord("b"), alpha=-1.0)
    assert close(run("llama", model), run("llama", alone), 1e-5)
    stack.merge()
    assert close(run("llama", model), run("llama", alone), 1e-5)


def test_the_dial_goes_from_the_base_to_the_tuned_model_and_beyond() -> None:
    """theta0 + t * tau."""
    model = rough("gpt2")
    stack = add(model)
    for t in (0.25, 1.0, -2.0):
        stack.scale(t)
        for delta in deltas(model, "delta"):
            owner, _, own = delta.full_name.rpartition(".")
            assert torch.equal(getattr(model.get_submodule(owner), own), delta.base + t * delta.value)


# -- as any peft adapter --------------------------------------------------------------------------------------------


def test_peft_adds_deletes_saves_and_merges_it_itself(tmp_path: Path) -> None:
    base = run("gpt2", rough("gpt2"))
    config = WeightDeltasConfig(target_parameters=r".*c_attn\.(weight|bias)|transformer\.wte\.weight")
    model = get_peft_model(rough("gpt2"), config)
    assert torch.equal(run("gpt2", model), base)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "weight_deltas" in name
            nn.init.normal_(parameter, std=0.1)
    expected = run("gpt2", model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run("gpt2", PeftModel.from_pretrained(rough("gpt2"), tmp_path)), expected)
    light = PeftModel.from_pretrained(rough("gpt2"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(run("gpt2", light), expected)
    model.add_adapter("other", config)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(run("gpt2", model), expected)
    with model.disable_adapter():
        assert torch.equal(run("gpt2", model), base)
    merged = model.merge_and_unload()
    assert torch.equal(run("gpt2", merged), expected)
    assert not any("weight_deltas" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_parameters": ["model.norm.wight"]},
            "has no parameter 'model.norm.wight'; the nearest names are model.n",
        ),
        ({"target_parameters": ["model.layers.0.mlp.up_proj.bias"]}, "LlamaForCausalLM has no parameter 'model.layers"),
        ({"target_parameters": "nothing"}, "No parameter of LlamaForCausalLM has a name like 'nothing'"),
        ({"target_parameters": []}, "WeightDeltasConfig needs target_parameters"),
        ({"target_parameters": ["model.norm.bias"], "add_missing": True}, "has no parameter 'model.norm.bias'"),
    ],
)
def test_parameters_that_are_not_there_are_one_sentence(options: dict[str, Any], message: str) -> None:
    model = rough("llama")
    expected = run("llama", model)
    with pytest.raises(ValueError, match=message) as error:
        stack_of(model).add(WeightDeltasConfig(**options), "delta")
    assert one_sentence(str(error.value))
    assert not stack_of(model).parts and torch.equal(run("llama", model), expected)
