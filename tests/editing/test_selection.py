"""What is captured and what is steered are the same tokens of the same sites, if they are described alike."""

from __future__ import annotations

import pytest
import torch
from edits import HEADS, fill, logits
from tiny_models import tiny
from torch import Tensor

from lightning_peft.editing import Selection, capture_texts, head_offsets_config, head_sites
from lightning_peft.positions import answering
from lightning_peft.stack.stack import stack_of

PROMPTS = (3, 6, 5)  # lengths
WINDOWS = (
    "all",
    "prompt",
    "answer",
    "generated",
    "answer[0:2]",
    "generated[1:]",
    "prompt[-2:]",
    "last_prompt",
    "all[1:4]",
)


@pytest.mark.parametrize("positions", WINDOWS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_edit_moves_the_tokens_that_a_capture_reads(positions: str, side: str, tokens: Tensor) -> None:
    lengths = (9, 8, 7)
    texts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    plain = tiny("llama")
    read = capture_texts(plain, head_sites(plain), texts, positions, PROMPTS)
    model = tiny("llama")
    stack = stack_of(model)
    stack.add(head_offsets_config(head_sites(model), HEADS, 2.0, positions), "edit", computed=True)
    fill(stack, "edit")
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.o_proj.base_layer.register_forward_pre_hook(lambda _, a: seen.append(a[0].clone()))
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, text in enumerate(texts):
        place = slice(9 - len(text), 9) if side == "left" else slice(0, len(text))
        ids[i, place], mask[i, place] = torch.tensor(text), 1
    positioned = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with answering(model, start=torch.tensor(PROMPTS) - 1):
        logits(model, ids, **positioned)
        with stack.disabled():
            logits(model, ids, **positioned)
    moved = (seen[0] != seen[1]).any(-1) & mask.bool()
    found = [(i, p) for i in range(3) for p in (positioned["position_ids"][i][moved[i]]).tolist()]
    assert found == list(zip(read.text.tolist(), read.place.tolist(), strict=True))


@pytest.mark.parametrize("positions", ["answer[0:2]", "generated[1:3]", "prompt[-2:]"])
def test_a_window_is_the_same_with_a_cache_and_without(positions: str, tokens: Tensor) -> None:
    model = tiny("llama")
    stack = stack_of(model)
    stack.add(head_offsets_config(head_sites(model), HEADS, 2.0, positions), "edit", computed=True)
    fill(stack, "edit")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(tokens, use_cache=True, **options)
    whole = model.generate(tokens, use_cache=False, **options)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-4, rtol=1e-4)
    with stack.disabled():
        bare = model.generate(tokens, use_cache=True, **options)
    assert not torch.allclose(bare.logits[-1], cached.logits[-1], atol=1e-3)


@pytest.mark.parametrize("positions", ["last", "answer[-1:]", "all[:-2]"])
def test_an_edit_cannot_count_from_an_end_that_is_to_come(positions: str) -> None:
    with pytest.raises(
        ValueError, match=r"^positions '.*' are counted from the end of a text, which is not known while"
    ):
        head_offsets_config(head_sites(tiny("llama")), HEADS, 2.0, positions)


def test_plain_text_is_an_answer_without_a_prompt(tokens: Tensor) -> None:
    base = logits(tiny("llama"), tokens)
    for positions, same in (("prompt", True), ("answer[0:9]", False), ("generated", False)):
        model = tiny("llama")
        stack = stack_of(model)
        stack.add(head_offsets_config(head_sites(model), HEADS, 2.0, positions), "edit", computed=True)
        fill(stack, "edit")
        found = logits(model, tokens)
        assert torch.equal(found, base) if same else not torch.allclose(found[:, 0], base[:, 0], atol=1e-3)


def test_sites_are_chosen_by_kind_window_and_number() -> None:
    model = tiny("llama")
    assert [s.name for s in Selection("block", "1:").find(model)] == ["model.layers.1", "model.layers.2"]
    assert [s.layer for s in Selection("mlp", "1:").find(model)] == [0, 1]
    assert [s.name for s in Selection("attention", (-1, 0)).find(model)] == [
        f"model.layers.{i}.self_attn.o_proj" for i in (2, 0)
    ]
    assert Selection().find(model) == head_sites(model)
    t5 = tiny("t5")
    assert Selection(part="cross").find(t5) == head_sites(t5, part="cross")
    assert len(Selection("block", within="encoder").find(t5)) == 3


def test_a_description_reads_what_it_says(tokens: Tensor) -> None:
    model = tiny("gpt2")
    described = {"sites": "block", "layers": [0, 2], "positions": "all[1:3]"}
    with Selection.of(described).capture(model) as capture:
        read = capture(tokens)
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(read[:, 0], states[1][:, 1:3].flatten(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"layer": [0]}, r"^A selection has no 'layer': did you mean 'layers'\?$"),
        (
            {"colour": 1},
            r"^A selection has no 'colour': there are sites, layers, positions, part, within, pattern, num",
        ),
        ({"sites": "norm"}, r"^sites must be one of heads, block, attention, mlp, got 'norm'\.$"),
        ({"layers": "4-12"}, r"^layers must be numbers or a window such as '4:12', got '4-12'\.$"),
        (
            {"positions": "frist"},
            r"^positions must be one of all, prompt, answer, generated, last, last_prompt, or a ph",
        ),
        ({"sites": "mlp", "num_heads": 4}, r"^pattern and num_heads are for heads, but the sites are 'mlp'\.$"),
        ({"layers": [3]}, r"^Layer 3 was asked for, but there are 3, from 0\.$"),
        ({"layers": "3:"}, r"^No site is left of the model's 3: Selection\("),
    ],
)
def test_what_a_selection_cannot_say_is_one_sentence(described: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection.of(described).find(tiny("llama"))
