"""LightningModules for transformers models: causal language model, sequence classifier, sequence to sequence.

Batches are dicts of tensors: `input_ids [B, T]`, `attention_mask [B, T]`, `labels`, and where known
`prompt_end [B]`, the position id of the last prompt token. `position_ids` are always passed where the model takes
them, so that padding does not change a row's result.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.backbone.window import check_batch, check_loaded
from lightning_peft.effects.text_sums import Off
from lightning_peft.fitting.checkpoints import AdapterCheckpointMixin
from lightning_peft.positions import answering_batch
from lightning_peft.stack.injection.initialisation import changes_base
from lightning_peft.stack.stack import adapters, find_stacks
from lightning_peft.truthfulqa.evaluation import Evaluation, by_logprob
from lightning_peft.truthfulqa.generation import Answer, AnswerGenerator

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
        self._accepts = set(inspect.signature(type(self.backbone).forward).parameters)

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
        if "position_ids" in self._accepts and "attention_mask" in batch:
            inputs["position_ids"] = (batch["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        return inputs


class _LanguageModel(_Pretrained, ABC):
    """The base of the two language models: they are trained on answers, and evaluated on choices and text too."""

    def __init__(self, pretrained: str, auto: str, learning_rate: float, weight_decay: float, dtype: str) -> None:
        super().__init__(pretrained, auto, learning_rate, weight_decay, dtype)
        self.evaluation = Evaluation()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, count = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=count)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._begin()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Evaluate a batch as `test_step` does."""
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.evaluation.finish("val_").items():
            self.log(name, value, prog_bar=name in ("val_loss", "val_mc2"), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self._begin()

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the scores of choices, `[B]`, in nats; the effects of text, `[B, 4]`; of other batches nothing."""
        return self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        results = self.evaluation.finish()
        self.log_dict({"test_loss" if name == "loss" else name: results[name] for name in results}, sync_dist=True)

    def _begin(self) -> None:
        off: Off | None = None
        configs: list[Any] = []
        if find_stacks(self.backbone):
            stack = adapters(self.backbone)
            off, configs = stack.disabled, [part.config for part in stack.parts]
        elif hasattr(self.backbone, "disable_adapter"):  # wrapped by peft itself
            wrapper: Any = self.backbone
            off, configs = wrapper.disable_adapter, list(wrapper.peft_config.values())
        base = not any(map(changes_base, configs))
        self.evaluation.begin(self.backbone, self._scorer, off if base else None, base)

    def _evaluate(self, batch: Batch) -> Tensor | None:
        result = self.evaluation.step(batch)
        if result is None:
            self.evaluation.add_loss(*self._loss(batch))
        return result

    def _scorer(self) -> Callable[[Batch], Tensor]:
        """Return the function that scores choices."""
        return by_logprob(self.backbone)

    @abstractmethod
    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean cross-entropy over answer tokens, and their number."""


class CausalLM(_LanguageModel):
    """A causal language model, trained on answers and tested on choices.

    Training and validation: cross-entropy over the tokens whose label is not -100. Validation and test: rows with
    `mc0`, `mc1` or `mc2 [B]` are one question's choices (1 true, 0 false, -1 not among that metric's); their exact
    log-probabilities give MC0, MC1, MC2 and MC3, logged as `mc0` … `mc3`; rows with `capability` give the share of
    simple questions answered rightly. Whatever adapter is active counts. Rows with `document` are neutral text: logged
    are its cross-entropy with and without the adapters, `ce` and `ce_base`, and `kl`, in nats per token; of adapters
    that cannot be switched off `ce` alone. The loss of other rows is `val_loss` or `test_loss`; in validation all names
    begin with `val_`.

    `scoring` may be set to score choices otherwise than by their log-probability: it is called with this module before
    the first choices of a test or validation, and what it returns with each batch of them, for scores `[B]`.

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
        self.scoring: Callable[[CausalLM], Callable[[Batch], Tensor]] = _by_logprob
        self._generator: AnswerGenerator | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Return logits `[B, T, vocabulary]`."""
        with self._answers(batch):
            return self.backbone(**self._inputs(batch)).logits

    def on_predict_epoch_start(self) -> None:
        self._generator = AnswerGenerator(self.backbone, self.tokenizer)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Answer] | Tensor:
        """Write greedy answers to a batch of prompts of `TruthfulQADataModule`; of any other batch return logits."""
        if "ending" not in batch:
            return self(batch)
        assert self._generator is not None
        return self._generator.answer(batch)

    def on_predict_epoch_end(self) -> None:
        self._generator = None

    def _scorer(self) -> Callable[[Batch], Tensor]:
        return self.scoring(self)

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


def _by_logprob(module: CausalLM) -> Callable[[Batch], Tensor]:
    """Return a function that scores answers by their exact log-probabilities behind their prompts."""
    return by_logprob(module.backbone)


class SequenceClassifier(_Pretrained):
    """An encoder or decoder with a linear head on the mean of its last hidden states.

    The head stands outside the backbone, so it is trained and saved whatever adapts the backbone. `labels [B]`.

    Args:
        pretrained: a model on the Hugging Face hub, or a folder.
        num_labels: the number of classes.
        learning_rate: of AdamW.
        weight_decay: of AdamW, on what is trained.
        dtype: the name of a torch dtype to load the weights in.
    """

    def __init__(
        self,
        pretrained: str,
        num_labels: int,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        super().__init__(pretrained, "AutoModel", learning_rate, weight_decay, dtype)
        self.save_hyperparameters()
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

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_accuracy(self(batch), batch["labels"])
        self.log("test_accuracy", self.test_accuracy, batch_size=len(batch["labels"]))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the likeliest class of each row, `[B]`."""
        return self(batch).argmax(-1)


class Seq2SeqLM(_LanguageModel):
    """An encoder-decoder trained on `labels [B, U]`, the target tokens, -100 where padded, and tested on choices.

    Validation and test: choices give `mc0` … `mc3` and `capability` as in `CausalLM`, the prompt read by the encoder
    and the answers scored by the decoder; the loss of other batches is `val_loss` or `test_loss`.

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
