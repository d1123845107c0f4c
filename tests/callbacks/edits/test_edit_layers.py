"""CAA, RepE, ActAdd, Ablation and gated ITI: one pass, then an adapter like any other; LayerOffsets is CAA trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from edits import close, logits
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from statements import Module, Statements, trainer
from tiny_models import tiny
from torch import Tensor
from tuning import QUIET, Language, base_weights, fit, one_sentence

from lightning_peft import adapters, load_from_checkpoint, save_adapter
from lightning_peft.backbone.layers import stream_writers
from lightning_peft.callbacks import CAA, ITI, Ablation, ActAdd, Edit, LayerOffsets, RepE
from lightning_peft.callbacks.edits.act_add import encode_alike
from lightning_peft.editing import ablation_direction, caa_vectors, capture_texts, layer_sites, repe_vectors
from lightning_peft.editing.capture import Capture

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:.*in eval mode")]
DATA = Statements()
KINDS = ("llama", "gpt2", "gpt_neox", "opt")


class Letters:
    """A tokenizer that begins every text with token 1 and gives each letter a token."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [3 + ord(letter) % 60 for letter in text]}


class Tokenized(Module):
    def __init__(self, kind: str = "llama", learning_rate: float = 0.01) -> None:
        super().__init__(kind, learning_rate)
        self.tokenizer = Letters()


EDITS: dict[str, Any] = {
    "CAA": lambda **o: CAA(**({"multiplier": 2.0} | o)),
    "adaptive CAA": lambda **o: CAA(**({"multiplier": 2.0, "gate": "adaptive", "beta": 0.1} | o)),
    "conditional CAA": lambda **o: CAA(**({"multiplier": 4.0, "gate": "conditional"} | o)),
    "RepE": lambda **o: RepE(**({"coeff": 2.0} | o)),
    "ActAdd": lambda **o: ActAdd("Love", "Hat", **o),
    "Ablation": lambda **o: Ablation(**o),
    "Ablation of blocks": lambda **o: Ablation(sites="block", **o),
    "adaptive ITI": lambda **o: ITI(**({"num_heads": 3, "alpha": 4.0, "gate": "adaptive"} | o)),
    "conditional ITI": lambda **o: ITI(**({"num_heads": 3, "alpha": 4.0, "gate": "conditional"} | o)),
}


def fitted(callback: Edit, kind: str = "llama", **options: Any) -> Tokenized:
    module = Tokenized(kind)
    trainer(callback, **options).fit(module, DATA.loader())
    return module


def answers(module: Any, tokens: Tensor) -> Tensor:
    return logits(module, tokens, labels=tokens.masked_fill(torch.arange(9) < 3, -100))


def activations(kind: str, layers: slice) -> Tensor:
    """What plain hooks read behind blocks at the statements' last tokens, text by text."""
    model, read = tiny(kind), []
    texts = [row["input_ids"][row["attention_mask"] == 1].tolist() for row in DATA.rows]
    with Capture(model, layer_sites(model)[layers]) as capture:
        read = [capture(torch.tensor([text])) for text in texts]
    return torch.cat(read)


# -- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_caa_installs_the_vectors_of_activations_read_one_by_one(kind: str) -> None:
    callback = CAA(layers=[0, 2], multiplier=3.0)
    stack = adapters(fitted(callback, kind))
    x, truth, question = activations(kind, slice(0, 3, 2)), DATA.column("label"), DATA.column("group")
    expected = caa_vectors(x, truth, question)
    names = [layer_sites(tiny(kind))[layer].name for layer in (0, 2)]
    for name, vector in zip(names, expected, strict=True):
        saved = stack.tensors(stack["caa"])[f"base_model.model.{name}.layer_edits.layer_offsets"]
        torch.testing.assert_close(saved[0], vector, atol=1e-4, rtol=1e-4)
    record = stack["caa"].record
    assert record["method"] == "CAA" and record["layers"] == names and record["statements"] == len(DATA)
    assert stack["caa"].config.alpha == 3.0 and callback.edit_ is not None and len(record["data_hash"]) == 64


def test_the_default_layers_are_the_middle_one_and_the_middle_third() -> None:
    assert list(adapters(fitted(CAA()))["caa"].config.target_modules) == ["model.layers.1"]
    callback = RepE()
    assert list(adapters(fitted(callback))["repe"].config.target_modules) == ["model.layers.1"]
    assert [callback.default_layers(count) for count in (1, 2, 30)] == ["0:1", "0:1", "10:20"]
    expected = repe_vectors(activations("llama", slice(1, 2)), DATA.column("label"), DATA.column("group"))
    assert callback.edit_ is not None
    torch.testing.assert_close(callback.edit_.vectors, expected, atol=1e-3, rtol=1e-3)


