"""The published ways of scoring TruthfulQA's choices, which give numbers that cannot be compared with each other.

Each is what its authors' code means to do; what it does by mistake is not reproduced. The original and honest_llama
count the tokens of the question's prompt and drop three more for the answer's `A:` and the line before it. That is
right for GPT-2's tokenizer. Where a tokenizer joins these to fewer tokens, it drops the answer's first token too, and
where it joins `?` and the line's end the count itself is off. Here an answer begins where its own tokens do, in every
protocol; see `encode_pair`.

`"chat"` is published by nobody: the same questions and answers as the turns of a chat, by the model's own template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_peft.data.chat_template import encode_turn, prompt_text
from lightning_peft.truthfulqa.presets import INSTRUCTIONS, Prompting
from lightning_peft.truthfulqa.prompts import QA_PRIMER, encode_pair, question_prompt
from lightning_peft.truthfulqa.questions import as_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_peft.truthfulqa.metrics import Ties

ProtocolName = Literal["lm_eval", "original", "honest_llama", "chat"]


@dataclass(frozen=True)
class Protocol:
    r"""One way of scoring choices.

    Args:
        name: its name in arguments.
        ties: what a tie of the best true answer with a false one counts as in MC1 and MC0; see `metrics.mc1`.
        full_stop: whether choices that end in none get a full stop. Those of the multiple-choice files have theirs.
        instruction: stands before the primer.
        primer: stands before the question.
        chat: whether the question is a user's turn in the tokenizer's chat template, the primer's questions and
            answers are earlier turns, the instruction is the system's message, and a choice is the assistant's turn,
            without the token that ends it.

    Example:
        >>> PROTOCOLS["honest_llama"].context("Why?", primer="")[-26:]
        'of the answer.\n\nQ: Why?\nA:'
        >>> PROTOCOLS["original"].answer("Because"), PROTOCOLS["lm_eval"].answer("Because")
        (' Because.', ' Because')
    """

    name: ProtocolName
    ties: Ties
    full_stop: bool
    instruction: str | None = None
    primer: str = QA_PRIMER
    chat: bool = False

    def context(self, question: str, primer: str | None = None) -> str:
        """Return the text before an answer; of a chat, what its messages are in this form.

        Args:
            question: its text.
            primer: in place of the protocol's own, such as demonstrations from training questions.
        """
        prompt = question_prompt(question, self.primer if primer is None else primer)
        return prompt if self.instruction is None else f"{self.instruction}\n\n{prompt}"

    def answer(self, choice: str) -> str:
        """Return a choice as it is scored, with the space before it, which a turn of a chat has not."""
        return ("" if self.chat else " ") + (as_sentence(choice) if self.full_stop else choice)

    def messages(self, question: str, primer: str | None = None) -> list[dict[str, str]]:
        """Return what stands before an answer as the messages of a chat; the arguments are as of `context`."""
        shown = self.primer if primer is None else primer
        return Prompting(instruction=self.instruction, primer=shown, chat_template=True).conversation(question)

    def shown(self, tokenizer: PreTrainedTokenizerBase, question: str, primer: str | None = None) -> str:
        """Return the text before an answer as the tokenizer takes it; the other arguments are as of `context`."""
        if self.chat:
            return prompt_text(tokenizer, self.messages(question, primer))
        return self.context(question, primer)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, question: str, choice: str, primer: str | None = None
    ) -> tuple[list[int], int]:
        """Return a choice behind its context as token ids, and how many of them are the context's.

        Args:
            tokenizer: of the model; for a chat one with a chat template.
            question: its text.
            choice: its text.
            primer: as of `context`.

        Raises:
            ValueError: as `encode_pair` and `encode_turn`.
        """
        if self.chat:
            return encode_turn(tokenizer, self.messages(question, primer), self.answer(choice), end=False)
        return encode_pair(tokenizer, self.context(question, primer), self.answer(choice))


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # EleutherAI's lm-evaluation-harness, tasks/truthfulqa/truthfulqa_mc1.yaml
        Protocol("lm_eval", ties="lm_eval", full_stop=False),
        # sylinrl/TruthfulQA, truthfulqa/models.py; Lin, Hilton, Evans 2021, arXiv:2109.07958
        Protocol("original", ties="strict", full_stop=True),
        # likenneth/honest_llama, utils.py; Li et al. 2023, arXiv:2306.03341
        Protocol("honest_llama", ties="strict", full_stop=True, instruction=INSTRUCTIONS["honest_llama"]),
        Protocol("chat", ties="strict", full_stop=True, chat=True),
    )
}


def protocol_named(name: str) -> Protocol:
    """Return the protocol of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}.")
    return PROTOCOLS[name]
