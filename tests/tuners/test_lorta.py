"""LoRTA: its formula by loops, on which side heads are, one tensor for all matrices, and it as an adapter of peft."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, one_sentence

from lightning_peft import load_adapter, save_adapter
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.lorta import LoRTAConfig, LoRTALayer
from lightning_peft.tuners.lorta.config import TENSORS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
KINDS = ("llama", "wide_llama", "gpt2", "gpt_neox", "opt", "bert", "t5")
R, ALPHA = 3, 12.0


def adapted(kind: str, name: str = "a", model: Any = None, **options: Any) -> Any:
    """A model with a LoRTA adapter of random values."""
    model = tiny(kind) if model is None else model
    stack = stack_of(model)
    part = stack.add(LoRTAConfig(r=R, alpha=ALPHA, **options), name)
    generator = torch.Generator().manual_seed(5)
    for tensor in stack.tensors(part).values():
        tensor.copy_(0.7 * torch.randn(tensor.shape, generator=generator))
    return model


def layers(model: nn.Module) -> dict[str, LoRTALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRTALayer)}


def shared(model: nn.Module, name: str = "a") -> list[Tensor]:
    """A, B, C_l, C_h and C_m."""
    (owner,) = (layer for layer in layers(model).values() if name in layer.lorta_A)
    return [getattr(owner, tensor)[name].detach() for tensor in TENSORS]


def run(model: Any, kind: str) -> Tensor:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model.eval()(input_ids=ids, **({"decoder_input_ids": ids} if kind == "t5" else {})).logits


def delta(tensors: list[Tensor], layer: int, head: int, matrix: int) -> Tensor:
    """What the paper's tensor has for one head, `[d, d_h]`, by loops over all its entries."""
    a, b, c_l, c_h, c_m = (tensor.tolist() for tensor in tensors)
    slab = [
        [
            sum(c_l[layer][k] * c_h[head][k] * c_m[matrix][k] * a[i][k] * b[k][j] for k in range(R))
            for j in range(len(b[0]))
        ]
        for i in range(len(a))
    ]
    return ALPHA / R * torch.tensor(slab)


# -- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "wide_llama"])
def test_heads_are_rows_of_queries_keys_and_values_and_columns_of_the_output(kind: str) -> None:
    model = adapted(kind)
    tensors, config = shared(model), model.config
    d_h = len(tensors[1][0])
    counts = {"q": config.num_attention_heads, "o": config.num_attention_heads}
    counts |= {"k": config.num_key_value_heads, "v": config.num_key_value_heads}
    for layer, (m, matrix) in itertools.product((0, 2), enumerate("qkvo")):
        module = layers(model)[f"model.layers.{layer}.self_attn.{matrix}_proj"]
        change = module.get_delta_weight("a")
        for h in range(counts[matrix]):
            expected = delta(tensors, layer, h, m)
            head = slice(h * d_h, (h + 1) * d_h)
            found = change[:, head] if matrix == "o" else change[head].T
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert len(change if matrix != "o" else change.T) == counts[matrix] * d_h


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_one_matrix_for_queries_keys_and_values_has_their_heads_where_the_model_splits_them(kind: str) -> None:
    model = adapted(kind)
    tensors, heads = shared(model), model.config.num_attention_heads
    d_h = model.config.hidden_size // heads
    name = {"gpt2": "transformer.h.1.attn.c_attn", "gpt_neox": "gpt_neox.layers.1.attention.query_key_value"}[kind]
    change = layers(model)[name].get_delta_weight("a")
    for h, m in itertools.product(range(heads), range(3)):
        start = d_h * (m * heads + h if kind == "gpt2" else 3 * h + m)
        torch.testing.assert_close(change[start : start + d_h].T, delta(tensors, 1, h, m), rtol=1e-5, atol=1e-6)


