"""Adapters written into their base: a plain transformers folder, or a sentence why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import nn
from tuning import Net, one_sentence, python

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.tuners.folders.merging import merge_pretrained
from lightning_peft.tuners.stack import stack_of

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
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_a_module_saved_whole_takes_its_originals_place(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    tiny("gpt_neox").save_pretrained(base)  # its input and output embeddings are not tied
    model = adapted(base, lora("query_key_value", modules_to_save=["embed_out"]))
    save_adapter(model, tmp_path / "adapter")
    merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


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


def tied_output(base: Path, folder: Path) -> None:
    save_adapter(adapted(base, lora("q_proj", modules_to_save=["lm_head"])), folder)


CANNOT = {
    "another base": (other_base, "another base model"),
    "not transformers": (hand_written, "load_from_checkpoint"),
    "answer positions": (lambda base, folder: save_adapter(head_offsets(base, "answer"), folder), "can be merged"),
    "no bias": (lambda base, folder: save_adapter(head_offsets(base, "all"), folder), "no place for"),
    "tied and trained": (tied_output, "shares"),
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

    from lightning_peft.tuners.folders.compression import compress_adapter

    save_adapter(adapted(base, lora("q_proj")), tmp_path / "adapter")
    compress_adapter(tmp_path / "adapter", tmp_path / "small", 0.5, scope="tensor")
    merge_pretrained(tmp_path / "small", tmp_path / "merged", str(base))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    load_adapter(model, tmp_path / "small")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
