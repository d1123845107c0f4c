"""Prefixes inside attention: one softmax, every query, whatever the model's attention is; and nothing when off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn
from tuning import QUIET, one_sentence

from lightning_peft import load_adapter, save_adapter
from lightning_peft.backbone.parts import attentions
from lightning_peft.backbone.projections import projections
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.prefix import PrefixConfig, PrefixLayer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
KINDS = (*LANGUAGE_MODELS, "bert", "t5", "vit")
IMPLEMENTATIONS = ("sdpa", "eager")


def model_of(kind: str, implementation: str = "sdpa") -> Any:
    model: Any = tiny(kind)
    model.set_attn_implementation(implementation)
    return model


def config_for(model: nn.Module, **options: Any) -> PrefixConfig:
    targets = [projections(span).query for span in attentions(model)]
    return PrefixConfig(target_modules=targets, **{"length": 3, "init": "paper", **options})


def shaken(model: Any, name: str = "a", noise: float = 1.0, **options: Any) -> Any:
    """The model with a prefix whose parameters are random."""
    torch.manual_seed(3)
    stack_of(model).add(config_for(model, **options), name)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key.split("."):
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def layers(model: nn.Module) -> list[PrefixLayer]:
    return [module for module in model.modules() if isinstance(module, PrefixLayer)]


@torch.no_grad()  # with it sdpa may choose another kernel
def logits(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    kind = model.config.model_type
    if kind == "vit":
        return model(torch.linspace(-1, 1, 3 * 3 * 64).view(3, 3, 8, 8)).logits
    if kind == "t5":
        more["decoder_input_ids"] = tokens[:, :5]
    return model(tokens, **more).logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


# -- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("init", ["paper", "identity"])
def test_it_is_one_softmax_over_the_prefix_and_the_tokens(implementation: str, gate: bool, init: str) -> None:
    model = shaken(model_of("llama", implementation), gate=gate, init=init, alpha=0.5)
    attention, (layer, *_) = model.model.layers[0].self_attn, layers(model)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    given = mask if implementation == "sdpa" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    found, _ = attention(x, position_embeddings=angles, attention_mask=given)

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    split = [p(x).view(2, 5, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    q, k = apply_rotary_pos_emb(split[0], split[1], *angles)
    v = split[2]
    pk, pv = (p["a"].view(3, 2, 8).transpose(0, 1) for p in (layer.prefix_key, layer.prefix_value))
    k, v, pk, pv = (t.repeat_interleave(2, -3) for t in (k, v, pk, pv))  # two queries to a key
    g = torch.ones(2, 5, 1)
    if gate:
        linear: Any = layer.prefix_gate["a"]
        g = 1 / (1 + torch.exp(-(x @ linear.weight.T + linear.bias)))
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    heads = torch.softmax(scores, -1) @ v
    weights = torch.softmax(torch.cat([(q * g[:, None]) @ pk.mT / 8**0.5, scores], -1), -1)
    prefixed = g[:, None] * (weights[..., :3] @ pv) + weights[..., 3:] @ v
    strength = 0.5 * (torch.tanh(layer.prefix_mix["a"]) if init == "identity" else 1)
    expected = heads + strength * (prefixed - heads)
    expected = attention.o_proj(expected.transpose(1, 2).reshape(2, 5, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, attention.o_proj(heads.transpose(1, 2).reshape(2, 5, -1)), atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_keys_and_values_of_a_text_as_prefix_continue_that_text(kind: str, implementation: str, tokens: Tensor) -> None:
    base = model_of(kind, implementation)
    prompt, rest = tokens[:1, :4], tokens[:1, 4:]
    positions = torch.arange(9)[None]
    whole = base(tokens[:1], position_ids=positions).logits[:, 4:]
    cache = base(prompt, position_ids=positions[:, :4], use_cache=True).past_key_values
    model = shaken(model_of(kind, implementation), length=4)
    with torch.no_grad():
        for layer, cached in zip(layers(model), cache.layers, strict=True):
            layer.prefix_key["a"].copy_(cached.keys[0].transpose(0, 1).flatten(1))
            layer.prefix_value["a"].copy_(cached.values[0].transpose(0, 1).flatten(1))
    assert close(model(rest, position_ids=positions[:, 4:]).logits, whole)
    assert not close(base(rest, position_ids=positions[:, 4:]).logits, whole, 1e-2)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_sdpa_agree(kind: str, gate: bool, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[1, 7:] = 0
    more = {} if kind == "vit" else {"attention_mask": mask}
    found = [logits(shaken(model_of(kind, i), gate=gate), tokens, **more) for i in IMPLEMENTATIONS]
    rows = torch.ones(found[0].shape[:2], dtype=torch.bool) if kind in ("t5", "vit") else mask.bool()
    assert close(found[0][rows], found[1][rows])
    assert not close(found[0][rows], logits(model_of(kind), tokens, **more)[rows], 1e-3)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_changes_nothing(kind: str, cache: str, gate: bool, tokens: Tensor) -> None:
    model = shaken(model_of(kind), gate=gate)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    kept = model.generate(tokens, **options, cache_implementation=cache)
    assert torch.equal(kept, model.generate(tokens, **options, use_cache=False))
    assert not torch.equal(kept, model_of(kind).generate(tokens, **options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gate_sees_neither_padding_nor_the_future(implementation: str, tokens: Tensor) -> None:
    model = shaken(model_of("gpt2", implementation), gate=True)
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(ids: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, position_ids=positions).logits

    other = tokens.clone()
    other[:, :3] = other[:, 7:] = 5
    assert close(run(other)[:, 3:7], run(tokens)[:, 3:7], 1e-6)
    assert not close(run(other)[:, 7:], run(tokens)[:, 7:], 1e-2)
    alone = model(tokens[:, 3:], position_ids=positions[:, 3:]).logits
    assert close(run(tokens)[:, 3:], alone)


def test_attention_weights_are_those_of_the_tokens(tokens: Tensor) -> None:
    model = shaken(model_of("llama", "eager"))
    weights = model(tokens, output_attentions=True).attentions
    assert len(weights) == 3 and all(w.shape == (3, 4, 9, 9) for w in weights)
    assert all((w.sum(-1) < 1).all() for w in weights)  # the rest is the prefix's


def test_a_mask_of_the_users_own_is_widened(tokens: Tensor) -> None:
    model = shaken(model_of("llama"))
    seen = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    expected = model(tokens).logits
    assert close(model(tokens, attention_mask=seen).logits, expected)
    assert close(model(tokens, attention_mask=added).logits, expected)


# -- identity, off, strength ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_off_and_untrained_are_the_base_bit_for_bit(kind: str, implementation: str, tokens: Tensor) -> None:
    expected = logits(model_of(kind, implementation), tokens)
    model = model_of(kind, implementation)
    stack_of(model).add(config_for(model, init="identity", gate=True))
    assert torch.equal(logits(model, tokens), expected)
    model = shaken(model_of(kind, implementation))
    assert not close(logits(model, tokens), expected, 1e-3)
    with stack_of(model).disabled():
        assert torch.equal(logits(model, tokens), expected)
    stack_of(model).scale(0.0)
    assert torch.equal(logits(model, tokens), expected)


def test_the_first_step_moves_the_mixture_and_later_ones_the_prefix(tokens: Tensor) -> None:
    model = tiny("llama")
    stack_of(model).add(config_for(model, init="identity"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    moved = []
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
        now = model.state_dict()
        moved.append({name.rsplit(".", 2)[-2] for name in before if not torch.equal(before[name], now[name])})
    assert moved == [{"prefix_mix"}, {"prefix_mix", "prefix_key", "prefix_value"}]


def test_two_prefixes_add_their_changes(tokens: Tensor) -> None:
    model = shaken(shaken(tiny("llama"), "a"), "b", length=5, noise=2.0)
    both = logits(model, tokens)
    alone = []
    for name in "ab":
        with stack_of(model).disabled(name):
            alone.append(logits(model, tokens))
    assert len(layers(model)) == 3 and not any(close(one, both, 1e-3) for one in alone)
    stack_of(model).remove("a")
    assert torch.equal(logits(model, tokens), alone[0])


# -- the model around it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_configuration_is_untouched_and_comes_back(kind: str) -> None:
    model: Any = tiny(kind)
    before = {name: m.config for name, m in model.named_modules() if hasattr(m, "config")}
    described = model.config.to_dict()
    stack_of(model).add(config_for(model))
    assert model.config.to_dict() == described and model.config._attn_implementation == "sdpa"
    stack_of(model).remove("default")
    after = {name: m.config for name, m in model.named_modules() if hasattr(m, "config")}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)
    assert not layers(model)


def test_a_copy_has_its_own_prefix(tokens: Tensor) -> None:
    model = shaken(tiny("llama"), gate=True)
    model.model.layers[0].self_attn.q_proj(torch.ones(3, 9, 32))  # a gate that nothing took
    other, expected = copy.deepcopy(model), logits(model, tokens)
    assert torch.equal(logits(other, tokens), expected)
    with torch.no_grad():
        for layer in layers(other):
            layer.prefix_value["a"].zero_()
    assert torch.equal(logits(model, tokens), expected) and not torch.equal(logits(other, tokens), expected)


def test_the_attention_may_be_changed_later(tokens: Tensor) -> None:
    model = shaken(tiny("llama"))
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model, tokens), logits(shaken(model_of("llama", "eager")), tokens))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"^The attention was set to 'flash_attention_2', and a prefix") as error:
        model(tokens)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("first", ["lora", "prefix"])
def test_it_goes_with_lora_on_the_same_matrix(first: str, tokens: Tensor) -> None:
    model: Any = tiny("llama")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for method in ("lora", "prefix") if first == "lora" else ("prefix", "lora"):
        torch.manual_seed(3)
        if method == "lora":
            stack_of(model).add(lora, "l")
        else:
            shaken(model, gate=True)
    stack = stack_of(model)
    both, base = logits(model, tokens), logits(tiny("llama"), tokens)
    with stack.disabled("a"):
        with_lora = logits(model, tokens)
    with stack.disabled("l"):
        with_prefix = logits(model, tokens)
    assert torch.equal(with_prefix, logits(shaken(tiny("llama"), gate=True), tokens))
    assert not any(close(one, both, 1e-3) for one in (with_lora, with_prefix, base))
    stack.remove("l")
    assert torch.equal(logits(model, tokens), with_prefix)
    stack.remove("a")
    assert torch.equal(logits(model, tokens), base)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_activation_checkpointing_gives_the_same_gradients(gate: bool, tokens: Tensor) -> None:
    found = []
    for checkpointing in (False, True):
        model = shaken(tiny("llama"), gate=gate, init="identity").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 3 * (5 if gate else 3)
    assert all(a.any() and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_it_is_loaded_by_this_package_and_by_plain_peft(kind: str, tmp_path: Path, tokens: Tensor) -> None:
    model = shaken(tiny(kind), gate=True, init="identity")
    stack_of(model).scale(0.5)
    expected = logits(model, tokens)
    save_adapter(model, tmp_path)
    ours = tiny(kind)
    load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours, tokens), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(kind), tmp_path), tokens), expected)
    assert not torch.equal(expected, logits(tiny(kind), tokens))


def test_plain_peft_unloads_it_and_cannot_merge_it(tokens: Tensor) -> None:
    base = tiny("llama")
    expected, config = logits(base, tokens), base.config
    model: Any = get_peft_model(base, config_for(base))
    assert not torch.equal(logits(model, tokens), expected)
    with pytest.raises(ValueError, match="cannot be written into the weights") as error:
        model.merge_and_unload()
    assert one_sentence(str(error.value))
    plain = model.unload()
    assert torch.equal(logits(plain, tokens), expected)
    assert all(m.config is config for m in plain.modules() if hasattr(m, "config"))


# -- wrong use ------------------------------------------------------------------------------------------------------


class OwnAttention(nn.Module):
    """An attention that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)


