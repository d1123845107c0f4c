"""Facts rewritten in the weights: the data, the closed forms, and the LoRA adapter that equals the dense update."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from edits import close, logits
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn
from tuning import one_sentence, same, weights

from lightning_peft import save_adapter
from lightning_peft.editing.facts import (
    Fact,
    FactScores,
    KeyMoments,
    KnowledgeEdit,
    Search,
    causal_trace,
    choose_layers,
    compute_memit,
    compute_rome,
    compute_rome_each,
    find_values,
    key_moments,
    memory_sites,
    random_prefixes,
    read_facts,
    score_facts,
)
from lightning_peft.editing.facts.prompt_tokens import Prompt, encode, object_log_probs
from lightning_peft.editing.facts.update import least_squares, rank_one
from lightning_peft.editing.facts.values import read_at_subject
from lightning_peft.stack.stack import stack_of

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*do not have")
FACTS = [
    Fact("he", "Who is {}? A:", "true", "false", ("Q: is {}",), ("she", "it")),
    Fact("she", "Q: Who is {}? A:", "false", "true", ("What is {}",), ("he",)),
    Fact("it", "Is {} true? A:", "is", "he", ("It is {}",), ("she",)),
]
TEXTS = ["Q: What is it? A: It is true. It is not false.", "Who is he? He is she.", "A: true false Who what Q: it"] * 3
PREFIXES = ["", "It is not"]
SEARCH = Search(v_num_grad_steps=3, clamp_norm_factor=50.0)
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(7))


def moments_of(model: nn.Module, tokenizer, *layers: int) -> KeyMoments:
    return key_moments(model, tokenizer, TEXTS, layers)


def edit_of(method: str, model: nn.Module, tokenizer, facts: list[Fact] = FACTS) -> KnowledgeEdit:
    compute, layers = (compute_rome, (1,)) if method == "rome" else (compute_memit, (0, 1))
    return compute(model, tokenizer, facts, moments_of(model, tokenizer, *layers), PREFIXES, SEARCH, shrinkage=0.1)


def changed(model: nn.Module, edit: KnowledgeEdit, strength: float = 1.0) -> nn.Module:
    """A copy of a bare model whose weights have the dense update in them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in edit.factors:
            module, delta = model.get_submodule(name), strength * edit.dense(name)
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
    return model


# -- the facts ------------------------------------------------------------------------------------------------------


def test_the_package_has_at_least_fifty_facts() -> None:
    facts = read_facts()
    assert len(facts) >= 50 and len({fact.prompt for fact in facts}) == len(facts)


@pytest.mark.parametrize("number", range(len(read_facts())))
def test_a_fact_has_two_paraphrases_and_five_neighbours(number: int) -> None:
    fact = read_facts(numbers=[number])[0]
    assert len(set(fact.paraphrases) - {fact.relation}) == 2
    assert len(set(fact.neighbours) - {fact.subject}) == 5
    for text in (fact.subject, fact.relation, fact.true, fact.new, *fact.paraphrases, *fact.neighbours):
        assert text == text.strip() and text.isascii()


def test_no_neighbour_is_itself_rewritten_and_all_share_their_true_object() -> None:
    facts = read_facts()
    told = {(fact.relation, fact.subject): fact.true for fact in facts}
    for fact in facts:
        assert not any((fact.relation, neighbour) in told for neighbour in fact.neighbours)
        assert fact.neighbours in {other.neighbours for other in facts if other.true == fact.true}
    objects: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        for neighbour in fact.neighbours:
            objects.setdefault((fact.relation, neighbour), set()).add(fact.true)
    assert all(len(found) == 1 for found in objects.values())


