"""Every saved folder says what it is and how to load it, and what the user has written stays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, PeftType, PromptTuningConfig, get_peft_model
from tiny_models import tiny
from tuning import ROOT

from lightning_peft import bake, load_adapter, save_adapter
from lightning_peft.editing import combine, head_offsets_config, head_sites
from lightning_peft.stack.adapter_files.adapter_facts import papers
from lightning_peft.stack.adapter_files.compression import compress_adapter, decompress_adapter
from lightning_peft.stack.adapter_files.folder import WEIGHTS, write_folders
from lightning_peft.stack.adapter_files.merging import merge_pretrained
from lightning_peft.stack.adapter_files.readme import code, public_name
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners import METHODS
from lightning_peft.tuners.ssb import SSBConfig

README = "README.md"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECORD = {"method": "iti", "data_hash": "ab" * 32, "statements": 120}


def edited(base: str = BASE, **options: Any) -> Any:
    """A model named `base` with an edit of one head."""
    model: Any = tiny("llama")
    model.config._name_or_path = base
    config = head_offsets_config(head_sites(model), [(1, 0)], alpha=15.0, **options)
    part = stack_of(model).add(config, "edit", computed=True, record=dict(RECORD))
    for value in stack_of(model).tensors(part).values():
        value.fill_(0.5)
    return model


def text(folder: Path) -> str:
    return (folder / README).read_text()


def check(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's card, which the hub can read."""
    card = ModelCard.load(folder / README)
    metadata = card.data.to_dict()
    assert ModelCardData(**metadata).to_dict() == metadata
    assert metadata["library_name"] in ("peft", "transformers", "lightning-peft")
    assert metadata["tags"] == sorted(set(metadata["tags"])) and "lightning-peft" in metadata["tags"]
    assert re.match(r"\s*# .+", card.text)
    return metadata


def test_the_card_of_an_edit_says_what_to_import_before_anything_else(tmp_path: Path) -> None:
    save_adapter(edited(), tmp_path)
    body = ModelCard.load(tmp_path / README).text.strip()
    lines = [line for line in body.splitlines() if line]
    assert lines[0] == f"# Inference-time intervention (ITI) for `{BASE}`"
    assert lines[1].startswith("**`import lightning_peft` is needed**") and "KeyError: 'HEAD_OFFSETS'" in lines[1]
    assert lines[3].startswith("import lightning_peft  #")
    for said in (
        f"[`{BASE}`](https://huggingface.co/{BASE})",
        "https://arxiv.org/abs/2306.03341",
        f"8 in {(tmp_path / WEIGHTS).stat().st_size} bytes",
        "computed, without gradient descent; strength `alpha=15`, at `answer` positions; `statements=120`",
        f"SHA-256 `{'ab' * 32}`",
        "PeftModel.from_pretrained(base,",
        "load_adapter(base,",
        "Steer(",
        "lightning-peft bake",
    ):
        assert said in body, said
    assert check(tmp_path) == {
        "base_model": BASE,
        "library_name": "peft",
        "tags": [f"base_model:adapter:{BASE}", "head-offsets", "iti", "lightning-peft"],
    }


def test_what_peft_knows_by_itself_needs_no_import(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.config._name_or_path = BASE
    stack_of(model).add(LoraConfig(r=12, target_modules=["q_proj"], task_type="CAUSAL_LM"), "lora")
    save_adapter(model, tmp_path)
    assert "peft loads it by itself" in text(tmp_path) and "import lightning_peft" not in text(tmp_path)
    assert f"AutoModelForCausalLM.from_pretrained('{BASE}')" in text(tmp_path)
    assert "--enable-lora --max-lora-rank 16" in text(tmp_path)
    assert check(tmp_path)["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: LoraConfig(target_modules=["q_proj"], use_dora=True), "Servers read no `use_dora`"),
        (lambda: SSBConfig(target_modules=["q_proj"]), "load LoRA alone"),
        (lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "no change of weights"),
    ],
)
def test_the_card_says_which_servers_load_a_type(config: Any, said: str, tmp_path: Path) -> None:
    model = tiny("llama")
    stack_of(model).add(config(), "tuned")
    save_adapter(model, tmp_path)
    check(tmp_path)
    assert said in text(tmp_path) and "vllm serve" not in text(tmp_path)