def own() -> nn.Module:
    return nn.Sequential(nn.ModuleDict({"attn": OwnAttention()}), nn.ModuleDict({"attn": OwnAttention()}))


def flash() -> nn.Module:
    model: Any = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def upcast() -> nn.Module:
    model: Any = model_of("gpt2", "eager")
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    return model


def unknown_width() -> nn.Module:
    model: Any = tiny("gpt2")
    for block in model.transformer.h:
        block.attn.config.n_head = 5
    return model


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (own, ["q"], r"^0\.attn \(OwnAttention\) does not ask transformers' AttentionInterface what to run, so no"),
        (flash, ["q_proj"], r"self_attn runs 'flash_attention_2' attention, and a prefix needs plain eager or sdpa"),
        (upcast, ["c_attn"], r"attn runs 'eager' attention, and a prefix needs plain eager or sdpa"),
        (unknown_width, ["c_attn"], r"c_attn gives 96 features, not queries, keys and values of 5 and 5 heads"),
        (lambda: tiny("llama"), ["v_proj"], r"^A prefix goes to the matrix that gives the queries: .*\.q_proj instead"),
        (lambda: tiny("llama"), ["down_proj"], r"mlp \(LlamaMLP\) does not ask transformers' AttentionInterface"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), None, r"^Sequential has no block with an attention in it\.$"),
    ],
    ids=["own attention", "flash", "upcast", "unknown width", "values", "no attention", "no target"],
)
def test_where_no_prefix_can_go_is_one_sentence(model: Any, targets: list[str] | None, message: str) -> None:
    backbone = model()
    configs = [m.config for m in backbone.modules() if hasattr(m, "config")]
    with pytest.raises(ValueError, match=message) as error:
        stack_of(backbone).add(PrefixConfig(target_modules=targets))
    assert one_sentence(str(error.value))
    assert not layers(backbone)
    assert [m.config for m in backbone.modules() if hasattr(m, "config")] == configs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, r"^The length of a prefix must be at least 1, got 0\.$"),
        ({"init": "zero"}, r"^init must be one of identity, paper, got 'zero'\.$"),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PrefixConfig(target_modules=["q_proj"], **options)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert"])
