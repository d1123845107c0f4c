"""What cannot be imported ends in one sentence, before anything is written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub_models import FOLDERS, base
from damage import DAMAGES

from lightning_peft import AdapterError, import_adapterhub, load_adapter
from lightning_peft.adapterhub.folder import read_adapter

Change = Callable[[dict[str, Any]], object]


def changed(kind: str, method: str, folder: Path, change: Change) -> Path:
    """Copy an adapter and change its `adapter_config.json`."""
    shutil.copytree(FOLDERS / kind / method, folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    change(values)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def refused(model: Any, folder: Path, output: Path, match: str) -> None:
    with pytest.raises(AdapterError, match=match) as caught:
        import_adapterhub(model, folder, output)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("houlsby", "ln_before", True),
        ("houlsby", "ln_after", True),
        ("houlsby", "inv_adapter", "nice"),
        ("houlsby", "use_gating", True),
        ("houlsby", "original_ln_after", False),
        ("houlsby", "residual_before_ln", "post_add"),
        ("pfeiffer", "residual_before_ln", False),
        ("parallel", "original_ln_after", False),
        ("houlsby", "non_linearity", "gelu_new"),
        ("houlsby", "scaling", "per_token"),
        ("houlsby", "reduction_factor", {"1": 4}),
        ("houlsby", "reduction_factor", 0),
        ("houlsby", "reduction_factor", "4"),
        ("compacter", "shared_phm_rule", False),
        ("compacter", "shared_W_phm", True),
        ("compacter", "factorized_phm_W", False),
        ("compacter", "phm_rank", 2),
        ("compacter", "phm_dim", 3),
        ("prefix", "non_linearity", "wave"),
        ("prefix", "use_gating", True),
        ("lora", "use_dora", True),
        ("lora", "vera_d", 0.1),
        ("lora", "composition_mode", "mix"),
        ("lora", "attn_matrices", ["q", "o"]),
        ("ia3", "dropout", 0.1),
        ("lora", "no_option_of_this_name", 1),
        ("lora", "architecture", "prompt_tuning"),
    ],
)
def test_an_option_without_an_equal_is_named(method: str, option: str, value: object, tmp_path: Path) -> None:
    folder = changed("bert", method, tmp_path / "in", lambda values: values["config"].update({option: value}))
    shown = {"architecture": "architecture 'prompt_tuning'", "phm_dim": "phm_rule has shape", "reduction_factor": ""}
    refused(base("bert"), folder, tmp_path / "out", shown.get(option) or option)


def test_a_sum_that_no_module_gives_is_named(tmp_path: Path) -> None:
    folder = changed("gpt2", "houlsby", tmp_path / "in", lambda v: v["config"].update(original_ln_before=True))
    refused(base("gpt2"), folder, tmp_path / "out", "original_ln_before=True .* behind transformer.h.0.attn.c_proj")


def test_a_prefix_of_t5_without_some_layers_is_refused(tmp_path: Path) -> None:
    folder = changed("t5", "prefix_flat", tmp_path / "in", lambda values: values["config"].update(leave_out=[1]))
    refused(base("t5"), folder, tmp_path / "out", r"leave_out=\[1\]")


def test_a_hash_in_place_of_a_configuration_is_refused(tmp_path: Path) -> None:
    folder = changed("bert", "pfeiffer", tmp_path / "in", lambda values: values.update(config="9076f36a74755ac4"))
    refused(base("bert"), folder, tmp_path / "out", "9076f36a74755ac4.*if it is a hash")


def test_another_base_is_refused(tmp_path: Path) -> None:
    refused(base("gpt2"), FOLDERS / "bert" / "lora", tmp_path / "out", "of the type bert, and the base is gpt2")
    folder = changed("bert", "lora", tmp_path / "in", lambda values: values.update(model_type=""))
    refused(base("gpt2"), folder, tmp_path / "out", "has no h.0.attn.c_attn.loras.lora_A")


def test_a_base_of_another_width_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=40, **sizes))
    refused(model, FOLDERS / "bert" / "lora", tmp_path / "out", r"lora_A has shape \(2, 16\).* need \(2, 32\)")


def test_a_base_with_fewer_or_more_layers_is_refused(tmp_path: Path) -> None:
    model = base("bert")
    del model.bert.encoder.layer[1]
    refused(model, FOLDERS / "bert" / "lora", tmp_path / "out", "4 of its tensors have no place there")
    model = base("bert")
    model.bert.encoder.layer.append(base("bert").bert.encoder.layer[0])
    refused(model, FOLDERS / "bert" / "lora", tmp_path / "out", "has no encoder.layer.2.attention.self.query")


def test_an_unknown_type_of_model_is_refused(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 16}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=40, **sizes))
    refused(model, FOLDERS / "bert" / "lora", tmp_path / "out", "types bert, gpt2, .*, not for gpt_neox")


def test_shared_matrices_that_adapterhub_did_not_save_are_missed(tmp_path: Path) -> None:
    folder = changed("t5", "compacter", tmp_path / "in", lambda values: None)
    tensors = {key: v for key, v in read_adapter(folder).tensors.items() if "phm_rule" not in key}
    torch.save(tensors, folder / "pytorch_adapter.bin")
    refused(base("t5"), folder, tmp_path / "out", "save the adapter of a T5AdapterModel")


def test_a_tensor_that_is_left_over_is_named(tmp_path: Path) -> None:
    folder = changed("bert", "houlsby", tmp_path / "in", lambda values: values["config"].update(mh_adapter=False))
    refused(base("bert"), folder, tmp_path / "out", "8 of its tensors have no place there, the first is bert.encoder")


def test_copies_of_a_prefix_must_be_copies(tmp_path: Path) -> None:
    folder = changed("bert", "prefix_flat", tmp_path / "in", lambda values: None)
    tensors = {key: value.clone() for key, value in read_adapter(folder).tensors.items()}
    next(value for key, value in tensors.items() if ".pool." in key).add_(1)
    torch.save(tensors, folder / "pytorch_adapter.bin")
    refused(base("bert"), folder, tmp_path / "out", "1 of its tensors have no place there")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = changed("bert", "houlsby", tmp_path / "in", lambda values: None)
    tensors = dict(read_adapter(folder).tensors)
    next(iter(tensors.values()))[0] = float("nan")
    torch.save(tensors, folder / "pytorch_adapter.bin")
    refused(base("bert"), folder, tmp_path / "out", "NaN")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["bert/pfeiffer/adapter.safetensors", "bert/houlsby/pytorch_adapter.bin"])
def test_damaged_weights_are_refused_or_say_so(file: str, damage: str, tmp_path: Path) -> None:
    folder = changed(*file.split("/")[:2], tmp_path / "in", lambda values: None)
    DAMAGES[damage](folder / file.split("/")[2])
    try:
        import_adapterhub(base("bert"), folder, tmp_path / "out")
    except AdapterError as error:
        assert "\n" not in str(error)
        assert not (tmp_path / "out").exists()
    else:
        assert damage == "flipped"  # one bit of a weight, which no file of AdapterHub could tell


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_is_refused(damage: str, tmp_path: Path) -> None:
    folder = changed("bert", "pfeiffer", tmp_path / "in", lambda values: None)
    DAMAGES[damage](folder / "adapter_config.json")
    refused(base("bert"), folder, tmp_path / "out", ".")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = changed("bert", "houlsby", tmp_path / "in", lambda values: None)
    (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": Trap()}))
    refused(base("bert"), folder, tmp_path / "out", "holds more than tensors")
    torch.save({"a": Trap()}, folder / "pytorch_adapter.bin")
    refused(base("bert"), folder, tmp_path / "out", "holds more than tensors")
    assert not (tmp_path / "sprung").exists()


def test_folders_of_others_are_told_apart(tmp_path: Path) -> None:
    refused(base("bert"), tmp_path, tmp_path / "out", "it has no adapter_config.json")
    import_adapterhub(base("bert"), FOLDERS / "bert" / "lora", tmp_path / "ours")
    refused(base("bert"), tmp_path / "ours", tmp_path / "out", "is a peft folder already")


def test_the_output_must_be_new_and_the_model_bare(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        import_adapterhub(base("bert"), FOLDERS / "bert" / "lora", tmp_path / "out")
    model = base("bert")
    import_adapterhub(model, FOLDERS / "bert" / "lora", tmp_path / "lora")
    load_adapter(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="has adapters already"):
        import_adapterhub(model, FOLDERS / "bert" / "lora", tmp_path / "again")


@pytest.mark.parametrize("text", ["lora[5]", "lora[{}: 1]", "lora[[1]: 2]", "lora[r=" + 300 * "(", "lora[r=1=2]", "|"])
def test_a_named_configuration_whose_options_are_none_is_one_sentence(text: str, tmp_path: Path) -> None:
    folder = changed("bert", "lora", tmp_path / "adapter", lambda values: values.update(config=text))
    refused(base("bert"), folder, tmp_path / "imported", "has the config .*\\.$")


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("lora", "architecture", []),
        ("lora", "architecture", {}),
        ("pfeiffer", "architecture", ["lora"]),
        ("pfeiffer", "non_linearity", []),
        ("pfeiffer", "non_linearity", {"relu": 1}),
        ("pfeiffer", "reduction_factor", float("nan")),
        ("pfeiffer", "reduction_factor", float("inf")),
    ],
)
@pytest.mark.parametrize("version", ["", "adapters.1.3.0"])
def test_values_of_another_kind_than_an_option_has_are_one_sentence(
    method: str, option: str, value: Any, version: str, tmp_path: Path
) -> None:
    def change(values: dict[str, Any]) -> None:
        values["version"] = version
        values["config"][option] = value

    refused(base("bert"), changed("bert", method, tmp_path / "adapter", change), tmp_path / "imported", "AdapterHub's")
