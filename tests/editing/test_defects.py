"""Fourteen defects of the code that inference-time intervention was published with, one test for each.

Numbers and names are those of the list in the documentation of ITI; each test fails where the defect is.
"""

from __future__ import annotations

import builtins
import csv
import gc
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import HEADS, add_offsets, close, logits
from letters import letters_folder
from statements import Module, Statements, trainer
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft import save_adapter
from lightning_peft.callbacks import ITI
from lightning_peft.editing import HeadCapture, compute_iti, head_offsets_config, head_sites
from lightning_peft.editing.directions import DIRECTIONS, mass_mean
from lightning_peft.editing.iti import REFERENCE_POSITIONS
from lightning_peft.models import CausalLM
from lightning_peft.positions import answering
from lightning_peft.stack.adapter_files.baking import bake
from lightning_peft.stack.stack import stack_of
from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule, load_questions
from lightning_peft.truthfulqa.prompts import question_prompt

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = Statements()
START = 3  # the last prompt token of the texts below


def fitted(module: Module, **options: Any) -> ITI:
    iti = ITI(**({"num_heads": 3, "alpha": 4.0} | options))
    trainer(iti).fit(module, DATA.loader())
    return iti


def choices() -> dict[str, Tensor]:
    """Three answers, of 5, 3 and 2 tokens, to one prompt of four."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 64, (3, 9), generator=generator)
    ids[:, : START + 1] = ids[0, : START + 1]
    mask = torch.arange(9) < torch.tensor([[9], [7], [6]])
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask | (torch.arange(9) <= START), -100),
    }


@torch.no_grad()
def probabilities(model: nn.Module, ids: Tensor, start: int = START) -> Tensor:
    """Log-probabilities `[T, vocabulary]` of one text whose prompt ends at `start`."""
    with answering(model, start=torch.tensor([start])):
        return model(input_ids=ids[None]).logits[0].log_softmax(-1)


def test_1_scores_and_cross_entropy_and_divergence_feel_the_edit() -> None:
    """It edited the last position of a call only, whose prediction no score looks at: alpha made no difference."""
    model, batch = tiny("llama"), choices()
    stack = add_offsets(model, "answer")
    edited = ChoiceScorer(model).score(**batch)
    with stack.disabled():
        base = ChoiceScorer(model).score(**batch)
    assert bool(((edited - base).abs() > 0.01).all())

    ids = batch["input_ids"][0]
    q = probabilities(model, ids)
    with stack.disabled():
        p = probabilities(model, ids)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert bool((divergence[START:] > 1e-3).all()) and bool((divergence[:START] == 0).all())
    loss, unedited = (-each[START:-1].gather(1, ids[START + 1 :, None]).mean() for each in (q, p))
    assert float((loss - unedited).abs()) > 0.01
    assert float(edited[0]) == pytest.approx(-5 * float(loss), abs=1e-4), "the scorer's is the same loss"


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("positions", ["answer", "all"])
def test_2_every_row_of_a_batch_is_edited(kind: str, positions: str, tokens: Tensor) -> None:
    """It edited row 0."""
    model = tiny(kind)
    base = logits(model, tokens)
    add_offsets(model, positions)
    with answering(model, start=torch.tensor([2, 4, 6])):
        batched = logits(model, tokens)
    for row, start in enumerate((2, 4, 6)):
        alone = probabilities(model, tokens[row], start)
        assert close(batched[row].log_softmax(-1), alone)
        assert not close(batched[row, start:], base[row, start:], 1e-3)


def test_3_no_answer_token_is_dropped_where_a_tokenizer_merges_the_prefix(tmp_path: Path) -> None:
    """It dropped three tokens as the answer's prefix, which other tokenizers write in two or one."""
    module = CausalLM(str(letters_folder(tmp_path, "llama", words="\na:")))
    encode = module.tokenizer
    assert len(encode("\nA:")["input_ids"]) == 1
    data = TruthfulQADataModule("package", tokenizer=encode, limit=10, primer="", questions_per_batch=1)
    data.setup()
    scorer = ChoiceScorer(module.backbone)
    for question, batch in list(zip(data.test_questions, data.test_dataloader(), strict=True))[:3]:
        found = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
        context = question_prompt(question.text, "")
        for score, choice in zip(found, question.choices, strict=True):
            ids = torch.tensor(encode(f"{context} {choice.text}")["input_ids"])
            first = len(encode(context)["input_ids"])
            each = probabilities(module.backbone, ids)[first - 1 : -1].gather(1, ids[first:, None])
            assert float(score) == pytest.approx(float(each.sum()), abs=1e-3)


