"""This package's methods are used through peft and transformers as LoRA is, in both directions, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from lightning_peft import bake, load_adapter
from lightning_peft.testing.models import rough
from lightning_peft.tuners.head_offsets import HeadOffsetsConfig
from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig
from lightning_peft.tuners.lorta import LoRTAConfig
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

pytestmark = [
    pytest.mark.filterwarnings(warning)
    for warning in (
        "ignore:.*tie_word_embeddings",
        "ignore:Adapter .* was active",
        "ignore:.*deprecated",
        "ignore:Could",
    )
]

KINDS = ("llama", "gpt2", "bert", "t5")
PROJECTIONS = {
    "llama": "self_attn.o_proj",
    "gpt2": "attn.c_proj",
    "bert": "attention.output.dense",
    "t5": "SelfAttention.o",
}
BLOCKS = {
    "llama": r"model\.layers\.\d",
    "gpt2": r"transformer\.h\.\d",
    "bert": r"bert\.encoder\.layer\.\d\.output\.dense",  # its blocks end in a norm of the residual sum
    "t5": r"decoder\.block\.\d",
}
QUERIES = r".*(q_proj|c_attn|query|SelfAttention\.q)\.weight"
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}


def heads(kind: str, **options: Any) -> HeadOffsetsConfig:
    config: Any = rough(kind).config
    size = getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    options = {"positions": "all", "target_modules": [PROJECTIONS[kind]], "task_type": TASKS[kind]} | options
    return HeadOffsetsConfig(head_dim=size, **options)


def layers(kind: str, **options: Any) -> LayerOffsetsConfig:
    width = int(rough(kind).config.hidden_size)
    options = {"positions": "all", "target_modules": BLOCKS[kind], "task_type": TASKS[kind]} | options
    return LayerOffsetsConfig(width=width, **options)


def deltas(kind: str, **options: Any) -> WeightDeltasConfig:
    return WeightDeltasConfig(**{"target_parameters": QUERIES, "task_type": TASKS[kind]} | options)


def masked(kind: str, **options: Any) -> WeightDeltasConfig:
    names = [name for name, _ in rough(kind).named_parameters() if re.fullmatch(QUERIES, name)]
    return deltas(kind, masked=names, **options)


def one_tensor(kind: str, **options: Any) -> LoRTAConfig:
    return LoRTAConfig(**{"r": 3, "task_type": TASKS[kind]} | options)


MEMBERS: dict[str, Callable[[str], Any]] = {
    "head offsets": heads,
    "gains of heads": lambda kind: heads(kind, parameters="gains"),
    "heads being chosen": lambda kind: heads(kind, parameters="lofit"),
    "gated heads": lambda kind: heads(kind, gate="adaptive"),
    "layer offsets": layers,
    "ablation": lambda kind: layers(kind, operation="ablate"),
    "gated layers": lambda kind: layers(kind, gate="conditional"),
    "deltas": deltas,
    "masked deltas": masked,
    "deltas by index": masked,
    "deltas by bits": masked,
    "pruned": lambda kind: masked(kind, pruned=True),
    "one tensor": one_tensor,
    "missing biases": lambda kind: deltas(kind, target_parameters=r".*\.bias", add_missing=True),
}
COMPACT = {"deltas by index": 0.01, "deltas by bits": 0.4}
MERGEABLE = (
    "head offsets",
    "gains of heads",
    "layer offsets",
    "deltas",
    "deltas by bits",
    "pruned",
    "one tensor",
    "missing biases",
)
kinds = pytest.mark.parametrize("kind", KINDS)
members = pytest.mark.parametrize("member", MEMBERS)
# a few architectures and members, where a statement is the same for all of them
some_kinds = pytest.mark.parametrize("kind", ["llama", "t5"])
some_members = pytest.mark.parametrize(
    "member", ["head offsets", "gated heads", "layer offsets", "deltas", "masked deltas"]
)


def adapter(member: str, kind: str, seed: int = 1) -> tuple[Any, dict[str, Tensor]]:
    """A configuration, and random tensors under the keys of a saved folder."""
    config, generator = MEMBERS[member](kind), torch.Generator().manual_seed(seed)
    tensors = get_peft_model_state_dict(get_peft_model(rough(kind), copy.deepcopy(config)))
    for key, value in tensors.items():
        if value.dtype == torch.bool:
            tensors[key] = torch.rand(value.shape, generator=generator) < COMPACT.get(member, 0.4)
        elif value.dtype == torch.int8:  # what a head's vector is
            tensors[key] = torch.randint(0, 3, value.shape, generator=generator, dtype=torch.int8)
        else:
            tensors[key] = 0.2 * torch.randn(value.shape, generator=generator)
    return config.compacted(tensors) if member in COMPACT else (config, tensors)


def base(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = rough(kind)
    for parameter in model.parameters():  # buffers stay, as transformers keeps them
        parameter.data = parameter.data.to(dtype)
    return model


def adapted(member: str, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    config, tensors = adapter(member, kind)
    model = get_peft_model(base(kind, dtype), config, **options)
    assert not set_peft_model_state_dict(model, tensors).unexpected_keys
    return model


def add(model: PeftModel, member: str, kind: str, name: str) -> None:
    """One more adapter, with other values."""
    config, tensors = adapter(member, kind, seed=2)
    model.add_adapter(name, config)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


@torch.no_grad()
def run(model: Any, kind: str) -> Tensor:
    return model.eval()(**inputs(kind)).logits


def inputs(kind: str) -> dict[str, Tensor]:
    tokens = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(7))
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if kind == "t5" else {})


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two states are the same bit for bit, the one of a `PeftModel` and the other of what is in it."""
    left, right = ({k.removeprefix("base_model.model."): v for k, v in s.items()} for s in (state, expected))
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) and value.dtype == right[key].dtype for key, value in left.items()
    )