GOOD = {"subject": "a", "relation": "{} is", "true": "b", "new": "c"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ([], "at least one"),
        (["text"], "an object"),
        ([{"subject": "a"}], "'relation' is missing"),
        ([GOOD | {"colour": "red"}], "'colour' is unknown"),
        ([GOOD | {"new": 3}], "'new' must be text"),
        ([GOOD | {"neighbours": "d"}], "a list of texts"),
        ([GOOD | {"relation": "it is"}], "'a' is not in the prompt 'it is'"),
        ([GOOD | {"new": " "}], "new of the fact"),
        ([GOOD | {"new": "b"}], "the true one"),
        ([GOOD | {"neighbours": ["a"]}], "its own neighbours"),
    ],
)
def test_a_file_that_holds_no_facts_is_one_sentence(tmp_path: Path, content: object, said: str) -> None:
    file = tmp_path / "facts.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=said) as error:
        read_facts(file)
    assert one_sentence(str(error.value))


def test_facts_are_chosen_by_number() -> None:
    assert read_facts(numbers=[3, 1]) == [read_facts()[3], read_facts()[1]]
    with pytest.raises(ValueError, match="number 999"):
        read_facts(numbers=[999])


# -- prompts --------------------------------------------------------------------------------------------------------


def test_the_object_and_the_end_of_the_subject_are_found_in_tokens(tiny_tokenizer) -> None:
    rows = encode(tiny_tokenizer, [Prompt("Q: Who is {}? A:", "she", "not false"), Prompt("{} is", "It", "true")])
    for row, subject, object in ((0, "she", "not false"), (1, "It", "true")):
        ids, columns = rows.input_ids[row], torch.arange(rows.input_ids.shape[1])
        named = ids[(columns >= rows.begin[row]) & (columns <= rows.subject[row])]
        assert tiny_tokenizer.decode(named).strip() == subject
        assert tiny_tokenizer.decode(ids[rows.objects[row]]).strip() == object


def test_the_subject_is_where_the_prompt_puts_it_and_not_where_its_letters_come_again(tiny_tokenizer) -> None:
    rows = encode(tiny_tokenizer, [Prompt("Is {} what she is?", "he", "true", prefix="Who is he")])
    before = tiny_tokenizer("Who is he. Is he")["input_ids"]
    assert rows.input_ids[0, : int(rows.subject) + 1].tolist() == before


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_an_objects_probability_is_that_of_its_tokens_one_by_one(kind: str, tiny_tokenizer) -> None:
    model = tiny(kind)
    asked = [
        Prompt("Q: Who is {}? A:", "she", "not false"),
        Prompt("{} is", "It", "true"),
        Prompt("{} is", "It", "he"),
    ]
    found = object_log_probs(model, encode(tiny_tokenizer, asked))
    for prompt, value in zip(asked, found, strict=True):
        begin = tiny_tokenizer(prompt.text)["input_ids"]
        ids = tiny_tokenizer(f"{prompt.text} {prompt.object}")["input_ids"]
        expected = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
        said = torch.stack([expected[i - 1, ids[i]] for i in range(len(begin), len(ids))])
        torch.testing.assert_close(value, said.mean(), atol=1e-5, rtol=1e-5)


def test_a_prompt_that_cannot_be_told_is_one_sentence(tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="'he' is not in the prompt 'Who is he") as error:
        encode(tiny_tokenizer, [Prompt("Who is he?", "he", "true")])
    assert one_sentence(str(error.value))


def test_an_object_without_tokens_is_one_sentence() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # no token for anything else, and none for the unknown
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="no token for the object 'z'") as error:
        encode(PreTrainedTokenizerFast(tokenizer_object=letters), [Prompt("{} b", "a", "z")])
    assert one_sentence(str(error.value))


def test_prefixes_are_excerpts_chosen_by_a_seed() -> None:
    texts = ["one two three four five", "six"]
    chosen = random_prefixes(texts, 3, words=2, seed=1)
    assert chosen == random_prefixes(texts, 3, words=2, seed=1) and chosen[0] == "" and len(chosen) == 4
    assert all(prefix in texts[0] for prefix in chosen)
    with pytest.raises(ValueError, match="No text has 9 words"):
        random_prefixes(texts, 1, words=9)


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_key_moment_is_that_of_the_inputs_text_by_text(kind: str, tiny_tokenizer) -> None:
    model = tiny(kind)
    moments = moments_of(model, tiny_tokenizer, 0, 2)
    for number, site in enumerate(moments.sites):
        keys: list[Tensor] = []
        module = model.get_submodule(site.name)
        handle = module.register_forward_pre_hook(lambda _, a, keys=keys: keys.append(a[0].reshape(-1, a[0].shape[-1])))
        for text in TEXTS:
            logits(model, torch.tensor([tiny_tokenizer(text)["input_ids"]]))
        handle.remove()
        all_keys = torch.cat(keys).double()
        assert len(all_keys) == moments.count
        torch.testing.assert_close(
            moments.matrix(number, 1e-9), all_keys.T @ all_keys / len(all_keys), atol=1e-4, rtol=1e-4
        )


