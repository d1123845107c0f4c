"""Facts rewritten in the weights: ROME and MEMIT as LoRA adapters, and the scores that say whether it worked."""

from lightning_peft.editing.facts.fact import Fact, read_facts
from lightning_peft.editing.facts.keys import KeyMoments, key_moments, memory_sites
from lightning_peft.editing.facts.memit import compute_memit
from lightning_peft.editing.facts.prompt_tokens import random_prefixes
from lightning_peft.editing.facts.rome import compute_rome, compute_rome_each
from lightning_peft.editing.facts.scores import FactScores, Score, score_facts
from lightning_peft.editing.facts.trace import causal_trace, choose_layers
from lightning_peft.editing.facts.update import KnowledgeEdit
from lightning_peft.editing.facts.values import Search, Value, find_values

__all__ = [
    "Fact",
    "FactScores",
    "KeyMoments",
    "KnowledgeEdit",
    "Score",
    "Search",
    "Value",
    "causal_trace",
    "choose_layers",
    "compute_memit",
    "compute_rome",
    "compute_rome_each",
    "find_values",
    "key_moments",
    "memory_sites",
    "random_prefixes",
    "read_facts",
    "score_facts",
]
