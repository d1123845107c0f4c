"""Capture reads exactly what the heads put out at the last real token, and runs nothing it need not."""

from __future__ import annotations

import pytest
import torch
from edits import PROJECTIONS, add_offsets
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft.editing import HeadCapture, HeadSite, capture_tokens, head_sites
from lightning_peft.positions import answering

LENGTHS = (9, 4, 1, 6, 7)


@pytest.fixture
def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in LENGTHS]


def plainly(model: nn.Module, texts: list[list[int]], projection: str) -> Tensor:
    """The plain way: a hook on every projection, the whole model, one text at a time, the last token taken after."""
    read: list[Tensor] = []
    modules = [module for name, module in model.named_modules() if name.endswith(projection)]
    handles = [m.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2))) for m in modules]
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([text]))
    for handle in handles:
        handle.remove()
    return torch.stack([z[-1] for z in read]).reshape(len(texts), len(modules), 4, -1)


def padded(texts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, texts))
    rows = [([0] * (width - len(t)), t) for t in texts]
    ids = torch.tensor([pad + t if side == "left" else t + pad for pad, t in rows])
    ones = [([0] * len(pad), [1] * len(t)) for pad, t in rows]
    return ids, torch.tensor([pad + one if side == "left" else one + pad for pad, one in ones])


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_capture_equals_the_plain_way(kind: str, side: str, texts: list[list[int]]) -> None:
    model = tiny(kind)
    with HeadCapture(model, head_sites(model)) as capture:
        read = capture(*padded(texts, side))
    torch.testing.assert_close(read, plainly(model, texts, PROJECTIONS[kind]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_batch_size_and_the_order_of_lengths_do_not_matter(batch_size: int, texts: list[list[int]]) -> None:
    model = tiny("llama")
    read = capture_tokens(model, head_sites(model), texts, batch_size)
    torch.testing.assert_close(read, plainly(model, texts, "o_proj"), atol=1e-5, rtol=1e-5)


def test_a_mask_that_is_absent_means_no_padding(tokens: Tensor) -> None:
    model = tiny("llama")
    with HeadCapture(model, head_sites(model)) as capture:
        assert torch.equal(capture(tokens), capture(tokens, torch.ones_like(tokens)))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_language_model_head_is_not_run(kind: str, tokens: Tensor) -> None:
    model, fired = tiny(kind), []
    model.get_output_embeddings().register_forward_hook(lambda *_: fired.append(True))
    with HeadCapture(model, head_sites(model)) as capture:
        capture(tokens)
    assert not fired
    model(input_ids=tokens)
    assert fired, "the hook must be able to fire, or this test says nothing"


def test_only_the_last_positions_are_kept_while_the_model_runs(tokens: Tensor) -> None:
    model = tiny("wide_llama")
    kept: list[tuple[int, ...]] = []
    with HeadCapture(model, head_sites(model)) as capture:
        model.model.norm.register_forward_hook(lambda *_: kept.extend(tuple(x.shape) for x in capture._read.values()))
        read = capture(tokens)
    assert kept == [(3, 4, 16)] * 3
    assert read.shape == (3, 3, 4, 16) and read.dtype == torch.float32


def test_nothing_is_left_on_the_model(tokens: Tensor) -> None:
    model = tiny("llama")
    with pytest.raises(KeyboardInterrupt), HeadCapture(model, head_sites(model)) as capture:
        capture(tokens)
        raise KeyboardInterrupt
    assert not any(m._forward_pre_hooks for m in model.modules()) and not capture._read


def test_bfloat16_models_are_read_in_float32(tokens: Tensor) -> None:
    model = tiny("llama").bfloat16()
    with HeadCapture(model, head_sites(model)) as capture:
        assert capture(tokens).dtype == torch.float32


def test_another_edit_acts_while_heads_are_read(tokens: Tensor) -> None:
    """A second edit is computed on top of the first: downstream heads show it, and the first's policy holds."""
    model = tiny("llama")
    sites = head_sites(model)
    with HeadCapture(model, sites) as capture:
        base = capture(tokens)
    stack = add_offsets(model, "answer")
    with HeadCapture(model, sites) as capture:
        moved = capture(tokens)
        with answering(model, start=torch.tensor([99, 99, 99])):  # no token of these rows is an answer's
            untouched = capture(tokens)
        with stack.disabled():
            off = capture(tokens)
    assert torch.equal(moved[:, 0], base[:, 0]) and not torch.equal(moved[:, 2], base[:, 2])
    assert torch.equal(untouched, base) and torch.equal(off, base)


def test_a_site_that_is_not_reached_is_an_error(tokens: Tensor) -> None:
    model = tiny("llama")
    model.spare = nn.Linear(32, 32)
    sites = [*head_sites(model), HeadSite("spare", 3, 4, 8)]
    with (
        HeadCapture(model, sites) as capture,
        pytest.raises(RuntimeError, match=r"^1 head sites were not reached by the forward pass, the first is spare\.$"),
    ):
        capture(tokens)


def test_a_text_without_tokens_is_an_error() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"^A text without tokens has no last token to read\.$"):
        capture_tokens(model, head_sites(model), [[4, 5], []])