def test_an_ablation_takes_one_direction_out_of_all_that_writes() -> None:
    callback = Ablation(layer=2)
    module = fitted(callback)
    stack = adapters(module)
    assert list(stack["ablation"].config.target_modules) == stream_writers(tiny("llama"))
    expected = ablation_direction(activations("llama", slice(2, 3)), DATA.column("label"))[0]
    for tensor in stack.tensors(stack["ablation"]).values():
        torch.testing.assert_close(tensor[0], expected, atol=1e-4, rtol=1e-4)
    left = capture_texts(module.backbone, layer_sites(module.backbone), [[5, 6, 7, 8]], "all").values @ expected
    before = capture_texts(tiny("llama"), layer_sites(tiny("llama")), [[5, 6, 7, 8]], "all").values @ expected
    assert float(left.abs().max()) < 1e-4 < float(before.abs().min())


@pytest.mark.parametrize("kind", KINDS)
def test_act_add_at_strength_one_turns_one_prompts_front_into_the_others(kind: str) -> None:
    """Added to the prompt that is led away from, the difference gives the other's activations."""
    module = fitted(ActAdd("Love", "Hat"), kind)
    love, hate = encode_alike(Letters(), "Love", "Hat")
    assert love[0] == hate[0] == 1 and len(love) == len(hate) == 5
    sites = layer_sites(module.backbone)[1:2]
    led = capture_texts(module.backbone, sites, [hate], "all").values
    torch.testing.assert_close(led, capture_texts(tiny(kind), sites, [love], "all").values, atol=1e-4, rtol=1e-4)
    assert not close(led, capture_texts(tiny(kind), sites, [hate], "all").values, 1e-2)


def test_act_add_looks_at_no_batch_and_runs_the_two_prompts_alone() -> None:
    module, seen = Tokenized(), []
    module.backbone.model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(1), with_kwargs=True)
    trainer(ActAdd("Love", "Hat")).fit(module, DATA.loader(batch_size=1))
    assert len(seen) < 10 < len(DATA)


@pytest.mark.parametrize("gate", ["adaptive", "conditional"])
def test_gated_iti_carries_the_probes_of_its_heads(gate: Any) -> None:
    """They tell the statements' truth at the very activations that were read; vectors are as without a gate."""
    gated, plain = (ITI(num_heads=3, alpha=4.0, gate=g, beta=0.2) for g in (gate, None))
    stack, without = adapters(fitted(gated)), adapters(fitted(plain))
    tensors = stack.tensors(stack["iti"])
    for key, vectors in without.tensors(without["iti"]).items():
        assert torch.equal(tensors[key], vectors)
        assert tensors[f"{key}_probe"].shape == (len(vectors), 9)
    assert len(tensors) == 2 * len(without.tensors(without["iti"]))
    assert stack["iti"].config.gate == gate and stack["iti"].config.beta == 0.2


# -- an adapter like any other --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_a_fitted_edit_has_a_dial_and_an_off_switch(name: str, tokens: Tensor) -> None:
    """At -1 it is what an edit of reversed strength is, computed anew."""
    module, base = fitted(EDITS[name]()), answers(tiny("llama"), tokens)
    stack, moved = adapters(module), answers(module.backbone, tokens)
    assert not close(moved, base, 1e-3) and not any(p.requires_grad for p in module.parameters())
    stack.scale(0.0)
    assert torch.equal(answers(module.backbone, tokens), base)
    stack.scale(-1.0)
    backwards = answers(module.backbone, tokens)
    assert not close(backwards, base, 1e-3) and not close(backwards, moved, 1e-3)
    stack.scale(1.0)
    assert torch.equal(answers(module.backbone, tokens), moved)
    with stack.disabled():
        assert torch.equal(answers(module.backbone, tokens), base)


@pytest.mark.parametrize("name", EDITS)
def test_a_fitted_edit_is_loaded_from_its_folder_and_its_checkpoint(name: str, tmp_path: Path, tokens: Tensor) -> None:
    keep = ModelCheckpoint(tmp_path, filename="edit")
    module = Tokenized()
    trainer(EDITS[name](), keep, enable_checkpointing=True).fit(module, DATA.loader())
    expected = answers(module.backbone, tokens)
    assert torch.equal(answers(load_from_checkpoint(Tokenized, tmp_path / "edit.ckpt").backbone, tokens), expected)
    folder = save_adapter(module, tmp_path / "folder")
    assert torch.equal(answers(PeftModel.from_pretrained(tiny("llama"), folder), tokens), expected)


