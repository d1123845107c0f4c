"""What `against.py` runs once with each tree's package: it computes, and writes what it computed into a folder.

    python benchmarks/against_probe.py OUT --sections logprobs edits tuning --smollm2 FOLDER
    python benchmarks/against_probe.py OUT --load SAVED

`OUT/<section>/<case>` holds logits, trained tensors and numbers, and the adapter as a folder and as a checkpoint; or
`error.json`, where the case fails. With `--load`, adapters that another probe saved are loaded and logits computed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from against_cases import KINDS, QUANTIZED, cases
from safetensors.torch import save_file
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import adapters, load_adapter, load_from_checkpoint, save_adapter
from lightning_peft import callbacks as c

Row = dict[str, Any]
QUESTIONS, WIDTH = 9, 8
BASES = ("llama", "wide_llama", "gpt2", "gpt_neox", "opt")


def rough(kind: str) -> nn.Module:
    """Return a tiny model with random biases and norms, so that a lost one shows."""
    model, generator = tiny(kind), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


class Tiny(L.LightningModule):
    """A tiny language model, trained with weight decay."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = rough(kind)
        self.tokenizer: Any = tokenizer()

    def training_step(self, batch: Row, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Row, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), batch_size=len(batch["input_ids"]))

    def _loss(self, batch: Row) -> Tensor:
        return self.backbone(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


class TinyInFewBits(Tiny):
    """The same, quantised when it is made."""

    def __init__(self, kind: str, quant_type: Any = "nf4") -> None:
        super().__init__(kind)
        c.Quantize(quant_type, backbone="backbone").apply(self)


def tokenizer() -> Any:
    """Return a byte-pair tokenizer of 64 tokens, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE(unk_token="<pad>"))
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    text = "Q: What is it?\nA: It is true. It is not false.\n\nQ: Who is he? A: He is she"
    pairs.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=pairs, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class ProbedStatements(L.LightningDataModule):
    """The labelled statements, to fit on and to validate with; what ends in a question is their beginnings."""

    def setup(self, stage: str) -> None:
        for callback in vars(self.trainer)["callbacks"]:
            if getattr(callback, "question_ends", False):
                callback.sigma_texts = self.question_ends()  # 0.1 asks for them

    def train_dataloader(self) -> DataLoader:
        return statements()

    def val_dataloader(self) -> DataLoader:
        return statements()

    def question_ends(self, seed: int = 0) -> list[list[int]]:
        return [row["input_ids"][: 2 + i % 3].tolist() for i, row in enumerate(statements().dataset)]  # type: ignore[arg-type]


def statements() -> DataLoader:
    """Return three labelled statements a question, of different lengths, in order; true ones end in other tokens."""
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(3 * QUESTIONS):
        length, truth = 4 + i % 5, i % 2
        ids = torch.zeros(WIDTH, dtype=torch.long)
        ids[:length] = torch.randint(9, VOCABULARY, (length,), generator=generator)
        ids[length - 1] = (5 if truth else 7) + i // 2 % 2
        mask = (torch.arange(WIDTH) < length).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(WIDTH) < 2), -100)
        row = {"input_ids": ids, "attention_mask": mask, "labels": labels}  # by which it is known where answers begin
        row |= {"label": truth, "group": i // 3}
        rows.append(row | {"truth": truth, "question_id": i // 3})  # the same as 0.1 calls them
    return DataLoader(rows, batch_size=5)  # type: ignore[arg-type]


def trainer(*callbacks: L.Callback) -> L.Trainer:
    """Return a quiet Trainer for one epoch on one CPU."""
    return L.Trainer(
        callbacks=list(callbacks),
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@torch.no_grad()
def logits(module: L.LightningModule) -> dict[str, Tensor]:
    """Return logits `[3, 9, V]` of a padded batch, without labels and with those by which an edit knows the answers."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    labels = ids.masked_fill((mask == 0) | (torch.arange(9) < 3), -100)
    given = {"input_ids": ids, "attention_mask": mask}
    module.eval()
    return {"plain": module.backbone(**given).logits, "answers": module.backbone(**given, labels=labels).logits}


def adapt(make: Callable[[], list[L.Callback]], kind: str, folder: Path) -> None:
    """Fit a case's callbacks on a tiny model, and write what came of it."""
    torch.manual_seed(5)
    module = Tiny(kind)
    torch.manual_seed(5)
    fitting = trainer(*make())
    fitting.fit(module, datamodule=ProbedStatements())
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    metrics = {name: float(value) for name, value in fitting.callback_metrics.items()}
    numbers = {"trainable_parameters": sum(p.numel() for p in trained.values()), "metrics": metrics}
    (folder / "numbers.json").write_text(json.dumps(numbers))
    write(folder / "trained.safetensors", trained)
    write(folder / "logits.safetensors", logits(module))
    # an adapter made out of the base's own weights cannot be switched off
    with contextlib.suppress(ValueError), adapters(module).disabled():
        write(folder / "disabled.safetensors", logits(module))
    fitting.save_checkpoint(folder / "last.ckpt")
    save_adapter(module, folder / "adapter")


def steer(saved: Path, folder: Path) -> None:
    """Validate a tiny model under a saved edit at half its strength."""
    (measured,) = trainer(c.Steer(saved / "adapter", scale=0.5)).validate(Tiny("llama"), statements(), verbose=False)
    (folder / "numbers.json").write_text(json.dumps(measured))


def score_tiny(kind: str, folder: Path) -> None:
    """Write log-probabilities of the choices of six questions of random tokens that share a beginning."""
    from lightning_peft.truthfulqa import ChoiceScorer

    generator, scores = torch.Generator().manual_seed(4), []
    scorer, shared = ChoiceScorer(rough(kind)), torch.randint(3, VOCABULARY, (12,), generator=generator)
    for question in range(6):
        prompt = torch.cat([shared, torch.randint(3, VOCABULARY, (5 + question,), generator=generator)])
        answers = [torch.randint(3, VOCABULARY, (2 + i,), generator=generator) for i in range(4)]
        rows = [torch.cat([prompt, answer]) for answer in answers]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(ids.shape[1]) < len(prompt)), -100)
        scores.append(scorer.score(ids, mask, labels))
    write(folder / "logprobs.safetensors", {"logprobs": torch.cat(scores)})


