"""Adapters written into their base: a plain transformers folder, or a sentence why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close
from tiny_models import tiny
from torch import nn
from tuning import Net, one_sentence, python

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.stack.adapter_files.merging import merge_pretrained
from lightning_peft.stack.stack import stack_of

IDS = torch.arange(3, 20)[None]


def change(backbone: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    stack = adapters(backbone)
    for part in stack.parts:
        for tensor in stack.tensors(part).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return backbone.eval()


def lora(*targets: str, **options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=list(targets), **options)


@pytest.fixture
def base(tiny_folder: Any) -> Path:
    return tiny_folder("llama")


def adapted(base: Path, *configs: Any, auto: str = "AutoModelForCausalLM") -> Any:
    import transformers

    backbone = getattr(transformers, auto).from_pretrained(base)
    for number, config in enumerate(configs):
        stack_of(backbone).add(config, f"part{number}")
    return change(backbone)


READ = """
import sys
import torch
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(3, 20)[None]).logits.detach(), sys.argv[2])
assert not {"lightning_peft", "peft"} & set(sys.modules)
"""


def test_the_merged_folder_gives_the_adapted_outputs_without_this_package(base: Path, tmp_path: Path) -> None:
    from peft import IA3Config

    model = adapted(base, lora("q_proj", "v_proj"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    save_adapter(model, tmp_path / "adapter")
    assert merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(base)).cls == "LlamaForCausalLM"
    python(READ, tmp_path / "merged", tmp_path / "logits.pt")
    merged = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(merged, model(IDS).logits, atol=1e-5, rtol=0)
    unadapted = tiny("llama").eval()(IDS).logits
    assert float((merged - unadapted).abs().max()) > 1e-3


def test_the_base_an_adapter_names_is_taken_where_none_is_given(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(base, lora("q_proj", base_model_name_or_path=str(base))), tmp_path / "adapter")
    assert merge_pretrained(tmp_path / "adapter", tmp_path / "merged").cls == "LlamaForCausalLM"


def test_the_class_is_the_one_that_was_adapted(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    model = adapted(base, lora("q_proj"), auto="AutoModel")
    save_adapter(model, tmp_path / "adapter")
    assert merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(base)).cls == "LlamaModel"
    merged = AutoModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS)[0], model(IDS)[0], atol=1e-5, rtol=0)


def test_a_folder_of_plain_peft_is_merged(base: Path, tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora("q_proj", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


def test_the_dtype_is_the_bases_or_the_one_asked_for(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_adapter(adapted(base, lora("q_proj")), tmp_path / "adapter")
    merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(base), "bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    merged.save_pretrained(tmp_path / "half")
    save_adapter(adapted(tmp_path / "half", lora("q_proj")), tmp_path / "other")
    merge_pretrained(tmp_path / "other", tmp_path / "again", str(tmp_path / "half"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").dtype == torch.bfloat16


def test_a_module_saved_whole_takes_its_originals_place(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    tiny("gpt_neox").save_pretrained(base)  # its input and output embeddings are not tied
    model = adapted(base, lora("query_key_value", modules_to_save=["embed_out"]))
    save_adapter(model, tmp_path / "adapter")
    merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
PAIR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
PAIR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 2, **SMALL}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
    "bart": ("BartForConditionalGeneration", PAIR),
    "marian": ("MarianMTModel", {"pad_token_id": 59, "decoder_vocab_size": 60, **PAIR}),
    "albert": ("AlbertForMaskedLM", {"embedding_size": 8, **SMALL}),
    "xlnet": ("XLNetLMHeadModel", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}),
}
HEAD, INPUT = ("lm_head.weight", "model.embed_tokens.weight"), "model.shared.weight"
REPEATED = {"layer_replication": [[0, 2], [1, 3]]}
SHARING: dict[str, tuple[str, tuple[str, ...], dict[str, Any], tuple[str, ...]]] = {
    "output embedding": ("llama", ("lm_head",), {}, HEAD),
    "input embedding": ("llama", ("embed_tokens",), {}, HEAD),
    "both": ("llama", ("embed_tokens", "lm_head"), {}, HEAD),
    "both, tied by peft": ("llama", ("q_proj", "embed_tokens"), {"ensure_weight_tying": True}, ()),
    "a trained copy": ("llama", ("q_proj",), {"modules_to_save": ["lm_head"]}, HEAD),
    "repeated layers": ("llama", ("q_proj",), REPEATED, ()),
    "T5's output": ("t5", ("lm_head", "q"), {}, ("lm_head.weight", "shared.weight")),
    "BART's encoder": ("bart", ("encoder.embed_tokens",), {}, ("model.encoder.embed_tokens.weight", INPUT)),
    "Marian's decoder": ("marian", ("decoder.embed_tokens",), {}, ("model.decoder.embed_tokens.weight", INPUT)),
    "ALBERT's layer": ("albert", ("query",), {}, ()),
    "XLNet's layer": ("xlnet", ("ff.layer_1",), {}, ()),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("bases")
    for name, (cls, options) in BASES.items():
        torch.manual_seed(0)
        made = getattr(transformers, cls)
        made(made.config_class(vocab_size=60, **options)).save_pretrained(folder / name)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SHARING)
def test_where_weights_are_shared_the_folder_computes_what_the_adapted_model_does(
    case: str, bases: Path, tmp_path: Path
) -> None:
    import transformers

    from lightning_peft.stack.adapter_files.example_inputs import find_probe, outputs

    kind, targets, options, untied = SHARING[case]
    cls = getattr(transformers, BASES[kind][0])
    model = cls.from_pretrained(bases / kind)
    probe = find_probe(model)
    assert probe is not None
    before = outputs(model, probe)[0]
    stack_of(model).add(lora(*targets, **options))
    expected = outputs(change(model), probe)[0]
    save_adapter(model, tmp_path / "adapter")
    made = merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(bases / kind))
    assert made.untied == untied and made.cls == cls.__name__
    assert made.verification is not None and made.verification.error is not None and made.verification.error <= 1e-5
    merged = outputs(cls.from_pretrained(tmp_path / "merged"), probe)[0]
    assert close(merged, expected) and not close(expected, before, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_the_folder_holds_the_float32_merge_rounded_once(
    dtype: str, base: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = adapted(base, lora("q_proj", "down_proj"))
    save_adapter(model, tmp_path / "adapter")
    made = merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(base), dtype)
    stack_of(model).merge()
    expected = {n.replace(".base_layer", ""): v.to(getattr(torch, dtype)) for n, v in model.state_dict().items()}
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written and all(torch.equal(value, expected[name]) for name, value in written.items())
    assert made.verification is not None and made.verification.error is not None
    assert 1e-5 < made.verification.error <= (made.verification.allowed or 0) < 0.1


def head_offsets(base: Path, positions: str) -> Any:
    from transformers import AutoModelForCausalLM

    from lightning_peft.editing import head_offsets_config, head_sites

    backbone = AutoModelForCausalLM.from_pretrained(base)
    stack_of(backbone).add(head_offsets_config(head_sites(backbone), [(0, 1)], 1.0, positions), computed=True)
    return change(backbone)


def test_an_edit_becomes_a_bias_where_the_model_has_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny("gpt2").save_pretrained(tmp_path / "base")
    model = head_offsets(tmp_path / "base", "all")
    save_adapter(model, tmp_path / "adapter")
    merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


def other_base(base: Path, folder: Path) -> None:
    backbone = tiny("gpt2")
    stack_of(backbone).add(lora("c_attn"))
    save_adapter(backbone, folder)


def hand_written(base: Path, folder: Path) -> None:
    net = Net()
    stack_of(net).add(lora("linear"))
    save_adapter(net, folder)


def new_tokens(base: Path, folder: Path) -> None:
    save_adapter(adapted(base, lora("q_proj", trainable_token_indices={"embed_tokens": [5, 6]})), folder)


CANNOT = {
    "another base": (other_base, "another base model"),
    "not transformers": (hand_written, "load_from_checkpoint"),
    "answer positions": (lambda base, folder: save_adapter(head_offsets(base, "answer"), folder), "can be merged"),
    "no bias": (lambda base, folder: save_adapter(head_offsets(base, "all"), folder), "no place for"),
    "a tied weight in a wrapper": (new_tokens, "is not known for lm_head.weight"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_merged_is_refused_in_one_sentence(base: Path, tmp_path: Path, case: str) -> None:
    make, said = CANNOT[case]
    make(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=said) as caught:
        merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(base))
    assert one_sentence(str(caught.value))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("case", ["another base", "not transformers", "answer positions", "no bias"])
def test_it_is_refused_before_any_weights_are_read(base: Path, tmp_path: Path, case: str) -> None:
    CANNOT[case][0](base, tmp_path / "adapter")
    (tmp_path / "config only").mkdir()
    (tmp_path / "config only" / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(ValueError, match=CANNOT[case][1]):
        merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "config only"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output": "adapter"}, "is not an empty folder"),
        ({"base": "/nowhere"}, "is neither a folder"),
        ({"base": None}, "names no base model"),
        ({"dtype": "float7"}, "must be auto or name a torch dtype"),
    ],
)
def test_wrong_arguments_are_one_sentence(base: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    backbone = tiny("llama")
    stack_of(backbone).add(lora("q_proj"))
    save_adapter(backbone, tmp_path / "adapter")
    given = {"output": "merged", "base": str(base)} | options
    given["output"] = tmp_path / given["output"]
    with pytest.raises(ValueError, match=said) as caught:
        merge_pretrained(tmp_path / "adapter", **given)
    assert one_sentence(str(caught.value))


def test_a_compressed_adapter_is_merged(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lightning_peft.stack.adapter_files.compression import compress_adapter

    save_adapter(adapted(base, lora("q_proj")), tmp_path / "adapter")
    compress_adapter(tmp_path / "adapter", tmp_path / "small", 0.5, scope="tensor")
    merge_pretrained(tmp_path / "small", tmp_path / "merged", str(base))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    load_adapter(model, tmp_path / "small")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
