"""What `predict` gives, as a file: a JSON object for each prompt, with its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_peft.generation.adapted import AdaptedModel
from lightning_peft.generation.answers import BatchWriter
from lightning_peft.generation.decoding import Decoding
from lightning_peft.generation.prompt_file import answer_line, writing_answers
from lightning_peft.generation.prompts import turn_ends
from lightning_peft.models import CausalLM, Seq2SeqLM
from lightning_peft.positions import answering
from lightning_peft.prompt_end import prompt_end, token_labels
from lightning_peft.replaced import Handle, replaced

_NUMBERS = 1000  # of a prediction at most: more, such as logits, are no rows of a file
Place = tuple[int, int, int, int]  # data loader, example or batch, process, row


class PredictionWriter(BasePredictionWriter):
    """Write what `predict` gives as JSON Lines: a row for each example, in the data's order, one file in all.

    With `CausalLM` and `Seq2SeqLM` prompts are answered greedily: a batch's `input_ids` up to `prompt_end`, or to the
    first label, or whole. A row has the `prompt` and the `answer`. Of other modules it has what `predict_step`
    returns, one value an example: texts and objects with a `text` (of which it has the other fields too) are answers,
    tokens that a module with a `tokenizer` generates too, and numbers a `prediction`. Of several processes the first
    writes for all. The `lightning-peft predict` command puts one on where there is no other writer.

    Args:
        path: the file; default `predictions.jsonl` in the logger's folder, or in the Trainer's `default_root_dir`.
        max_new_tokens: of an answer, at most, unless the batch has `max_new_tokens` of its own.

    After `predict`, `written` is the file, None where nothing could be written; `skipped` then says why.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.generation import PredictionWriter
        >>> trainer = L.Trainer(callbacks=[PredictionWriter("answers.jsonl")])  # doctest: +SKIP
        >>> trainer.predict(module, data)  # doctest: +SKIP
    """

    def __init__(self, path: str | Path | None = None, max_new_tokens: int = 256) -> None:
        super().__init__("batch")
        self.path, self.decoding = path, Decoding(max_new_tokens)
        self.written: Path | None = None
        self.skipped: str | None = None
        self.count = 0
        self._rows: list[tuple[Place, dict[str, Any]]] = []
        self._answering: Handle | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a language model answer prompts, and begin a file."""
        self._rows, self.written, self.skipped, self.count = [], None, None, 0
        own = type(pl_module).predict_step in (CausalLM.predict_step, Seq2SeqLM.predict_step)
        if not isinstance(pl_module, CausalLM | Seq2SeqLM) or not own:
            return
        writers: list[BatchWriter] = []

        def answer(original: Callable[..., Any], batch: Any, *more: Any, **named: Any) -> Any:
            if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
                return original(batch, *more, **named)
            if not writers:
                adapted = AdaptedModel(cast(Any, pl_module.backbone), pl_module.tokenizer)
                ends = turn_ends(adapted, [], chat=bool(adapted.tokenizer.chat_template))
                writers.append(BatchWriter(adapted, self.decoding, ends))
            prompts = prompts_of(batch, _reads_all(pl_module))
            limit = int(batch.get("max_new_tokens", self.decoding.max_new_tokens))
            rooms = [min(limit, writers[0].room(ids)) for ids in prompts]
            texts = [""] * len(prompts)
            for room in sorted(set(rooms)):  # one that comes to the window's end ends no other
                rows = [row for row, own in enumerate(rooms) if own == room]
                chosen = [prompts[row] for row in rows]
                # a callback may have noted where the answers of the whole batch begin
                with answering(pl_module, start=torch.tensor([len(ids) - 1 for ids in chosen])):
                    for row, text in zip(rows, writers[0].write(chosen, room), strict=True):
                        texts[row] = text
            return texts

        self._answering = replaced(pl_module, "predict_step", answer)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take the rows of a batch."""
        tokenizer = getattr(pl_module, "tokenizer", None)
        values = _values(prediction, tokenizer)
        if values is None:
            self.skipped = (
                self.skipped or f"predict_step returns {_described(prediction)}, which is no row for each example"
            )
            return
        prompts: list[str] = []
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if tokenizer is not None and isinstance(ids, Tensor) and len(ids) == len(values):
            prompts = [str(tokenizer.decode(tokens)) for tokens in prompts_of(batch, _reads_all(pl_module))]
        known = list(batch_indices or [])
        for row, value in enumerate(values):
            number = known[row] if len(known) == len(values) else batch_idx
            place = (dataloader_idx, number, trainer.global_rank, row)
            self._rows.append((place, {**({"prompt": prompts[row]} if prompts else {}), **value}))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        path = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl")
        rows = self._rows
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, rows)
            rows = [row for share in shares for row in share]
        self.count = len(rows)
        self._rows = []
        if not rows:
            return
        self.written = path
        if trainer.is_global_zero:
            with writing_answers(path) as file:
                file.writelines(answer_line(row) for _, row in sorted(rows, key=lambda entry: entry[0]))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the module predict as it did."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let the module predict as it did."""
        self._leave()

    def _leave(self) -> None:
        if self._answering is not None:
            self._answering.remove()
            self._answering = None


