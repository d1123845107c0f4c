"""Within `steering` a model is adapted by a saved adapter; afterwards it is what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edits import add_lora, add_offsets, fill, logits
from peft import IA3Config, LoraConfig
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft import load_adapter, save_adapter, steering
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import stack_of

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*generation flags")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Saves head offsets for a tiny model; gives the folder."""

    def make(kind: str = "llama", positions: str = "answer", seed: int = 3) -> Path:
        model = tiny(kind)
        add_offsets(model, positions)
        fill(stack_of(model), "edit", seed)
        return save_adapter(model, tmp_path / f"{kind}-{positions}-{seed}")

    return make


def generated(model: nn.Module, tokens: Tensor) -> Tensor:
    """Two rows of unlike prompts, padded on the left, with six greedy tokens each, and the scores of them."""
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    made = model.generate(  # type: ignore[operator]
        tokens[:2, :5] * mask,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.logits)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("positions", ["answer", "all"])
def test_within_it_the_model_is_that_with_the_adapter_and_afterwards_as_before(
    kind: str, positions: str, folder: Callable[..., Path], tokens: Tensor
) -> None:
    model, installed, saved = tiny(kind), tiny(kind), folder(kind, positions)
    load_adapter(installed, saved)
    base = generated(model, tokens), logits(model, tokens)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with steering(model, saved):
        assert torch.equal(generated(model, tokens), generated(installed, tokens))
        assert torch.equal(logits(model, tokens), logits(installed, tokens))
        assert not torch.equal(generated(model, tokens), base[0])
    assert torch.equal(generated(model, tokens), base[0]) and torch.equal(logits(model, tokens), base[1])
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert [name for name, _ in model.named_modules()] == [name for name, _ in tiny(kind).named_modules()]


def test_at_strength_zero_the_model_is_itself_bit_for_bit(folder: Callable[..., Path], tokens: Tensor) -> None:
    model = tiny("llama")
    base = logits(model, tokens)
    with steering(model, folder(), scale=0.0):
        assert torch.equal(logits(model, tokens), base)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_the_strength_is_that_of_the_stack(scale: float, folder: Callable[..., Path], tokens: Tensor) -> None:
    model, installed, saved = tiny("llama"), tiny("llama"), folder()
    load_adapter(installed, saved)
    stack_of(installed).scale(scale)
    with steering(model, saved, scale=scale):
        assert torch.equal(logits(model, tokens), logits(installed, tokens))


def test_positions_can_be_others_than_those_saved(folder: Callable[..., Path], tokens: Tensor) -> None:
    model = tiny("llama")
    with steering(model, folder(positions="all")):
        everywhere = generated(model, tokens)
    saved = folder(positions="answer")
    with steering(model, saved, positions="all"):
        assert torch.equal(generated(model, tokens), everywhere)
    with steering(model, saved):
        assert not torch.equal(generated(model, tokens), everywhere)


def test_contexts_can_be_nested(folder: Callable[..., Path], tokens: Tensor) -> None:
    model, installed = tiny("llama"), tiny("llama")
    one, other = folder(seed=3), folder(seed=5)
    load_adapter(installed, one, "one")
    alone = logits(installed, tokens)
    load_adapter(installed, other, "other")
    with steering(model, one):
        with steering(model, other):
            assert torch.equal(logits(model, tokens), logits(installed, tokens))
        assert torch.equal(logits(model, tokens), alone)
    assert torch.equal(logits(model, tokens), logits(tiny("llama"), tokens))


@pytest.mark.parametrize("where", ["inside", "while it is put on"])
def test_an_exception_leaves_the_model_as_it_was(where: str, folder: Callable[..., Path], tokens: Tensor) -> None:
    model = tiny("llama")
    base, trained = logits(model, tokens), [parameter.requires_grad for parameter in model.parameters()]
    options = {} if where == "inside" else {"positions": "answer", "scale": 2.0}
    saved = folder() if where == "inside" else ia3(folder().parent)
    with pytest.raises((KeyError, ValueError)), steering(model, saved, **options):
        raise KeyError
    assert torch.equal(logits(model, tokens), base) and not stack_of(model).parts
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def ia3(parent: Path) -> Path:
    """A saved adapter without a strength and without positions."""
    model = tiny("llama")
    stack_of(model).add(IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    return save_adapter(model, parent / "ia3")


def test_an_adapter_below_stays_trainable_and_on(folder: Callable[..., Path], tokens: Tensor) -> None:
    model = tiny("llama")
    add_lora(model, ["q_proj"])
    tuned, trained = logits(model, tokens), [parameter.requires_grad for parameter in model.parameters()]
    with steering(model, folder()):
        assert not torch.equal(logits(model, tokens), tuned)
    assert torch.equal(logits(model, tokens), tuned)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_a_saved_stack_is_put_on_whole_and_without_dropout(tmp_path: Path, tokens: Tensor) -> None:
    installed = tiny("llama")
    add_lora(installed, ["q_proj", "o_proj"], lora_dropout=0.5)
    add_offsets(installed)
    saved, model = save_adapter(installed, tmp_path), tiny("llama")
    with steering(model, saved) as parts:
        assert len(parts) == 2
        assert torch.equal(logits(model, tokens), logits(installed.eval(), tokens))
    assert torch.equal(logits(model, tokens), logits(tiny("llama"), tokens))


REFUSED = {
    "no strength": ({"scale": 2.0}, "has no dial to scale"),
    "no positions": ({"positions": "all"}, "is not limited to positions: leave positions out"),
    "unknown positions": ({"positions": "some"}, "positions must be one of"),
    "from the end": ({"positions": "last"}, "are counted from the end of a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_sentence(case: str, tmp_path: Path) -> None:
    options, said = REFUSED[case]
    with pytest.raises(ValueError, match=said), steering(tiny("llama"), ia3(tmp_path), **options):  # type: ignore[arg-type]
        pass


def test_weights_that_cannot_be_had_again_are_not_touched(tmp_path: Path, tokens: Tensor) -> None:
    tuned, model = tiny("llama"), tiny("llama")
    stack_of(tuned).add(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    saved, base = save_adapter(tuned, tmp_path), logits(model, tokens)
    with pytest.raises(ValueError, match="cannot be taken off again"), steering(model, saved):
        pass
    assert torch.equal(logits(model, tokens), base)


def test_merged_adapters_are_not_taken_out_of_the_weights(folder: Callable[..., Path]) -> None:
    model = tiny("llama")
    add_lora(model, ["q_proj"]).merge()
    with pytest.raises(ValueError, match=r"unmerge them before steering\.$"), steering(model, folder()):
        pass


def test_a_base_with_a_row_for_a_new_token_is_steered_where_asked_for(
    folder: Callable[..., Path], tokens: Tensor
) -> None:
    model, saved = tiny("llama"), folder()
    model.resize_token_embeddings(model.config.vocab_size + 1)
    with pytest.raises(AdapterError, match="their parameters have other names or shapes"), steering(model, saved):
        pass
    base = logits(model, tokens)
    warned = pytest.warns(UserWarning, match="was made for another base model")
    with warned as found, steering(model, saved, strict_base=False):
        assert not torch.equal(logits(model, tokens), base)
    assert len([w for w in found if "another base model" in str(w.message)]) == 1
    assert torch.equal(logits(model, tokens), base)