def _fused(kind: str) -> tuple[Any, str]:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    if kind == "mpt":
        sizes = {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_layers": 1}
    if kind == "bloom":
        sizes["n_layer"], sizes["n_head"] = sizes.pop("num_hidden_layers"), sizes.pop("num_attention_heads")
    if kind == "phi3":
        sizes |= {"num_key_value_heads": 2, "pad_token_id": 0}
    if kind in ("phi3", "persimmon", "gpt_neox"):
        sizes["intermediate_size"] = 48
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval(), kind


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "gpt_neox", "bloom", "mpt", "persimmon", "phi3"])
def test_the_known_orders_are_those_in_which_the_models_split_what_a_matrix_gives(kind: str) -> None:
    """With queries and keys of zero all tokens are attended to alike, and a head gives what its values are."""
    model, _ = _fused(kind)
    config = LoRTAConfig()
    get_peft_model(copy.deepcopy(model), config)
    (place,) = (config.place(n) for n in config.places or {} if config.place(n).matrix != "o")
    (name,) = (n for n in config.places or {} if config.place(n).matrix != "o")
    (output,) = (n for n in config.places or {} if config.place(n).matrix == "o")
    order = [*"q" * place.heads, *"k" * place.own_heads, *"v" * place.own_heads]
    order = order if place.matrix == "concatenated" else [*"qkv" * place.heads]
    slots = [i for i, matrix in enumerate(order) if matrix == "v"]
    given: list[Tensor] = []
    model.get_submodule(output).register_forward_pre_hook(lambda _, args: given.append(args[0]))
    for value_head, slot in enumerate(slots):

        def only(module: nn.Module, args: Any, out: Tensor, slot: int = slot) -> Tensor:
            ones = torch.zeros_like(out)
            ones[..., slot * place.head_dim : (slot + 1) * place.head_dim] = 1.0
            return ones

        handle = model.get_submodule(name).register_forward_hook(only)
        with torch.no_grad():
            model(input_ids=torch.arange(3, 8)[None])
        handle.remove()
        heads = given[-1].unflatten(-1, (place.heads, place.head_dim)).mean((0, 1, 3))
        group = place.heads // place.own_heads
        expected = torch.zeros(place.heads)
        expected[value_head * group : (value_head + 1) * group] = 1.0
        torch.testing.assert_close(heads, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_adds_what_the_weights_change_and_merging_can_be_undone(kind: str) -> None:
    model = adapted(kind, model=rough(kind))
    expected, bare = run(model, kind), run(rough(kind), kind)
    assert not close(expected, bare, 1e-2)
    plain: Any = rough(kind)
    for name, layer in layers(model).items():
        change, target = layer.get_delta_weight("a").detach(), plain.get_submodule(name)
        target.weight.data += change if isinstance(target, nn.Linear) else change.T
    assert close(run(plain, kind), expected)
    stack = stack_of(model)
    before = {name: layer.get_base_layer().weight for name, layer in layers(model).items()}
    for layer in layers(model).values():
        layer.merge()
    assert close(run(model, kind), expected)
    for layer in layers(model).values():
        layer.unmerge()
    assert all(layer.get_base_layer().weight is before[name] for name, layer in layers(model).items())
    assert torch.equal(run(model, kind), expected)
    stack.scale(0.0)
    assert torch.equal(run(model, kind), bare)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_it_begins_as_nothing_and_with_the_papers_spread(kind: str) -> None:
    model: Any = get_peft_model(tiny(kind), LoRTAConfig(r=200))
    a, b, *factors = shared(model, "default")
    assert torch.equal(run(model, kind), run(tiny(kind), kind)) and not b.any()
    torch.testing.assert_close(float(a.abs().max()), 200**-0.5, rtol=0.02, atol=0)
    for c in factors:
        torch.testing.assert_close(float(c.abs().max()), (6 / 200) ** 0.5, rtol=0.02, atol=0)
        torch.testing.assert_close(float(c.std()), (2 / 200) ** 0.5, rtol=0.2, atol=0)
    narrow = shared(get_peft_model(tiny(kind), LoRTAConfig(r=200, init_scale=1.0)), "default")
    torch.testing.assert_close(float(narrow[3].abs().max()), 200**-0.5, rtol=0.02, atol=0)


# -- one tensor for all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_reads_the_same_parameters_which_are_counted_and_saved_once(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    owners = {layer._owners["a"][0] for layer in layers(model).values()}
    assert len(owners) == 1 and len({o.lorta_A["a"].data_ptr() for o in owners}) == 1
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 5 and {id(p) for p in trained} == {
        id(p) for o in owners for p in o.parameters() if p.requires_grad
    }
    saved = stack_of(model).tensors(stack_of(model)["a"])
    assert len(saved) == 5
    save_adapter(model, tmp_path)
    loaded: Any = tiny(kind)
    load_adapter(loaded, tmp_path)
    assert torch.equal(run(loaded, kind), run(model, kind))


def test_chosen_blocks_have_a_row_each() -> None:
    model = adapted("llama", target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 2])
    _, _, c_l, *_ = shared(model)
    assert len(c_l) == 2 and len(layers(model)) == 4
    assert layers(model)["model.layers.2.self_attn.o_proj"].places["a"].layer == 1


