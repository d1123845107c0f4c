"""`fit` with ITI is one pass without gradients, then the edit; afterwards it is an adapter like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from edits import logits
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from statements import QUESTIONS, Module, Statements, trainer
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import adapters, export_checkpoint, load_adapter, load_from_checkpoint, save_adapter
from lightning_peft.callbacks import ITI, PEFT, LoRA
from lightning_peft.editing import capture_tokens, compute_iti, head_sites
from lightning_peft.stack.stack import find_stacks

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode", "ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*Checkpoint directory"),
]
DATA = Statements()


def iti(**options: Any) -> ITI:
    return ITI(**({"num_heads": 3, "alpha": 4.0} | options))


def fitted(module: Module, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    made = trainer(*callbacks, **options)
    made.fit(module, DATA.loader(), DATA.loader())
    return made


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", ""): value.clone()
        for name, value in module.state_dict().items()
        if "lora_" not in name and "head_offsets" not in name
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def answers(module: Module, tokens: Tensor) -> Tensor:
    return logits(module.backbone, tokens, labels=tokens.masked_fill(torch.arange(9) < 3, -100))


# -- the pass -------------------------------------------------------------------------------------------------------


def test_fit_is_one_pass_over_every_example_and_trains_nothing() -> None:
    module = Module()
    before = base_weights(module)
    made = fitted(module, iti(), max_epochs=5)
    assert sorted(module.seen) == sorted(DATA.column("input_ids").sum(-1).tolist())
    assert module.steps == 0 and made.current_epoch == 1 and made.global_step == 1
    assert same(base_weights(module), before)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_edit_is_that_of_the_activations_read_one_by_one(kind: str) -> None:
    module, callback = Module(kind), iti()
    fitted(module, callback)
    model = tiny(kind)
    texts = [row["input_ids"][row["attention_mask"] == 1].tolist() for row in DATA.rows]
    expected = compute_iti(
        capture_tokens(model, head_sites(model), texts, 1), DATA.column("label"), DATA.column("group"), 3
    )
    edit = callback.edit_
    assert edit is not None and edit.heads == expected.heads
    torch.testing.assert_close(edit.directions, expected.directions, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(edit.sigma, expected.sigma, atol=1e-4, rtol=1e-4)
    stack = adapters(module)
    for site, vectors in edit.offsets(head_sites(model)).items():
        assert torch.equal(stack.tensors(stack["iti"])[f"base_model.model.{site}.head_offsets"], vectors)
    assert stack["iti"].config.alpha == 4.0 and stack["iti"].record == edit.record
    assert sum(t.numel() for t in stack.tensors(stack["iti"]).values()) == edit.directions.numel()


def test_validation_sees_the_edited_model() -> None:
    module, callback = Module(), iti()
    made = fitted(module, callback)
    logged = float(made.callback_metrics["val_loss"])
    assert made.callback_metrics["probe_accuracy_best"] == callback.edit_.accuracy.max()
    assert made.callback_metrics["edited_parameters"] == 3 * 8
    with adapters(module).disabled():
        off = trainer().validate(module, DATA.loader(), verbose=False)[0]["val_loss"]
    assert logged == trainer().validate(module, DATA.loader(), verbose=False)[0]["val_loss"] != off


def test_the_language_model_head_runs_in_validation_only() -> None:
    module, fired = Module(), []
    module.backbone.lm_head.register_forward_hook(lambda *_: fired.append(True))
    trainer(iti()).fit(module, DATA.loader())
    assert not fired


def test_later_epochs_are_no_ops() -> None:
    module, callback = Module(), iti()
    calls = []
    module.backbone.model.register_forward_hook(lambda *_: calls.append(True))
    made = trainer(callback, min_epochs=3, max_epochs=5)
    made.fit(module, DATA.loader())
    assert made.current_epoch == 3 and made.global_step == 1
    assert len(calls) == len(DATA.loader()) and len(module.seen) == 3 * len(DATA)
    once, alone = iti(), Module()
    trainer(once).fit(alone, DATA.loader())
    assert same(alone.state_dict(), module.state_dict())


def test_a_limited_pass_uses_the_batches_it_was_given() -> None:
    module, callback = Module(), iti()
    trainer(callback, limit_train_batches=4).fit(module, DATA.loader())
    assert callback.edit_ is not None and callback.edit_.record["statements"] == 20


def test_batches_may_be_any_mapping() -> None:
    """As a tokenizer's `pad` makes them."""
    from transformers import BatchEncoding

    def collate(rows: list[dict[str, Any]]) -> BatchEncoding:
        return BatchEncoding(torch.utils.data.default_collate(rows))

    callback = iti()
    trainer(callback).fit(Module(), DATA.loader(collate_fn=collate))
    assert callback.edit_ is not None and callback.edit_.record["statements"] == len(DATA)


