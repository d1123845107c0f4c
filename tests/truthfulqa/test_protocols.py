"""Each protocol's scores are those of its description, worked out here plainly, a text at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_peft.models import CausalLM
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.truthfulqa import INSTRUCTIONS, PROTOCOLS, QA_PRIMER, TruthfulQADataModule
from lightning_peft.truthfulqa.prompts import few_shot_primer

# in the tiny tokenizer's few letters; two choices without a full stop, and in the second question a tie
QUESTIONS = [
    {
        "question": "What is he?",
        "mc1_targets": {"He is true": 1, "He is not.": 0, "It is false": 0},
        "mc2_targets": {"He is true": 1, "It is she.": 1, "He is not.": 0, "It is false": 0},
    },
    {"question": "Who is it?", "mc1_targets": {"She is": 1, "She is ": 0}, "mc2_targets": {"She is": 1, "She is ": 0}},
    {"question": "Is it he?", "mc1_targets": {"It is": 1, "Not": 0}, "mc2_targets": {"It is": 1, "Not": 0, "She.": 0}},
    {"question": "Is he it?", "mc1_targets": {"Not.": 1, "It is": 0}, "mc2_targets": {"Not.": 1, "It is": 0}},
]
DESCRIPTIONS = {
    "lm_eval": ("", False, True),
    "original": ("", True, False),
    "honest_llama": (INSTRUCTIONS["honest_llama"] + "\n\n", True, False),
    "chat": ("", True, False),
}
# a chat as the tiny tokenizer's letters can write it; the space behind the colon is the assistant's
TEMPLATE = (
    "{% for m in messages %}{{ bos_token + m.role[0] + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'a:' }}{% endif %}"
)


def chat(question: str, primer: str = QA_PRIMER) -> str:
    """The text before an answer in a chat of this form."""
    turns = primer.replace("\nA: ", "</s><s>a: ").replace("\n\nQ: ", "</s><s>u: ").removeprefix("Q: ")
    return "<s>u: " + (f"{turns}</s><s>u: " if primer else "") + f"{question}</s><s>a:"


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "mc_task.json").write_text(json.dumps(QUESTIONS))
    return str(tmp_path / "mc_task.json")


@torch.no_grad()
def sum_of_logprobs(model: nn.Module, tokenizer: PreTrainedTokenizerBase, before: str, answer: str) -> float:
    """Of the tokens that the answer adds to what stands before it."""
    ids = tokenizer(before + answer)["input_ids"]
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logprobs[t - 1, ids[t]] for t in range(len(tokenizer(before)["input_ids"]), len(ids))))


def described(module: CausalLM, name: str) -> list[dict[str, float]]:
    """The log-probability of every choice of each question."""
    instruction, full_stop, _ = DESCRIPTIONS[name]
    found = []
    for question in QUESTIONS:
        before = f"{instruction}{QA_PRIMER}\n\nQ: {question['question']}\nA:"
        before = chat(str(question["question"])) if name == "chat" else before
        texts = {choice: choice.strip() if full_stop else choice for choice in question["mc2_targets"]}
        texts = {choice: text + "." * (full_stop and text[-1] != ".") for choice, text in texts.items()}
        scored = {
            choice: sum_of_logprobs(module.backbone, module.tokenizer, before, " " + text)
            for choice, text in texts.items()
        }
        found.append(scored)
    return found


def logged(module: CausalLM, data: TruthfulQADataModule) -> dict[str, float]:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    data.setup()
    data.test_questions = sorted(data.test_questions + data.fold_questions, key=lambda question: question.id)
    return dict(trainer.test(module, data, verbose=False)[0])


@pytest.fixture(scope="module")
def module(tiny_folder: Callable[[str], Path]) -> CausalLM:
    module = CausalLM(str(tiny_folder("opt")))
    # room for the instruction, which in letters is long
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig.from_pretrained(str(tiny_folder("opt")), max_position_embeddings=4096)
    module.backbone = OPTForCausalLM(config).eval()
    module.tokenizer.chat_template = TEMPLATE
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return module


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_scores_what_it_describes(module: CausalLM, source: str, name: str) -> None:
    data = TruthfulQADataModule(source, tokenizer=module.tokenizer, val_fraction=0.5, protocol=name)  # type: ignore[arg-type]
    found = logged(module, data)
    scores = described(module, name)
    mc2 = []
    for question, scored in zip(QUESTIONS, scores, strict=True):
        labels: dict[str, int] = question["mc2_targets"]  # type: ignore[assignment]
        shares = torch.tensor(list(scored.values())).softmax(0)
        mc2.append(float(shares[torch.tensor(list(labels.values())) == 1].sum()))
    assert found["mc2"] == pytest.approx(sum(mc2) / len(QUESTIONS), abs=1e-4)
    ties_count = DESCRIPTIONS[name][2]
    mc1 = []
    for question, scored in zip(QUESTIONS, scores, strict=True):
        rivals = [scored[choice] for choice, truth in question["mc1_targets"].items() if not truth]
        best = scored[next(iter(question["mc1_targets"]))]
        tied = abs(best - max(rivals)) < 1e-4
        mc1.append(float(ties_count) if tied else float(best > max(rivals)))
    assert found["mc1"] == pytest.approx(sum(mc1) / len(QUESTIONS))


def test_the_second_question_is_a_tie_only_where_both_choices_get_a_full_stop(module: CausalLM) -> None:
    for name, tied in (("lm_eval", False), ("original", True), ("honest_llama", True), ("chat", True)):
        first, second = described(module, name)[1].values()
        assert (first == second) == tied


def test_the_protocols_differ_in_what_the_table_says() -> None:
    assert {name: (p.ties, p.full_stop, p.instruction is None) for name, p in PROTOCOLS.items()} == {
        "lm_eval": ("lm_eval", False, True),
        "original": ("strict", True, True),
        "honest_llama": ("strict", True, False),
        "chat": ("strict", True, True),
    }
    assert all(name == protocol.name and protocol.primer == QA_PRIMER for name, protocol in PROTOCOLS.items())


@pytest.mark.parametrize(("name", "strict"), [("lm_eval", False), ("original", True), ("honest_llama", True)])
def test_a_batch_carries_the_tie_rule(
    tiny_tokenizer: PreTrainedTokenizerBase, source: str, name: str, strict: bool
) -> None:
    data = TruthfulQADataModule(source, tokenizer=tiny_tokenizer, val_fraction=0.5, protocol=name)  # type: ignore[arg-type]
    data.setup()
    assert all(bool((batch["strict"] == strict).all()) for batch in data.test_dataloader())


def test_the_instruction_stands_before_a_primer_of_one_s_own_and_before_free_answers(
    tiny_tokenizer: PreTrainedTokenizerBase, source: str
) -> None:
    data = TruthfulQADataModule(
        source, tokenizer=tiny_tokenizer, val_fraction=0.5, primer="Q: It?\nA: It.", protocol="honest_llama"
    )
    data.setup()
    instruction = INSTRUCTIONS["honest_llama"]
    for question in data.test_questions:
        assert data.test_contexts()[question.id] == f"{instruction}\n\nQ: It?\nA: It.\n\nQ: {question.text}\nA:"
    assert data.prompting.instruction == instruction and TruthfulQADataModule(source).prompting.instruction is None


def test_an_unknown_protocol_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^protocol must be one of lm_eval, original, honest_llama, chat, got '"):
        TruthfulQADataModule("package", protocol="lm-eval")  # type: ignore[arg-type]


def test_every_choice_of_a_chat_is_scored_packed_as_it_is_alone(module: CausalLM, source: str) -> None:
    """Demonstrations from training questions are earlier turns; the end of a turn is not the answer's."""
    data = TruthfulQADataModule(
        source, tokenizer=module.tokenizer, val_fraction=0.5, protocol="chat", few_shot=2, questions_per_batch=2
    )
    data.setup()
    scorer, scored = ChoiceScorer(module.backbone), {}
    for batch in data.test_dataloader():
        scores = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
        choices = zip(batch["group"].tolist(), batch["choice"].tolist(), strict=True)
        scored |= dict(zip(choices, scores.tolist(), strict=True))
    assert scorer.packs
    contexts, primer = data.test_contexts(), few_shot_primer(data.fold_questions, 2, data.seed)
    for question in data.test_questions:
        assert contexts[question.id] == chat(question.text, primer)
        for i, choice in enumerate(question.choices):
            answer = f" {choice.text.strip()}" + "." * (choice.text.strip()[-1] != ".")
            alone = sum_of_logprobs(module.backbone, module.tokenizer, contexts[question.id], answer)
            assert scored.pop((question.id, i)) == pytest.approx(alone, abs=1e-4)
    assert not scored


