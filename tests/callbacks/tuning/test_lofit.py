"""LoFiT chooses heads by learnt scales and trains their offsets; a computed edit is where training can start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from edits import add_lora, add_offsets, close, logits
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from statements import Module, Statements
from statements import trainer as statements_trainer
from tiny_models import tiny
from torch import Tensor
from tuning import QUIET, Language, fit, one_sentence

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import ITI, HeadGains, HeadOffsets, LoFiT
from lightning_peft.stack.adapter_files.folder import read_folder
from lightning_peft.tuners.head_offsets import HeadOffsetsConfig

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

HEADS = 12  # of the tiny models: 3 layers of 4 heads of width 8


class Noted(L.Callback):
    """Every head's vector `[12, 8]` and role `[12]` after each step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.roles: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        stack = adapters(pl_module)
        found = stack.tensors(stack["lofit"])
        self.values.append(torch.cat([v.clone() for k, v in found.items() if k.endswith("head_offsets")]))
        self.roles.append(torch.cat([v.clone() for k, v in found.items() if k.endswith("roles")]))


def lofit(**options: Any) -> LoFiT:
    return LoFiT(**({"share": 0.25, "select_steps": 3} | options))


def test_in_the_first_phase_every_heads_output_is_scaled(tokens: Tensor) -> None:
    module, noted = Language(), Noted()
    base = logits(module.model, tokens)
    callback = lofit()
    callback.apply(module)
    assert torch.equal(logits(module.model, tokens), base)
    fit(module, callback, noted, max_steps=4, limit_train_batches=2)
    expected = tiny("llama")
    for layer, scale in zip(expected.model.layers, noted.values[2].reshape(3, 32), strict=True):
        layer.self_attn.o_proj.weight.data *= 1 + scale  # [out, in]: the columns are what the heads give
    stack = adapters(module)
    state = stack.backbone.state_dict()
    for i, layer in enumerate(sorted(k for k in state if k.endswith("head_offsets.lofit"))):
        state[layer].copy_(noted.values[2][4 * i : 4 * i + 4])
        state[layer.replace("head_offsets.lofit", "head_offsets_roles.lofit")].fill_(2)
    assert close(logits(stack.backbone, tokens), logits(expected, tokens))


def test_the_heads_with_the_largest_scales_are_kept_and_only_their_offsets_move() -> None:
    module, noted = Language(), Noted()
    fit(module, lofit(), noted, max_steps=6)
    assert all((roles == 2).all() for roles in noted.roles[:3])
    largest = noted.values[2].norm(dim=1).topk(3).indices
    for values, roles in zip(noted.values[3:], noted.roles[3:], strict=True):
        assert set(roles.nonzero()[:, 0].tolist()) == set(largest.tolist()) and set(roles.tolist()) == {0, 1}
        assert not values[roles == 0].any() and values[roles == 1].any(1).all()
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == HEADS * 8


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_in_either_phase(tmp_path: Path, step: int) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole, again = Language(), Language()
    fit(whole, lofit(), keep, max_steps=6, enable_checkpointing=True)
    fit(again, lofit(), max_steps=6, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    a, b = (adapters(module).tensors(adapters(module)["lofit"]) for module in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert sum(int((v == 1).sum()) for k, v in a.items() if k.endswith("roles")) == 3


def test_the_penalty_adds_its_sign_to_the_gradient_of_the_scales() -> None:
    def after_two_steps(l1: float) -> tuple[Tensor, Tensor]:
        module, noted = Language(), Noted()
        module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
            [p for p in module.parameters() if p.requires_grad], lr=0.1
        )
        fit(module, lofit(l1=l1), noted, max_steps=4)
        return noted.values[0], noted.values[1]

    (first, free), (same, penalised) = after_two_steps(0.0), after_two_steps(0.01)
    assert torch.equal(first, same)  # at zero the penalty has no slope
    assert torch.allclose(free - penalised, 0.1 * 0.01 * first.sign(), atol=1e-7)


def test_what_is_saved_is_the_offsets_of_the_kept_heads(tmp_path: Path, tokens: Tensor) -> None:
    module = Language()
    fit(module, lofit(), max_steps=8)
    trained = logits(module.model, tokens)
    save_adapter(module, tmp_path)
    config, tensors, _ = read_folder(tmp_path)
    assert isinstance(config, HeadOffsetsConfig) and config.parameters == "offsets" and config.heads is not None
    assert sum(map(len, config.heads.values())) == 3 and sum(t.numel() for t in tensors.values()) == 3 * 8
    ours, plain = tiny("llama"), PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours, tokens), trained) and torch.equal(logits(plain, tokens), trained)
    assert not close(trained, logits(tiny("llama"), tokens), 1e-4)
    adapters(module).merge()
    assert close(logits(module.model, tokens), trained)


