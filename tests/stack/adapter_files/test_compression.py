"""ComPEFT: exactly k of the changes, as signs with one scale, in a folder like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor, nn
from tuning import one_sentence, same, weights

from lightning_peft import load_adapter, save_adapter
from lightning_peft.stack.adapter_files.compression import compress_adapter, decompress_adapter, keep_largest
from lightning_peft.stack.adapter_files.folder import COMPRESSED, AdapterError, read_folder
from lightning_peft.stack.stack import stack_of

METHODS = ("lora", "ia3")


def config(method: str, targets: tuple[str, ...] = ("q_proj", "v_proj"), **options: object) -> object:
    from peft import IA3Config, LoraConfig

    if method == "ia3":
        return IA3Config(target_modules=list(targets), feedforward_modules=[])
    return LoraConfig(**({"r": 4, "target_modules": list(targets)} | options))


def change(backbone: nn.Module, size: float = 0.02, seed: int = 0) -> None:
    """Move every number of the adapters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    stack = stack_of(backbone)
    for part in stack.parts:
        for tensor in stack.tensors(part).values():
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Folders of an adapter before and after training."""
    backbone = tiny("llama")
    stack_of(backbone).add(config(request.param))
    before = save_adapter(backbone, tmp_path / "before")
    change(backbone)
    return before, save_adapter(backbone, tmp_path / "after")


def tensors(folder: Path) -> dict[str, Tensor]:
    return read_folder(folder)[1]


def test_equal_magnitudes_are_kept_from_the_first_on_and_exactly_k() -> None:
    assert keep_largest(torch.tensor([1.0, -1.0, 1.0, 1.0]), 0.5).tolist() == [1, -1, 0, 0]
    assert int(keep_largest(torch.randn(1001), 0.3).count_nonzero()) == 300


@pytest.mark.parametrize("saved", METHODS, indirect=True)
@pytest.mark.parametrize("deviation", ["all", "kept"])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_values_are_the_signs_of_the_largest_changes_times_alpha_sigma(
    saved: tuple[Path, Path], tmp_path: Path, density: float, deviation: str
) -> None:
    before, after = map(tensors, saved)
    (numbers,) = compress_adapter(saved[1], tmp_path / "small", density, 3.0, deviation, saved[0])
    made = tensors(tmp_path / "small")
    assert made.keys() == after.keys()
    tau = torch.cat([(after[key] - before[key]).flatten() for key in sorted(after)])
    got = torch.cat([(made[key] - before[key]).flatten() for key in sorted(after)])
    kept = tau.abs() >= tau.abs().sort(descending=True).values[round(density * len(tau)) - 1]
    sigma = (tau if deviation == "all" else tau * kept).std()
    assert numbers.kept == round(density * len(tau)) == int(kept.sum())
    torch.testing.assert_close(got, 3.0 * sigma * tau.sign() * kept, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("saved", METHODS, indirect=True)
def test_without_its_start_a_change_is_counted_from_what_the_method_starts_at(
    saved: tuple[Path, Path], tmp_path: Path
) -> None:
    (numbers,) = compress_adapter(saved[1], tmp_path / "small", 0.2, 1.0)
    start = 1.0 if "ia3" in next(iter(tensors(saved[1]))) else 0.0
    values = torch.cat([value.flatten() for value in tensors(tmp_path / "small").values()]) - start
    allowed = torch.tensor([-numbers.scale, 0.0, numbers.scale])
    assert float((values[:, None] - allowed).abs().min(1).values.max()) < 1e-6
    assert all("lora_A" in key for key in numbers.raw) and bool(numbers.raw) is (start == 0.0)


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
def test_each_tensor_has_its_own_share_and_scale_where_asked(saved: tuple[Path, Path], tmp_path: Path) -> None:
    (whole,) = compress_adapter(saved[1], tmp_path / "whole", 0.1, 1.0)
    (apart,) = compress_adapter(saved[1], tmp_path / "apart", 0.1, 1.0, scope="tensor")
    assert whole.empty and not apart.empty, "A at random outweighs B"
    for key, value in tensors(tmp_path / "apart").items():
        original = tensors(saved[1])[key]
        assert int(value.count_nonzero()) == round(0.1 * value.numel())
        assert float(value.abs().max()) == pytest.approx(float(original.std()), rel=1e-5)


@pytest.mark.parametrize("saved", METHODS, indirect=True)
def test_a_compressed_folder_loads_and_decompresses_to_what_peft_reads(
    saved: tuple[Path, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    compress_adapter(saved[1], tmp_path / "small", 0.3, 2.0, initial=saved[0])
    plain = decompress_adapter(tmp_path / "small", tmp_path / "plain")
    assert same(tensors(tmp_path / "small"), load_file(plain / "adapter_model.safetensors"))
    ours = tiny("llama").eval()
    load_adapter(ours, tmp_path / "small")
    theirs = PeftModel.from_pretrained(tiny("llama"), plain).eval()
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-6, rtol=0)


def test_bytes_are_near_the_entropy_bound_and_shrink_as_published(tmp_path: Path) -> None:
    backbone = tiny("llama")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    stack_of(backbone).add(config("lora", targets, r=64))
    before = save_adapter(backbone, tmp_path / "before")
    change(backbone)
    after = save_adapter(backbone, tmp_path / "after")
    (numbers,) = compress_adapter(after, tmp_path / "small", 0.1, 1.0, initial=before)
    assert numbers.coded <= 1.03 * numbers.bound
    assert 16 * numbers.parameters / 8 / numbers.coded > 27, "of bfloat16; 28.1 at the bound"
    assert numbers.after == (tmp_path / "small" / COMPRESSED).stat().st_size < numbers.before / 35


def test_a_stack_is_compressed_part_by_part(tmp_path: Path) -> None:
    backbone = tiny("llama")
    stack = stack_of(backbone)
    stack.add(config("lora"), "a")
    stack.add(config("ia3", ("k_proj",)), "b")
    change(backbone)
    save_adapter(backbone, tmp_path / "stack")
    assert [n.parameters for n in compress_adapter(tmp_path / "stack", tmp_path / "small", 0.2)] == [1344, 48]
    parts = load_adapter(tiny("llama"), tmp_path / "small")
    assert [part.name for part in parts] == ["a", "b"]
    assert (decompress_adapter(tmp_path / "small", tmp_path / "plain") / "b" / "adapter_model.safetensors").exists()


def test_what_is_not_the_methods_own_is_kept_as_it_is(tmp_path: Path) -> None:
    backbone = tiny("bert")
    stack_of(backbone).add(config("lora", ("query",), bias="all"))
    change(backbone)
    save_adapter(backbone, tmp_path / "full")
    (numbers,) = compress_adapter(tmp_path / "full", tmp_path / "small", 0.1)
    full, small = tensors(tmp_path / "full"), tensors(tmp_path / "small")
    biases = {key: value for key, value in full.items() if "lora_" not in key}
    assert biases and numbers.dense == sum(value.numel() for value in biases.values())
    assert same(biases, {key: small[key] for key in biases})


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
def test_a_plain_adapter_saved_over_a_compressed_one_is_what_is_read(saved: tuple[Path, Path], tmp_path: Path) -> None:
    small = tmp_path / "small"
    compress_adapter(saved[1], small, 0.1)
    backbone = tiny("llama")
    load_adapter(backbone, saved[1])
    save_adapter(backbone, small)
    assert same(tensors(small), tensors(saved[1]))


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": 0.0}, "density must be in"),
        ({"density": 1.5}, "density must be in"),
        ({"alpha": 0.0}, "alpha must be a positive number"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"folder": "nowhere"}, "is not an adapter folder"),
        ({"output": "after"}, "name another folder"),
        ({"initial": "nowhere"}, "is not an adapter folder"),
        ({"initial": "other"}, "is not the start of this adapter"),
    ],
)
def test_what_cannot_be_compressed_is_refused_in_one_sentence(
    saved: tuple[Path, Path], tmp_path: Path, options: dict[str, object], said: str
) -> None:
    backbone = tiny("llama")
    stack_of(backbone).add(config("lora", ("k_proj",)))
    save_adapter(backbone, tmp_path / "other")
    given = {"folder": saved[1], "output": tmp_path / "small"} | {
        key: tmp_path / value if isinstance(value, str) else value for key, value in options.items()
    }
    with pytest.raises(ValueError, match=said) as caught:
        compress_adapter(**given)
    assert one_sentence(str(caught.value))
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
@pytest.mark.parametrize("broken", ["index", "signs", "missing", "start gone", "start changed", "truncated"])
def test_a_compressed_file_that_cannot_be_read_is_refused_in_one_sentence(
    saved: tuple[Path, Path], tmp_path: Path, broken: str
) -> None:
    small = tmp_path / "small"
    compress_adapter(saved[1], small, 0.1, initial=saved[0])
    file = small / COMPRESSED
    packed = load_file(file)
    if broken == "index":
        save_file(packed | {"index": packed["index"].flip(0)}, file)
    elif broken == "signs":
        save_file(packed | {"negative": packed["negative"][1:].clone()}, file)
    elif broken == "missing":
        save_file({key: value for key, value in packed.items() if key != "layout"}, file)
    elif broken == "start gone":
        (saved[0] / "adapter_model.safetensors").unlink()
    elif broken == "start changed":
        save_adapter(_changed(saved[0]), saved[0])
    else:
        file.write_bytes(file.read_bytes()[:-10])
    backbone = tiny("llama")
    untouched = weights(backbone)
    with pytest.raises(AdapterError) as caught:
        load_adapter(backbone, small)
    assert one_sentence(str(caught.value))
    assert same(untouched, weights(backbone))


def _changed(folder: Path) -> nn.Module:
    backbone = tiny("llama")
    load_adapter(backbone, folder)
    change(backbone, seed=3)
    return backbone


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
def test_notes_and_base_are_kept(saved: tuple[Path, Path], tmp_path: Path) -> None:
    compress_adapter(saved[1], tmp_path / "small", 0.1)
    notes = [json.loads((folder / "lightning_peft.json").read_text()) for folder in (saved[1], tmp_path / "small")]
    assert notes[0] == notes[1] and notes[0]["fingerprint"]
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(tiny("wide_llama"), tmp_path / "small")


def test_directions_and_probes_of_an_edit_are_kept_as_they_are(tmp_path: Path) -> None:
    from lightning_peft.tuners.head_offsets import HeadOffsetsConfig

    backbone = tiny("llama")
    name = "model.layers.0.self_attn.o_proj"
    config = HeadOffsetsConfig(heads={name: [0, 2]}, head_dim=8, parameters="gains", gate="adaptive", positions="all")
    stack_of(backbone).add(config, computed=True)
    change(backbone)
    before = tensors(save_adapter(backbone, tmp_path / "edit"))
    (numbers,) = compress_adapter(tmp_path / "edit", tmp_path / "small", 0.5)
    after = tensors(tmp_path / "small")
    assert numbers.parameters == 2 and numbers.dense == 2 * 8 + 2 * 9
    kept = [key for key in before if not key.endswith("head_offsets")]
    assert len(kept) == 2 and all(torch.equal(after[key], before[key]) for key in kept)