def test_too_little_text_makes_the_covariance_singular(tiny_tokenizer) -> None:
    model = tiny("llama")
    few = key_moments(model, tiny_tokenizer, ["It is."], [1])
    with pytest.raises(ValueError, match="singular") as error:
        compute_rome(model, tiny_tokenizer, FACTS, few, shrinkage=0.0)
    assert one_sentence(str(error.value))
    assert torch.linalg.eigvalsh(few.matrix(0, 0.1)).min() > 0


@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_what_predicts_no_next_tokens_is_refused(kind: str, tiny_tokenizer) -> None:
    model = tiny(kind)
    with pytest.raises(ValueError) as error:
        compute_rome(model, tiny_tokenizer, FACTS, moments_of(model, tiny_tokenizer, 1), search=SEARCH)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(("layers", "said"), [([7], "layer 7"), ([-1], "layer -1")])
def test_a_layer_that_is_not_there_is_one_sentence(layers: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        memory_sites(tiny("llama"), layers)
    assert one_sentence(str(error.value))


def test_a_quantised_layer_is_refused() -> None:
    from lightning_peft.backbone.quantization import Quantization, quantize

    model = tiny("llama")
    quantize(model, Quantization())
    with pytest.raises(ValueError, match="down_proj is quantised") as error:
        memory_sites(model)
    assert one_sentence(str(error.value))


# -- the closed forms -----------------------------------------------------------------------------------------------


def positive(size: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
    return root @ root.T


def test_rank_one_gives_the_value_with_the_least_change() -> None:
    generator = torch.Generator().manual_seed(0)
    moment, key, delta = (
        positive(6, generator),
        torch.randn(6, generator=generator),
        torch.randn(4, generator=generator),
    )
    a, b = rank_one(delta, key, moment)
    update = (b @ a).double()
    torch.testing.assert_close(update @ key.double(), delta.double(), atol=1e-5, rtol=1e-5)
    for _ in range(5):  # what else gives it differs by something that the key does not see
        other = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        other -= torch.outer(other @ key.double(), key.double()) / key.double().square().sum()
        assert ((update + other) @ moment @ (update + other).T).trace() > (update @ moment @ update.T).trace()


def test_least_squares_weighs_new_memories_against_old_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    moment, keys, missing = (
        positive(6, generator),
        torch.randn(3, 6, generator=generator),
        torch.randn(3, 4, generator=generator),
    )
    a, b = least_squares(missing, keys, moment, weight=0.7)
    assert a.shape == (3, 6) and b.shape == (4, 3)
    update = (b @ a).double().requires_grad_()
    error = (update @ keys.T.double() - missing.T.double()).square().sum() + 0.7 * (update @ moment @ update.T).trace()
    (slope,) = torch.autograd.grad(error, update)
    assert slope.abs().max() < 1e-4


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_facts_searched_together_do_not_see_each_other(kind: str, tiny_tokenizer) -> None:
    model = tiny(kind)
    site = memory_sites(model)[0]
    together = find_values(model, tiny_tokenizer, FACTS, site, PREFIXES, SEARCH)
    for fact, value in zip(FACTS, together, strict=True):
        (alone,) = find_values(model, tiny_tokenizer, [fact], site, PREFIXES, SEARCH)
        torch.testing.assert_close(value.key, alone.key, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(value.delta, alone.delta, atol=1e-3, rtol=1e-3)


def test_the_search_makes_the_new_object_likelier_and_stays_within_its_bound(tiny_tokenizer) -> None:
    model = tiny("llama")
    site = memory_sites(model)[0]
    (first,) = find_values(model, tiny_tokenizer, FACTS[:1], site, PREFIXES, Search(v_num_grad_steps=1))
    loose = Search(v_num_grad_steps=15, v_lr=0.1, clamp_norm_factor=100.0, v_weight_decay=0.0)
    (last,) = find_values(model, tiny_tokenizer, FACTS[:1], site, PREFIXES, loose)
    assert last.log_prob > first.log_prob
    (tight,) = find_values(model, tiny_tokenizer, FACTS[:1], site, PREFIXES, Search(clamp_norm_factor=0.5))
    _, output = read_at_subject(model, tiny_tokenizer, FACTS[:1], site.name, PREFIXES)
    assert tight.delta.norm() <= 0.5 * output[0].norm() * (1 + 1e-5)


def test_a_search_ends_where_its_loss_is_small_enough(tiny_tokenizer) -> None:
    model = tiny("llama")
    values = find_values(model, tiny_tokenizer, FACTS, memory_sites(model)[0], PREFIXES, Search(stop=1e6))
    assert all(value.steps == 1 and not value.delta.any() for value in values)


def test_a_search_leaves_the_model_as_it_was(tiny_tokenizer) -> None:
    model = tiny("gpt2").train()
    next(model.parameters()).requires_grad_(False)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    find_values(model, tiny_tokenizer, FACTS, memory_sites(model)[0], PREFIXES, SEARCH)
    assert same(weights(model), before) and model.training and all(p.grad is None for p in model.parameters())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("option", ["v_num_grad_steps", "v_lr", "clamp_norm_factor"])
def test_a_search_that_cannot_move_is_one_sentence(option: str) -> None:
    with pytest.raises(ValueError, match=option) as error:
        Search(**{option: 0})
    assert one_sentence(str(error.value))


# -- the adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_adapter_is_the_dense_update_with_a_dial_and_an_off_switch(kind: str, method: str, tiny_tokenizer) -> None:
    model = tiny(kind)
    bare, base = copy.deepcopy(model), logits(model, TOKENS)
    edit = edit_of(method, model, tiny_tokenizer)
    part = edit.install(model, method)
    stack = stack_of(model)
    assert part.config.r == part.config.lora_alpha == len(FACTS)
    for strength in (1.0, 2.0, -1.0):
        stack.scale(strength)
        assert close(logits(model, TOKENS), logits(changed(bare, edit, strength), TOKENS))
    assert not close(logits(model, TOKENS), base)
    stack.scale(0.0)
    assert torch.equal(logits(model, TOKENS), base)
    stack.scale(1.0)
    with stack.disabled():
        assert torch.equal(logits(model, TOKENS), base)
    stack.merge()
    assert close(logits(model, TOKENS), logits(changed(bare, edit), TOKENS))
    stack.remove(method)
    assert close(logits(model, TOKENS), base) and [n for n, _ in model.named_modules()] == [
        n for n, _ in bare.named_modules()
    ]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_rome_moves_the_layers_output_at_the_subject_to_the_value(kind: str, tiny_tokenizer) -> None:
    model = tiny(kind)
    moments = moments_of(model, tiny_tokenizer, 1)
    name = moments.sites[0].name
    values = find_values(model, tiny_tokenizer, FACTS, moments.sites[0], PREFIXES, SEARCH)
    _, before = read_at_subject(model, tiny_tokenizer, FACTS, name, PREFIXES)
    edits = compute_rome_each(model, tiny_tokenizer, FACTS, moments, PREFIXES, SEARCH, 0.1, values)
    for i, (edit, value) in enumerate(zip(edits, values, strict=True)):
        edit.install(model, "rome")
        _, after = read_at_subject(model, tiny_tokenizer, [FACTS[i]], name, PREFIXES)
        assert close(after[0] - before[i], value.delta, 1e-3)


def test_put_on_again_it_knows_the_matrix_below_the_adapter(tiny_tokenizer) -> None:
    model = tiny("gpt2")
    edit = edit_of("rome", model, tiny_tokenizer)
    once = edit.install(model, "rome").config
    assert once.fan_in_fan_out and edit.install(model, "rome").config.to_dict() == once.to_dict()


def test_rome_of_several_facts_is_one_after_the_other(tiny_tokenizer) -> None:
    model, other = tiny("llama"), tiny("llama")
    edit_of("rome", model, tiny_tokenizer).install(model, "all")
    for i, fact in enumerate(FACTS):
        moments = moments_of(tiny("llama"), tiny_tokenizer, 1)
        edit = compute_rome(other, tiny_tokenizer, [fact], moments, PREFIXES, SEARCH, 0.1)
        edit.install(other, f"fact{i}")
    assert close(logits(other, TOKENS), logits(model, TOKENS), 1e-4)


def test_two_edits_stack_and_come_out_one_by_one(tiny_tokenizer) -> None:
    model = tiny("gpt2")
    bare = copy.deepcopy(model)
    first = edit_of("rome", model, tiny_tokenizer, FACTS[:1])
    first.install(model, "first")
    second = edit_of("memit", model, tiny_tokenizer, FACTS[1:])
    second.install(model, "second")
    stack = stack_of(model)
    assert close(logits(model, TOKENS), logits(changed(changed(bare, first), second), TOKENS))
    stack.remove("first")
    assert close(logits(model, TOKENS), logits(changed(bare, second), TOKENS))
    stack.remove("second")
    assert torch.equal(logits(model, TOKENS), logits(bare, TOKENS))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_memit_is_the_authors_algorithm_done_plainly_on_the_weights(kind: str, tiny_tokenizer) -> None:
    model = tiny(kind)
    moments = moments_of(model, tiny_tokenizer, 0, 1, 2)
    edit = compute_memit(model, tiny_tokenizer, FACTS, moments, PREFIXES, SEARCH, 0.1, 5.0)
    plain = copy.deepcopy(model)
    stream = moments.sites[-1].name.split(".2.")[0] + ".2"
    values = find_values(model, tiny_tokenizer, FACTS, moments.sites[-1], PREFIXES, SEARCH, reference=stream)
    goal = torch.stack([v.delta for v in values]) + read_at_subject(model, tiny_tokenizer, FACTS, stream, [""])[1]
    for i, site in enumerate(moments.sites):
        keys = read_at_subject(plain, tiny_tokenizer, FACTS, site.name, PREFIXES)[0].double().T
        missing = (goal - read_at_subject(plain, tiny_tokenizer, FACTS, stream, [""])[1]).double().T / (3 - i)
        update = missing @ keys.T @ torch.linalg.inv(5.0 * moments.matrix(i, 0.1) + keys @ keys.T)
        assert close(edit.dense(site.name).double(), update, 1e-4)
        plain = changed(plain, KnowledgeEdit({site.name: (torch.eye(update.shape[1]), update.float())}, {}))


def test_more_weight_on_what_is_known_writes_less(tiny_tokenizer) -> None:
    model = tiny("llama")
    moments = moments_of(model, tiny_tokenizer, 0, 1)
    sizes = [
        compute_memit(model, tiny_tokenizer, FACTS, moments, PREFIXES, SEARCH, 0.1, weight)
        .dense(moments.sites[0].name)
        .norm()
        for weight in (1.0, 100.0, 10000.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_saved_edit_is_a_plain_lora_folder(tmp_path: Path, tiny_tokenizer) -> None:
    from peft import PeftModel

    model = tiny("gpt2")
    edit_of("memit", model, tiny_tokenizer).install(model, "memit")
    save_adapter(model, tmp_path / "edit")
    loaded = PeftModel.from_pretrained(tiny("gpt2"), str(tmp_path / "edit"))
    assert close(logits(loaded, TOKENS), logits(model, TOKENS))
    record = json.loads((tmp_path / "edit" / "lightning_peft.json").read_text())
    assert "memit" in json.dumps(record) and FACTS[0].prompt in json.dumps(record)


def test_what_rome_and_memit_cannot_do_is_one_sentence(tiny_tokenizer) -> None:
    model = tiny("llama")
    two, swapped = moments_of(model, tiny_tokenizer, 0, 1), moments_of(model, tiny_tokenizer, 1, 0)
    calls = [
        lambda: compute_rome(model, tiny_tokenizer, FACTS, two),
        lambda: compute_rome(model, tiny_tokenizer, [], two.only(0)),
        lambda: compute_memit(model, tiny_tokenizer, FACTS, swapped),
        lambda: compute_memit(model, tiny_tokenizer, FACTS, two, mom2_update_weight=0.0),
    ]
    for call, said in zip(calls, ("one layer", "no fact", "ascending", "above 0"), strict=True):
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert one_sentence(str(error.value))


def test_memit_refuses_a_block_that_normalises_what_it_adds(tiny_tokenizer) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = OPTConfig(**sizes, num_attention_heads=4, do_layer_norm_before=False)
    model = OPTForCausalLM(config).eval()
    with pytest.raises(ValueError, match="does not add the output") as error:
        compute_memit(model, tiny_tokenizer, FACTS, moments_of(model, tiny_tokenizer, 0, 1), search=SEARCH)
    assert one_sentence(str(error.value))


# -- scores and the trace -------------------------------------------------------------------------------------------


def test_a_score_is_the_share_of_prompts_on_which_the_right_object_is_likelier() -> None:
    kind, fact = torch.tensor([0, 1, 1, 2, 2]), torch.zeros(5, dtype=torch.long)
    true = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5]).log()
    new = torch.tensor([0.75, 0.25, 0.75, 0.25, 0.25]).log()
    scores = FactScores(kind, fact, true, new)
    scores = scores + scores
    assert [scores[k].success for k in ("efficacy", "paraphrase", "neighbourhood")] == [1.0, 0.5, 1.0]
    assert [round(scores[k].magnitude, 6) for k in ("efficacy", "paraphrase", "neighbourhood")] == [0.25, 0.0, 0.25]
    assert scores["paraphrase"].prompts == 4 and scores.fact.tolist() == [0] * 5 + [1] * 5
    assert scores.overall == pytest.approx(3 / (1 + 2 + 1))
    # Wilson's interval of 2 of 2, since both prompts of a fact are one cluster
    assert scores["efficacy"].low == pytest.approx(2 / (2 + 1.959964**2), abs=1e-4) and scores["efficacy"].high == 1.0
    with pytest.raises(ValueError, match="one of"):
        scores["luck"]


def test_a_models_scores_are_those_of_its_prompts_one_by_one(tiny_tokenizer) -> None:
    model = tiny("gpt_neox")
    scores = score_facts(model, tiny_tokenizer, FACTS, batch_size=4)
    asked = [Prompt(fact.relation, fact.subject, object) for fact in FACTS for object in (fact.true, fact.new)]
    alone = torch.stack([object_log_probs(model, encode(tiny_tokenizer, [p]))[0].detach() for p in asked])
    rows = scores.kind == 0
    torch.testing.assert_close(
        torch.stack([scores.true[rows], scores.new[rows]], 1).flatten(), alone, atol=1e-5, rtol=1e-5
    )
    assert scores.kind.bincount().tolist() == [3, 3, 4]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_without_noise_nothing_is_brought_back_and_all_layers_bring_back_most(kind: str, tiny_tokenizer) -> None:
    model = tiny(kind)
    still = causal_trace(model, tiny_tokenizer, FACTS, noise=0.0)
    assert still.shape == (3,) and still.abs().max() < 1e-6
    loud = causal_trace(model, tiny_tokenizer, FACTS, noise=5.0)
    # the last layer at the subject has no later token to tell
    assert loud[:2].abs().max() > 0 and loud[2].abs() < 1e-6


def test_layers_are_chosen_in_a_row_up_to_the_largest_effect() -> None:
    effects = torch.tensor([0.1, 0.2, 0.9, 0.3, 2.0])
    assert (
        choose_layers(effects) == [2] and choose_layers(effects, 2) == [1, 2] and choose_layers(effects, 9) == [0, 1, 2]
    )