def marks(model: nn.Module) -> list[Any]:
    """What an adapter could leave behind: names, classes, hooks and attributes."""
    ignored = {"_modules", "peft_config", "_hf_peft_config_loaded"}  # which transformers sets
    return [
        (name, type(module), sorted(vars(module).keys() - ignored), len(module._forward_hooks), [*module._parameters])
        for name, module in model.named_modules()
    ]


# -- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the models: `float32/llama` and so on."""
    root = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            base(kind, dtype).save_pretrained(root / str(dtype).removeprefix("torch.") / kind)
    return root


@pytest.mark.sampled(3)
@members
@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in KINDS), ("gpt2", "bfloat16")])
def test_peft_transformers_and_this_package_load_a_saved_folder_bit_for_bit(
    kind: str, dtype: str, member: str, bases: Path, tmp_path: Path
) -> None:
    precision = getattr(torch, dtype)
    model = adapted(member, kind, precision)
    model.peft_config["default"].base_model_name_or_path = str(bases / dtype / kind)
    expected, state = run(model, kind), get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    assert not torch.equal(expected, run(base(kind, precision), kind))
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base(kind, precision), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(run(loaded, kind), expected) and same(get_peft_model_state_dict(loaded), state)
        loaded.load_adapter(tmp_path, "beside", low_cpu_mem_usage=low)
        loaded.set_adapter("beside")
        assert torch.equal(run(loaded, kind), expected)
        assert same(get_peft_model_state_dict(loaded, adapter_name="beside"), state)
    for name in ("default", "other"):
        plain = base(kind, precision)
        report = plain.load_adapter(tmp_path, name)
        assert not report.missing_keys and not report.unexpected_keys
        assert torch.equal(run(plain, kind), expected) and same(plain.get_adapter_state_dict(name), state)
    whole = type(plain).from_pretrained(tmp_path, dtype=precision)
    assert torch.equal(run(whole, kind), expected) and same(whole.get_adapter_state_dict(), state)
    ours = base(kind, precision)
    load_adapter(ours, tmp_path)
    assert torch.equal(run(ours, kind), expected)