def test_a_hand_written_module_is_edited_by_pattern() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.proj = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.proj(self.value(x).cumsum(1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(64, 16), nn.Sequential(Attention(), Attention())
            self.out = nn.Linear(16, 64)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(self.blocks(self.embed(input_ids)))

    class Plain(Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Net()

        def _loss(self, batch: dict[str, Tensor]) -> Tensor:
            return self.backbone(batch["input_ids"]).flatten(0, 1)[:, 0].mean()

    module = Plain()
    with pytest.raises(
        ValueError, match=r"^Net has no configuration that says how many heads it has: .*heads_per_layer"
    ):
        trainer(iti(pattern="proj")).fit(module, DATA.loader())
    base = module.backbone(DATA.column("input_ids"))
    trainer(iti(pattern="proj", heads_per_layer=4)).fit(module, DATA.loader())
    assert adapters(module)["iti"].config.head_dim == 4
    assert not torch.equal(module.backbone(DATA.column("input_ids")), base)


ENDS = [*([9, 10, 11 + i] for i in range(20)), [5]]


def test_sigma_is_that_of_the_texts_that_are_given() -> None:
    plain, module, callback = iti(), Module(), iti(question_ends=True, sigma_texts=ENDS)
    trainer(plain).fit(Module(), DATA.loader())
    trainer(callback).fit(module, DATA.loader())
    edit, own = callback.edit_, plain.edit_
    assert edit is not None and own is not None and edit.heads == own.heads
    assert torch.equal(edit.directions, own.directions) and not torch.equal(edit.sigma, own.sigma)
    model = tiny("llama")
    read = capture_tokens(model, head_sites(model), ENDS)
    for i, (layer, head) in enumerate(edit.heads):
        expected = (read[:, layer, head] @ edit.directions[i]).std(unbiased=False)
        torch.testing.assert_close(edit.sigma[i], expected)
    assert was_restored(module)


def test_reference_takes_the_texts_and_the_authors_positions() -> None:
    module, callback = Module(), iti(reference=True, sigma_texts=ENDS)
    trainer(callback).fit(module, DATA.loader())
    assert callback.edit_ is not None and callback.edit_.record["sigma_texts"] == 21
    assert callback.edit_.record["reference"] and adapters(module)["iti"].config.positions == "generated[1:]"
    assert iti().positions == "answer" == iti(reference=True, positions="answer").positions


@pytest.mark.parametrize("option", ["question_ends", "reference"])
def test_data_without_texts_for_sigma(option: str) -> None:
    before_the_pass([iti(**{option: True})], r"^ITI takes sigma over texts that end in a question, and has none: give")


def test_texts_for_sigma_may_be_strings_where_the_module_has_a_tokenizer() -> None:
    module, callback = Module(), iti(sigma_texts=["11", "12 13", "20"])
    with pytest.raises(ValueError, match=r"^sigma_texts are strings, and the LightningModule has no tokenizer: give"):
        trainer(callback).fit(module, DATA.loader())
    assert was_restored(module)
    module.tokenizer = lambda text: {"input_ids": [int(word) for word in text.split()]}  # type: ignore[assignment]
    trainer(callback).fit(module, DATA.loader())
    other = iti(sigma_texts=[[11], [12, 13], [20]])
    trainer(other).fit(Module(), DATA.loader())
    assert torch.equal(callback.edit_.sigma, other.edit_.sigma) and callback.edit_.record["sigma_texts"] == 3


# -- names of one's own ---------------------------------------------------------------------------------------------


def renamed(**names: str) -> DataLoader:
    """The same statements under other keys."""
    rows = [{names.get(key, key): value for key, value in row.items()} for row in DATA.rows]
    return DataLoader(rows, batch_size=5)  # type: ignore[arg-type]


def test_labels_and_groups_are_read_where_the_user_says() -> None:
    plain, own, old = (
        iti(),
        iti(label_key="is_wanted", group_key="pair"),
        iti(label_key="truth", group_key="question_id"),
    )
    trainer(plain).fit(Module(), DATA.loader())
    trainer(own).fit(Module(), renamed(label="is_wanted", group="pair"))
    trainer(old).fit(Module(), renamed(label="truth", group="question_id"))
    assert plain.edit_.record == own.edit_.record == old.edit_.record


@pytest.mark.parametrize(
    ("options", "names", "message"),
    [
        (
            {},
            {"label": "truth"},
            r"^ITI needs .* no label: what was 'truth' is 'label' now, so rename it, `batch\[\"label\"\] = "
            r"batch\.pop\(\"truth\"\)`, or give label_key=\"truth\"\.$",
        ),
        ({}, {"group": "question_id"}, r"^ITI needs .* no group: what was 'question_id' is 'group' now, so rename it"),
        ({"label_key": "wanted"}, {}, r"^ITI needs .* no wanted: wanted is `torch\.tensor\(\[1, 0, …\]\)`"),
        ({"label_key": "length"}, {}, r"^ITI reads length as 1 \(wanted, true\) or 0 \(not\), got 4, 5, 6, 7, 8: make"),
        (
            {"group_key": "name"},
            {},
            r"^ITI reads name as a tensor of integers, .*, got a list of texts such as .* for 5 rows: ",
        ),
        ({"group_key": "labels"}, {}, r"^ITI reads labels as .*, got \[5, 8\], torch\.int64 for 5 rows: "),
    ],
)
def test_keys_that_do_not_fit_are_one_sentence(options: dict[str, str], names: dict[str, str], message: str) -> None:
    rows = [
        {names.get(key, key): value for key, value in row.items()}
        | {"length": int(row["attention_mask"].sum()), "name": str(row["group"])}
        for row in DATA.rows
    ]
    module = Module()
    with pytest.raises(ValueError, match=message):
        trainer(iti(**options)).fit(module, DataLoader(rows, batch_size=5))  # type: ignore[arg-type]
    assert was_restored(module)


def test_a_second_fit_computes_the_same_edit_again() -> None:
    module = Module()
    fitted(module, iti())
    first = {k: v.clone() for k, v in module.state_dict().items()}
    fitted(module, iti())
    assert same(module.state_dict(), first) and len(adapters(module).parts) == 1


def test_other_settings_on_the_same_module_are_an_error() -> None:
    module = Module()
    fitted(module, iti())
    with pytest.raises(
        ValueError, match=r"^The backbone already has an adapter 'iti' with other settings: alpha: 4\.0 !="
    ):
        trainer(iti(alpha=9.0)).fit(module, DATA.loader())


# -- what remains ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_and_restores_the_edit_bit_for_bit(tmp_path: Path, tokens: Tensor) -> None:
    module, keep = Module(), ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    fitted(module, iti(), keep, enable_checkpointing=True)
    path = Path(keep.best_model_path)
    assert path.is_file() and path.stat().st_size < 30_000
    loss = trainer().test(module, DATA.loader(), verbose=False)[0]["test_loss"]
    edited = answers(module, tokens)
    assert not torch.equal(edited, answers(Module(), tokens))

    tested = Module()
    result = trainer(iti()).test(tested, DATA.loader(), ckpt_path=path, verbose=False)
    assert result[0]["test_loss"] == loss and torch.equal(answers(tested, tokens), edited)
    assert torch.equal(answers(load_from_checkpoint(Module, path), tokens), edited)
    exported = tiny("llama")
    load_adapter(exported, export_checkpoint(path, tmp_path / "exported"))
    assert torch.equal(logits(exported, tokens, labels=tokens.masked_fill(torch.arange(9) < 3, -100)), edited)


def test_best_is_taken_from_the_trainer_that_fitted(tmp_path: Path) -> None:
    module = Module()
    made = fitted(
        module, iti(), ModelCheckpoint(tmp_path, monitor="val_loss"), enable_checkpointing=True, num_sanity_val_steps=2
    )
    loss = made.test(module, DATA.loader(), ckpt_path="best", verbose=False)[0]["test_loss"]
    with adapters(module).disabled():
        assert trainer().test(module, DATA.loader(), verbose=False)[0]["test_loss"] != loss


@pytest.mark.parametrize("max_epochs", [1, 2])  # 1: the pass is over, and the edit is the checkpoint's
def test_fitting_on_from_a_checkpoint_gives_the_same_edit(max_epochs: int, tmp_path: Path) -> None:
    module, keep = Module(), ModelCheckpoint(tmp_path)
    fitted(module, iti(), keep, enable_checkpointing=True)
    again = Module()
    resumed = trainer(iti(), max_epochs=max_epochs)
    resumed.fit(again, DATA.loader(), ckpt_path=keep.best_model_path)
    assert same(again.state_dict(), module.state_dict())


def test_the_adapter_folder_has_the_edit_and_its_record(tmp_path: Path, tokens: Tensor) -> None:
    module, callback = Module(), iti()
    fitted(module, callback)
    save_adapter(module, tmp_path)
    model = tiny("llama")
    (part,) = load_adapter(model, tmp_path)
    given = {"labels": tokens.masked_fill(torch.arange(9) < 3, -100)}
    assert torch.equal(logits(model, tokens, **given), answers(module, tokens))
    assert part.computed and callback.edit_ is not None and part.record == callback.edit_.record


def test_scale_and_switch_work_after_fit(tokens: Tensor) -> None:
    module = Module()
    base = answers(module, tokens)
    fitted(module, iti(alpha=2.0))
    edited, stack = answers(module, tokens), adapters(module)
    with stack.disabled("iti"):
        assert torch.equal(answers(module, tokens), base)
    stack.scale(0.0)
    assert torch.equal(answers(module, tokens), base)
    stack.scale(2.0)
    double = Module()
    fitted(double, iti(alpha=4.0))
    assert torch.equal(answers(module, tokens), answers(double, tokens))
    stack.scale(1.0)
    assert torch.equal(answers(module, tokens), edited)


def test_an_edit_of_all_positions_can_be_merged(tokens: Tensor) -> None:
    module = Module()
    fitted(module, iti(positions="all"))
    edited = logits(module.backbone, tokens)
    adapters(module).merge()
    torch.testing.assert_close(logits(module.backbone, tokens), edited, atol=1e-4, rtol=1e-4)


# -- before and after -----------------------------------------------------------------------------------------------


def was_restored(module: Module) -> bool:
    untouched = not {"training_step", "configure_optimizers"} & set(module.__dict__)
    hooks = [hook for m in module.backbone.model.layers.modules() for hook in m._forward_pre_hooks]
    return untouched and module.automatic_optimization and not hooks


def test_what_was_replaced_is_put_back_and_training_works_again() -> None:
    module = Module()
    fitted(module, iti())
    assert was_restored(module) and not any(p.requires_grad for p in module.parameters())
    adapters(module).remove("iti")
    before = base_weights(module)
    fitted(module, LoRA(r=2))
    assert module.steps == len(DATA.loader()) and same(base_weights(module), before)
    assert any(float(t.abs().max()) > 0 for k, t in module.state_dict().items() if "lora_B" in k)


def test_what_was_replaced_is_put_back_after_an_exception(tokens: Tensor) -> None:
    class Failing(Module):
        fail = True

        def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            if batch_idx == 2 and self.fail:
                raise KeyError("mid-epoch")

    module = Failing()
    module.training_step = own = module.training_step  # something of the user's on the instance
    base = answers(module, tokens)
    with pytest.raises(KeyError, match="mid-epoch"):
        trainer(iti()).fit(module, DATA.loader())
    assert module.__dict__.pop("training_step") is own and was_restored(module)
    assert torch.equal(answers(module, tokens), base)
    module.fail = False
    fitted(module, iti())
    expected = Module()
    fitted(expected, iti())
    assert torch.equal(answers(module, tokens), answers(expected, tokens))


def test_a_tuned_adapter_cannot_come_on_top_of_the_edit() -> None:
    module = Module()
    fitted(module, iti())
    with pytest.raises(
        ValueError, match=r"^Adapter 'lora' is tuned and belongs below the edit 'iti': tune first, then ed"
    ):
        trainer(LoRA(r=2)).fit(module, DATA.loader())
    assert was_restored(module)


def test_lora_then_iti_is_a_stack_that_checkpoints_and_restores(tmp_path: Path, tokens: Tensor) -> None:
    module, keep = Module(), ModelCheckpoint(tmp_path)
    fitted(module, LoRA(r=2, target_modules=["o_proj", "q_proj"]))
    tuned, trained = answers(module, tokens), {k: v.clone() for k, v in module.state_dict().items()}
    callback = iti()
    fitted(module, callback, keep, enable_checkpointing=True)
    stack = adapters(module)
    assert [(p.name, p.computed) for p in stack.parts] == [("lora", False), ("iti", True)]
    with stack.disabled("iti"):
        assert torch.equal(answers(module, tokens), tuned)
    with stack.disabled():
        assert torch.equal(answers(module, tokens), answers(Module(), tokens))
    lora = {k: v for k, v in trained.items() if "lora_" in k}
    now = {k.replace("o_proj.base_layer.lora", "o_proj.lora"): v for k, v in module.state_dict().items()}
    assert lora and all(torch.equal(now[k], v) for k, v in lora.items())

    # the edit is that of the tuned model, not of the base
    sites = head_sites(module.backbone)
    texts = [row["input_ids"][row["attention_mask"] == 1].tolist() for row in DATA.rows]
    with stack.disabled("iti"):
        read = capture_tokens(module.backbone, sites, texts)
    assert callback.edit_ is not None
    assert callback.edit_.heads == compute_iti(read, DATA.column("label"), DATA.column("group"), 3).heads

    both = answers(module, tokens)
    path = keep.best_model_path
    assert torch.equal(answers(load_from_checkpoint(Module, path), tokens), both)
    for callbacks in ([iti()], [LoRA(r=2, target_modules=["o_proj", "q_proj"])]):
        fresh = Module()
        trainer(*callbacks).test(fresh, DATA.loader(), ckpt_path=path, verbose=False)
        assert torch.equal(answers(fresh, tokens), both)
    save_adapter(module, tmp_path / "folder")
    model = tiny("llama")
    load_adapter(model, tmp_path / "folder")
    given = {"labels": tokens.masked_fill(torch.arange(9) < 3, -100)}
    assert torch.equal(logits(model, tokens, **given), both)


def test_a_second_edit_is_computed_on_top_of_the_first(tokens: Tensor) -> None:
    module = Module()
    fitted(module, iti())
    first = answers(module, tokens)
    fitted(module, iti(name="second", direction="random", positions="generated"))
    with adapters(module).disabled("second"):
        assert torch.equal(answers(module, tokens), first)
    assert not torch.equal(answers(module, tokens), first)
    assert [part.name for part in adapters(module).parts] == ["iti", "second"]


def test_computed_offsets_can_be_trained_on(tokens: Tensor) -> None:
    module = Module()
    fitted(module, iti())
    part = adapters(module)["iti"]
    before = {k: v.clone() for k, v in adapters(module).tensors(part).items()}
    frozen = base_weights(module)
    fitted(module, PEFT(part.config, name="iti"))
    after = adapters(module).tensors(adapters(module)["iti"])
    assert module.steps == len(DATA.loader()) and same(base_weights(module), frozen)
    assert all(not torch.equal(after[k], before[k]) for k in before)


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, r"^direction must be one of mass_mean, probe_weight, ccs, pca, random, got 'up'\.$"),
        (
            {"positions": "some"},
            r"^positions must be one of all, prompt, answer, generated, last, last_prompt, or .*got 'some'\.$",
        ),
        ({"strength": "much"}, r"^strength must be one of equal, accuracy, got 'much'\.$"),
        ({"num_heads": 0}, r"^num_heads must be at least 1, got 0\.$"),
        ({"val_fraction": 1.0}, r"^val_fraction must be between 0 and 1, got 1\.0\.$"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iti(**options)


def before_the_pass(callbacks: list[L.Callback], message: str, **fit: Any) -> None:
    """The error comes before the first batch, and the module can be used afterwards."""
    module = Module()
    with pytest.raises(ValueError, match=message):
        trainer(*callbacks).fit(module, **(fit or {"train_dataloaders": DATA.loader()}))
    assert not module.seen and was_restored(module)


def test_more_heads_than_the_model_has() -> None:
    before_the_pass([iti(num_heads=13)], r"^num_heads is 13, but the model has 12 heads\.$")


def test_an_unknown_architecture() -> None:
    before_the_pass([iti(pattern="nothing")], r"^No attention output projection was found in LlamaForCausalLM: give ")


def test_true_texts_alone_are_refused_before_the_model_reads_any() -> None:
    module, calls = Module(), []
    module.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    module.backbone.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"^Statements of both classes are needed, .* are \[1\]: let "):
        trainer(iti()).fit(module, Statements(truth=1).loader())
    assert not calls and was_restored(module)


def test_sorted_by_label_the_edit_is_the_same_and_every_text_is_read() -> None:
    rows = sorted(DATA.rows, key=lambda row: row["label"])
    module, callback = Module(), iti()
    trainer(callback).fit(module, DataLoader(rows, batch_size=5))
    texts = [row["input_ids"][row["attention_mask"] == 1].tolist() for row in rows]
    read = capture_tokens(tiny("llama"), head_sites(tiny("llama")), texts, 1)
    truth, questions = (torch.tensor([row[key] for row in rows]) for key in ("label", "group"))
    assert callback.edit_.heads == compute_iti(read, truth, questions, 3).heads


def test_a_data_module_may_have_a_kind_of_its_own() -> None:
    class Own(L.LightningDataModule):
        kind = "answers"

        def train_dataloader(self) -> Any:
            return DATA.loader()

    module = Module()
    trainer(iti()).fit(module, datamodule=Own())
    assert "iti" in adapters(module)


def test_another_adaptation_in_the_same_fit() -> None:
    message = r"^ITI takes the whole of fit, so LoRA cannot share it: fit one after the other, each in a Trainer of its"
    before_the_pass([LoRA(r=2), iti()], message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Statements(drop=("label",)),
            r"^ITI needs input_ids, label, group, but the .* has no label: label is `to",
        ),
        (
            Statements(drop=("label", "group")),
            r"batch has no label and no group: label is .*; group is",
        ),
        (
            Statements(truth=1),
            r"^Statements of both classes are needed, label 0 and 1; the .* are \[1\]: let ",
        ),
    ],
)
def test_data_without_both_labels(data: Statements, message: str, tokens: Tensor) -> None:
    module = Module()
    with pytest.raises(ValueError, match=message):
        trainer(iti()).fit(module, data.loader())
    assert was_restored(module) and torch.equal(answers(module, tokens), answers(Module(), tokens))


