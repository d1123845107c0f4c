"""`reference=True` differs from the default in what the cards list, and in nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close, logits
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn
from tuning import one_sentence, same, weights

from lightning_peft import save_adapter
from lightning_peft.editing.facts import (
    Fact,
    KeyMoments,
    KnowledgeEdit,
    Search,
    compute_memit,
    compute_rome,
    find_values,
    key_moments,
    memory_sites,
)
from lightning_peft.editing.facts.update import least_squares
from lightning_peft.editing.facts.values import read_at_subject
from lightning_peft.stack.stack import stack_of

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*do not have")
FACTS = [
    Fact("he", "Who is {}? A:", "true", "false"),
    Fact("she", "Q: Who is {}? A:", "false", "not true"),
]
TEXTS = ["Q: What is it? A: It is true. It is not false.", "Who is he? He is she.", "A: true false Who what Q: it"] * 3
PREFIXES = ["", "It is not", "Who is she"]
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(7))
LOOSE: dict[str, float] = {"clamp_norm_factor": 1e3, "v_weight_decay": 0.0, "kl_factor": 0.0, "v_lr": 0.1}


def edit_of(
    method: str, model: nn.Module, tokenizer: Any, prefixes: list[str], search: Search, reference: bool = True
) -> KnowledgeEdit:
    compute, layers = (compute_rome, [1]) if method == "rome" else (compute_memit, [0, 1])
    moments = key_moments(model, tokenizer, TEXTS, layers)
    return compute(model, tokenizer, FACTS, moments, prefixes, search, shrinkage=0.1, reference=reference)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_of_the_bare_prompt_alone_only_the_place_of_kl_and_the_number_of_steps_differ(
    kind: str, method: str, tiny_tokenizer
) -> None:
    model, options = tiny(kind).double(), {"v_weight_decay": 0.5, "clamp_norm_factor": 1.0, "kl_factor": 0.0}
    steps_more = edit_of(method, model, tiny_tokenizer, [""], Search(5, 0.1, **options))
    default = edit_of(method, model, tiny_tokenizer, [""], Search(4, 0.1, **options), reference=False)
    for name in default.factors:
        assert apart(steps_more.dense(name), default.dense(name)) < 1e-3
    same_steps = edit_of(method, model, tiny_tokenizer, [""], Search(5, 0.1, **options), reference=False)
    assert any(apart(same_steps.dense(name), default.dense(name)) > 1e-2 for name in default.factors)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_bare_prompt_is_given_the_value_and_by_default_the_mean_key(kind: str, tiny_tokenizer) -> None:
    model = tiny(kind).double()
    moments = key_moments(model, tiny_tokenizer, TEXTS, [1])
    site, fact = moments.sites[0], FACTS[:1]
    authors = compute_rome(model, tiny_tokenizer, fact, moments, PREFIXES, Search(5, **LOOSE), 0.1, reference=True)
    default = compute_rome(model, tiny_tokenizer, fact, moments, PREFIXES, Search(4, **LOOSE), 0.1)
    bare, _ = read_at_subject(model, tiny_tokenizer, fact, site.name, [""])
    mean, _ = read_at_subject(model, tiny_tokenizer, fact, site.name, PREFIXES)
    (value,) = find_values(model, tiny_tokenizer, fact, site, PREFIXES, Search(4, **LOOSE))
    assert apart(authors.dense(site.name) @ bare[0], value.delta) < 1e-3
    assert apart(default.dense(site.name) @ mean[0], value.delta) < 1e-3
    assert apart(authors.dense(site.name) @ mean[0], value.delta) > 1e-2


def test_memits_bare_prompt_makes_half_of_a_key(tiny_tokenizer) -> None:
    model = tiny("llama").double()
    moments = key_moments(model, tiny_tokenizer, TEXTS, [1])
    search, name = Search(5, **LOOSE), moments.sites[0].name
    edit = compute_memit(model, tiny_tokenizer, FACTS, moments, PREFIXES, search, 0.1, 3.0, reference=True)
    bare, _ = read_at_subject(model, tiny_tokenizer, FACTS, name, [""])
    others, _ = read_at_subject(model, tiny_tokenizer, FACTS, name, PREFIXES[1:])
    expected, _ = least_squares(torch.zeros(2, 1), (bare + others) / 2, moments.matrix(0, 0.1), 3.0)
    assert apart(edit.factors[name][0], expected) < 1e-5


def test_the_bound_is_of_the_bare_prompts_output(tiny_tokenizer) -> None:
    model = tiny("gpt2").double()
    moments = key_moments(model, tiny_tokenizer, TEXTS, [1])
    name, tight = moments.sites[0].name, Search(5, v_lr=10.0, clamp_norm_factor=0.5)
    edit = compute_rome(model, tiny_tokenizer, FACTS[:1], moments, PREFIXES, tight, 0.1, reference=True)
    key, output = read_at_subject(model, tiny_tokenizer, FACTS[:1], name, [""])
    moved = (edit.dense(name) @ key[0]).norm()
    assert float(moved / output[0].norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_it_is_an_adapter_whose_folder_says_how_it_was_computed(
    kind: str, method: str, tmp_path: Path, tiny_tokenizer
) -> None:
    model = tiny(kind)
    base = logits(model, TOKENS)
    search = Search(v_num_grad_steps=3, clamp_norm_factor=50.0)
    for reference in (True, False):
        edit = edit_of(method, model, tiny_tokenizer, PREFIXES, search, reference)
        assert edit.record["reference"] is reference and len(edit.record["facts"]) == len(FACTS)
        edit.install(model, method)
        save_adapter(model, tmp_path / str(reference))
        record = (tmp_path / str(reference) / "lightning_peft.json").read_text()
        assert f'"reference": {str(reference).lower()}' in record
        assert not close(logits(model, TOKENS), base)
        stack_of(model).remove(method)


def test_it_leaves_the_model_as_it_was(tiny_tokenizer) -> None:
    model = tiny("gpt2").train()
    before = copy.deepcopy(weights(model))
    for method in ("rome", "memit"):
        edit_of(method, model, tiny_tokenizer, PREFIXES, Search(3))
    assert same(weights(model), before) and model.training and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_search_that_is_good_enough_ends(tiny_tokenizer) -> None:
    edit = edit_of("rome", tiny("llama"), tiny_tokenizer, PREFIXES, Search(stop=1e6))
    assert [fact["steps"] for fact in edit.record["facts"]] == [1, 1]


def test_a_loss_that_is_not_finite_is_one_sentence(tiny_tokenizer) -> None:
    model, search = tiny("llama"), Search(v_lr=1e30, clamp_norm_factor=1e38)
    moments, fact = key_moments(model, tiny_tokenizer, TEXTS, [1]), Fact("it", "It is true {} is", "he", "she")
    with pytest.raises(ValueError, match="lower v_lr") as error:
        compute_rome(model, tiny_tokenizer, [fact], moments, PREFIXES, search, shrinkage=0.1, reference=True)
    assert one_sentence(str(error.value))


def test_values_of_another_search_are_refused(tiny_tokenizer) -> None:
    model = tiny("llama")
    moments = KeyMoments(memory_sites(model, [1]))
    values = find_values(model, tiny_tokenizer, FACTS, moments.sites[0], [""], Search(1))
    with pytest.raises(ValueError, match="leave values out") as error:
        compute_memit(model, tiny_tokenizer, FACTS, moments, values=values, reference=True)
    assert one_sentence(str(error.value))
