"""The scorers of the benchmark's choices, of `lightning_peft.packing`."""

from lightning_peft.packing.answers import AnswerScorer as AnswerScorer
from lightning_peft.packing.choices import ChoiceScorer as ChoiceScorer