def test_activations_that_are_not_finite() -> None:
    module = Module()
    module.backbone.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^The activations of layer 1, head 0 contain NaN or infinite values\.$"):
        trainer(iti()).fit(module, DATA.loader())
    assert was_restored(module)


class Stop(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(("callbacks", "options"), [([Stop()], {}), ([], {"limit_train_batches": 0})])
def test_a_fit_that_ends_before_the_pass_does(callbacks: list[L.Callback], options: dict[str, Any]) -> None:
    """As a time limit would end it: no edit of zeros is passed off as one."""
    module = Module()
    with pytest.raises(
        RuntimeError, match=r"^ITI computed nothing, because fit ended before the first epoch did: it nee"
    ):
        trainer(iti(), *callbacks, **options).fit(module, DATA.loader())
    assert was_restored(module)


# -- two processes --------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from lightning_peft import adapters, save_adapter
from lightning_peft.callbacks import ITI
from lightning.pytorch.callbacks import ModelCheckpoint
from statements import Module, Statements, trainer

module, folder = Module(), sys.argv[1]
made = trainer(
    ITI(num_heads=3, alpha=4.0), ModelCheckpoint(folder, filename="last"), devices=2, strategy="ddp",
    enable_checkpointing=True, min_epochs=2, max_epochs=3,
)
made.fit(module, Statements().loader(shuffle=True), Statements().loader())
save_adapter(module, f"{folder}/rank{made.global_rank}")
assert made.world_size == 2 and made.global_step == 1
"""

WRONG = """
from lightning_peft.callbacks import ITI
from statements import Module, Statements, trainer

trainer(ITI(num_heads=3), devices=2, strategy="ddp").fit(Module(), Statements(truth=0).loader())
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    tests = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (tests.parent, tests)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(folder / "script.py"), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_two_processes_compute_the_edit_of_one(tmp_path: Path) -> None:
    """27 statements on two processes: the sampler adds one, which must not count."""
    assert len(DATA) % 2 == 1
    ran = run(SCRIPT, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    module, callback = Module(), iti()
    fitted(module, callback)
    save_adapter(module, tmp_path / "one")
    one, *two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "rank0", "rank1"))
    assert same(*two)
    assert one.keys() == two[0].keys()
    for key, value in one.items():
        torch.testing.assert_close(two[0][key], value, atol=1e-4, rtol=1e-4)
    stack = adapters(load_from_checkpoint(Module, tmp_path / "last.ckpt"))
    assert same(stack.tensors(stack["iti"]), two[0])
    assert stack["iti"].record["statements"] == len(DATA) and stack["iti"].record["questions"] == QUESTIONS


@pytest.mark.slow
def test_an_error_in_the_computation_ends_every_process(tmp_path: Path) -> None:
    ran = run(WRONG, tmp_path)
    assert ran.returncode != 0 and ran.stderr.count("ValueError: Statements of both classes are needed") >= 2


def test_nothing_is_injected_twice() -> None:
    module = Module()
    for _ in range(2):
        fitted(module, iti())
        trainer(iti()).validate(module, DATA.loader(), verbose=False)
    assert list(find_stacks(module)) == ["backbone"]
    names = [name for name, m in module.named_modules() if type(m).__name__ == "HeadOffsetsLayer"]
    assert len(names) == len({name.split(".base_layer")[0] for name in names})