def test_without_targets_every_attention_has_a_prefix(kind: str) -> None:
    model = get_peft_model(tiny(kind), PrefixConfig(length=2))
    expected = [projections(span).query for span in attentions(tiny(kind))]
    assert model.peft_config["default"].target_modules == expected
    assert len(layers(model)) == len(expected)


def test_where_positions_are_counted_a_prefix_moves_the_tokens_by_its_length() -> None:
    model: Any = tiny("t5")
    attention = model.encoder.block[1].layer[0].SelfAttention
    config = PrefixConfig(target_modules=[r"SelfAttention.q"], length=3, init="paper", count_positions=True)
    stack_of(model).add(config)
    layer: Any = attention.q
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(4, 4)
    counted = layer.position_bias("default", bias, 3)
    torch.testing.assert_close(counted, model.encoder.block[0].layer[0].SelfAttention.compute_bias(4, 7))
    plain: Any = tiny("t5")
    stack_of(plain).add(PrefixConfig(target_modules=["SelfAttention.q"], length=3, init="paper"))
    kept = plain.encoder.block[1].layer[0].SelfAttention.q.position_bias("default", bias, 3)
    assert torch.equal(kept[..., 3:], bias)
    assert not kept[..., :3].any()


def test_a_model_without_relative_positions_has_none_to_count() -> None:
    given = torch.randint(1, 60, (2, 5))
    values = []
    for count in (False, True):
        model: Any = tiny("llama")
        torch.manual_seed(0)
        stack_of(model).add(PrefixConfig(target_modules=["q_proj"], length=3, init="paper", count_positions=count))
        values.append(model(given).logits)
    assert torch.equal(*values)