@pytest.mark.parametrize("name", EDITS)
def test_a_second_fit_computes_the_same_edit_again(name: str) -> None:
    module = fitted(EDITS[name]())
    first = {key: value.clone() for key, value in module.state_dict().items()}
    trainer(EDITS[name]()).fit(module, DATA.loader())
    again = module.state_dict()
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)
    assert len(adapters(module).parts) == 1 and not module.steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_ablation_can_be_merged(kind: str, tokens: Tensor) -> None:
    module = fitted(Ablation(), kind)
    unmerged = logits(module.backbone, tokens)
    adapters(module).merge()
    assert close(logits(module.backbone, tokens), unmerged)


def test_an_edit_is_computed_on_top_of_what_is_there() -> None:
    """Layer offsets, then heads, then layers: each names what it edits as in the bare model."""
    module = Tokenized()
    for callback in (CAA(), ITI(num_heads=3), CAA(name="second", layers=[1, 2]), Ablation()):
        trainer(callback).fit(module, DATA.loader())
    assert [part.name for part in adapters(module).parts] == ["caa", "iti", "second", "ablation"]


# -- trained --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", ["block", "attention", "mlp"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layer_offsets_train_a_vector_a_site_and_nothing_else(kind: str, sites: Any) -> None:
    module = Language(kind)
    before = base_weights(module)
    fit(module, LayerOffsets(sites=sites, layers="1:"))
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 2 * 32
    now = {key: value for key, value in base_weights(module).items() if "layer_edits" not in key}
    assert all(torch.equal(now[key], value) for key, value in before.items())
    stack = adapters(module)
    assert all(tensor.any() for tensor in stack.tensors(stack["layer_offsets"]).values())


def test_what_caa_computes_can_be_trained_on() -> None:
    module = fitted(CAA(layers=[1], positions="all"))
    part = adapters(module)["caa"]
    before = {key: value.clone() for key, value in adapters(module).tensors(part).items()}
    trainer(LayerOffsets(layers=[1], name="caa")).fit(module, DATA.loader())
    after = adapters(module).tensors(adapters(module)["caa"])
    assert module.steps and before.keys() == after.keys() and not any(torch.equal(after[k], before[k]) for k in before)


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CAA(gate="some"), "gate must be None, 'adaptive' or 'conditional', got 'some'."),  # type: ignore[arg-type]
        (lambda: ITI(gate="conditional", threshold=0.0), "threshold must be between 0 and 1, got 0.0."),
        (lambda: CAA(sites="heads", layers=[0], positions="some"), "positions must be one of all"),  # type: ignore[arg-type]
        (lambda: Ablation(sites="some"), "sites must be writes, block, attention or mlp, got 'some'."),  # type: ignore[arg-type]
        (lambda: ActAdd("a", "a"), "Both prompts are 'a', and between them there is no difference to add."),
        (lambda: ActAdd(positions="last"), "positions must be all, prompt, answer or generated, got 'last'."),  # type: ignore[arg-type]
        (lambda: LayerOffsets(positions="some"), "positions must be"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message) and one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("callback", "data", "message"),
    [
        (CAA(layers=[3]), DATA, r"^Layer 3 was asked for, but there are 3, from 0\.$"),
        (
            RepE(),
            Statements(truth=1),
            r"^Statements of both classes are needed, label 0 and 1; the values given are \[1\]",
        ),
        (
            CAA(),
            Statements(drop=("label",)),
            r"^CAA needs .* but the training batch has no label: label is `torch",
        ),
        (
            ActAdd(),
            DATA,
            r"^ActAdd needs a tokenizer for its prompts: give the LightningModule one, or ActAdd\(tokenizer=…\)\.$",
        ),
    ],
)
def test_what_cannot_be_computed_is_one_sentence(callback: Edit, data: Statements, message: str) -> None:
    module = Module()
    with pytest.raises(ValueError, match=message):
        trainer(callback).fit(module, data.loader())
    assert not {"training_step", "configure_optimizers"} & set(module.__dict__)


def test_activations_that_are_not_finite_are_one_sentence() -> None:
    module = Module()
    module.backbone.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^The activations of site 0 contain NaN or infinite values\.$"):
        trainer(CAA()).fit(module, DATA.loader())


def test_answers_in_an_encoder_are_one_sentence() -> None:
    class Seq2Seq(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny("t5")

    with pytest.raises(ValueError, match=r"^The answer of an encoder-decoder such as T5.* for 1 sites in its encoder"):
        CAA(layers=[0]).apply(Seq2Seq())
