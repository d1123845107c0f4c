"""Task arithmetic: sums of adapters are sums of what they add, whatever form they are stored in."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close, fill, logits
from peft import LoraConfig, PeftModel
from tiny_models import tiny
from torch import Tensor, nn
from tuning import one_sentence

from lightning_peft import load_adapter, save_adapter
from lightning_peft.backbone.modules import standalone_name
from lightning_peft.editing import checkpoint_difference, combine, head_offsets_config, head_sites
from lightning_peft.stack.adapter_files.folder import NOTES, AdapterError, read_folder
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

Deltas = dict[str, Tensor]
WEIGHTS = (0.5, -2.0)


def saved(folder: Path, config: Any, seed: int, size: float = 0.3, model: nn.Module | None = None) -> Path:
    """The folder of an adapter with random values."""
    model = tiny("llama") if model is None else model
    stack_of(model).add(config, "default")
    fill(stack_of(model), "default", seed, size)
    return save_adapter(model, folder)


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    """Two adapters of different ranks, scalings and matrices."""
    a = LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "v_proj"])
    b = LoraConfig(r=3, lora_alpha=6, use_rslora=True, rank_pattern={"layers.1.self_attn.v_proj": 4})
    b.target_modules = ["v_proj", "down_proj", "embed_tokens"]
    return [saved(tmp_path / "a", a, 1), saved(tmp_path / "b", b, 2)]


@pytest.fixture
def offsets(tmp_path: Path) -> list[Path]:
    """Head offsets on heads of which one is in both."""
    sites = head_sites(tiny("llama"))
    a = head_offsets_config(sites, [(0, 1), (1, 2)], 2.0, "all")
    b = head_offsets_config(sites, [(1, 2), (1, 0), (2, 3)], 0.5, "all")
    return [saved(tmp_path / "a", a, 1), saved(tmp_path / "b", b, 2)]


@pytest.fixture
def differences(tmp_path: Path) -> list[Path]:
    """Weight deltas of which one matrix is in both."""
    a = WeightDeltasConfig(target_parameters=["lm_head.weight", "model.norm.weight"], alpha=2.0)
    b = WeightDeltasConfig(target_parameters=["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
    return [saved(tmp_path / "a", a, 1), saved(tmp_path / "b", b, 2)]


def added(folder: Path) -> Deltas:
    """What an adapter adds to each weight, found by merging it."""
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_adapter(model, folder)
    stack_of(model).merge()
    after = {standalone_name(model, name): value for name, value in model.state_dict().items()}
    return {name: after[name] - value for name, value in before.items() if not torch.equal(after[name], value)}


def vectors(folder: Path) -> Deltas:
    """What head offsets add to each head."""
    config, tensors, _ = read_folder(folder)
    found = {}
    for key, value in tensors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".head_offsets")
        for head, vector in zip(sorted(config.heads[name]), value, strict=True):  # type: ignore[attr-defined]
            found[f"{name}:{head}"] = config.alpha * vector  # type: ignore[attr-defined]
    return found


def weighted(parts: list[Deltas], weights: Any) -> Deltas:
    """A weighted sum, zero where a part has nothing."""
    keys = dict.fromkeys(key for part in parts for key in part)
    zero = torch.zeros(())
    return {k: sum(((w * p.get(k, zero)) for p, w in zip(parts, weights, strict=True)), zero) for k in keys}


def alike(a: Deltas, b: Deltas, tolerance: float = 1e-5) -> bool:
    largest = max(float(value.abs().max()) for value in b.values())
    keys = a.keys() | b.keys()
    zero = torch.zeros(())
    return all(float((a.get(k, zero) - b.get(k, zero)).abs().max()) <= tolerance * largest for k in keys)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NOTES).read_text())["record"]


# -- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), WEIGHTS, (0.3, 0.7)])
def test_a_sum_of_loras_is_the_sum_of_what_they_add_and_ranks_add_up(
    loras: list[Path], tmp_path: Path, weights: tuple[float, float]
) -> None:
    out = combine(loras, tmp_path / "sum", weights)
    assert alike(added(out), weighted([added(path) for path in loras], weights))
    ranks = {k: v.shape[0] for k, v in read_folder(out)[1].items() if "lora_A" in k or "embedding_A" in k}
    assert sorted(set(ranks.values())) == [2, 3, 5, 6]


def test_a_sum_of_loras_is_what_peft_makes_by_concatenation(tmp_path: Path, tokens: Tensor) -> None:
    configs = [LoraConfig(r=r, lora_alpha=4, target_modules=["q_proj", "v_proj"]) for r in (2, 3)]
    folders = [saved(tmp_path / name, config, i) for i, (name, config) in enumerate(zip("ab", configs, strict=True))]
    peft = PeftModel.from_pretrained(tiny("llama"), str(folders[0]), adapter_name="a")
    peft.load_adapter(str(folders[1]), adapter_name="b")
    for method, rank in (("cat", None), ("svd", 2)):
        peft.add_weighted_adapter(["a", "b"], [0.5, 2.0], method, combination_type=method, svd_rank=rank)
        peft.set_adapter(method)
        ours = PeftModel.from_pretrained(tiny("llama"), str(combine(folders, tmp_path / method, [0.5, 2.0], rank=rank)))
        assert close(logits(ours, tokens), logits(peft, tokens))


def test_a_cut_rank_is_the_nearest_and_says_how_much_it_kept(loras: list[Path], tmp_path: Path) -> None:
    whole = weighted([added(path) for path in loras], WEIGHTS)
    assert alike(added(combine(loras, tmp_path / "same", WEIGHTS, rank=6)), whole)
    assert record(tmp_path / "same")["kept_squared_norm"] == pytest.approx(1.0, abs=1e-6)
    cut = added(combine(loras, tmp_path / "cut", WEIGHTS, rank=1))
    kept = total = 0.0
    for name, value in whole.items():
        if name == "lm_head.weight":  # the embedding's, which is adapted
            continue
        u, s, v = torch.linalg.svd(value)
        assert close(cut[name], s[0] * u[:, :1] @ v[:1], 1e-4)
        kept, total = kept + float(s[0] ** 2), total + float((s**2).sum())
    assert (
        record(tmp_path / "cut")["kept_squared_norm"] == pytest.approx(kept / total, rel=1e-4) and kept < 0.95 * total
    )


@pytest.mark.parametrize("kind", ["offsets", "differences"])
def test_sums_of_offsets_and_of_differences_are_exact(kind: str, tmp_path: Path, request: Any) -> None:
    folders, read = request.getfixturevalue(kind), vectors if kind == "offsets" else added
    out = combine(folders, tmp_path / "sum", WEIGHTS)
    assert alike(read(out), weighted([read(path) for path in folders], WEIGHTS), 1e-6)


def test_a_sum_of_layer_offsets_is_both_at_their_dials(tmp_path: Path, tokens: Tensor) -> None:
    layers = [[f"model.layers.{i}" for i in pair] for pair in ((0, 1), (1, 2))]
    configs = [LayerOffsetsConfig(target_modules=pair, width=32, alpha=2.0, positions="all") for pair in layers]
    folders = [saved(tmp_path / name, config, i) for i, (name, config) in enumerate(zip("ab", configs, strict=True))]
    both, one = tiny("llama"), tiny("llama")
    for path, weight in zip(folders, WEIGHTS, strict=True):
        load_adapter(both, path, name=path.name)
        stack_of(both).scale(weight, path.name)
    load_adapter(one, combine(folders, tmp_path / "sum", WEIGHTS))
    assert close(logits(one, tokens), logits(both, tokens))


def test_gains_are_summed_as_the_offsets_they_make(tmp_path: Path, offsets: list[Path]) -> None:
    sites = head_sites(tiny("llama"))
    config = head_offsets_config(sites, [(1, 2), (2, 2)], 3.0, "all")
    config.parameters = "gains"
    gains = saved(tmp_path / "gains", config, 5)
    _, tensors, _ = read_folder(gains)
    made = {}
    for layer in (1, 2):
        name = f"model.layers.{layer}.self_attn.o_proj"
        key = f"base_model.model.{name}.head_offsets"
        made[f"{name}:2"] = 3.0 * (tensors[key] * tensors[f"{key}_directions"])[0]
    out = combine([gains, offsets[0]], tmp_path / "sum", WEIGHTS)
    assert alike(vectors(out), weighted([made, vectors(offsets[0])], WEIGHTS), 1e-6)


@pytest.mark.parametrize("kind", ["offsets", "differences", "loras"])
def test_add_then_subtract_is_the_start_and_minus_itself_the_base(
    kind: str, tmp_path: Path, request: Any, tokens: Tensor
) -> None:
    a, b = request.getfixturevalue(kind)
    both = combine([a, b], tmp_path / "both")
    ours, back, base = tiny("llama"), tiny("llama"), tiny("llama")
    load_adapter(ours, a)
    load_adapter(back, combine([both, b], tmp_path / "back", [1, -1]))
    assert close(logits(back, tokens), logits(ours, tokens))
    nothing = tiny("llama")
    load_adapter(nothing, combine([a, a], tmp_path / "nothing", [1, -1]))
    if kind == "loras":  # two products that cancel, each rounded
        assert close(logits(nothing, tokens), logits(base, tokens))
    else:
        assert torch.equal(logits(nothing, tokens), logits(base, tokens))


@pytest.mark.parametrize("kind", ["offsets", "differences", "loras"])
def test_the_negation_of_the_negation_is_bit_equal(kind: str, tmp_path: Path, request: Any, tokens: Tensor) -> None:
    a = request.getfixturevalue(kind)[0]
    once = combine([a], tmp_path / "once", [-1])
    twice, same, dialled = tiny("llama"), tiny("llama"), tiny("llama")
    load_adapter(twice, combine([once], tmp_path / "twice", [-1]))
    load_adapter(same, a)
    assert torch.equal(logits(twice, tokens), logits(same, tokens))
    load_adapter(dialled, a)
    stack_of(dialled).scale(-1.0)
    negated = PeftModel.from_pretrained(tiny("llama"), str(once))
    assert close(logits(negated, tokens), logits(dialled, tokens))
    assert not close(logits(negated, tokens), logits(same, tokens), 1e-3)


def test_sparse_differences_are_summed_where_either_has_an_entry(tmp_path: Path, differences: list[Path]) -> None:
    folders = []
    for seed, density in ((1, 0.01), (2, 0.2)):  # stored by indices, and by bits
        model = tiny("llama")
        name = "model.layers.0.mlp.up_proj.weight"
        stack_of(model).add(WeightDeltasConfig(target_parameters=[name], masked=[name]), "default")
        state = stack_of(model).tensors(stack_of(model)["default"])
        generator = torch.Generator().manual_seed(seed)
        for key, value in state.items():
            drawn = torch.rand(value.shape, generator=generator)
            value.copy_(drawn < density if ".masks." in key else drawn)
        folders.append(save_adapter(model, tmp_path / f"sparse{seed}"))
    out = combine(folders, tmp_path / "sum", WEIGHTS)
    assert alike(added(out), weighted([added(path) for path in folders], WEIGHTS), 1e-6)
    assert sum(v.numel() for k, v in read_folder(out)[1].items() if ".values." in k) < 0.25 * 48 * 32
    mixed = [folders[0], differences[1]]
    assert alike(added(combine(mixed, tmp_path / "mixed")), weighted([added(p) for p in mixed], (1, 1)), 1e-6)


# -- TIES and DARE ----------------------------------------------------------------------------------------------------


def plain_ties(parts: list[Deltas], weights: Any, density: float) -> Deltas:
    """Yadav et al. 2023, section 3, entry by entry: trim each, elect, average those that agree."""
    trimmed = []
    for part, w in zip(parts, weights, strict=True):
        every = [(w * float(v), k, i) for k, t in part.items() for i, v in enumerate(t.flatten())]
        largest = sorted(every, key=abs_first)[: int(density * len(every))]
        trimmed.append({(k, i): v for v, k, i in largest})
    merged = {key: torch.zeros_like(value) for part in parts for key, value in part.items()}
    for key, values in merged.items():
        for i in range(values.numel()):
            found = [part.get((key, i), 0.0) for part in trimmed]
            sign = 1.0 if sum(found) >= 0 else -1.0
            agreeing = [v for v in found if v * sign > 0]
            values.view(-1)[i] = sum(agreeing) / max(1, len(agreeing))
    return merged


def abs_first(entry: tuple[float, str, int]) -> float:
    return -abs(entry[0])


@pytest.mark.parametrize("weights", [(1.0, 1.0), WEIGHTS])
def test_ties_is_trim_elect_and_average(offsets: list[Path], tmp_path: Path, weights: Any) -> None:
    out = combine(offsets, tmp_path / "ties", weights, "ties", density=0.4)
    expected = plain_ties([vectors(path) for path in offsets], weights, 0.4)
    assert alike(vectors(out), expected, 1e-6)
    assert any((value == 0).any() for value in expected.values())


def test_ties_of_loras_is_of_what_they_add_at_full_rank(tmp_path: Path) -> None:
    configs = [LoraConfig(r=r, lora_alpha=4, target_modules=["v_proj"], layers_to_transform=[1]) for r in (2, 3)]
    folders = [saved(tmp_path / name, config, i) for i, (name, config) in enumerate(zip("ab", configs, strict=True))]
    out = combine(folders, tmp_path / "ties", method="ties", density=0.3, rank=16)
    expected = plain_ties([added(path) for path in folders], (1, 1), 0.3)
    assert alike(added(out), expected)
    peft = PeftModel.from_pretrained(tiny("llama"), str(folders[0]), adapter_name="a")
    peft.load_adapter(str(folders[1]), adapter_name="b")
    peft.add_weighted_adapter(["a", "b"], [1, 1], "ties", combination_type="ties_svd", density=0.3, svd_rank=16)
    layer = peft.base_model.model.model.layers[1].self_attn.v_proj
    assert alike({"model.layers.1.self_attn.v_proj.weight": layer.get_delta_weight("ties")}, expected)
    default = combine(folders, tmp_path / "default", method="ties", density=0.3)
    assert max(v.shape[0] for k, v in read_folder(default)[1].items() if "lora_A" in k) == 3
    assert 0.2 < record(default)["kept_squared_norm"] < 0.99


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_drops_at_random_and_divides_by_the_density(differences: list[Path], tmp_path: Path, method: Any) -> None:
    alone = combine(differences[:1], tmp_path / "alone", method=method, density=0.3, seed=4)
    whole, dropped = added(differences[0]), added(alone)
    kept = {key: dropped[key] != 0 for key in whole}
    assert alike(dropped, {key: torch.where(kept[key], value / 0.3, 0.0) for key, value in whole.items()})
    share = sum(int(k.sum()) for k in kept.values()) / sum(k.numel() for k in kept.values())
    assert abs(share - 0.3) < 0.04  # of 2,080 entries: four standard deviations
    again, other = (combine(differences[:1], tmp_path / str(s), method=method, density=0.3, seed=s) for s in (4, 5))
    assert alike(added(again), dropped, 0.0) and not alike(added(other), dropped, 0.1)


def test_dare_sums_and_dare_ties_averages_those_of_the_elected_sign(differences: list[Path], tmp_path: Path) -> None:
    made = {
        m: added(combine(differences, tmp_path / m, WEIGHTS, m, density=0.5, seed=1)) for m in ("dare", "dare_ties")
    }  # type: ignore[arg-type]
    norm = "model.norm.weight"  # the one in both
    parts = [w * added(path)[norm] / 0.5 for path, w in zip(differences, WEIGHTS, strict=True)]
    for i, total in enumerate(made["dare"][norm].tolist()):
        kept = next(
            found
            for choice in itertools.product((0, 1), repeat=2)
            if abs(sum(found := [c * float(p[i]) for c, p in zip(choice, parts, strict=True)]) - total) < 1e-5
        )
        agreeing = [v for v in kept if v * (1 if sum(kept) >= 0 else -1) > 0]
        assert float(made["dare_ties"][norm][i]) == pytest.approx(sum(agreeing) / max(1, len(agreeing)), abs=1e-5)


# -- whole checkpoints ------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, dtype: torch.dtype, seed: int | None = None) -> Path:
    model = tiny("llama").to(dtype)
    generator = torch.Generator().manual_seed(seed or 0)
    for parameter in model.parameters() if seed else ():
        change = 0.02 * torch.randn(parameter.shape, generator=generator)
        parameter.data = (parameter.data.float() + change).to(dtype)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_its_base_and_its_difference(dtype: torch.dtype, tmp_path: Path, tokens: Tensor) -> None:
    base, tuned = checkpoint(tmp_path / "base", dtype), checkpoint(tmp_path / "tuned", dtype, 1)
    folder = checkpoint_difference(tuned, base, tmp_path / "tau")
    cls = type(tiny("llama"))
    model = cls.from_pretrained(base, dtype="auto")
    load_adapter(model, folder)
    stack = stack_of(model)
    theta0, theta1 = (cls.from_pretrained(path, dtype="auto") for path in (base, tuned))
    if dtype is torch.bfloat16:
        assert torch.equal(logits(model, tokens), logits(theta1, tokens))
    assert close(logits(model, tokens), logits(theta1, tokens), 1e-6)
    stack.scale(0.0)
    assert torch.equal(logits(model, tokens), logits(theta0, tokens))
    stack.scale(-0.5)
    for parameter, other in zip(theta0.parameters(), theta1.parameters(), strict=True):
        tau = other.data.float() - parameter.data.float()
        parameter.data = (parameter.data.float() - 0.5 * tau).to(dtype)
    assert close(logits(model, tokens), logits(theta0, tokens), 1e-6 if dtype is torch.float32 else 1e-2)


def test_differences_of_checkpoints_are_added_like_any_adapter(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", torch.float32)
    tuned = [checkpoint(tmp_path / f"tuned{i}", torch.float32, i) for i in (1, 2)]
    taus = [checkpoint_difference(path, base, tmp_path / f"tau{i}") for i, path in enumerate(tuned)]
    assert alike(added(combine(taus, tmp_path / "sum")), weighted([added(tau) for tau in taus], (1, 1)), 1e-6)
    with pytest.raises(AdapterError, match="have the same weights"):
        checkpoint_difference(base, base, tmp_path / "none")
    tiny("wide_llama").save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match="was not tuned from") as error:
        checkpoint_difference(tmp_path / "wide", base, tmp_path / "none")
    assert one_sentence(str(error.value))


# -- forgetting -------------------------------------------------------------------------------------------------------


def progression(low: int, step: int) -> Tensor:
    """Sixteen rows of ten tokens, each token `step` after the last, modulo sixteen."""
    return low + (torch.arange(16)[:, None] + step * torch.arange(10)) % 16


def test_a_task_is_forgotten_by_negation_and_another_is_not(tmp_path: Path) -> None:
    task, control = progression(5, 3), progression(40, 5)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(input_ids=x, labels=x).loss

    def train(model: nn.Module, steps: int, batch: Any) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            sum(loss(model, x) for x in batch()).backward()
            optimizer.step()

    def noisy() -> list[Tensor]:  # half of the task's tokens are any: the base knows it, but not well
        return [torch.where(torch.rand(task.shape) < 0.5, torch.randint(5, 21, task.shape), task), control]

    torch.manual_seed(0)
    model: Any = tiny("llama")
    train(model.requires_grad_(True), 60, noisy)
    model.save_pretrained(tmp_path / "base")
    matrices = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    stack_of(model).add(LoraConfig(r=4, lora_alpha=4, target_modules=matrices), "default")
    train(model, 20, lambda: [task])
    save_adapter(model, tmp_path / "tuned")

    def scores(folder: Path | None) -> tuple[float, float]:
        fresh = type(model).from_pretrained(tmp_path / "base")
        if folder is not None:
            load_adapter(fresh, folder)
        return float(loss(fresh, task)), float(loss(fresh, control))

    base, tuned = scores(None), scores(tmp_path / "tuned")
    negated = scores(combine([tmp_path / "tuned"], tmp_path / "negated", [-1]))
    assert tuned[0] < base[0] - 0.2 and negated[0] > base[0] + 0.2
    assert abs(negated[1] - base[1]) < 0.05 and abs(negated[1] - base[1]) < 0.1 * (negated[0] - base[0])


# -- errors -----------------------------------------------------------------------------------------------------------


def test_adapters_of_other_bases_and_kinds_are_one_sentence(
    loras: list[Path], offsets: list[Path], tmp_path: Path
) -> None:
    moved = tiny("llama")
    with torch.no_grad():
        moved.model.embed_tokens.weight.add_(0.1)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    head = saved(tmp_path / "head", head_offsets_config(head_sites(tiny("llama")), [(0, 0)], 1.0, "answer"), 1)
    everywhere = saved(tmp_path / "all", head_offsets_config(head_sites(tiny("llama")), [(0, 0)], 1.0, "all"), 1)
    dora = saved(tmp_path / "dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), 1)
    plain = saved(tmp_path / "plain", lora, 1)
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([plain, saved(tmp_path / "moved", lora, 1, model=moved)], {}, "were made for different base models"),
        ([plain, head], {}, "Only adapters of one kind have a sum"),
        ([everywhere, head], {}, "act in different ways"),
        ([dora], {}, "does more than add a product to each matrix (use_dora)"),
        ([plain], {"weights": [1, 2]}, "Each adapter needs one weight, but there are 1 adapters and 2"),
        ([plain], {"method": "mean"}, "method must be one of sum, ties, dare, dare_ties"),
        ([plain], {"density": 0.0}, "density must be in (0, 1]"),
        ([plain], {"rank": 0}, "rank must be at least 1"),
        ([head], {"rank": 2}, "rank is LoRA's"),
        ([tmp_path / "nowhere"], {}, "is not an adapter folder"),
    ]
    for folders, options, message in cases:
        with pytest.raises(ValueError) as error:
            combine(folders, tmp_path / "none", **options)
        assert message in str(error.value) and one_sentence(str(error.value)), error.value
    assert not (tmp_path / "none").exists()