def prompts_of(batch: Mapping[str, Any], whole: bool = False) -> list[list[int]]:
    """Return the tokens of each row's prompt: up to `prompt_end`, or the first label, or all; without padding.

    Args:
        batch: with `input_ids [B, T]`, and perhaps `attention_mask`, `prompt_end [B]` and `labels`.
        whole: the rows are prompts and nothing else, as an encoder-decoder's are.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
        >>> mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        >>> prompts_of({"input_ids": ids, "attention_mask": mask, "prompt_end": torch.tensor([1, 2])})
        [[5, 6], [5, 6, 7]]
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    ends, labels = prompt_end(batch), token_labels(batch)
    if ends is None and labels is not None:
        answered = labels != -100
        first = torch.where(answered.any(-1), answered.long().argmax(-1), ids.shape[1])
        ends = torch.stack([row[:place].sum() - 1 for row, place in zip(mask, first.tolist(), strict=True)])
    if whole:
        ends = None
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    return rows if ends is None else [row[: end + 1] for row, end in zip(rows, ends.tolist(), strict=True)]


def _values(prediction: Any, tokenizer: Any) -> list[dict[str, Any]] | None:
    """Return the fields of each example's row; None where a prediction is not one value an example."""
    if isinstance(prediction, Tensor) and 1 <= prediction.dim() <= 2 and prediction[:1].numel() <= _NUMBERS:
        tokens = prediction.dim() == 2 and not prediction.is_floating_point() and prediction.dtype != torch.bool
        if tokens and tokenizer is not None:
            return [{"answer": str(tokenizer.decode(row, skip_special_tokens=True))} for row in prediction]
        return [{"prediction": value} for value in prediction.tolist()]
    if not isinstance(prediction, list | tuple) or hasattr(prediction, "_fields"):
        return None
    rows: list[dict[str, Any]] = []
    for value in prediction:
        if isinstance(value, str):
            rows.append({"answer": value})
        elif isinstance(text := getattr(value, "text", None), str):
            others = value._asdict() if hasattr(value, "_asdict") else {}
            rows.append({"answer": text, **{name: field for name, field in others.items() if name != "text"}})
        elif isinstance(value, int | float):
            rows.append({"prediction": value})
        else:
            return None
    return rows


def _reads_all(module: L.LightningModule) -> bool:
    return isinstance(module, Seq2SeqLM)


def _described(prediction: Any) -> str:
    if isinstance(prediction, Tensor):
        return f"a tensor of {' x '.join(map(str, prediction.shape))}"
    return "nothing" if prediction is None else f"a {type(prediction).__name__}"
