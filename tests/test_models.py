"""The LightningModules train, validate and test on the batch contract, with and without adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from lightning_peft.callbacks import ITI, LoRA
from lightning_peft.models import CausalLM, Seq2SeqLM, SequenceClassifier
from lightning_peft.stack.stack import adapters
from lightning_peft.truthfulqa import TruthfulQADataModule

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(*callbacks: L.Callback, **settings: object) -> L.Trainer:
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **(QUIET | settings))  # type: ignore[arg-type]


def data(kind: str, tokenizer: PreTrainedTokenizerBase) -> TruthfulQADataModule:
    return TruthfulQADataModule(
        source="package",
        train=kind,
        limit=12,
        primer="",
        tokenizer=tokenizer,  # type: ignore[arg-type]
    )


def test_causal_lm_tuned_and_edited_are_scored_alike(
    tiny_folder: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    module = CausalLM(str(tiny_folder("llama")), learning_rate=0.02)
    questions = data("answers", tiny_tokenizer)
    base = trainer().test(module, questions, verbose=False)[0]
    assert set(base) == {"mc0", "mc1", "mc2", "mc3"}
    before = trainer().validate(module, questions, verbose=False)[0]["val_loss"]
    run = trainer(LoRA(r=4), max_epochs=4)
    run.fit(module, questions)
    assert float(run.callback_metrics["val_loss"]) < before
    tuned = trainer().test(module, questions, verbose=False)[0]
    run = trainer(ITI(num_heads=3, alpha=8.0), max_epochs=1)
    run.fit(module, data("statements", tiny_tokenizer))
    both = trainer().test(module, questions, verbose=False)[0]
    assert base["mc2"] != tuned["mc2"] != both["mc2"]
    adapters(module).scale(0.0, "iti")
    assert trainer().test(module, questions, verbose=False)[0] == tuned, "strength 0 is bit-equal"
    adapters(module).enable(False)
    assert trainer().test(module, questions, verbose=False)[0] == base


def test_only_answer_columns_go_through_the_head_and_the_loss_is_the_models_own(
    tiny_folder: Callable[[str], Path], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    module = CausalLM(str(tiny_folder("llama")))
    questions = data("answers", tiny_tokenizer)
    questions.setup()
    batch = next(iter(questions.train_dataloader()))
    rows: list[int] = []
    module.backbone.lm_head.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[1]))
    loss = module.training_step(batch, 0)
    labels = batch["labels"]
    expected = module.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    torch.testing.assert_close(loss, expected)
    assert rows[0] == int((labels[:, 1:] != -100).any(0).sum()) < labels.shape[1]


def test_an_unknown_dtype_is_one_sentence(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="dtype must name a torch dtype"):
        CausalLM(str(tiny_folder("llama")), dtype="float33")


@pytest.fixture
def encoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def classified(tokens: Tensor) -> list[dict[str, Tensor]]:
    """Whether a row's first token is in the upper half of the vocabulary."""
    ids = torch.randint(3, 64, (64, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": (row[0] > 33).long()} for row in ids]


def test_sequence_classifier_trains_its_head_outside_the_backbone(
    encoder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    L.seed_everything(0)
    module = SequenceClassifier(str(encoder), num_labels=2, learning_rate=0.01)
    rows = DataLoader(classified(tokens), batch_size=16)  # type: ignore[arg-type]
    before = trainer().validate(module, rows, verbose=False)[0]["val_accuracy"]
    run = trainer(LoRA(r=4), max_epochs=8, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(module, rows)
    after = trainer().validate(module, rows, verbose=False)[0]["val_accuracy"]
    assert after > before + 0.15
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    back = SequenceClassifier.load_from_checkpoint(path)
    assert torch.equal(back.head.weight, module.head.weight)
    assert trainer().validate(back, rows, verbose=False)[0]["val_accuracy"] == after
    predicted = trainer().predict(back, rows)
    assert predicted is not None and len(torch.cat(predicted)) == 64  # type: ignore[arg-type]


def test_padding_does_not_change_a_classification(encoder: Path, tokens: Tensor) -> None:
    module = SequenceClassifier(str(encoder), num_labels=3).eval()
    row = tokens[:1, :5]
    padded = torch.cat([row, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (torch.arange(9) < 5).long()[None]
    with torch.no_grad():
        alone = module({"input_ids": row, "attention_mask": torch.ones_like(row)})
        torch.testing.assert_close(module({"input_ids": padded, "attention_mask": mask}), alone, atol=1e-5, rtol=1e-5)


def test_sequence_to_sequence_learns_and_generates(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tiny_tokenizer.save_pretrained(tmp_path / "t5")
    module = Seq2SeqLM(str(tmp_path / "t5"), learning_rate=0.02)
    ids = torch.randint(3, 64, (16, 5), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[:3]} for row in ids]
    loader = DataLoader(rows, batch_size=8)  # type: ignore[arg-type]
    before = trainer().test(module, loader, verbose=False)[0]["test_loss"]
    trainer(LoRA(r=4), max_epochs=6).fit(module, loader)
    assert trainer().test(module, loader, verbose=False)[0]["test_loss"] < before
    generated = trainer().predict(module, loader)
    assert generated is not None and generated[0].shape[0] == 8  # type: ignore[union-attr]
