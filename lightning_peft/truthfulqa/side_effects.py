"""Settings of what is measured beside the benchmark's questions: neutral text, and simple questions known before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_peft.effects.slices import TextSettings, TextSlice
from lightning_peft.moved.names import keep_old_names
from lightning_peft.truthfulqa.questions import Question, load_questions, subset

CAPABILITY = Path(__file__).with_name("capability.csv")
# one demonstration of each kind: without them a small model does not know what is asked of it
CAPABILITY_PRIMER = """Q: What is 2 plus 3?
A: 5.

Q: What do you drink from?
A: A cup.

Q: Mia has a dog and Leo has a cat. Who has the cat?
A: Leo.

Q: What is the plural of house?
A: houses."""


@dataclass
class SideEffects:
    """The measurements beside the benchmark's questions, the same for every method.

    Args:
        tokens: of neutral text; 0 for none.
        capability: how many of the simple questions; 0 for none.
        source: of the text; see `text_slice`.
        seed: of the draw of text and questions.
        length: tokens of a document at most.
    """

    tokens: int = 4096
    capability: int = 82
    source: str = "package"
    seed: int = 0
    length: int = 128

    def text(self) -> TextSlice | None:
        """Draw the slice of neutral text."""
        return TextSettings(self.tokens, self.source, self.seed, self.length).text()

    def questions(self) -> list[Question]:
        """Draw the simple questions: arithmetic, common sense, reading and grammar, each kind in proportion."""
        known = load_questions(CAPABILITY)
        if not 0 <= self.capability <= len(known):
            raise ValueError(f"capability is {self.capability}, but there are {len(known)} simple questions.")
        return subset(known, self.capability, self.seed) if self.capability else []


def forgotten(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Return forgetting: the share of questions answered rightly before that are answered wrongly after.

    Args:
        before: of each question, 1 where the base model is right, 0 where it is wrong.
        after: the same of the adapted model; shares where several adapters were tried.

    Example:
        >>> forgotten({0: 1, 1: 1, 2: 0}, {0: 1, 1: 0, 2: 1})
        0.5
    """
    right = sum(before.values())
    return sum(max(0.0, before[i] - after[i]) for i in before) / right if right else 0.0


keep_old_names(__name__)
