"""Awkward answers and tokenizers, from a question file to logged scores, against the definition and by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lightning_peft.truthfulqa import (
    MC0,
    MC1,
    MC2,
    MC3,
    Choice,
    ChoiceScorer,
    Evaluation,
    Question,
    TruthfulQADataModule,
    load_questions,
)
from lightning_peft.truthfulqa.metrics import ChoiceMetrics, mc1, mc2, mc3

PRIMER = "Q: Why?\nA: So."
ANSWERS = {
    "unicode": {"À l'été, 東京 🙂.": 1, "e\u0301te\u0301": 1, "нет": 0, "\u200fلا": 0},
    "one token": {"a": 1, "e": 0, "o": 0},
    "beginnings of each other": {"So it is": 1, "So it": 0, "So": 0, "So it is not so": 1},
    "spaces within and around": {"It  is": 1, " It is": 0, "It is ": 0},
    "line ends": {"It is\nso": 1, "It\tis": 0, "A: It is": 0},
}
ENDS = ("?", "?\n", "? \n", " ?")  # of questions; some tokenizers join these with the line's end


def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """`words` splits before spaces; `lines` joins `?` with the end of its line; `spaceless` splits nowhere, so that a
    token may reach from the prompt into the answer; `marked` begins each text with `<s>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("words", "marked"))
    if kind == "lines":
        split = pre_tokenizers.Split(Regex(r"[?.]\n+| ?\w+|\s+|[^\w\s]"), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:
        made.pre_tokenizer = level
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    texts = ["Q: Why is it so?\nA: So it is.\n\nQ: Is it?\nA: It is not so.\n\n"]
    if kind == "spaceless":  # four tokens of more than a byte: `A:`, `A: `, `A: S` and `?\n`
        texts = ["A:"] * 9 + ["A: "] * 5 + ["A: S"] * 3 + ["?\n"] * 2
    size = {"vocab_size": 263 if kind == "spaceless" else 300, "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False, **size)
    made.train_from_iterator(texts, trainer)
    if kind == "marked":
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


KINDS = ("words", "lines", "spaceless", "marked")
TOKENIZERS = {kind: tokenizer(kind) for kind in KINDS}


def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return made


MODEL = model()


@torch.no_grad()
def definition(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> float:
    """Of the text's tokens those that come after as many as the prompt alone has."""
    prompt = f"{PRIMER}\n\nQ: {question}\nA:"
    ids = tokenizer(f"{prompt} {answer}")["input_ids"]
    begin = len(tokenizer(prompt)["input_ids"])
    assert begin < len(ids)
    logprobs = MODEL(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logprobs[t - 1, ids[t]] for t in range(begin, len(ids))))


def folder(path: Path, answers: dict[str, int]) -> str:
    """Questions that differ in how they end, all with these answers."""
    mc1_targets = {text: truth for text, truth in answers.items() if not truth or text == next(iter(answers))}
    entries = [
        {"question": f"{'Why' * (i + 1)}{end}x", "mc1_targets": mc1_targets, "mc2_targets": answers}
        for i, end in enumerate(ENDS)
    ]
    (path / "mc_task.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return str(path / "mc_task.json")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANSWERS)
def test_awkward_answers_are_scored_by_the_definition(tmp_path: Path, kind: str, name: str) -> None:
    data = TruthfulQADataModule(
        folder(tmp_path, ANSWERS[name]), tokenizer=TOKENIZERS[kind], primer=PRIMER, val_fraction=0.5
    )
    data.setup()
    data.test_questions = load_questions(data.source)
    scorer, found = ChoiceScorer(MODEL), []
    for batch in data.test_dataloader():
        found += scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"]).tolist()
    expected = [
        definition(TOKENIZERS[kind], question.text, choice.text)
        for question in data.test_questions
        for choice in question.choices
    ]
    assert found == pytest.approx(expected, abs=1e-3)
    assert len({choice.text for choice in data.test_questions[0].choices}) == len(ANSWERS[name])


def test_the_tokenizers_are_as_awkward_as_they_should_be() -> None:
    def joined(kind: str, text: str) -> bool:
        return any(text in TOKENIZERS[kind].decode([i]) for i in TOKENIZERS[kind](f"Q: Why{text}A: So it")["input_ids"])

    assert joined("lines", "?\n") and joined("spaceless", "?\n") and not joined("words", "?\n")
    prompt, whole = (TOKENIZERS["spaceless"](f"Q: Why?\nA:{rest}")["input_ids"] for rest in ("", " So it is"))
    assert whole[: len(prompt)] != prompt and len(whole) > len(prompt), "a token reaches into the answer"
    assert TOKENIZERS["marked"]("So")["input_ids"][0] == 1


def test_scores_of_minus_eight_hundred_are_shares_where_the_harness_s_have_no_number() -> None:
    """By hand: e^0 + e^-1 of e^0 + e^-1 + e^-2, all times e^-800, which no float holds."""
    logprobs = torch.tensor([-800.0, -801.0, -802.0])
    best, truth = torch.tensor([1, -1, 0]), torch.tensor([1, 1, 0])
    metrics = ChoiceMetrics()
    metrics.begin()
    metrics.add(logprobs, {"mc0": best, "mc1": best, "mc2": truth, "group": torch.zeros(3, dtype=torch.long)})
    found = {name: float(value) for name, value in metrics.finish().items()}
    share = (1 + math.exp(-1)) / (1 + math.exp(-1) + math.exp(-2))
    assert found == pytest.approx({"mc0": 1.0, "mc1": 1.0, "mc2": share, "mc3": 1.0}, abs=1e-6)
    with np.errstate(invalid="ignore"):
        probabilities = np.exp(logprobs.double().numpy())
        assert np.isnan(probabilities / probabilities.sum()).all()


def test_empty_answers_are_left_out_and_the_rest_is_scored_as_without_them(tmp_path: Path) -> None:
    answers = {"So": 1, "Not so": 0, "It is": 0}
    with pytest.warns(UserWarning, match="16 empty choices are left out"):  # two of mc1 and mc2 in four questions
        questions = load_questions(folder(tmp_path, answers | {"": 0, " ": 0}))
    assert questions == load_questions(folder(tmp_path, answers))


Drawn = Sequence[tuple[Sequence[float], Sequence[int]]]
choices = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-20, 0).map(lambda i: i / 2), min_size=n, max_size=n),  # so that ties are common
        st.lists(st.sampled_from([0, 1]), min_size=n, max_size=n).filter(lambda t: 0 < sum(t) < len(t)),
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(choices, min_size=1, max_size=6), st.data(), st.booleans())
def test_metrics_do_not_depend_on_order_or_on_what_is_in_a_batch(drawn: Drawn, data: Any, strict: bool) -> None:
    rows = [(q, c) for q, (scores, _) in enumerate(drawn) for c in range(len(scores))]
    best = [truth.index(1) for _, truth in drawn]

    def batch(some: list[tuple[int, int]]) -> tuple[Tensor, dict[str, Tensor]]:
        truths = torch.tensor([drawn[q][1][c] for q, c in some])
        first = torch.tensor([c == best[q] for q, c in some])
        named = torch.where(first | (truths == 0), truths, -1)
        question = torch.tensor([q for q, _ in some])
        found = {"mc0": named, "mc1": named, "mc2": truths, "group": question}
        found["strict"] = torch.full((len(some),), strict)
        return torch.tensor([drawn[q][0][c] for q, c in some]), found

    def measured(batches: list[list[tuple[int, int]]]) -> dict[str, float]:
        metrics = ChoiceMetrics()
        metrics.begin()
        for some in batches:
            metrics.add(*batch(some))
        return {name: float(value) for name, value in metrics.finish().items()}

    alone = measured([[row for row in rows if row[0] == q] for q in range(len(drawn))])
    shuffled = data.draw(st.permutations(rows))
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(drawn), max_size=len(drawn)))
    together = [[row for row in shuffled if parts[row[0]] == part] for part in (2, 0, 1)]
    repeated = [*together, together[data.draw(st.integers(0, 2))]]  # as a sampler of several processes does
    for batches in (together, repeated):
        assert measured([some for some in batches if some]) == pytest.approx(alone, abs=1e-6)
    ties: Any = "strict" if strict else "lm_eval"
    by_hand = {"mc1": 0.0, "mc2": 0.0, "mc3": 0.0}
    for q in range(len(drawn)):
        scores, found = batch([row for row in rows if row[0] == q])
        by_hand["mc1"] += mc1(scores, found["mc1"], ties) / len(drawn)
        by_hand["mc2"] += mc2(scores, found["mc2"]) / len(drawn)
        by_hand["mc3"] += mc3(scores, found["mc2"]) / len(drawn)
    assert {name: alone[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    assert alone["mc0"] == alone["mc1"]


@settings(max_examples=12, deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 5))
def test_neither_do_a_models_scores(data: Any, kind: str, together: int) -> None:
    """From questions to metrics, by way of the model: choices and questions in any order, so many in a batch."""
    named = [
        Question(
            i,
            f"Why {'so ' * i}it{end}",
            "",
            tuple(
                Choice(t, -1, 1 if j == 0 else truth - (truth == 1) * 2, truth)
                for j, (t, truth) in enumerate(answers.items())
            ),
            "",
            (),
            (),
        )
        for i, (end, answers) in enumerate(zip([*ENDS, "?"], ANSWERS.values(), strict=True))
    ]

    def measured(asked: Sequence[Question], together: int) -> dict[str, float]:
        module = TruthfulQADataModule(
            "package", tokenizer=TOKENIZERS[kind], primer=PRIMER, questions_per_batch=together
        )
        module.setup()
        module.test_questions = list(asked)
        evaluation = Evaluation()
        evaluation.begin(MODEL)
        for batch in module.test_dataloader():
            evaluation.step(batch)
        return evaluation.finish()

    shuffled = [
        replace(question, choices=tuple(data.draw(st.permutations(question.choices))))
        for question in data.draw(st.permutations(named))
    ]
    found = measured(named, 1)
    assert measured(shuffled, together) == pytest.approx(found, abs=1e-4) and found.keys() == {"mc1", "mc2", "mc3"}


@pytest.mark.parametrize(
    ("kind", "strict", "expected"), [(MC1, True, 0), (MC1, False, 1), (MC0, True, 0), (MC0, False, 1)]
)
def test_a_batch_s_tie_rule_goes_before_the_metric_s(kind: type[MC1], strict: bool, expected: float) -> None:
    metric = kind(ties="lm_eval" if strict else "strict")
    tied, truth, question = torch.tensor([-2.0, -2.0]), torch.tensor([1, 0]), torch.tensor([3, 3])
    metric.update(tied, truth, question, torch.full((2,), strict))
    assert float(metric.compute()) == expected


@pytest.mark.parametrize("kind", [MC2, MC3])
def test_shares_know_no_tie_rule(kind: type[MC2]) -> None:
    found = []
    for strict in (True, False):
        metric = kind()
        metric.update(torch.zeros(2), torch.tensor([1, 0]), torch.tensor([3, 3]), torch.full((2,), strict))
        found.append(float(metric.compute()))
    assert found[0] == found[1]
