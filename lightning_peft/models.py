"""LightningModules for transformers models: causal language model, sequence classifier, sequence to sequence.

Batches are dicts of tensors: `input_ids [B, T]`, `attention_mask [B, T]`, `labels`, and where known
`prompt_end [B]`, the position id of the last prompt token. `position_ids` are always passed where the model takes
them and counts from 0, so that padding does not change a row's result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.backbone.accepted_arguments import accepted_arguments
from lightning_peft.backbone.token_numbers import numbers_from_zero, places
from lightning_peft.backbone.window import check_batch, check_loaded
from lightning_peft.fitting.checkpoints import AdapterCheckpointMixin
from lightning_peft.positions import answering_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = dict[str, Tensor]


class _Pretrained(AdapterCheckpointMixin, L.LightningModule):
    """The base of the three modules: a pretrained backbone, a tokenizer, AdamW."""

    backbone: PreTrainedModel

    def __init__(self, pretrained: str, auto: str, learning_rate: float, weight_decay: float, dtype: str) -> None:
        super().__init__()
        import transformers

        if not hasattr(torch, dtype) or not isinstance(getattr(torch, dtype), torch.dtype):
            raise ValueError(f"dtype must name a torch dtype such as float32 or bfloat16, got {dtype!r}.")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        if torch.get_default_device().type != "meta":  # else only shapes are asked for, which config.json gives
            self.tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(pretrained)
        self.backbone = getattr(transformers, auto).from_pretrained(pretrained, dtype=getattr(torch, dtype))
        self._accepts = accepted_arguments(self.backbone)
        self._numbers = numbers_from_zero(self.backbone)  # once, since it looks at all modules

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)

    def on_train_start(self) -> None:
        check_loaded(self.backbone, self.trainer.train_dataloader, "training texts")

    def on_validation_start(self) -> None:
        check_loaded(self.backbone, self.trainer.val_dataloaders, "validation texts")

    def on_test_start(self) -> None:
        check_loaded(self.backbone, self.trainer.test_dataloaders, "test texts")

    def on_predict_start(self) -> None:
        check_loaded(self.backbone, self.trainer.predict_dataloaders, "prompts with their answers")

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        check_batch(self.backbone, batch)
        inputs: dict[str, Tensor] = {n: batch[n] for n in ("input_ids", "attention_mask") if n in batch}
        if self._numbers and "attention_mask" in batch:
            inputs["position_ids"] = places(batch["attention_mask"])
        return inputs


class TokenMean(nn.Module):
    """The mean of losses over all tokens of an epoch and of all processes; a module, so that it follows its owner."""

    def __init__(self) -> None:
        super().__init__()
        # a loss that is NaN stays one; MeanMetric(nan_strategy="disable") takes no weights (torchmetrics 1.9)
        self.loss, self.tokens = SumMetric(nan_strategy="disable"), SumMetric()

    def begin(self) -> None:
        """Forget what was added before."""
        for metric in (self.loss, self.tokens):
            metric.reset()
            metric.update(0)  # of several processes those without any loss must take part too

    def add(self, loss: Tensor, tokens: int) -> None:
        """Count a batch's mean loss as often as it has tokens."""
        if tokens:  # the mean of none is no number
            self.loss.update(loss.detach().float() * tokens)
            self.tokens.update(tokens)

    def finish(self) -> float | None:
        """Return the mean, None where there was no token in any process, and begin anew."""
        loss, tokens = self.loss.compute(), self.tokens.compute()
        for metric in (self.loss, self.tokens):
            metric.reset()
        return float(loss / tokens) if tokens else None