def test_answers_to_tune_on_are_turns_with_their_end_and_free_answers_are_asked_for_by_the_template(
    module: CausalLM, source: str
) -> None:
    data = TruthfulQADataModule(source, tokenizer=module.tokenizer, val_fraction=0.5, protocol="chat", primer="")
    data.setup()
    tokenizer = module.tokenizer

    def read(text: str) -> str:
        """A text with what this tokenizer's few letters leave of it."""
        return tokenizer.decode(tokenizer(text)["input_ids"])

    asked = [read(chat(question.text, "")) for question in data.train_questions]
    answers = {choice.text for question in data.train_questions for choice in question.choices if choice.mc2 == 1}
    found = set()
    for batch in data.train_dataloader():
        for ids, labels, end in zip(batch["input_ids"], batch["labels"], batch["prompt_end"], strict=True):
            assert tokenizer.decode(ids[: end + 1]) in asked
            found.add(tokenizer.decode(labels[labels != -100]))
    assert found == {read(f" {answer}</s>") for answer in answers}
    (batch,) = data.predict_dataloader()
    prompts = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    texts = [tokenizer.decode(ids[mask.bool()]) for ids, mask in prompts]
    assert sorted(texts) == sorted(read(chat(question.text, "")) for question in data.test_questions)


def test_a_chat_needs_a_template(tiny_tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    data = TruthfulQADataModule(source, tokenizer=tiny_tokenizer, val_fraction=0.5, protocol="chat")
    with pytest.raises(ValueError, match=r"has no chat template"):
        data.setup()
