"""Contrasted logits are those of a plain reimplementation, whatever the model, the batch and the way of decoding."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from layer_contrast import divergence, slow, softmax
from peft import LoraConfig, get_peft_model
from tiny_models import LANGUAGE_MODELS, VOCABULARY, tiny
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from lightning_peft import adapters
from lightning_peft.editing import DoLa, head_offsets_config, head_sites
from lightning_peft.editing.dola import candidate_layers, contrast, jensen_shannon
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.models import rough
from lightning_peft.truthfulqa import AnswerGenerator

PROMPTS = [[5, 9, 11, 30], [7, 8, 12, 31, 40, 17, 23], [9, 4]]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, rows: list[list[int]], **options: Any) -> list[list[int]]:
    given = padded(rows)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(**given, **settings)[:, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_every_logit_is_that_of_a_plain_reimplementation(kind: str, reference: bool) -> None:
    model, layers = rough(kind), [0, 1, 2]
    for ids in PROMPTS:
        expected = slow(kind, model, ids, layers, reference=reference)
        with torch.no_grad(), DoLa(model, layers, reference=reference):
            found = model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_greedy_decoding_is_that_of_a_plain_reimplementation(kind: str) -> None:
    model, expected = rough(kind), []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(slow(kind, model, ids, [1, 2])[-1].argmax()))
        expected.append(ids[len(prompt) :])
    with DoLa(model, [1, 2]):
        alone = [greedy(model, [prompt])[0] for prompt in PROMPTS]
        together = greedy(model, PROMPTS)
        without_cache = greedy(model, PROMPTS, use_cache=False)
    assert alone == together == without_cache == expected
    assert expected != greedy(model, PROMPTS)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_beams_find_the_same_in_a_batch_and_without_a_cache(kind: str) -> None:
    model = rough(kind)
    with DoLa(model, [1, 2]):
        alone = [greedy(model, [prompt], num_beams=3)[0] for prompt in PROMPTS]
        assert alone == greedy(model, PROMPTS, num_beams=3) == greedy(model, PROMPTS, num_beams=3, use_cache=False)


def test_a_repetition_penalty_acts_on_the_contrasts() -> None:
    model, ids = rough("llama"), list(PROMPTS[1])
    for _ in range(6):
        scores = slow("llama", model, ids, [1, 2])[-1]
        for token in set(ids):
            scores[token] *= 1.2 if scores[token] < 0 else 1 / 1.2
        ids.append(int(scores.argmax()))
    with DoLa(model, [1, 2]):
        found = greedy(model, [PROMPTS[1]], repetition_penalty=1.2)[0]
        assert found == ids[len(PROMPTS[1]) :] != greedy(model, [PROMPTS[1]])[0]


def test_with_the_last_layer_itself_only_the_constraint_is_left() -> None:
    model = rough("llama")
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits.softmax(-1)
        with DoLa(model, 3, relative_top=0.1):
            found = model(input_ids=ids).logits
    plausible = probabilities >= 0.1 * probabilities.amax(-1, keepdim=True)
    assert 0 < int(plausible.sum()) < plausible.numel()
    torch.testing.assert_close(found, torch.zeros_like(found).masked_fill(~plausible, -1000.0), atol=1e-5, rtol=0)


def test_outside_of_the_context_nothing_is_left_of_it() -> None:
    model, ids = rough("gpt2"), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(KeyError), DoLa(model, 1):
            raise KeyError
        assert torch.equal(model(input_ids=ids).logits, before)


def test_only_the_logits_asked_for_are_contrasted() -> None:
    model, ids = rough("llama"), torch.tensor(PROMPTS[:1])
    head_saw: list[int] = []
    with torch.no_grad(), DoLa(model, [1, 2]):
        whole = model(input_ids=ids).logits
        model.lm_head.register_forward_hook(lambda m, args, out: head_saw.append(args[0].shape[1]))
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, whole[:, -2:])
        kept = torch.tensor([0, 2])
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=kept).logits, whole[:, kept])
    assert head_saw == [2] * 6  # the last layer and two candidates, twice


def test_what_an_adapter_changes_is_contrasted_too() -> None:
    model = rough("llama")
    stack = stack_of(model)
    part = stack.add(head_offsets_config(head_sites(model), [(0, 1), (2, 3)], 2.0, "all"), computed=True)
    for tensor in stack.tensors(part).values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    expected = slow("llama", model, PROMPTS[1], [1, 2])
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad(), DoLa(model, [1, 2]):
        torch.testing.assert_close(model(input_ids=ids).logits[0], expected, atol=1e-4, rtol=1e-4)
        with adapters(model).disabled():
            plain = model(input_ids=ids).logits[0]
    torch.testing.assert_close(plain, slow("llama", rough("llama"), PROMPTS[1], [1, 2]), atol=1e-4, rtol=1e-4)


def test_free_answers_are_contrasted_with_their_primer_computed_once(tiny_tokenizer: Any) -> None:
    primer = [5, 9, 11, 3, 7, 8, 12, 30, 31, 9, 9, 4]
    rows = [[*primer, *prompt, *primer[:7]] for prompt in PROMPTS]
    model = rough("llama")
    with DoLa(model, [1, 2]):
        generator = AnswerGenerator(model, tiny_tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # whole prompts would be warned of
            together = generator.write(**padded(rows), max_new_tokens=6)
        alone = [AnswerGenerator(model, tiny_tokenizer).write(**padded([row]), max_new_tokens=6)[0] for row in rows]
    assert together == alone != AnswerGenerator(model, tiny_tokenizer).write(**padded(rows), max_new_tokens=6)


@pytest.mark.filterwarnings("ignore:Model has")  # of tied weights
def test_a_model_that_peft_has_wrapped_is_contrasted_as_it_is() -> None:
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False)
    wrapped = get_peft_model(rough("llama"), config).eval()
    model = wrapped.get_base_model()
    ids = torch.tensor([PROMPTS[1]])
    expected = slow("llama", model, PROMPTS[1], [1, 2])
    with torch.no_grad(), DoLa(wrapped, [1, 2]):
        torch.testing.assert_close(wrapped(input_ids=ids).logits[0], expected, atol=1e-4, rtol=1e-4)
        assert greedy(wrapped, PROMPTS) == greedy(model, PROMPTS)


# -- the contrast itself ----------------------------------------------------------------------------------------------


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reverse", [False, True])
def test_the_divergence_is_its_definition(reverse: bool) -> None:
    p, q = logits(5), logits(5, seed=1)
    found = jensen_shannon(p.log_softmax(-1), q.log_softmax(-1), reverse)
    expected = [
        divergence(softmax(a), softmax(b), reverse) for a, b in zip(p.double().numpy(), q.double().numpy(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-5, rtol=1e-5)


def test_the_divergence_is_symmetric_zero_of_equals_and_at_most_log_2() -> None:
    p, q = logits(5).log_softmax(-1), logits(5, seed=1).log_softmax(-1)
    torch.testing.assert_close(jensen_shannon(p, q), jensen_shannon(q, p))
    torch.testing.assert_close(jensen_shannon(p, p), torch.zeros(5), atol=1e-6, rtol=0)
    apart = torch.tensor([[0.0, -80.0], [-80.0, 0.0]])
    assert float(jensen_shannon(apart[0], apart[1])) == pytest.approx(math.log(2))


def test_each_token_takes_the_candidate_farthest_from_it() -> None:
    final, early = logits(2, 6), [logits(2, 6, seed=seed) for seed in (1, 2, 3)]
    scores, taken = contrast(final, early)
    assert len(taken.unique()) > 1
    for number in range(3):  # one candidate is the static way
        alone, _ = contrast(final, [early[number]])
        assert torch.equal(scores[taken == number], alone[taken == number])


def test_of_equally_far_candidates_the_first_is_taken() -> None:
    final, early = logits(6), logits(6, seed=1)
    assert contrast(final, [final, early, early])[1].tolist() == [1] * 6


@pytest.mark.parametrize("top", [0.0, 0.1, 1.0])
def test_implausible_tokens_get_what_was_asked_for_after_normalising(top: float) -> None:
    final, early = logits(4), logits(4, seed=1)
    scores, _ = contrast(final, [early], top, implausible=-1000.0, normalise=True)
    p = final.softmax(-1)
    plausible = p >= top * p.amax(-1, keepdim=True) * (1 - 1e-6)
    assert torch.equal(scores == -1000.0, ~plausible)
    whole = (final.log_softmax(-1) - early.log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(scores[plausible], whole[plausible])


@pytest.mark.parametrize(
    ("layers", "depth", "tied", "expected"),
    [
        ("low", 32, False, tuple(range(0, 16, 2))),  # the authors' for LLaMA-7B
        ("high", 32, False, tuple(range(16, 32, 2))),
        ("low", 30, True, (2, 4, 6, 8, 10, 12, 14)),
        ("high", 30, True, (16, 18, 20, 22, 24, 26, 28)),
        ([0, 7], 12, True, (0, 7)),
        (12, 12, False, (12,)),
    ],
)
def test_layers_by_name_are_the_even_ones_of_a_half(layers: Any, depth: int, tied: bool, expected: Any) -> None:
    assert candidate_layers(layers, depth, tied) == expected


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["middle", [], 4, [-1], "low"])
def test_layers_that_are_not_there_are_one_sentence(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layers.*\.$"):
        DoLa(tiny("llama"), layers)  # tied, of three blocks: no even one in the lower half


def test_a_share_that_is_none_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"relative_top must be from 0 to 1, got 2\.$"):
        DoLa(tiny("llama"), 1, relative_top=2)


def test_a_model_that_caps_its_logits_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 40}
    model = Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=2, final_logit_softcapping=0.5, **sizes)).eval()
    with pytest.raises(ValueError, match=r"more than a chain of modules .* cannot be read as logits\.$"):
        DoLa(model, 1)


def test_what_is_no_causal_language_model_is_refused() -> None:
    for model in (tiny("t5"), tiny("hand_written"), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"no causal language model of transformers with one stack.*\.$"):
            DoLa(model, 1)