@pytest.mark.sampled(3)
@members
@kinds
def test_what_transformers_saves_is_loaded_by_all(kind: str, member: str, tmp_path: Path) -> None:
    config, tensors = adapter(member, kind)
    model = base(kind)
    model.add_adapter(config)
    set_peft_model_state_dict(model, tensors)
    expected = run(model, kind)
    model.save_pretrained(tmp_path)
    assert torch.equal(expected, run(adapted(member, kind), kind))
    assert torch.equal(run(PeftModel.from_pretrained(base(kind), tmp_path), kind), expected)
    for load in (load_adapter, lambda plain, folder: plain.load_adapter(folder)):
        plain = base(kind)
        load(plain, tmp_path)
        assert torch.equal(run(plain, kind), expected)


@some_members
def test_a_module_that_is_trained_whole_is_saved_loaded_and_deleted_with_the_adapter(
    member: str, tmp_path: Path
) -> None:
    config, _ = adapter(member, "gpt2")
    config.modules_to_save = ["ln_f"]
    model = get_peft_model(rough("gpt2"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    expected = run(model, "gpt2")
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(rough("gpt2"), tmp_path), "gpt2"), expected)
    plain = base("gpt2")
    plain.load_adapter(tmp_path)
    assert torch.equal(run(plain, "gpt2"), expected)
    model.delete_adapter("default")
    assert torch.equal(run(model.base_model.model, "gpt2"), run(rough("gpt2"), "gpt2"))
    assert not any(".modules_to_save.default" in name for name, _ in model.named_parameters())


@some_members
def test_a_folder_of_a_later_release_is_read_without_what_is_not_known(member: str, tmp_path: Path) -> None:
    model = adapted(member, "llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_a_later_release": 1}))
    with pytest.warns(UserWarning, match="of_a_later_release"):
        loaded = PeftModel.from_pretrained(base("llama"), tmp_path)
    assert torch.equal(run(loaded, "llama"), run(model, "llama"))


# -- several adapters -----------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@members
@some_kinds
def test_after_its_only_adapter_is_deleted_a_model_is_as_before(kind: str, member: str) -> None:
    plain = base(kind)
    before, expected, names = marks(plain), run(plain, kind), list(plain.state_dict())
    for delete in ("peft", "transformers"):
        config, tensors = adapter(member, kind)
        if delete == "peft":
            model = get_peft_model(plain, config)
            set_peft_model_state_dict(model, tensors)
            model.delete_adapter("default")
            assert model.active_adapters == []
        else:
            plain.add_adapter(config)
            set_peft_model_state_dict(plain, tensors)
            plain.delete_adapter("default")
        assert torch.equal(run(plain, kind), expected)
        if "head" not in member and member != "one tensor":  # whose wrappers stay, as peft's own do
            assert marks(plain) == before and list(plain.state_dict()) == names
        else:
            assert marks(plain)[0] == before[0]
            plain = base(kind)


@pytest.mark.sampled(2)
@members
@some_kinds
def test_deleting_an_adapter_leaves_another_active_and_the_inactive_ones_alone(kind: str, member: str) -> None:
    model = adapted(member, kind)
    first = run(model, kind)
    add(model, member, kind, "second")
    assert torch.equal(run(model, kind), first)
    model.set_adapter("second")
    second = run(model, kind)
    assert not torch.equal(second, first)
    model.delete_adapter("second")
    assert model.active_adapters == ["default"] and torch.equal(run(model, kind), first)
    add(model, member, kind, "second")
    model.delete_adapter("second")
    assert model.active_adapters == ["default"] and torch.equal(run(model, kind), first)
    add(model, member, kind, "second")
    model.delete_adapter("default")
    assert model.active_adapters == ["second"] and torch.equal(run(model, kind), second)
    with pytest.raises(ValueError, match=r"^Adapter nope does not exist$"):
        model.delete_adapter("nope")
    model.delete_adapter("second")
    assert torch.equal(run(model.base_model.model, kind), run(base(kind), kind))