def score_smollm2(model: Path, folder: Path) -> None:
    """Write log-probabilities of the choices of four of the package's questions, with the primer."""
    from lightning_peft.models import CausalLM
    from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule, load_questions

    module = CausalLM(str(model)).eval()
    data = TruthfulQADataModule(source="package", tokenizer=module.tokenizer)
    data.setup()
    data.test_questions = list(load_questions("package")[:4])
    scorer = ChoiceScorer(module.backbone)
    scores = [scorer.score(b["input_ids"], b["attention_mask"], b["labels"]) for b in data.test_dataloader()]
    write(folder / "logprobs.safetensors", {"logprobs": torch.cat(scores)})


def load_folder(saved: Path, name: str, kind: str, folder: Path) -> None:
    """Write the logits of a saved adapter, put on a new model from its folder."""
    module = TinyInFewBits(kind, QUANTIZED[name]) if name in QUANTIZED else Tiny(kind)
    load_adapter(module.backbone, saved / "adapter")
    write(folder / "logits.safetensors", logits(module))


def load_checkpoint(saved: Path, name: str, kind: str, folder: Path) -> None:
    """Write the logits of a module made from a checkpoint."""
    given = {"quant_type": QUANTIZED[name]} if name in QUANTIZED else {}
    module = load_from_checkpoint(TinyInFewBits if given else Tiny, saved / "last.ckpt", **given)
    write(folder / "logits.safetensors", logits(module))


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)


@contextlib.contextmanager
def case(folder: Path) -> Iterator[Path]:
    """Give a new folder to a case, where its error stands if it fails; other cases go on."""
    folder.mkdir(parents=True)
    try:
        yield folder
    except Exception as error:
        described = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        (folder / "error.json").write_text(json.dumps(described, indent=2))


def compute(out: Path, sections: list[str], smollm2: Path | None) -> None:
    if "logprobs" in sections:
        for kind in BASES:
            with case(out / "logprobs" / kind) as folder:
                score_tiny(kind, folder)
        if smollm2 is not None:
            with case(out / "logprobs" / "SmolLM2") as folder:
                score_smollm2(smollm2, folder)
    for section in ("edits", "tuning"):
        for name, make in cases(section).items() if section in sections else ():
            for kind in KINDS:
                with case(out / section / f"{name} on {kind}") as folder:
                    adapt(make, kind, folder)
    if "edits" in sections:
        with case(out / "edits" / "Steer on llama") as folder:
            steer(out / "edits" / "CAA of all tokens on llama", folder)


def load_all(out: Path, saved: Path) -> None:
    for section in ("edits", "tuning"):
        for name in cases(section):
            for kind in KINDS:
                title = f"{name} on {kind}"
                if not (saved / section / title / "adapter").is_dir():
                    continue
                for source, load in (("folder", load_folder), ("checkpoint", load_checkpoint)):
                    with case(out / section / source / title) as folder:
                        load(saved / section / title, name, kind, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tree", type=Path, help="where the package must come from")
    parser.add_argument("--sections", nargs="*", default=[])
    parser.add_argument("--smollm2", type=Path, help="the folder of SmolLM2-135M-Instruct")
    parser.add_argument("--load", type=Path, help="what another probe wrote")
    options = parser.parse_args()
    if options.tree and not Path(c.__file__).resolve().is_relative_to(options.tree.resolve()):
        raise SystemExit(f"The package is that of {c.__file__}, expected that of {options.tree}: set PYTHONPATH.")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    compute(options.out, options.sections, options.smollm2)
    if options.load is not None:
        load_all(options.out, options.load)


if __name__ == "__main__":
    main()
