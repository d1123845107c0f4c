"""An encoder-decoder's answer is all that its decoder reads, whatever is known of the prompt in its encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from edits import fill
from tiny_models import tiny
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from lightning_peft.editing import Capture, head_offsets_config, head_sites, layer_offsets_config, layer_sites
from lightning_peft.positions import PositionsError, answering, note_batch
from lightning_peft.stack.stack import AdapterStack, stack_of


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(d_model=32, **sizes, **heads, **ids)).eval()


MODELS: dict[str, Callable[[], Any]] = {"t5": lambda: tiny("t5"), "bart": bart}
every_model = pytest.mark.parametrize("kind", MODELS)


def edited(kind: str, positions: str, part: str = "cross") -> tuple[Any, AdapterStack]:
    model = MODELS[kind]()
    stack = stack_of(model)
    heads = head_offsets_config(head_sites(model, part=part), [(0, 1), (1, 2)], 2.0, positions)
    stack.add(heads, "heads", computed=True)
    fill(stack, "heads")
    if part == "cross":
        layers = layer_offsets_config(layer_sites(model, part="self"), positions=positions)
        stack.add(layers, "blocks", computed=True)
        fill(stack, "blocks", seed=5, size=0.3)
    return model, stack


@every_model
@pytest.mark.parametrize("length", [5, 9])  # of the answers; 9 is that of the prompts
@torch.no_grad()
def test_the_whole_decoder_is_the_answer(kind: str, length: int, tokens: Tensor) -> None:
    (answer, stack), (everywhere, _) = edited(kind, "answer"), edited(kind, "all")
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, :length].contiguous()}
    expected = everywhere(**given).logits
    assert torch.equal(answer(**given).logits, expected)
    with answering(answer, start=torch.tensor([8, 6, 7])):
        assert torch.equal(answer(**given).logits, expected)
    noted = note_batch([], answer, {**given, "prompt_end": torch.tensor([8, 8, 8]), "labels": None})
    assert torch.equal(answer(**given).logits, expected)
    note_batch(noted, answer, {**given, "labels": tokens.masked_fill(torch.arange(9) < 6, -100)})
    assert torch.equal(answer(**given).logits, expected)
    note_batch(noted, answer, None)
    with answering(answer, mask=(torch.arange(length) < 2).expand(3, length)):
        apart = answer(**given).logits
    assert torch.equal(apart[:, :2], expected[:, :2]) and not torch.equal(apart, expected)
    with stack.disabled():
        assert not torch.equal(answer(**given).logits[:, 0], expected[:, 0])


@every_model
@torch.no_grad()
def test_windows_count_the_decoders_tokens(kind: str, tokens: Tensor) -> None:
    given = {"input_ids": tokens, "decoder_input_ids": tokens[:, :6]}
    for positions, first in (("generated", 1), ("answer[3:]", 3)):
        model, stack = edited(kind, positions)
        moved = model(**given).logits
        with stack.disabled():
            base = model(**given).logits
        assert [torch.equal(base[:, i], moved[:, i]) for i in range(6)] == [i < first for i in range(6)]


@every_model
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_answers_are_edited_with_and_without_a_cache(kind: str, beams: int, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def logits(model: Any, use_cache: bool = True) -> Tensor:
        return torch.stack(model.generate(tokens, attention_mask=mask, use_cache=use_cache, **options).logits)

    written = {}
    for positions in ("answer", "all", "answer[0:2]"):
        model, stack = edited(kind, positions)
        written[positions] = logits(model)
        torch.testing.assert_close(written[positions], logits(model, use_cache=False), atol=1e-4, rtol=1e-4)
    assert torch.equal(written["answer"], written["all"]) and not torch.equal(written["answer"], written["answer[0:2]"])
    with stack.disabled():
        assert not torch.equal(written["answer[0:2]"], logits(model))


def test_a_backward_pass_runs_each_half_again_with_its_own_tokens(tokens: Tensor) -> None:
    given = {"input_ids": tokens, "labels": tokens[:, :5].contiguous()}
    gradients = []
    for checkpointed in (False, True):
        model, _ = edited("t5", "answer[2:]")
        model.requires_grad_(True)
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout") and isinstance(module.dropout, float):
                    module.dropout = 0.0
        model(**given).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_what_is_read_of_a_decoder_is_edited_too(tokens: Tensor) -> None:
    read = []
    for positions in ("answer", "all"):
        model, _ = edited("t5", positions)
        with Capture(model, head_sites(model, part="cross"), "all") as capture:
            read.append(capture(tokens, torch.ones_like(tokens), decoder_input_ids=tokens[:, :4]))
    assert torch.equal(*read)


def test_an_edit_of_the_encoder_at_answers_cannot_generate(tokens: Tensor) -> None:
    model, stack = edited("t5", "answer", part="encoder")
    with pytest.raises(PositionsError, match=r"^`generate` of T5For.* runs its encoder apart, .*: edit the sites"):
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2)
    given = {"input_ids": tokens, "labels": tokens[:, :5].contiguous()}
    with torch.no_grad(), answering(model, start=torch.tensor([8, 8, 8])):
        moved = model(**given).encoder_last_hidden_state
        with stack.disabled():
            base = model(**given).encoder_last_hidden_state
    assert not torch.equal(moved, base)


def test_a_mask_of_neither_half_is_an_error(tokens: Tensor) -> None:
    model, _ = edited("t5", "answer")
    with answering(model, mask=torch.ones(3, 4)), pytest.raises(PositionsError, match=r"has shape \(3, 4\) but this"):
        model(input_ids=tokens, labels=tokens[:, :5].contiguous())


@torch.no_grad()
def test_copies_have_decoders_of_their_own_and_nothing_stays_behind(tokens: Tensor) -> None:
    model, stack = edited("t5", "answer")
    twin = copy.deepcopy(model)
    given = {"input_ids": tokens, "labels": tokens[:, :5].contiguous()}
    expected = model(**given).logits
    stack.remove("blocks")
    stack.remove("heads")
    assert not model.get_decoder()._forward_pre_hooks and not model.get_decoder()._forward_hooks
    assert torch.equal(twin(**given).logits, expected) and not torch.equal(model(**given).logits, expected)
