"""Which of peft's tests do not apply to which of our types, and why.

A rule speaks of what a method or a model is, never of a single test's name to hide it. Tests that it names are run all
the same, and one that passes is counted as passed, and is listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]  # how a test ended, as `plugin` writes it


@dataclass(frozen=True)
class Rule:
    """Tests that do not apply.

    Args:
        reason: one sentence for the table.
        covers: whether a test is one of them.
    """

    reason: str
    covers: Callable[[Entry], bool]


def reason_of(entry: Entry) -> str | None:
    """Return why a test does not apply, or None where it does."""
    return next((rule.reason for rule in RULES if rule.covers(entry)), None)


def _options(entry: Entry) -> str:
    return " ".join(entry["options"].values())


def _is(entry: Entry, *types: str) -> bool:
    return entry["type"] in types


def _merges(entry: Entry) -> bool:
    """Return whether a test merges an adapter: all whose names say so, and those that end with a merged model."""
    if "forward" in entry["test"]:  # those in half precision merge at their end
        return "float16" in entry["test"]
    return "merg" in entry["test"]


def _model(entry: Entry, *parts: str) -> bool:
    return any(part in (entry["model"] or "") for part in parts)


_WITHOUT_OUTPUT_BIAS = ("qwen2", "Llama", "Gemma3", "T5")

RULES = (
    Rule(
        "merging: a bottleneck with a non-linearity, biases or a gate is no linear map, and cannot be written into the "
        "matrix",
        lambda e: _is(e, "BOTTLENECK") and _merges(e) and "linear" not in _options(e),
    ),
    Rule(
        "merging: a prefix is seen by the softmax of every query and cannot be written into the weights",
        lambda e: _is(e, "ATTENTION_PREFIX") and _merges(e),
    ),
    Rule(
        "a prefix stands before the keys of an attention that asks transformers' AttentionInterface what to run; "
        "GPT-J's computes its softmax itself",
        lambda e: _is(e, "ATTENTION_PREFIX") and _model(e, "GPTJ"),
    ),
    Rule(
        "merging: an edit of some positions only is no bias, which acts at every position",
        lambda e: _is(e, "LAYER_OFFSETS", "HEAD_OFFSETS") and _merges(e) and "positions" not in _options(e),
    ),
    Rule(
        "merging: nothing in this model has a bias that adds the same (the block ends in a norm, or its last matrix "
        "has none), so that a saved model would lose the edit; `lightning_peft.bake` writes it where that is possible",
        lambda e: (
            _is(e, "LAYER_OFFSETS", "HEAD_OFFSETS")
            and _merges(e)
            and (_model(e, *_WITHOUT_OUTPUT_BIAS) or (_is(e, "LAYER_OFFSETS") and _model(e, "Bart")))
        ),
    ),
    Rule(
        "an ablation begins without a direction, where its gradient is zero: its direction is computed, not trained "
        "from nothing",
        lambda e: (
            "ablate" in _options(e)
            and e["test"]
            in ("test_disable_adapters", "test_disable_adapters_with_merging", "test_only_params_are_updated")
        ),
    ),
    Rule(
        "`adapter_names`: peft has batches of several adapters for a few methods of its own (LoRA, RoAd, VeRA, …); "
        "here they are refused in one sentence",
        lambda e: "mixed_adapter_batches" in e["test"] and "disabled" not in e["test"] and not _is(e, "LORA"),
    ),
    Rule(
        "the test looks for the adapter's layer in the place of the module it adapts; no module is replaced here, the "
        "layer is its child",
        lambda e: (
            _is(e, "LAYER_OFFSETS", "WEIGHT_DELTAS")
            and e["test"]
            in (
                "test_set_adapter_non_overlapping_modules",
                "test_set_adapter_non_overlapping_modules_to_save",
                "test_set_requires_grad",
            )
        ),
    ),
    Rule(
        "peft's merge tests give every method target_modules=['fc_out'] on GPT-J; this method takes full names of "
        "parameters, or matrices of queries, and says so",
        lambda e: _is(e, "WEIGHT_DELTAS", "ATTENTION_PREFIX") and _merges(e) and _model(e, "GPTJ"),
    ),
    Rule(
        "an edit of answer positions at every site of an encoder-decoder: `generate` runs the encoder apart, where no "
        "token is an answer, and a sentence says so",
        lambda e: (
            _is(e, "LAYER_OFFSETS", "HEAD_OFFSETS")
            and _model(e, "T5", "Bart")
            and "positions" not in _options(e)
            and e["test"] in ("test_generate", "test_generate_half_prec", "test_disable_adapter")
        ),
    ),
    Rule(
        "the rows' targets are a regular expression, which names the blocks itself: with `layers_to_transform` it is "
        "refused in one sentence, as peft's own methods refuse it",
        lambda e: _is(e, "LAYER_OFFSETS", "HEAD_OFFSETS") and "layer_indexing" in e["test"],
    ),
    Rule(
        "peft's own LoRA on the random models made here: values 16 wide cannot take the rank 20 that the test combines "
        "to, and two adapters of a random Gemma 3 write the same tokens, which the test wants to differ",
        lambda e: (
            _is(e, "LORA")
            and (
                (e["test"] == "test_weighted_combination_of_adapters" and _model(e, "Llama"))
                or (e["test"] == "test_generate_with_mixed_adapter_batches" and _model(e, "Gemma3"))
            )
        ),
    ),
)
