"""LT-SFT beside its authors' code: the same entries kept, at the same values, in float64."""

from __future__ import annotations

import json
import logging
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from parity.comparison import Comparison, Difference
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_peft import adapters
from lightning_peft.callbacks import LTSFT
from lightning_peft.tuners.weight_deltas.masks import deltas

FOLDER = Path(__file__).parent / "fixtures/composable_sft"
RECORD = json.loads((FOLDER / "cases.json").read_text())
PEER = f"composable-sft {RECORD['commit'][:7]}, LotteryTicketSparseFineTuner"
NOTE = (
    "float64; kept entries and changes, also clipped and with L1, the peer's L1 cut from the graph (as published it has "
    "no gradient); the peer also sets heads back and restarts the learning rate in each phase, not shown"
)
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
RENAMED = {  # ViT's parameters, between the peer's release of transformers and this one
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def comparisons() -> list[Comparison]:
    """Return a row for each model, optimizer and number of iterations."""
    rows = []
    for kind in ("bert", "gpt2", "vit"):
        for optimizer in ("sgd", "adam"):
            for iterations in (1, 2, 3) if kind != "vit" else (2,):
                method = f"LTSFT(iterations={iterations}), {optimizer}"
                difference = partial(compare, kind, optimizer, iterations)
                rows.append(Comparison(method, PEER, kind, difference, outputs=1e-12, note=NOTE))
    return rows


def compare(kind: str, optimizer: str, iterations: int) -> Difference:
    """Return the largest difference of a change, over the largest change of theirs; infinite where masks differ."""
    stored, largest = fixture(kind), 0.0
    for number, case in enumerate(RECORD["cases"]):
        if (case["optimizer"], case["iterations"]) != (optimizer, iterations):
            continue
        tuned = fitted(kind, case)
        assert {f"{number}.kept.{name}" for name in tuned} <= stored.keys()
        apart = [
            (change[mask] - stored[f"{number}.change.{name}"]).abs()
            if torch.equal(mask.flatten().nonzero()[:, 0], stored[f"{number}.kept.{name}"].long())
            else torch.tensor([torch.inf])
            for name, (mask, change) in tuned.items()
        ]
        theirs = torch.cat([stored[f"{number}.change.{name}"] for name in tuned])
        largest = max(largest, float(torch.cat(apart).max() / theirs.abs().max()))
        kept = (sum(int(mask.sum()) for mask, _ in tuned.values()), len(theirs))
    return Difference(largest, parameters=kept)


def fitted(kind: str, case: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mask and change of each parameter after a fit as long as theirs."""
    module = Module(kind, case["optimizer"])
    entries = sum(parameter.numel() for parameter in module.model.parameters())
    steps, phase = 2 * RECORD["phase"] * case["iterations"], RECORD["phase"]
    callback = LTSFT(
        density=(RECORD["kept"] + 0.5) / entries,
        full_steps=phase,
        iterations=case["iterations"],
        l1=case["l1"] if case["detached"] else 0.0,
        backbone="model",
    )
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[callback],
            gradient_clip_val=case["clip"] or None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, DataLoader(Rows(kind), RECORD["batch"]))
    found = deltas(adapters(module).backbone, "lt-sft")
    return {d.full_name: (d.mask, d.value.detach()) for d in found if d.mask is not None}


class Module(L.LightningModule):
    """A stored model in float64, with the mean cross-entropy in that precision."""

    def __init__(self, kind: str, optimizer: str) -> None:
        super().__init__()
        self.kind, self.optimizer = kind, optimizer
        text = {"vocab_size": 24, "attn_implementation": "eager"}
        self.model = {
            "bert": lambda: transformers.BertForMaskedLM(
                transformers.BertConfig(max_position_embeddings=16, **SIZES, **STILL, **text)
            ),
            "gpt2": lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    n_embd=8,
                    n_layer=2,
                    n_head=2,
                    n_inner=12,
                    n_positions=16,
                    attn_pdrop=0,
                    resid_pdrop=0,
                    embd_pdrop=0,
                    **text,
                )
            ),
            "vit": lambda: transformers.ViTModel(
                transformers.ViTConfig(image_size=4, patch_size=2, **SIZES, **STILL), add_pooling_layer=False
            ),
        }[kind]().double()
        start = {n.removeprefix("start."): v for n, v in fixture(kind).items() if n.startswith("start.")}
        assert start.keys() == dict(self.model.named_parameters()).keys()
        self.model.load_state_dict(start, strict=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(**{name: value for name, value in batch.items() if name != "labels"})
        logits = output.logits if "logits" in output else output.last_hidden_state[:, 0]
        return nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.optimizer]
        return kind(self.parameters(), lr=RECORD["learning_rates"][self.optimizer])


class Rows(Dataset[dict[str, Tensor]]):
    """The stored examples."""

    def __init__(self, kind: str) -> None:
        self.data = {n.removeprefix("data."): v for n, v in fixture(kind).items() if n.startswith("data.")}

    def __len__(self) -> int:
        return len(self.data["labels"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: value[row] for name, value in self.data.items()}


@cache
def fixture(kind: str) -> dict[str, Tensor]:
    """Return what the peer's code made of a model."""
    stored = load_file(FOLDER / f"{kind}.safetensors")
    return stored if kind != "vit" else {_renamed(name): value for name, value in stored.items()}


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name