def test_attentions_of_other_widths_have_tensors_of_their_own(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    shape = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 60}
    config = BartConfig(d_model=24, encoder_attention_heads=2, decoder_attention_heads=4, **shape)
    model: Any = BartForConditionalGeneration(config)
    adapted("bart", model=model)
    sizes = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    # 2 attentions of 2 heads in the encoder, and of 4 in the decoder its own and the one between them
    assert sizes == {(24, R), (R, 12), (R, 6), (2, R), (4, R)}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == R * (
        (24 + 12 + 2 + 2 + 4) + (24 + 6 + 2 + 4 + 4)
    )
    save_adapter(model, tmp_path)
    config = LoRTAConfig.from_pretrained(tmp_path)
    assert len(config.lora_factors(stack_of(model).tensors(stack_of(model)["a"]))) == 16


def test_an_optimizer_step_moves_all_matrices_and_dropout_acts_in_training_alone() -> None:
    model = adapted("llama", dropout=0.5)
    before = {name: layer.get_delta_weight("a").detach().clone() for name, layer in layers(model).items()}
    ids = torch.arange(3, 12)[None]
    assert torch.equal(run(model, "llama"), run(model, "llama"))
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(layer.get_delta_weight("a"), before[name]) for name, layer in layers(model).items())


COPIES: dict[str, Callable[[Any], Any]] = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved whole": lambda model: _through_a_file(model),
}


def _through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_shares_a_tensor_of_its_own(how: str) -> None:
    model: Any = get_peft_model(tiny("llama"), LoRTAConfig(r=R))
    for tensor in shared(model, "default"):
        nn.init.normal_(tensor)
    expected, other = run(model, "llama"), COPIES[how](model)
    assert torch.equal(run(other, "llama"), expected)
    assert len({layer._owners["default"][0] for layer in layers(other).values()}) == 1
    shared(other, "default")[1].zero_()
    assert torch.equal(run(other, "llama"), run(tiny("llama"), "llama")) and torch.equal(run(model, "llama"), expected)


# -- as an adapter of peft ------------------------------------------------------------------------------------------


