"""What AdapterHub saved computes here what it computed there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub_models import CLASSES, COUSINS, FOLDERS, base, inputs, logits_differ
from safetensors.torch import load_file, save_file

import lightning_peft
from lightning_peft import import_adapterhub, load_adapter
from lightning_peft.adapterhub.folder import read_adapter

METHODS = ("houlsby", "pfeiffer", "parallel", "adapter_plus", "compacter", "compacter++", "prefix_flat", "prefix")
METHODS += ("mam", "lora", "ia3")
OPTIONS = ("some_layers", "learned_scaling", "all_matrices", "union")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("method", METHODS)
def test_an_imported_adapter_computes_what_it_computed_in_adapterhub(kind: str, method: str, tmp_path: Path) -> None:
    model = base(kind)
    import_adapterhub(model, FOLDERS / kind / method, tmp_path / "out")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, kind, method) <= 1e-6


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("method", OPTIONS)
def test_options_of_layers_places_matrices_and_scalings_are_honoured(kind: str, method: str, tmp_path: Path) -> None:
    model = base(kind)
    import_adapterhub(model, FOLDERS / kind / "imported" / method, tmp_path / "out")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, kind, method, f"{kind}/imported") <= 1e-6


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [kind for kind in COUSINS if kind != "classifier"])
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel", "prefix_flat", "lora", "ia3"])
def test_models_with_the_names_of_another_are_read_alike(kind: str, method: str, tmp_path: Path) -> None:
    model = base(kind)
    import_adapterhub(model, FOLDERS / kind / method, tmp_path / "out")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, kind, method) <= 1e-6


@pytest.mark.parametrize("kind", CLASSES)
def test_gates_are_imported_where_asked_for_and_equal_where_they_read_nothing(kind: str, tmp_path: Path) -> None:
    model = base(kind)
    with pytest.raises(lightning_peft.AdapterError, match="use_gating=True"):
        import_adapterhub(model, FOLDERS / kind / "unipelt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    imported = import_adapterhub(model, FOLDERS / kind / "unipelt", tmp_path / "out", token_gates=True)
    assert list(imported.parts) == ["low_rank", "adapter", "prefix"]
    load_adapter(model, tmp_path / "out")
    assert (logits_differ(model, kind, "unipelt") <= 1e-6) == (kind == "vit")


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "prefix_flat", "lora", "ia3"])
def test_peft_reads_the_folder(method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    import_adapterhub(base("llama"), FOLDERS / "llama" / method, tmp_path / "out")
    assert logits_differ(PeftModel.from_pretrained(base("llama"), tmp_path / "out"), "llama", method) <= 1e-6


def test_it_is_put_on_for_a_while_and_taken_off(tmp_path: Path) -> None:
    model = base("vit")
    import_adapterhub(model, FOLDERS / "vit" / "mam", tmp_path / "out")
    with lightning_peft.steering(model, tmp_path / "out"):
        assert logits_differ(model, "vit", "mam") <= 1e-6
    assert logits_differ(model, "vit", "base") <= 1e-6


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_lora_and_ia3_need_nothing_of_this_package(method: str, tmp_path: Path) -> None:
    import_adapterhub(base("gpt2"), FOLDERS / "gpt2" / method, tmp_path / "out")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "assert 'lightning_peft' not in sys.modules\n"
        "torch.save(model(torch.tensor([[5, 6, 7]])).logits, sys.argv[3])\n"
    )
    paths = [FOLDERS / "gpt2" / "base", tmp_path / "out", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    model = base("gpt2")
    load_adapter(model, tmp_path / "out")
    ours = model(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), ours, rtol=0, atol=1e-6)


def test_a_prefix_of_t5_counts_positions_and_generates_the_same_with_a_cache(tmp_path: Path) -> None:
    model = base("t5")
    import_adapterhub(model, FOLDERS / "t5" / "prefix", tmp_path / "out")
    load_adapter(model, tmp_path / "out")
    given = {key: value for key, value in inputs("t5").items() if not key.startswith("decoder")}
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached, plain = (model.generate(**given, **settings, use_cache=use_cache) for use_cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-5, atol=1e-5)


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = base("bert")
    model.bert.embeddings.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    import_adapterhub(model, FOLDERS / "bert" / "mam", tmp_path / "out")
    assert {name: type(module) for name, module in model.named_modules()} == modules
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


# -- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "pfeiffer"])
def test_the_head_of_a_classifier_comes_along(method: str, tmp_path: Path) -> None:
    imported = import_adapterhub(base("classifier"), FOLDERS / "classifier" / method, tmp_path / "out")
    assert imported.notes == ()
    model = base("classifier")
    with torch.no_grad():
        model.classifier.weight.add_(1)  # as a head that is made anew
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, "classifier", method) <= 1e-6


def test_a_head_of_adapterhubs_own_is_named_as_left_out(tmp_path: Path) -> None:
    imported = import_adapterhub(base("bert"), FOLDERS / "classifier" / "own_head", tmp_path / "out")
    assert len(imported.notes) == 1
    assert "The head 'peer' of BertAdapterModel was left out" in imported.notes[0]


def test_a_language_models_head_is_named_only_where_it_was_changed(tmp_path: Path) -> None:
    same = import_adapterhub(base("bert"), FOLDERS / "classifier" / "same_language_head", tmp_path / "same")
    assert same.notes == ()
    other = import_adapterhub(base("bert"), FOLDERS / "classifier" / "other_language_head", tmp_path / "other")
    assert len(other.notes) == 1
    assert "The head of BertForMaskedLM was trained too and is left out" in other.notes[0]


def test_files_that_were_not_read_are_named(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS / "bert" / "lora", tmp_path / "in")
    (tmp_path / "in" / "embedding.pt").touch()
    (tmp_path / "in" / "pytorch_adapter.bin").touch()
    imported = import_adapterhub(base("bert"), tmp_path / "in", tmp_path / "out")
    assert [note.split()[0] for note in imported.notes] == ["embedding.pt", "pytorch_adapter.bin"]


# -- files of former versions ---------------------------------------------------------------------------------------


def rewritten(source: Path, folder: Path, change: Any) -> Path:
    """Copy an adapter, with its config changed by `change(values, tensors)`, which may return other tensors."""
    folder.mkdir()
    values, tensors = json.loads((source / "adapter_config.json").read_text()), dict(read_adapter(source).tensors)
    tensors = change(values, tensors) or tensors
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "adapter.safetensors")
    return folder


def test_a_configuration_may_be_a_name_with_options(tmp_path: Path) -> None:
    def change(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        values["config"] = "houlsby[reduction_factor=4]"

    folder = rewritten(FOLDERS / "gpt2" / "houlsby", tmp_path / "in", change)
    model = base("gpt2")
    import_adapterhub(model, folder, tmp_path / "out")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, "gpt2", "houlsby") <= 1e-6


def test_names_and_options_of_the_first_version_are_read(tmp_path: Path) -> None:
    def change(values: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
        values["type"] = "text_task"
        del values["version"], values["config"]["phm_layer"], values["config"]["scaling"]
        values["config"] |= {"attention_type": "sent-lvl-dynamic", "new_attention_norm": False}
        values["config"]["invertible_adapter"] = {"block_type": "nice", "reduction_factor": 2}
        return {key.replace(".output.adapters.", ".output.layer_text_task_adapters."): v for key, v in tensors.items()}

    folder = rewritten(FOLDERS / "bert" / "pfeiffer", tmp_path / "in", change)
    model = base("bert")
    import_adapterhub(model, folder, tmp_path / "out")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, "bert", "pfeiffer") <= 1e-6


def test_lora_of_a_version_without_scaling_is_imported_without_it(tmp_path: Path) -> None:
    def change(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        values["version"] = "adapters.1.0.1"

    folder = rewritten(FOLDERS / "bert" / "lora", tmp_path / "in", change)
    import_adapterhub(base("bert"), folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)


def test_tensors_are_copied_bit_for_bit(tmp_path: Path) -> None:
    import_adapterhub(base("bert"), FOLDERS / "bert" / "pfeiffer", tmp_path / "out")
    theirs = read_adapter(FOLDERS / "bert" / "pfeiffer").tensors
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, value in ours.items():
        assert any(torch.equal(value, other) for other in theirs.values()), key
    assert len(ours) == len(theirs)