def test_a_stack_has_a_card_of_its_own_and_one_for_each_part(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.config._name_or_path = BASE
    stack_of(model).add(LoraConfig(r=2, target_modules=["q_proj"]), "lora")
    config = head_offsets_config(head_sites(model), [(1, 0)])
    stack_of(model).add(config, "edit", computed=True, record=dict(RECORD))
    save_adapter(model, tmp_path)
    assert "2 adapters" in text(tmp_path) and "2. [`edit`](edit): Inference-time" in text(tmp_path)
    for folder in (tmp_path, tmp_path / "edit", tmp_path / "lora"):
        check(folder)
    assert check(tmp_path)["tags"] == [f"base_model:adapter:{BASE}", "head-offsets", "iti", "lightning-peft", "lora"]


def test_compressed_decompressed_and_combined_adapters_have_cards(tmp_path: Path) -> None:
    save_adapter(edited(), tmp_path / "a")
    compress_adapter(tmp_path / "a", tmp_path / "small", density=0.5)
    decompress_adapter(tmp_path / "small", tmp_path / "plain")
    combine([tmp_path / "a", tmp_path / "a"], tmp_path / "sum", weights=[0.25, 0.75])
    small, total = text(tmp_path / "small"), text(tmp_path / "sum")
    assert check(tmp_path / "small")["library_name"] == "lightning-peft"
    assert "**A compressed adapter, which peft cannot read**" in small and "PeftModel" not in small
    assert re.search(r"8 in \d+ bytes, compressed", small)
    assert "import lightning_peft` is needed" in text(tmp_path / "plain") and check(tmp_path / "plain")
    assert "Task arithmetic, a weighted sum" in total and "`weights=[0.25, 0.75]`" in total
    assert f"SHA-256 `{'ab' * 32}`" in total and check(tmp_path / "sum")["base_model"] == BASE


def test_models_with_adapters_in_their_weights_say_what_was_written_in(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    save_adapter(edited(str(tmp_path / "base")), tmp_path / "edit")
    bake(model, tmp_path / "edit", tmp_path / "baked")
    stack_of(model).add(LoraConfig(r=2, target_modules=["q_proj"]), "lora")
    save_adapter(model, tmp_path / "lora")
    merge_pretrained(tmp_path / "lora", tmp_path / "merged", str(tmp_path / "base"))
    for name, method in (("baked", "Inference-time intervention (ITI)"), ("merged", "LoRA")):
        said, metadata = text(tmp_path / name), check(tmp_path / name)
        assert metadata["library_name"] == "transformers" and "transformers" in metadata["tags"]
        assert f"# {method} in" in said and "LlamaForCausalLM.from_pretrained" in said and "Verified: " in said
        assert str(tmp_path) not in said
    assert "acts at every token; as it was saved, at answer positions" in text(tmp_path / "baked")
    assert check(tmp_path / "merged")["base_model"] == "base"


def test_peft_and_transformers_write_the_card_too(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.config._name_or_path = str(tmp_path / "models" / "mine")
    wrapped = get_peft_model(model, SSBConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.save_pretrained(tmp_path / "peft")
    before = (tmp_path / "peft" / README).read_bytes()
    wrapped.save_pretrained(tmp_path / "peft")
    assert (tmp_path / "peft" / README).read_bytes() == before
    adapted: Any = tiny("llama")
    adapted.add_adapter(SSBConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "transformers")
    for name in ("peft", "transformers"):
        said = text(tmp_path / name)
        assert "`import lightning_peft` is needed" in said and "More Information" not in said
        assert str(tmp_path) not in said
        assert check(tmp_path / name)["pipeline_tag"] == "text-generation"
    assert "192 in" in text(tmp_path / "peft")


@pytest.mark.parametrize("written", ["# My adapter\n", "---\nlicense: mit\n---\n# Mine\n", "\xff\xfe", ""])
def test_a_readme_of_the_users_own_stays(written: str, tmp_path: Path) -> None:
    (tmp_path / README).write_bytes(written.encode("latin-1"))
    save_adapter(edited(), tmp_path)
    assert (tmp_path / README).read_bytes() == written.encode("latin-1")
    load_adapter(tiny("llama"), tmp_path)


def test_a_card_is_replaced_until_a_word_of_it_is_changed(tmp_path: Path) -> None:
    save_adapter(edited("gpt2"), tmp_path)
    first = text(tmp_path)
    (tmp_path / README).write_text(first.replace("tags:", "license: mit\ntags:\n- honest", 1))
    save_adapter(edited(BASE), tmp_path)
    metadata = check(tmp_path)
    assert metadata["base_model"] == BASE and metadata["license"] == "mit" and "honest" in metadata["tags"]
    assert "gpt2" not in text(tmp_path)
    changed = text(tmp_path).replace("## In a server", "It is good.\n\n## In a server")
    (tmp_path / README).write_text(changed)
    save_adapter(edited("gpt2"), tmp_path)
    assert text(tmp_path) == changed


def test_a_link_is_neither_followed_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.md").write_text("x")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / README).symlink_to(tmp_path / "elsewhere.md")
    save_adapter(edited(), tmp_path / "adapter")
    assert (tmp_path / "elsewhere.md").read_text() == "x" and (tmp_path / "adapter" / README).is_symlink()


@pytest.mark.parametrize(
    "base",
    [
        "evil\n---\nlicense: mit\n# Title",
        "a: b, [c] {d} *e* `f` | g # h",
        "'''\"\"\"",
        "```\n```python\nimport os",
        "<!-- x --> <script>",
        "\x00\x1b[31m&anchor !tag %",
    ],
)
def test_no_name_of_a_base_breaks_the_card(base: str, tmp_path: Path) -> None:
    save_adapter(edited(base), tmp_path)
    metadata, body = check(tmp_path), ModelCard.load(tmp_path / README).text
    assert "license" not in metadata and "base_model" not in metadata
    assert len(re.findall(r"^```", body, re.MULTILINE)) % 2 == 0 and len(re.findall(r"^# ", body, re.MULTILINE)) == 1
    save_adapter(edited("gpt2"), tmp_path)  # it is still ours
    assert check(tmp_path)["base_model"] == "gpt2"


def test_no_setting_or_note_breaks_the_card(tmp_path: Path) -> None:
    nasty = "`x`\n---\n# y | <b>\x00"
    config = LoraConfig(target_modules=nasty, base_model_name_or_path="gpt2")
    notes = {"computed": True, "record": {"method": nasty, "note": nasty, "data_hash": nasty, "path": "/home/me/data"}}
    write_folders(tmp_path, {"default": (config, {"a": torch.zeros(2)}, notes)})
    body = ModelCard.load(tmp_path / README).text
    assert len(re.findall(r"^#+ ", body, re.MULTILINE)) == 4 and "\n---" not in body and "/home/me" not in body
    check(tmp_path)


def test_the_same_adapter_gives_the_same_card(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = tiny("llama")
        stack_of(model).add(LoraConfig(r=2, target_modules=["v_proj", "q_proj", "k_proj", "o_proj"]), "lora")
        save_adapter(model, tmp_path / name)
    assert text(tmp_path / "a") == text(tmp_path / "b")


def test_folders_without_a_card_are_read_as_before(tmp_path: Path) -> None:
    save_adapter(edited(), tmp_path)
    (tmp_path / README).unlink()
    (part,) = load_adapter(tiny("llama"), tmp_path)
    assert part.computed and isinstance(PeftModel.from_pretrained(tiny("llama"), tmp_path), PeftModel)
    assert not (tmp_path / README).exists()


def test_a_folder_on_this_machine_is_told_by_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    names = {"models/mine": "mine", "models/other": "models/other", "./a/b": "b", "~/a": "a", "a/b/c": "c"}
    names |= {"C:\\models\\x": "x", "..\\x": "x", "gpt2": "gpt2"}
    assert {name: public_name(name) for name in names} == names
    assert public_name("/") is None and public_name(None) is None


def test_papers_are_those_of_the_methods_cards() -> None:
    cards = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert [paper for _, paper in papers().values() if paper and f"arXiv:{paper}" not in cards] == []
    assert code("``a``") == "``` ``a`` ```"


def test_types_of_this_package_have_a_name_on_cards_and_a_line_in_the_docs() -> None:
    own = [method.rpartition(".")[2] for method in METHODS]
    kinds = [{"prefix": "ATTENTION_PREFIX"}.get(name, name.upper()) for name in own]
    assert set(kinds) <= {kind.value for kind in PeftType} and set(kinds) <= papers().keys()
    assert {key for key in papers() if key.isupper()} <= {*(kind.value for kind in PeftType), "CAA"}
    for page in ("serving.md", "citizens.md"):
        content = (ROOT / "docs" / page).read_text()
        assert set(re.findall(r"^\| `([A-Z_]+)` \|", content, re.MULTILINE)) == set(kinds)