@members
def test_transformers_switches_adds_up_and_deletes_several(member: str) -> None:
    model, names = base("llama"), ("first", "second")
    bare, alone = run(model, "llama"), {}
    for seed, name in enumerate(names, 1):
        config, tensors = adapter(member, "llama", seed)
        model.add_adapter(config, name)
        set_peft_model_state_dict(model, tensors, adapter_name=name)
        alone[name] = run(model, "llama")
    model.set_adapter([*names])
    assert all(not torch.equal(run(model, "llama"), one) for one in (bare, *alone.values()))
    model.delete_adapter("second")
    assert model.active_adapters() == ["first"] and torch.equal(run(model, "llama"), alone["first"])
    model.disable_adapters()
    assert torch.equal(run(model, "llama"), bare)
    model.enable_adapters()
    assert torch.equal(run(model, "llama"), alone["first"])
    model.delete_adapter("first")
    assert torch.equal(run(model, "llama"), bare)


def test_adapters_on_different_layers_are_deleted_one_by_one() -> None:
    one, other = (layers("llama", target_modules=[f"model.layers.{i}"]) for i in (0, 1))
    model = get_peft_model(base("llama"), one)
    model.add_adapter("other", other)
    model.set_adapter("other")
    model.delete_adapter("other")  # of the first layer there is nothing else to ask for what is active
    assert model.active_adapters == ["default"]
    model.add_adapter("other", other)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]


@pytest.mark.parametrize("member", MERGEABLE)
def test_a_merged_adapter_is_not_deleted_and_stays_merged_when_another_is(member: str) -> None:
    model = adapted(member, "gpt2")
    add(model, member, "gpt2", "other")
    expected = run(model, "gpt2")
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match=r"^Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    merged = run(model, "gpt2")
    model.delete_adapter("other")
    assert torch.equal(run(model, "gpt2"), merged) and torch.allclose(merged, expected, atol=1e-4)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(run(model, "gpt2"), expected)


@members
def test_switched_off_the_base_computes(member: str) -> None:
    model = adapted(member, "llama")
    expected = run(model, "llama")
    with model.disable_adapter():
        assert torch.equal(run(model, "llama"), run(base("llama"), "llama"))
    assert torch.equal(run(model, "llama"), expected)


@some_members
def test_a_batch_of_several_adapters_is_refused(member: str) -> None:
    model = adapted(member, "llama")
    with pytest.raises(ValueError, match=r"Model computes a whole batch with the active adapters"):
        model(**inputs("llama"), adapter_names=["default", "default", "__base__"])


# -- precision ------------------------------------------------------------------------------------------------------


