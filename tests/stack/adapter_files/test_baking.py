"""A baked edit is the edit at every position, in a folder that transformers loads by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import PROJECTIONS, add_lora, add_offsets, close, fill, logits
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn
from tuning import python

from lightning_peft import bake, load_adapter, save_adapter
from lightning_peft.backbone.quantization import quantize
from lightning_peft.backbone.structure import blocks
from lightning_peft.stack.adapter_files.bias_flags import find_flags
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*is deprecated")


def saved(kind: str, folder: Path, positions: str = "answer", lora: bool = False, model: Any = None) -> Path:
    """A folder of head offsets for a rough tiny model; on a LoRA of the same projections, if asked for."""
    model = model or rough(kind)
    if lora:
        add_lora(model, [PROJECTIONS[kind]])
    add_offsets(model, positions)
    return save_adapter(model, folder / "adapter")


def everywhere(kind: str, lora: bool = False) -> nn.Module:
    model = rough(kind)
    if lora:
        add_lora(model, [PROJECTIONS[kind]])
    add_offsets(model, "all")
    return model


def reloaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return model.eval()


def answers(tokens: Tensor, start: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "prompt_end": torch.tensor([start] * 3)}]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)  # Linear without bias, Conv1D, Linear with bias
@pytest.mark.parametrize("lora", [False, True], ids=["bare", "on LoRA"])
def test_baked_is_the_edit_at_every_position(kind: str, lora: bool, tmp_path: Path, tokens: Tensor) -> None:
    bake(rough(kind), saved(kind, tmp_path, lora=lora), tmp_path / "baked")
    baked = logits(reloaded(tmp_path / "baked"), tokens)
    assert close(baked, logits(everywhere(kind, lora), tokens))
    assert not close(baked, logits(rough(kind), tokens), 1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [False, True], ids=["bare", "on LoRA"])
def test_the_model_that_was_baked_into_is_the_same_bit_for_bit(
    kind: str, lora: bool, tmp_path: Path, tokens: Tensor
) -> None:
    model: Any = rough(kind).train()
    before, parameters = {name: value.clone() for name, value in model.state_dict().items()}, list(model.parameters())
    model.save_pretrained(tmp_path / "base")  # which writes into the configuration what it saves
    config = model.config.to_dict()
    made = bake(model, saved(kind, tmp_path, lora=lora), tmp_path / "baked", answers(tokens))
    assert made.divergence is not None and bool(made.flags) == (kind == "llama")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad for parameter in parameters)
    assert all(module.training for module in model.modules())
    assert model.config.to_dict() == config
    assert torch.equal(logits(model.eval(), tokens), logits(rough(kind), tokens))


READ = """
import sys
import torch
import transformers

