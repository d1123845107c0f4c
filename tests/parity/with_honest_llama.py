"""ITI beside its authors' code: activations, directions, chosen heads, sigma, and the edited model's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import transformers
from parity.comparison import Comparison, Difference
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.editing import compute_iti, head_sites
from lightning_peft.editing.collect import capture_tokens
from lightning_peft.editing.directions import mass_mean
from lightning_peft.editing.iti import HeadEdit, reference_split
from lightning_peft.positions import answering
from lightning_peft.stack.stack import stack_of

FOLDER = Path(__file__).parent / "fixtures/honest_llama"
RECORD = json.loads((FOLDER / "record.json").read_text())
PEER = f"honest_llama {RECORD['commit'][:7]}"


def comparisons() -> list[Comparison]:
    """Return a row for each of the algorithm's steps, on the same activations, and for the edited model."""
    split = "questions of the first fold; in later folds the authors' draw goes on where the last one ended"
    rows: list[tuple[str, str, Callable[[], Difference], str]] = [
        ("capture_tokens", "Collector", activations, "one text a call there, batches here"),
        ("reference_split", "draw in validate_2fold", inner_split, split),
        ("mass_mean", "get_com_directions", directions, "unit length"),
        (
            "compute_iti(reference=True).accuracy",
            "train_probes",
            accuracies,
            "their lbfgs stops at 1e-4, here the optimum",
        ),
        (
            "compute_iti(reference=True).heads",
            "get_top_heads",
            chosen,
            "same order; no ties among them: numpy's argsort orders equals at will",
        ),
        ("compute_iti(reference=True).directions", "get_interventions_dict", edit_directions, ""),
        (
            "compute_iti(reference=True).sigma",
            "get_interventions_dict",
            sigma,
            "ddof 0; validate_2fold at HEAD has ddof 1",
        ),
        (
            'ITI(positions="answer")',
            "ITI_Intervener",
            logits,
            "the last token of every call with a cache, as legacy/ (HEAD leaves the prompt's call out)",
        ),
    ]
    runs_a_model = (activations, logits)  # in float32, where machines differ in the last bits
    return [
        Comparison(ours, f"{PEER}, {theirs}", "llama", step, 5e-6 if step in runs_a_model else 1e-6, note=note)
        for ours, theirs, step, note in rows
    ]


@cache
def stored() -> dict[str, Tensor]:
    """Return what the peer's code computed."""
    return load_file(FOLDER / "llama.safetensors")


def tiny_llama() -> nn.Module:
    """Return the model that the peer's code ran on."""
    config = transformers.LlamaConfig(vocab_size=40, attn_implementation="eager", **RECORD["sizes"])
    model = transformers.LlamaForCausalLM(config).eval()
    weights = {name.removeprefix("model."): value for name, value in stored().items() if name.startswith("model.")}
    model.load_state_dict(weights)
    return model


def relative(ours: Tensor, theirs: Tensor) -> Difference:
    """Return the largest difference over the largest value of the peer's."""
    assert ours.shape == theirs.shape
    return Difference(float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()))


def development() -> Tensor:
    """Return which statements are of the questions that are not tested."""
    return stored()["question"] >= 80


def edit() -> HeadEdit:
    """Compute the intervention from the peer's activations."""
    rows, s = development(), stored()
    return compute_iti(
        s["activations"][rows],
        s["labels"][rows],
        s["question"][rows],
        RECORD["heads"],
        val_fraction=RECORD["val_ratio"],
        seed=RECORD["seed"],
        sigma_activations=s["tuning"],
        reference=True,
    )


def activations() -> Difference:
    model = tiny_llama()
    return relative(capture_tokens(model, head_sites(model), stored()["texts"].tolist()), stored()["activations"])


def inner_split() -> Difference:
    questions = stored()["question"][development()]
    train, _ = reference_split(questions, RECORD["val_ratio"], RECORD["seed"])
    return relative(questions[train].unique(), stored()["train_set"])


def directions() -> Difference:
    rows, s = development(), stored()
    theirs = s["com_directions"] / s["com_directions"].norm(dim=-1, keepdim=True)
    return relative(mass_mean(s["activations"][rows].flatten(1, 2), s["labels"][rows]), theirs)


def accuracies() -> Difference:
    return relative(edit().accuracy.flatten(), stored()["accuracies"])


def chosen() -> Difference:
    return relative(torch.tensor(edit().heads), stored()["top_heads"])


def edit_directions() -> Difference:
    return relative(edit().directions, stored()["direction"])


def sigma() -> Difference:
    return relative(edit().sigma, stored()["sigma"])


@torch.no_grad()
def logits() -> Difference:
    """Compare the logits of the last prompt token and of those after it; the largest change is the unit."""
    model, s = tiny_llama(), stored()
    stack_of(model).put("iti", edit().adapter(head_sites(model), RECORD["alpha"], "answer"))
    start = len(s["text"]) - RECORD["new"] - 1
    with answering(model, start=torch.tensor([start])):
        ours = model(input_ids=s["text"][None]).logits[0, start:]
    change = float((s["logits"] - s["base_logits"]).abs().max())
    return Difference(float((ours - s["logits"]).abs().max()) / change)
