"""Models whose past is a state that does not count: an edit with it touches the tokens that it touches without."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hooked import MOVED, add_edit, hooked, left_padded, rough, written
from torch import Tensor

from lightning_peft.positions import PositionsError, answering, track
from lightning_peft.testing.lockstep import in_lockstep

T: Any = transformers
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1}
ATTENTION = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


def model(kind: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return rough(getattr(T, f"{kind}ForCausalLM")(getattr(T, f"{kind}Config")(**sizes)))


MODELS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: model("Mamba", **SIZES, state_size=8),
    "mamba2": lambda: model("Mamba2", **SIZES, state_size=8, num_heads=8, head_dim=8, n_groups=1),
    "falcon_mamba": lambda: model("FalconMamba", **SIZES, state_size=8),
    "rwkv": lambda: model("Rwkv", **SIZES, attention_hidden_size=32, context_length=64),
    "bamba": lambda: model("Bamba", **ATTENTION, attn_layer_indices=[1], **MAMBA2),
    "recurrent_gemma": lambda: model(
        "RecurrentGemma", **ATTENTION, lru_width=32, block_types=["recurrent", "attention"], head_dim=8
    ),
    "qwen3_next": lambda: model(
        "Qwen3Next",
        **ATTENTION,
        **LINEAR,
        **EXPERTS,
        head_dim=8,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
}
STATES = ["mamba", "mamba2", "falcon_mamba", "rwkv"]
PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23], [31, 32, 33, 34, 35]]
BLOCKS = {"rwkv": "rwkv.blocks.0", "mamba": "backbone.layers.0", "mamba2": "backbone.layers.0"}
BLOCKS |= {"falcon_mamba": "backbone.layers.0"}


def block(kind: str) -> str:
    return BLOCKS.get(kind, "model.layers.0")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("positions", ["answer", "generated[0:2]"])
def test_generate_with_a_state_equals_a_hook_without(kind: str, positions: str) -> None:
    plain = MODELS[kind]()
    # transformers' RWKV takes no more than one row with a state
    prompts = PROMPTS[:1] if kind == "rwkv" else PROMPTS
    expected = [hooked(plain, block(kind), positions, torch.tensor([prompt]), 4) for prompt in prompts]
    base = written(plain, 4, **left_padded(prompts))
    add_edit(plain, block(kind), positions)
    for options in ({}, {"use_cache": False}):
        moved = written(plain, 4, **left_padded(prompts), **options)
        torch.testing.assert_close(moved, torch.stack(expected), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(moved, base, atol=1e-2), "the edit must show, or this test says nothing"


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next"])
def test_beams_write_the_same_with_a_state_as_without(kind: str) -> None:
    edited = MODELS[kind]()
    base = edited.generate(**left_padded(PROMPTS), max_new_tokens=5, num_beams=3)
    add_edit(edited, block(kind), "answer")
    with_state, without = (
        edited.generate(**left_padded(PROMPTS), max_new_tokens=5, num_beams=3, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_state, without) and not torch.equal(with_state, base)


@torch.no_grad()
def by_hand(edited: Any, ids: Tensor, parts: list[int], **given: Any) -> Tensor:
    """The logits of a text that is read in parts, each with the state that the last returned."""
    state, logits = {}, []
    for part in ids.split(parts, 1):
        output = edited(input_ids=part, use_cache=True, **state, **given)
        state = {name: output[name] for name in ("cache_params", "state") if name in output}
        logits.append(output.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("positions", MOVED)
def test_a_text_read_in_parts_equals_one_call(kind: str, positions: str) -> None:
    edited = MODELS[kind]()
    add_edit(edited, block(kind), positions)
    ids = torch.tensor([PROMPTS[0]])
    with answering(edited, start=torch.tensor([3])):
        whole = by_hand(edited, ids, [7])
        for parts in ([4, 1, 1, 1], [2, 1, 1, 1, 1, 1]):
            torch.testing.assert_close(by_hand(edited, ids, parts), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_was_read_elsewhere_is_an_error(kind: str) -> None:
    edited, ids = MODELS[kind](), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        output = edited(input_ids=ids, use_cache=True)
        state = {name: output[name] for name in ("cache_params", "state") if name in output}
        stack = add_edit(edited, block(kind), "answer")
        with (
            answering(edited, start=torch.tensor([3])),
            pytest.raises(PositionsError, match="continues a state of which"),
        ):
            edited(input_ids=ids[:, :1], **copy.deepcopy(state))
        stack.remove("edit")
        add_edit(edited, block(kind), "all")
        edited(input_ids=ids[:, :1], **state)


def test_a_state_without_a_start_is_an_error() -> None:
    edited = MODELS["mamba"]()
    add_edit(edited, block("mamba"), "answer")
    with torch.no_grad(), pytest.raises(PositionsError, match="nothing says where the answer began"):
        with answering(edited, start=torch.tensor([6])):
            state = edited(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True).cache_params
        edited(input_ids=torch.tensor([[5]]), cache_params=state)


def test_lengths_of_states_are_forgotten_with_them_and_not_copied() -> None:
    edited = MODELS["rwkv"]()
    add_edit(edited, block("rwkv"), "answer")
    lengths = track(edited)._lengths
    with answering(edited, start=torch.tensor([6])):
        output = edited(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True)
        assert lengths.past({"state": output.state}, 1).read.tolist() == [7]
        for twin in (copy.deepcopy(lengths), pickle.loads(pickle.dumps(lengths))):
            assert not twin.past({"state": output.state}, 1).known
        del output
    assert not lengths._read


def test_threads_with_states_write_what_each_writes_alone() -> None:
    edited = MODELS["mamba"]()
    add_edit(edited, block("mamba"), "generated[0:2]")

    def one(number: int) -> list[int]:
        return edited.generate(**left_padded(PROMPTS[number : number + 1]), max_new_tokens=4, do_sample=False)[
            0
        ].tolist()

    alone = [one(number) for number in range(3)]
    assert in_lockstep(edited, one, threads=3) == alone