@pytest.mark.parametrize(("positions", "first"), [("answer", START), (REFERENCE_POSITIONS, START + 2)])
def test_4_the_first_answer_token_is_predicted_by_the_edited_model(positions: str, first: int) -> None:
    """It began two tokens late; whoever wants that says so."""
    model, ids = tiny("llama"), choices()["input_ids"][0]
    base = probabilities(model, ids)
    add_offsets(model, positions)
    moved = (probabilities(model, ids) - base).abs().amax(-1)
    assert bool((moved[:first] == 0).all()) and bool((moved[first:] > 1e-3).all())


def test_5_every_direction_can_be_had_and_the_control_keeps_the_heads() -> None:
    """Without the mass mean it crashed, probes' weights were lost, and "random" meant random heads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, 4, 6, generator=generator)
    truth, question_id = torch.arange(120) % 2, torch.arange(120) // 4
    x[truth == 1, 1, 2, 1] += 3
    x[..., 1, 2, 3] *= 4
    edits = {name: compute_iti(x, truth, question_id, 3, name) for name in DIRECTIONS}
    assert all(edit.heads == edits["mass_mean"].heads for edit in edits.values())
    found = torch.stack([edit.directions[0] for edit in edits.values()])
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(DIRECTIONS)))
    alike = (found @ found.T - torch.eye(len(found))).abs()
    assert float(alike.max()) < 0.9999, "no two of them are the same"
    layer, head = edits["mass_mean"].heads[0]
    torch.testing.assert_close(found[0], mass_mean(x[:, layer, head : head + 1], truth)[0])


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_6_a_merged_edit_is_the_projection_of_its_vectors(kind: str, tokens: Tensor) -> None:
    """It wrote the heads' vectors themselves into the bias, which lives in another space."""
    model = tiny(kind)
    stack = add_offsets(model)
    edited = logits(model, tokens)
    stack.merge()
    assert close(logits(model, tokens), edited)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_7_merging_adds_the_one_bias_it_needs_and_serves_every_architecture(kind: str) -> None:
    """It switched a flag that gave queries, keys and values biases too, and that LLaMA alone has."""
    model = tiny(kind)
    before = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    stack = add_offsets(model)
    edited = set(stack["edit"].config.target_modules)
    stack.merge()
    after = {n.replace(".base_layer", "") for n, _ in model.named_parameters() if n.endswith("bias")}
    assert after - before <= {f"{name}.bias" for name in edited} and before <= after


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_7_a_baked_model_is_the_edited_one_and_what_its_setting_brings_along_is_zero(
    kind: str, tmp_path: Path, tokens: Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(kind)
    own = {name for name, _ in model.named_parameters()}
    stack = add_offsets(model)
    edited = logits(model, tokens)
    projections = set(stack["edit"].config.target_modules)
    save_adapter(model, tmp_path / "edit")
    bake(tiny(kind), tmp_path / "edit", tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    assert close(logits(baked, tokens), edited)
    for name, parameter in baked.named_parameters():
        assert name in own or name.removesuffix(".bias") in projections or not parameter.any()


def alive() -> int:
    """Numbers in all tensors there are."""
    gc.collect()
    return sum(o.numel() for o in gc.get_objects() if issubclass(type(o), Tensor))


def test_8_nothing_that_was_seen_is_kept() -> None:
    """It kept every call's activations on the device for ever."""
    module = Module()
    fitted(module)
    scorer, batch = ChoiceScorer(module.backbone), choices()
    with HeadCapture(module.backbone, head_sites(module.backbone)) as capture:

        def after(calls: int) -> int:
            for _ in range(calls):
                scorer.score(**batch)
                capture(batch["input_ids"], batch["attention_mask"])
                logits(module.backbone, batch["input_ids"])
            return alive()

        assert after(2) == after(5)


def test_8_a_fit_leaves_the_edit_and_no_activations() -> None:
    module = Module()
    fitted(module)
    before = alive()
    iti = fitted(module)
    assert iti.edit_ is not None
    own = sum(t.numel() for t in (iti.edit_.directions, iti.edit_.sigma, iti.edit_.accuracy))
    assert alive() - before <= 4 * own < len(DATA) * 12 * 8, "less than the pass has read"


@pytest.mark.parametrize("direction", ["mass_mean", "random"])
def test_9_heads_have_the_width_the_model_says(direction: str) -> None:
    """It divided the hidden size by the number of heads, and drew random directions of 128."""
    module = Module("wide_llama")
    config = module.backbone.config
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    edit = fitted(module, direction=direction).edit_
    assert edit is not None and edit.directions.shape == (3, config.head_dim)
    assert edit.accuracy.shape == (config.num_hidden_layers, config.num_attention_heads)
    before = logits(tiny("wide_llama"), choices()["input_ids"])
    assert not close(logits(module.backbone, choices()["input_ids"]), before, 1e-3)


def test_10_activations_and_offsets_are_single_precision() -> None:
    """It captured in half precision, in which 65,504 is the largest number, and rounded the directions to it."""
    module = Module()
    with torch.no_grad():
        module.backbone.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
    edit = fitted(module, num_heads=12).edit_
    assert edit is not None and float(edit.sigma.max()) > 65504 and bool(edit.directions.isfinite().all())
    model = tiny("llama")
    stack = stack_of(model)
    stack.add(head_offsets_config(head_sites(model), HEADS, 1.0, "all"), "edit", computed=True)
    fine = 1 + 2.0**-20  # which a half is not precise enough for
    for tensor in stack.tensors(stack["edit"]).values():
        tensor.fill_(fine)
    seen: list[Tensor] = []
    with seeing(model, seen):
        logits(model, choices()["input_ids"])
        with stack.disabled():
            logits(model, choices()["input_ids"])
    head = slice(8, 16)  # of the first layer, which nothing before it has changed
    added = (seen[0] - seen[1]).double()[..., head]
    assert float((added - fine).abs().max()) < 2.0**-21


@contextmanager
def seeing(model: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Keep what enters the first layer's output projection."""
    projection = model.get_submodule("model.layers.0.self_attn.o_proj.base_layer")
    hook = projection.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    yield
    hook.remove()


@pytest.mark.parametrize("fold", [0, 1])
def test_11_sigma_sees_no_test_question_and_follows_the_seed(fold: int) -> None:
    """It took sigma from all questions, tested ones too, each followed by one drawn without a seed."""
    data = TruthfulQADataModule("package", fold=fold, tokenizer=lambda text: {"input_ids": [text]})  # type: ignore[arg-type]
    data.setup()
    texts = [text for (text,) in data.question_ends(3)]  # type: ignore[misc]
    assert len(texts) == sum(len(q.correct) + len(q.incorrect) for q in data.fold_questions)
    asked = {part.split(" A: ")[0].strip() for text in texts for part in str(text).split("Q: ") if part}
    assert asked <= {q.text for q in data.fold_questions} and asked.isdisjoint(q.text for q in data.test_questions)
    assert data.question_ends(3) == [[text] for text in texts] != data.question_ends(4)


def test_12_scores_need_no_judge_no_network_and_no_waiting(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asked paid judges of a company, which no longer runs them, and slept between calls."""
    module = CausalLM(str(tiny_folder("llama")))
    imports = builtins.__import__

    def without_judges(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("openai", "anthropic", "requests"):
            raise ImportError(name)
        return imports(name, *rest, **more)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was opened, or time was slept away")

    monkeypatch.setattr(builtins, "__import__", without_judges)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(time, "sleep", refuse)
    data = TruthfulQADataModule("package", train="statements", limit=10, primer="")
    iti = ITI(num_heads=3, alpha=4.0)
    run = trainer(iti, limit_val_batches=0)
    run.fit(module, datamodule=data)
    (found,) = run.test(module, datamodule=data, verbose=False)
    assert {"mc1", "mc2", "mc3"} <= found.keys()


def test_13_no_name_decides_what_is_computed() -> None:
    """It looked for "llama" in the model's name to decide what to run."""
    plain, renamed = Module(), Module()
    renamed.backbone.__class__ = type("Mistaken", (type(renamed.backbone),), {})
    renamed.backbone.config._name_or_path = "someone/gpt2-alpaca"
    first, second = fitted(plain).edit_, fitted(renamed).edit_
    assert first is not None and second is not None and first.record == second.record
    assert torch.equal(first.directions, second.directions)
    scores = [ChoiceScorer(module.backbone).score(**choices()) for module in (plain, renamed)]
    assert torch.equal(*scores)


def test_14_what_belongs_to_a_question_is_found_by_its_text(tmp_path: Path) -> None:
    """It overwrote rows of the CSV by number, which in another release are other questions."""
    questions = load_questions("package")[:12]
    task = [
        {
            "question": q.text,
            "mc1_targets": {c.text: c.mc1 for c in q.choices if c.mc1 >= 0},
            "mc2_targets": {c.text: c.mc2 for c in q.choices if c.mc2 >= 0},
        }
        for q in questions
    ]
    (tmp_path / "mc_task.json").write_text(json.dumps(task))
    kept = [q for i, q in enumerate(reversed(questions)) if i not in (2, 7)]  # another order, two of them gone
    with (tmp_path / "TruthfulQA.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        rows.writerows([q.category, q.text, q.best, ";".join(q.correct), ";".join(q.incorrect)] for q in kept)
    there = {q.text: q.category for q in kept}
    loaded = load_questions(tmp_path)
    assert [q.text for q in loaded] == [q.text for q in questions]
    assert [q.category for q in loaded] == [there.get(q.text, "unknown") for q in questions]
    for question, original in zip(load_questions(tmp_path / "TruthfulQA.csv"), kept, strict=True):
        assert (question.text, question.correct) == (original.text, original.correct)


@pytest.mark.data
def test_14_every_release_loads_as_it_is(truthfulqa_data: Path) -> None:
    sizes = [len(load_questions(truthfulqa_data / release)) for release in ("v0", "v1", ".")]
    assert sizes == [817, 817, 790]