def test_saved_before_heads_are_chosen_it_is_the_scales_of_all(tmp_path: Path, tokens: Tensor) -> None:
    module = Language()
    callback = lofit()
    callback.apply(module)
    stack = adapters(module)
    for key, value in stack.tensors(stack["lofit"]).items():
        if key.endswith("head_offsets"):
            value.fill_(0.1)
    save_adapter(module, tmp_path)
    plain = PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    assert torch.equal(logits(plain, tokens), logits(module.model, tokens))
    with pytest.raises(ValueError, match="still scales heads"):
        stack.merge()


# -- from a computed edit ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[None, "adaptive"])
def edit(tmp_path: Path, request: Any) -> Path:
    """The folder of an ITI edit of three heads, with a gate and without."""
    module = Module()
    statements_trainer(ITI(num_heads=3, alpha=5.0, gate=request.param)).fit(module, Statements().loader())
    return save_adapter(module, tmp_path / "iti")


@pytest.mark.parametrize(("method", "count"), [(HeadGains, 3), (HeadOffsets, 3 * 8)])
def test_training_starts_at_the_edit_and_trains_so_many_numbers(edit: Path, method: Any, count: int) -> None:
    steered = Module()
    load_adapter(steered.backbone, edit)
    module = Module()
    callback = method(init_from=str(edit))
    callback.apply(module)
    batch = next(iter(Statements().loader()))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    start = module.backbone(**inputs).logits
    assert torch.equal(start, steered.backbone(**inputs).logits)
    assert not close(start, tiny("llama")(**inputs).logits, 1e-3)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == count
    statements_trainer(callback).fit(module, Statements(truth=1).loader())
    stack = adapters(module)
    assert not torch.equal(module.backbone(**inputs).logits, start)
    if method is HeadGains:
        name = callback.name
        fixed = {k: v for k, v in stack.tensors(stack[name]).items() if k.endswith("directions")}
        again = Module()
        HeadGains(init_from=str(edit)).apply(again)
        before = adapters(again).tensors(adapters(again)[name])
        assert fixed and all(torch.equal(value, before[key]) for key, value in fixed.items())


def test_trained_gains_are_saved_and_loaded_by_peft_alone(edit: Path, tmp_path: Path, tokens: Tensor) -> None:
    module = Module()
    callback = HeadGains(init_from=str(edit))
    statements_trainer(callback).fit(module, Statements(truth=1).loader())
    save_adapter(module, tmp_path / "gains")
    plain = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "gains"))
    given = {"labels": tokens.masked_fill(torch.arange(tokens.shape[1]) < 2, -100)}
    assert torch.equal(logits(plain, tokens, **given), logits(module.backbone, tokens, **given))
    adapters(module).scale(0.0)
    assert torch.equal(logits(module.backbone, tokens, **given), logits(tiny("llama"), tokens))


def test_random_gains_are_a_control_that_begins_at_the_base(tokens: Tensor) -> None:
    module = Language()
    HeadGains(seed=1).apply(module)
    assert torch.equal(logits(module.model, tokens), logits(tiny("llama"), tokens))
    stack = adapters(module)
    found = stack.tensors(stack["head_gains"])
    drawn = torch.cat([value for key, value in found.items() if key.endswith("directions")])
    assert drawn.shape == (HEADS, 8) and torch.allclose(drawn.norm(dim=1), torch.ones(HEADS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoFiT(share=0.0), "share must be in (0, 1], got 0.0."),
        (lambda: LoFiT(l1=-1.0), "LoFiT needs an l1 of at least 0"),
        (lambda: LoFiT(heads=[]), "heads must be pairs of a layer and a head"),
        (lambda: HeadGains(init_from="x", heads=[(0, 1)]), "give init_from or heads, not both."),
    ],
)
def test_wrong_arguments_are_one_sentence_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and one_sentence(str(error.value))


def test_a_training_that_ends_before_heads_are_chosen_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^LoFiT changes what it trains after 9 optimizer steps") as error:
        fit(Language(), lofit(select_steps=9), max_steps=5)
    assert one_sentence(str(error.value))


def test_what_is_no_edit_of_this_base_is_one_sentence(tmp_path: Path) -> None:
    lora, other = tiny("llama"), tiny("llama")
    add_lora(lora, ["q_proj"])
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(0.1)
    add_offsets(other)
    for model, message in ((lora, "holds no head offsets by themselves"), (other, "was made for another base model")):
        save_adapter(model, tmp_path / message.split()[0])
        with pytest.raises(ValueError, match=message) as error:
            HeadGains(init_from=str(tmp_path / message.split()[0])).apply(Module())
        assert one_sentence(str(error.value))