class _LanguageModel(_Pretrained, ABC):
    """The base of the two language models, which are trained and measured on answers."""

    def __init__(self, pretrained: str, auto: str, learning_rate: float, weight_decay: float, dtype: str) -> None:
        super().__init__(pretrained, auto, learning_rate, weight_decay, dtype)
        self.answer_loss = TokenMean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, count = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=count)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.answer_loss.begin()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.answer_loss.add(*self._loss(batch))
        return None

    def on_validation_epoch_end(self) -> None:
        self._log_loss("val_loss", prog_bar=True)

    def on_test_epoch_start(self) -> None:
        self.answer_loss.begin()

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.answer_loss.add(*self._loss(batch))
        return None

    def on_test_epoch_end(self) -> None:
        self._log_loss("test_loss")

    def _log_loss(self, name: str, prog_bar: bool = False) -> None:
        if (loss := self.answer_loss.finish()) is not None:
            self.log(name, loss, prog_bar=prog_bar, sync_dist=True)

    @abstractmethod
    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean cross-entropy over answer tokens, and their number."""


class CausalLM(_LanguageModel):
    """A causal language model, trained on the tokens whose label is not -100.

    `val_loss` and `test_loss` are the mean cross-entropy over these tokens of the whole epoch, on all processes;
    `predict` returns logits.

    Args:
        pretrained: a model on the Hugging Face hub, or a folder.
        learning_rate: of AdamW.
        weight_decay: of AdamW, on what is trained.
        dtype: the name of a torch dtype to load the weights in.
    """

    def __init__(
        self, pretrained: str, learning_rate: float = 1e-4, weight_decay: float = 0.0, dtype: str = "float32"
    ) -> None:
        super().__init__(pretrained, "AutoModelForCausalLM", learning_rate, weight_decay, dtype)
        self.save_hyperparameters()

    def forward(self, batch: Batch) -> Tensor:
        """Return logits `[B, T, vocabulary]`."""
        with self._answers(batch):
            return self.backbone(**self._inputs(batch)).logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return logits `[B, T, vocabulary]`."""
        return self(batch)

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean cross-entropy over answer tokens, and their number.

        Only columns that hold any go through the language-model head, which is a fifth of a small model.
        """
        targets = batch["labels"][:, 1:]
        columns = (targets != -100).any(0).nonzero().flatten()
        with self._answers(batch):
            if "logits_to_keep" in self._accepts:
                logits = self.backbone(**self._inputs(batch), logits_to_keep=columns).logits
            else:
                logits = self.backbone(**self._inputs(batch)).logits[:, columns]
        targets = targets[:, columns]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return loss, int((targets != -100).sum())

    def _answers(self, batch: Batch) -> AbstractContextManager[None]:
        return answering_batch(self.backbone, batch)


class SequenceClassifier(_Pretrained):
    """An encoder or decoder with a linear head on the mean of its last hidden states.

    The head stands outside the backbone, so it is trained and saved whatever adapts the backbone. `labels [B]`.

    Args:
        pretrained: a model on the Hugging Face hub, or a folder.
        num_labels: the number of classes.
        learning_rate: of AdamW.
        weight_decay: of AdamW, on what is trained.
        dtype: the name of a torch dtype to load the weights in.
        head_learning_rate: of the head where something in the backbone is trained beside it, for a new head needs
            another one than pretrained weights; alone the head has `learning_rate`. Default: always `learning_rate`.
    """

    def __init__(
        self,
        pretrained: str,
        num_labels: int,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        dtype: str = "float32",
        head_learning_rate: float | None = None,
    ) -> None:
        super().__init__(pretrained, "AutoModel", learning_rate, weight_decay, dtype)
        self.save_hyperparameters()
        self.head_learning_rate = head_learning_rate
        self.head = nn.Linear(self.backbone.config.hidden_size, num_labels)
        self.val_accuracy = MulticlassAccuracy(num_labels, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_labels, average="micro")

    def forward(self, batch: Batch) -> Tensor:
        """Return class logits `[B, num_labels]`."""
        hidden = self.backbone(**self._inputs(batch)).last_hidden_state
        mask = batch.get("attention_mask")
        mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.head(mean.to(self.head.weight.dtype))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, labels = self(batch), batch["labels"]
        loss = nn.functional.cross_entropy(logits, labels)
        self.val_accuracy(logits, labels)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Return columns `[B]`: `accuracy` (0 or 1), `nll` in nats, `target`, `prediction`; `unit` where given."""
        logits, labels = self(batch), batch["labels"]
        self.test_accuracy(logits, labels)
        self.log("test_accuracy", self.test_accuracy, batch_size=len(labels))
        prediction, nll = logits.argmax(-1), nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        columns = {"accuracy": (prediction == labels).float(), "nll": nll, "target": labels, "prediction": prediction}
        return columns | ({"unit": batch["unit"]} if "unit" in batch else {})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        head = [p for p in self.head.parameters() if p.requires_grad]
        others = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("head.")]
        if self.head_learning_rate is None or not head or not others:
            return super().configure_optimizers()
        groups = [{"params": others}, {"params": head, "lr": self.head_learning_rate}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the likeliest class of each row, `[B]`."""
        return self(batch).argmax(-1)


class Seq2SeqLM(_LanguageModel):
    """An encoder-decoder trained on `labels [B, U]`, the target tokens, -100 where padded.

    `val_loss` and `test_loss` are the mean cross-entropy over the target tokens of the whole epoch, on all processes;
    `predict` generates.

    Args:
        pretrained: a model on the Hugging Face hub, or a folder.
        learning_rate: of AdamW.
        weight_decay: of AdamW, on what is trained.
        dtype: the name of a torch dtype to load the weights in.
    """

    def __init__(
        self, pretrained: str, learning_rate: float = 1e-4, weight_decay: float = 0.0, dtype: str = "float32"
    ) -> None:
        super().__init__(pretrained, "AutoModelForSeq2SeqLM", learning_rate, weight_decay, dtype)
        self.save_hyperparameters()

    def forward(self, batch: Batch) -> Tensor:
        """Return logits `[B, U, vocabulary]`."""
        return self.backbone(**self._inputs(batch), labels=batch["labels"]).logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Generate token ids, `[B, U]`."""
        attention_mask = batch.get("attention_mask")
        backbone: Any = self.backbone
        return backbone.generate(input_ids=batch["input_ids"], attention_mask=attention_mask)

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        labels = batch["labels"]
        loss = nn.functional.cross_entropy(self(batch).flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return loss, int((labels != -100).sum())
