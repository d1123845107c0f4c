"""What is adapted where nobody says what: it works, or one sentence says what to name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

from lightning_peft.backbone.defaults import default_targets, every_matrix
from lightning_peft.backbone.structure import blocks
from lightning_peft.callbacks import IA3, FullFineTuning, Houlsby, LoRA, ParallelAdapter, Pfeiffer
from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.stack.stack import AdapterStack, stack_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*is deprecated", "ignore:.*Proxy")
IDS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def make(name: str, **settings: Any) -> nn.Module:
    """A tiny random causal language model of transformers, wide enough for every adapter to show."""
    import transformers

    model_class = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(model_class.config_class(vocab_size=60, pad_token_id=0, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.dim() == 1))
    return model.eval()


SIZE = {"hidden_size": 16, "num_hidden_layers": 2}
HEADS = {**SIZE, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
SPACES: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: make("Mamba", **SIZE, state_size=4),
    "mamba2": lambda: make("Mamba2", **SIZE, state_size=4, num_heads=4, head_dim=8, n_groups=1, expand=2, chunk_size=4),
    "falcon_mamba": lambda: make("FalconMamba", **SIZE, state_size=4),
    "jamba": lambda: make(
        "Jamba",
        **{**HEADS, "num_hidden_layers": 4},
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=4,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    "rwkv": lambda: make("Rwkv", **SIZE, attention_hidden_size=16, intermediate_size=24),
}
MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: make("Mixtral", **HEADS, **EXPERTS),
    "qwen3_moe": lambda: tiny("qwen3_moe"),
    "phimoe": lambda: make("Phimoe", **HEADS, **EXPERTS),  # its router is an nn.Linear that gives a choice
    "deepseek_v3": lambda: make(
        "DeepseekV3",
        **HEADS,
        **LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
}


def look(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def adapt(model: nn.Module, callback: AdapterCallback) -> AdapterStack:
    stack = stack_of(model)
    stack.add(callback.make_config(model), "adapter")
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return stack


def check_works(model: nn.Module, callback: AdapterCallback) -> list[str]:
    """Every adapter acts, and merged they compute the same: none is on a matrix that nothing calls."""
    base = look(model).detach()
    stack = adapt(model, callback)
    adapted = look(model)
    assert not torch.allclose(adapted, base, rtol=1e-3)
    adapted.sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    stack.merge()
    assert torch.allclose(look(model), adapted, atol=1e-4 * float(adapted.abs().max()))
    stack.unmerge()
    return stack.parts[0].injection.places()


@pytest.mark.parametrize("kind", [*SPACES, *MIXTURES])
@pytest.mark.filterwarnings("ignore:By default", "ignore:IA3 leaves")
def test_defaults_work_on_state_space_models_and_mixtures(kind: str) -> None:
    build = (SPACES | MIXTURES)[kind]
    for callback in (LoRA(r=2), LoRA(r=2, target_modules="all-linear"), IA3()):
        assert check_works(build(), callback)
    some = check_works(build(), LoRA(r=2, target_modules="all-linear", layers=[1]))
    assert some and all(re.search(r"(layers|blocks)\.1\.", name) for name in some)


def test_peft_s_table_is_read_as_it_is_written() -> None:
    class Named(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.config = type("Config", (), {"model_type": kind})()
            layer = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)})
            self.language_model, self.wo = nn.ModuleList([layer]), nn.Linear(2, 2)

    assert default_targets(Named("gemma4")) == r".*language_model\..*\.(q_proj|v_proj)"
    assert default_targets(Named("qwen2")) == ["q_proj", "v_proj"]
    assert default_targets(Named("bert")) == ["language_model.0.q_proj", "language_model.0.v_proj", "wo"]


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_feed_forward_part_of_a_mixture_is_its_experts(kind: str) -> None:
    model = MIXTURES[kind]()
    experts = [name for block in blocks(model) for name in block.experts]
    config: Any = LoRA(r=2, within="mlp", layers=[1]).make_config(model)
    assert set(experts) & set(config.target_parameters) == {name for name in experts if ".1." in name} != set()
    assert all(".layers.1.mlp." in name for name in [*config.target_modules, *config.target_parameters])
    check_works(MIXTURES[kind](), LoRA(r=2, within="mlp"))
    deltas: Any = FullFineTuning(within="mlp").make_config(model)
    assert set(experts) <= set(deltas.target_parameters) and not any("attn" in n for n in deltas.target_parameters)


def test_what_peft_takes_for_experts_is_adapted_where_it_was_named() -> None:
    model = MIXTURES["deepseek_v3"]()
    places = check_works(model, LoRA(r=2, within="mlp", layers=[0]))  # a plain block, below the mixtures
    assert places == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("callback", [Pfeiffer(), Houlsby(), ParallelAdapter()], ids=lambda c: type(c).__name__)
def test_an_adapter_behind_a_part_says_that_experts_have_no_last_matrix(callback: AdapterCallback) -> None:
    message = r"^The feed-forward parts of \w+ are mixtures of experts, fused into parameters such as model\.layers\.\d"
    for kind in ("qwen3_moe", "deepseek_v3"):
        with pytest.raises(ValueError, match=message) as error:
            callback.make_config(MIXTURES[kind]())
        assert "\n" not in str(error.value)
    plain: Any = Pfeiffer(layers=[0]).make_config(MIXTURES["deepseek_v3"]())
    assert plain.target_modules == ["model.layers.0.mlp.down_proj"]
    named: Any = Pfeiffer(target_modules=["o_proj"]).make_config(MIXTURES["qwen3_moe"]())
    assert named.target_modules == ["o_proj"]


def test_what_cannot_adapt_experts_says_so() -> None:
    with pytest.warns(UserWarning, match=r"^IA3 leaves the experts of Qwen3MoeForCausalLM alone, .* 6 parameters"):
        IA3().make_config(tiny("qwen3_moe"))
    with pytest.warns(UserWarning, match=r"largest of the others is .*experts .*: .*LoRA\(within=\"mlp\"\)"):
        LoRA().make_config(tiny("qwen3_moe"))
    with pytest.raises(ValueError, match=r"adapted as a parameter, .* not with dropout=0\.1 and variant='lora'"):
        LoRA(dropout=0.1, within="mlp").make_config(tiny("qwen3_moe"))
    with pytest.raises(ValueError, match=r"^No parameter of the backbone is called 'experts\.gate_proj'; the nearest"):
        LoRA(target_parameters=["experts.gate_proj"]).make_config(tiny("qwen3_moe"))


def net(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.core, self.head = kind(8, 16), nn.Linear(16, 3)


def test_a_net_of_convolutions_has_them_adapted_and_not_its_classifier() -> None:
    flat = nn.Flatten()
    small = net(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), flat, nn.Linear(16, 8), nn.Linear(8, 3))
    assert every_matrix(small) == ["0", "1", "3"]
    assert every_matrix(net(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), flat, nn.Linear(16, 3))) == ["0"]
    patches = net(nn.Conv2d(3, 8, 4), *(nn.Linear(8, 8) for _ in range(4)))
    assert every_matrix(patches) == ["1", "2", "3", "4"]
    config: Any = LoRA(r=2).make_config(small)
    assert config.target_modules == {"0", "1", "3"}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_said_to_be_left_alone(kind: type[nn.RNNBase]) -> None:
    with pytest.warns(UserWarning, match=r"^By default 1 modules of Recurrent are adapted, head .*train core, a recur"):
        assert LoRA().make_config(Recurrent(kind)).target_modules == {"head"}
    with pytest.raises(
        ValueError, match=r"has no linear layer to adapt; name the target_modules, or train it, a recur"
    ):
        LoRA().make_config(kind(8, 16))


def test_nothing_is_said_of_a_backbone_that_is_adapted_as_a_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("hand_written", "vit", "convolutional"):
            LoRA().make_config(tiny(kind))


def test_the_head_of_a_convolutional_network_of_transformers_is_left_out() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)  # type: ignore[call-arg]
    model = ResNetForImageClassification(config)
    names = every_matrix(model)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert names == convolutions and len(names) > 4