def trained_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.sampled(3)
@members
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_is_the_bases_where_peft_is_told_not_to_raise_it(
    dtype: torch.dtype, member: str, tmp_path: Path
) -> None:
    for raised, expected in ((False, dtype), (True, torch.float32)):
        model = adapted(member, "llama", dtype, autocast_adapter_dtype=raised)
        assert trained_dtypes(model) == {expected}
        assert not torch.equal(run(model, "llama"), run(base("llama", dtype), "llama"))
        model.save_pretrained(tmp_path / str(raised))
        for low in (False, True):
            options: dict[str, Any] = {"autocast_adapter_dtype": raised, "low_cpu_mem_usage": low, "is_trainable": True}
            loaded = PeftModel.from_pretrained(base("llama", dtype), tmp_path / str(raised), **options)
            assert trained_dtypes(loaded) == {expected}
            assert torch.equal(run(loaded, "llama"), run(model, "llama"))


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("member", MERGEABLE)
@kinds
def test_a_merged_model_is_saved_with_the_edit_or_not_merged(kind: str, member: str, tmp_path: Path) -> None:
    model = adapted(member, kind)
    expected, bare = run(model, kind), base(kind)
    try:
        merged = model.merge_and_unload()
    except ValueError as error:
        assert "lightning_peft.bake" in str(error) and "merge_adapter() and unload()" in str(error)
        name = re.search(r"the first is (\S+),", str(error))
        assert name and name[1] not in bare.state_dict()
        assert torch.equal(run(model, kind), expected)  # nothing was changed
        model.merge_adapter()
        assert torch.allclose(run(model, kind), expected, atol=1e-4)
        with pytest.raises(ValueError, match=r"lightning_peft\.bake"):
            model.merge_and_unload()
        merged = model.unload()
        assert torch.allclose(run(merged, kind), expected, atol=1e-4)
        assert {name for name, _ in merged.named_modules()} == {name for name, _ in bare.named_modules()}
        return
    assert torch.allclose(run(merged, kind), expected, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(run(type(bare).from_pretrained(tmp_path), kind), run(merged, kind))


@pytest.mark.parametrize("member", ["head offsets", "layer offsets", "missing biases"])
def test_baking_gives_what_merging_would_lose(member: str, tmp_path: Path) -> None:
    config = deltas("llama", target_parameters=r".*o_proj\.bias", add_missing=True)
    config = config if member == "missing biases" else MEMBERS[member]("llama")
    model = get_peft_model(base("llama"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    expected = run(model, "llama")
    with pytest.raises(ValueError, match=r"^Merging adds 3 parameters that a plain LlamaForCausalLM has no place for"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    bake(base("llama"), tmp_path / "adapter", tmp_path / "baked")
    assert torch.allclose(run(type(base("llama")).from_pretrained(tmp_path / "baked"), "llama"), expected, atol=1e-4)


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_an_edit_of_a_shared_embedding_is_saved_as_two_weights(operation: str, tmp_path: Path) -> None:
    model = get_peft_model(base("gpt2"), layers("gpt2", target_modules=["transformer.wte"], operation=operation))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    expected = run(model, "gpt2")
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings and torch.allclose(run(again, "gpt2"), expected, atol=1e-5)


@pytest.mark.parametrize("member", MERGEABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_broken_is_merged_safely(value: float, member: str) -> None:
    model = adapted(member, "gpt2")
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel():
            parameter.data.fill_(value)
    with pytest.raises(ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be b"):
        model.merge_adapter(safe_merge=True)


# -- as a module ----------------------------------------------------------------------------------------------------


def copies(model: PeftModel) -> Iterator[PeftModel]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


@pytest.mark.sampled(2)
@members
@some_kinds
def test_a_copy_and_a_pickle_are_models_of_their_own(kind: str, member: str) -> None:
    model = adapted(member, kind)
    expected = run(model, kind)
    for twin in copies(model):
        assert torch.equal(run(twin, kind), expected)
        twin.delete_adapter("default")
        assert torch.equal(run(twin.base_model.model, kind), run(base(kind), kind))
        assert torch.equal(run(model, kind), expected)


@members
def test_blocks_computed_again_in_backward_give_the_same_gradients(member: str) -> None:
    gradients = []
    for again in (False, True):
        model = adapted(member, "llama").train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**inputs("llama")).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain and all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())


@some_members
def test_hooks_of_others_are_called_as_often_as_before(member: str) -> None:
    plain, called = base("llama"), []
    for module in plain.modules():
        module.register_forward_hook(lambda module, args, output: called.append(id(module)))
    run(plain, "llama")
    before = list(called)
    config, _ = adapter(member, "llama")
    model = get_peft_model(plain, config)
    for step in (lambda: None, lambda: model.delete_adapter("default")):
        step()
        called.clear()
        run(plain, "llama")
        assert called == before


# -- configurations -------------------------------------------------------------------------------------------------


@members
def test_a_configuration_is_made_from_its_type_and_its_values(member: str) -> None:
    config = MEMBERS[member]("llama")
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    for again in (PeftConfig.from_peft_type(**values), get_peft_config(dict(values))):
        assert type(again) is type(config) and again.to_dict() == config.to_dict()


@pytest.mark.parametrize("member", ["head offsets", "gated heads", "layer offsets", "gated layers"])
def test_the_keys_of_a_state_say_which_modules_are_adapted(member: str) -> None:
    config, tensors = adapter(member, "llama")
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    first = {key: value for key, value in bare.items() if ".layers.0." in key}
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        model = inject_adapter_in_model(config, base("llama"), state_dict=first)
    assert get_peft_model_state_dict(model).keys() == first.keys()


def places(config: Any) -> set[str]:
    """The modules of a LLaMA that are adapted."""
    keys = get_peft_model_state_dict(get_peft_model(base("llama"), config))
    return {re.split(r"\.layer_edits|\.head_offsets", key.removeprefix("base_model.model."))[0] for key in keys}


@pytest.mark.parametrize("form", [list, set, tuple])
def test_targets_are_a_list_a_set_or_a_tuple(form: Any, tmp_path: Path) -> None:
    names = ["model.layers.1.mlp", "model.layers.0.self_attn"]
    assert places(layers("llama", target_modules=form(names))) == set(names)
    assert places(heads("llama", target_modules=form(["layers.0.self_attn.o_proj"]))) == {
        "model.layers.0.self_attn.o_proj"
    }
    parameters = [f"model.layers.{i}.mlp.up_proj.weight" for i in (2, 0)]
    model = get_peft_model(base("llama"), deltas("llama", target_parameters=form(parameters)))
    assert len(get_peft_model_state_dict(model)) == 2
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    assert saved == (sorted(parameters) if form is set else parameters)


@pytest.mark.parametrize(("make", "target"), [(heads, "self_attn.o_proj"), (layers, "mlp")])
def test_blocks_are_chosen_by_number_and_modules_excluded(make: Callable[..., Any], target: str) -> None:
    def chosen(*numbers: int) -> set[str]:
        return {f"model.layers.{number}.{target}" for number in numbers}

    suffix = target.rpartition(".")[2]
    assert places(make("llama", target_modules=[suffix], layers_to_transform=[0, 2])) == chosen(0, 2)
    assert places(make("llama", target_modules=[suffix], layers_to_transform=1, layers_pattern="layers")) == chosen(1)
    left_out = f"model.layers.1.{target}"
    assert places(make("llama", target_modules=[suffix], exclude_modules=[left_out])) == chosen(0, 2)
    assert places(make("llama", target_modules=[suffix], exclude_modules=r".*layers\.[01]\..*")) == chosen(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": [0], "target_modules": ".*o_proj"}, "is a regular expression, which can name the"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' says where layers_to_transform are counted"),
        (
            {"layers_to_transform": [0], "heads": {"model.layers.0.self_attn.o_proj": [1]}},
            "heads are given by the full",
        ),
    ],
)
def test_blocks_that_nothing_chooses_from_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        heads("llama", **options)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@some_members
@pytest.mark.parametrize("around", ["PeftModel", "transformers"])
def test_the_trainer_of_transformers_trains_saves_and_resumes(around: str, member: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, 6)).tolist()]

    def trainer(steps: int, **options: Any) -> Trainer:
        model = base("llama")
        config, _ = adapter(member, "llama")
        if around == "PeftModel":
            model = get_peft_model(model, config)
        else:
            model.add_adapter(config)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            learning_rate=0.05, lr_scheduler_type="constant", disable_tqdm=True, **options,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=rows)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        straight = trainer(4)
        straight.train()
        expected = run(straight.model, "llama")
        assert not torch.equal(expected, run(base("llama"), "llama"))
        if around == "PeftModel":  # without one transformers looks for a whole model in the checkpoint, of LoRA as well
            resumed = trainer(4)
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            assert torch.equal(run(resumed.model, "llama"), expected)
        plain = base("llama")
        plain.load_adapter(str(tmp_path / "checkpoint-4"))
        assert torch.equal(run(plain, "llama"), expected)