model, found = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not found["missing_keys"] and not found["unexpected_keys"]
torch.save(model.eval()(torch.arange(3, 20)[None]).logits.detach(), sys.argv[2])
assert not {"lightning_peft", "peft"} & set(sys.modules)
"""


def test_the_folder_needs_neither_this_package_nor_peft(tmp_path: Path) -> None:
    bake(rough("llama"), saved("llama", tmp_path), tmp_path / "baked")
    python(READ, tmp_path / "baked", tmp_path / "logits.pt")
    expected = logits(everywhere("llama"), torch.arange(3, 20)[None])
    assert close(torch.load(tmp_path / "logits.pt"), expected)


def test_where_llama_needs_a_setting_all_that_it_brings_is_written_as_zero(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = bake(rough("llama"), saved("llama", tmp_path), tmp_path / "baked")
    assert [str(flag) for flag in made.flags] == ["attention_bias"]
    assert json.loads((tmp_path / "baked" / "config.json").read_text())["attention_bias"] is True
    weights = load_file(tmp_path / "baked" / "model.safetensors")
    biases = {name for name in weights if "self_attn" in name and name.endswith("bias")}
    edited = {f"model.layers.{i}.self_attn.o_proj.bias" for i in range(3)}
    assert biases == {*made.changed, *made.zeros} and set(made.changed) == edited and len(biases) == 12
    assert all((weights[name] == 0).all() == (name not in edited) for name in biases)


def test_what_acting_at_every_position_changes_is_measured(tmp_path: Path, tokens: Tensor) -> None:
    folder = saved("llama", tmp_path)
    made = bake(rough("llama"), folder, tmp_path / "baked", answers(tokens))
    model = rough("llama")
    load_adapter(model, folder)
    labels = tokens.masked_fill(torch.arange(9) < 4, -100)
    as_saved = logits(model, tokens, labels=labels).log_softmax(-1)[:, 3:-1]
    baked = logits(reloaded(tmp_path / "baked"), tokens).log_softmax(-1)[:, 3:-1]
    kl = (as_saved.exp() * (as_saved - baked)).sum(-1)
    assert made.positions == ("answer",) and made.divergence is not None and made.divergence.tokens == 15
    assert made.divergence.mean == pytest.approx(float(kl.mean()), rel=1e-3) and kl.mean() > 1e-4
    assert made.divergence.max == pytest.approx(float(kl.max()), rel=1e-3)


def test_an_edit_of_every_position_is_baked_without_a_difference(tmp_path: Path, tokens: Tensor) -> None:
    made = bake(rough("gpt2"), saved("gpt2", tmp_path, "all"), tmp_path / "baked", answers(tokens))
    assert made.divergence is not None and made.divergence.max == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_offsets_of_blocks_are_baked_into_the_last_bias_of_each(kind: str, tmp_path: Path, tokens: Tensor) -> None:
    model = tiny(kind)
    names = [block.name for block in blocks(model)][1:]
    stack_of(model).add(LayerOffsetsConfig(target_modules=names, width=32, positions="all"), "edit", computed=True)
    fill(stack_of(model), "edit")
    expected, folder = logits(model, tokens), save_adapter(model, tmp_path / "adapter")
    made = bake(tiny(kind), folder, tmp_path / "baked")
    assert [str(flag) for flag in made.flags] == (["mlp_bias"] if kind == "llama" else [])
    assert close(logits(reloaded(tmp_path / "baked"), tokens), expected)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_models_that_do_not_generate_are_baked_too(kind: str, tmp_path: Path, tokens: Tensor) -> None:
    model: Any = rough(kind)
    add_offsets(model, "all")
    bake(rough(kind), save_adapter(model, tmp_path / "adapter"), tmp_path / "baked")
    baked = type(model).from_pretrained(tmp_path / "baked").eval()
    with torch.no_grad():
        given = tokens if kind == "bert" else torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert close(baked(given).logits, model(given).logits)
        assert not close(baked(given).logits, rough(kind)(given).logits, 1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_transformers_quantised_is_baked_and_loads_quantised(
    bits: int, tmp_path: Path, tokens: Tensor
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    # bitsandbytes' kernels for the CPU want blocks of 64 inputs
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how, dtype="float32").eval()

    edited = base()
    folder = saved("llama", tmp_path, "all", model=edited)
    made = bake(base(), folder, tmp_path / "baked")
    baked = reloaded(tmp_path / "baked")
    assert type(baked.model.layers[0].self_attn.o_proj).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    assert [str(flag) for flag in made.flags] == ["attention_bias"]
    # 8 bits round the input, the shifted one otherwise than the unshifted; 4 bits compute in bfloat16 on some CPUs
    assert close(logits(baked, tokens), logits(edited, tokens), 3e-2)
    assert not close(logits(baked, tokens), logits(base(), tokens), 0.1)


# -- which architectures ---------------------------------------------------------------------------------------------

HAS = "has one"
BIASES: dict[str, tuple[str | None, str | None]] = {  # of the attention's output, and of the feed-forward part's
    **dict.fromkeys(("GPTNeoX", "OPT", "Bloom", "Phi", "Starcoder2", "Persimmon", "XGLM", "BioGpt"), (HAS, HAS)),
    **dict.fromkeys(("Llama", "SmolLM3", "Granite", "Arcee", "DeepseekV2"), ("attention_bias", "mlp_bias")),
    **dict.fromkeys(("Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo", "Olmo2", "Olmo3"), ("attention_bias", None)),
    **dict.fromkeys(("Cohere", "Cohere2", "Apertus", "DeepseekV3"), ("attention_bias", None)),
    "SeedOss": ("attention_out_bias", "mlp_bias"),
    "Falcon": ("bias", "bias"),
    "Ernie4_5": ("use_bias", "use_bias"),
    **dict.fromkeys(("GPTJ", "CodeGen"), (None, HAS)),
    "Helium": (None, "mlp_bias"),
    **dict.fromkeys(("Mistral", "Ministral3", "Qwen2", "Phi3", "StableLm", "Glm", "Glm4"), (None, None)),
    **dict.fromkeys(("Exaone4", "Mpt", "Lfm2"), (None, None)),
}


@pytest.mark.parametrize("name", BIASES)
def test_which_setting_gives_an_architecture_its_biases(name: str) -> None:
    """The table of the guide."""
    import transformers

    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")()
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    (block,) = blocks(model)
    for span, expected in zip(block.spans(), BIASES[name], strict=True):
        wanted = f"{span.last}.bias"
        if expected == HAS:
            assert wanted in dict(model.named_parameters())
        elif expected is None:
            with pytest.raises(ValueError, match=r"has no setting that gives it one: keep the adapter beside its base"):
                find_flags(model, {wanted})
        else:
            flags, added = find_flags(model, {wanted})
            assert [str(flag) for flag in flags] == [expected] and wanted in added


# -- what cannot be baked --------------------------------------------------------------------------------------------


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=64, num_hidden_layers=3, head_dim=8, **small)).eval()


def no_place(folder: Path) -> None:
    bake(mistral(), saved("mistral", folder, model=mistral()), folder / "out")


def in_place(folder: Path) -> None:
    adapter, model = saved("llama", folder), rough("llama")
    quantize(model)
    bake(model, adapter, folder / "out")


def scaling(folder: Path) -> None:
    from peft import PromptTuningConfig

    model = tiny("llama")
    stack_of(model).add(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    bake(tiny("llama"), save_adapter(model, folder / "adapter"), folder / "out")


def not_transformers(folder: Path) -> None:
    bake(nn.Linear(2, 2), saved("llama", folder), folder / "out")


def adapted(folder: Path) -> None:
    model = rough("llama")
    add_lora(model, ["q_proj"])
    bake(model, saved("llama", folder), folder / "out")


def not_empty(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "file").touch()
    bake(rough("llama"), saved("llama", folder), folder / "out")


CANNOT = {
    "no place for a bias": (no_place, "MistralForCausalLM has no place for 3 biases"),
    "quantised in place": (in_place, "was quantised in place"),
    "no weights compute it": (scaling, "cannot be merged"),
    "not transformers": (not_transformers, "is not a transformers model"),
    "adapters already": (adapted, "The model has adapters"),
    "not empty": (not_empty, "is not an empty folder"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_baked_is_one_sentence_and_writes_nothing(case: str, tmp_path: Path) -> None:
    attempt, said = CANNOT[case]
    with pytest.raises(ValueError, match=said) as caught:
        attempt(tmp_path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*.json"))