def test_two_adapters_are_added_switched_and_deleted() -> None:
    bare = run(tiny("llama"), "llama")
    model: Any = get_peft_model(tiny("llama"), LoRTAConfig(r=2))
    model.add_adapter("other", LoRTAConfig(r=3, target_modules=["k_proj", "o_proj"]))
    for name in ("default", "other"):
        for tensor in shared(model, name):
            nn.init.normal_(tensor, std=0.5)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = run(model, "llama")
    with model.disable_adapter():
        assert torch.equal(run(model, "llama"), bare)
    model.delete_adapter("default")
    assert torch.equal(run(model, "llama"), alone["other"])
    model.delete_adapter("other")
    assert torch.equal(run(model.base_model.model, "llama"), bare)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_first_adapted_matrix_owns_what_a_state_dict_knows_of_the_others() -> None:
    model: Any = get_peft_model(tiny("llama"), LoRTAConfig(r=2))
    for tensor in shared(model, "default"):
        nn.init.normal_(tensor)
    state = get_peft_model_state_dict(model)
    assert {key.rsplit(".", 1)[0] for key in state} == {"base_model.model.model.layers.0.self_attn.q_proj"}
    plain: Any = tiny("llama")
    inject_adapter_in_model(LoRTAConfig(r=2), plain, state_dict=state)
    assert len(layers(plain)) == 12


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_and_transformers_load_it(dtype: torch.dtype, low: bool, tmp_path: Path) -> None:
    model: Any = get_peft_model(tiny("llama").to(dtype), LoRTAConfig(r=2, task_type="CAUSAL_LM"))
    for tensor in shared(model, "default"):
        assert tensor.dtype == torch.float32
        nn.init.normal_(tensor)
    model.save_pretrained(tmp_path)
    expected = run(model, "llama")
    assert expected.dtype == dtype
    loaded: Any = PeftModel.from_pretrained(tiny("llama").to(dtype), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(run(loaded, "llama"), expected)
    plain: Any = tiny("llama").to(dtype)
    report = plain.load_adapter(tmp_path, "beside")
    assert not report.missing_keys and not report.unexpected_keys
    assert torch.equal(run(plain, "llama"), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "The rank r must be at least 1, got 0."),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0."),
        ({"fused": "mixed"}, "fused must be one of concatenated, interleaved, got 'mixed'."),
        ({"places": {"q": {"matrix": "q"}}}, "The place of q is one of q, k, v, o, concatenated, interleaved with"),
        ({"target_modules": ["q_proj", "up_proj"]}, "model.layers.0.mlp.up_proj gives no queries, keys or values"),
        ({"num_heads": 3}, "model.layers.0.self_attn.o_proj takes 32 features, which 3 heads cannot share equally."),
        (
            {"places": {"model.q": dict(matrix="q", layer=0, width=8, heads=1, own_heads=1, head_dim=8)}},
            "The model has no module 'model.q', which has a place in this LoRTA adapter.",
        ),
        (
            {"places": {"q": dict(matrix="q", layer=7, width=8, heads=1, own_heads=1, head_dim=8)}},
            "q has a place in layer 7, but there are fewer matrices than that.",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        get_peft_model(tiny("llama"), LoRTAConfig(**options))
    assert str(error.value).startswith(message)


def test_a_place_of_another_shape_is_refused() -> None:
    name = "model.layers.0.self_attn.q_proj"
    place = {"matrix": "q", "layer": 0, "width": 2**40, "heads": 4, "own_heads": 4, "head_dim": 8}
    with pytest.raises(ValueError, match=rf"^{name} is \(32, 32\) \(inputs, outputs\), but has a place for"):
        get_peft_model(tiny("llama"), LoRTAConfig(target_modules=[name], places={name: place}))


def test_an_unknown_order_must_be_given() -> None:
    model: Any = tiny("gpt_neox")
    model.config.model_type = "other"
    with pytest.raises(ValueError) as error:
        get_peft_model(model, LoRTAConfig())
    assert one_sentence(str(error.value)) and "give fused='concatenated'" in str(error.value)
    config = LoRTAConfig(fused="interleaved")
    get_peft_model(model, config)
    assert {values["matrix"] for values in (config.places or {}).values()} == {"interleaved", "o"}


def test_attentions_that_are_read_without_being_called_are_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2)
    with pytest.raises(ValueError, match=r"out_proj is never called, since nn\.MultiheadAttention reads its weight"):
        get_peft_model(model, LoRTAConfig(num_heads=2))
