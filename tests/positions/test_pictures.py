"""Texts with pictures: an edit touches tokens by their number, whatever position ids a model gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hooked import VECTOR, add_edit, hooked, left_padded, rough, written
from torch import Tensor

from lightning_peft.positions import answering

T: Any = transformers
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
VISION = {"hidden_size": 32, "depth": 1, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
VISION |= {"temporal_patch_size": 2, "intermediate_size": 48, "out_hidden_size": 32}
PICTURE = 90  # the token that stands for a part of one
QWEN = {"image_token_id": PICTURE, "video_token_id": 93, "vision_start_token_id": 91, "vision_end_token_id": 92}
GLM = {"image_token_id": PICTURE, "video_token_id": 93, "image_start_token_id": 91, "image_end_token_id": 92}


def model(kind: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    text = TEXT | {"rope_parameters": ROPE} | text
    config = getattr(T, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    return rough(getattr(T, f"{kind}ForConditionalGeneration")(config))


MODELS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: model("Qwen2VL", {}, VISION | {"embed_dim": 32}, **QWEN),
    "qwen3_5": lambda: model(
        "Qwen3_5",
        {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]} | LINEAR,
        VISION | {"num_position_embeddings": 16},
        **QWEN,
    ),
    "glm4v": lambda: model("Glm4v", {}, VISION | {"image_size": 16}, **GLM),
}
BLOCK = "model.language_model.layers.0"
# pictures of 4 tokens and of 8 take fewer position ids than tokens
PROMPTS = [[11, 91, *[PICTURE] * 4, 92, 12, 13], [21, 22, 23], [31, 91, *[PICTURE] * 8, 92, 32]]
GRIDS = [(1, 4, 4), None, (1, 4, 8)]


def pictures(rows: list[int]) -> dict[str, Tensor]:
    """What goes with the prompts of these rows."""
    grids = [grid for row in rows if (grid := GRIDS[row]) is not None]
    if not grids:
        return {}
    patches = [torch.rand(4 * h * w, 96, generator=torch.Generator().manual_seed(h * w))[: h * w] for _, h, w in grids]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def kinds(ids: Tensor) -> Tensor:
    return (ids == PICTURE).long()


def prompts(rows: list[int]) -> dict[str, Tensor]:
    given = left_padded([PROMPTS[row] for row in rows])
    return given | pictures(rows) | {"mm_token_type_ids": kinds(given["input_ids"])}


def expected(kind: str, positions: str | None, row: int, steps: int = 3) -> Tensor:
    prompt = torch.tensor([PROMPTS[row]])
    return hooked(
        MODELS[kind](), BLOCK, positions, prompt, steps, mm_token_type_ids=kinds, attention_mask=torch.ones_like,
        **pictures([row]),
    )  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("positions", ["answer", "generated[0:2]", "prompt[-2:]"])
def test_generate_equals_a_hook_that_counts_tokens(kind: str, positions: str) -> None:
    right = torch.stack([expected(kind, positions, row) for row in range(3)])
    assert not torch.allclose(right, torch.stack([expected(kind, None, row) for row in range(3)]), atol=1e-2)
    edited = MODELS[kind]()
    add_edit(edited, BLOCK, positions)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.testing.assert_close(written(edited, 3, **prompts([0, 1, 2]), **options), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_beams_of_a_padded_batch_write_what_each_prompt_writes_alone(kind: str) -> None:
    edited = MODELS[kind]()
    add_edit(edited, BLOCK, "answer")
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    together = edited.generate(**prompts([0, 1, 2]), **options)[:, -3:]
    alone = [edited.generate(**prompts([row]), **options)[0, -3:] for row in range(3)]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_a_call_with_position_ids_of_three_rows_is_read_by_its_mask() -> None:
    edited, given = MODELS["qwen2_vl"](), prompts([0, 1, 2])
    places, _ = edited.model.get_rope_index(**{name: given[name] for name in given if name != "pixel_values"})
    add_edit(edited, BLOCK, "generated")
    with answering(edited, start=torch.tensor([7, 1, 10])):
        moved = edited(**given, position_ids=places).logits
        torch.testing.assert_close(edited(**given).logits, moved)
    with answering(edited, mask=(torch.arange(12) == 11).expand(3, 12)):
        torch.testing.assert_close(edited(**given, position_ids=places).logits, moved)


def test_position_ids_that_begin_at_one_are_not_taken_for_the_tokens_numbers() -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 32, "vision_use_head": False}
    text = TEXT | {"model_type": "gemma", "head_dim": 8}
    config = T.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=PICTURE, projection_dim=32)
    plain, prompt = rough(T.PaliGemmaForConditionalGeneration(config)), torch.tensor([[11, 12, 13, 14, 15]])
    options = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "use_cache": False}
    base = written(plain, 3, **options)

    def move(module: Any, args: Any, output: Any) -> Any:
        moved = (output if isinstance(output, Tensor) else output[0]).clone()
        moved[:, 5:6] += VECTOR
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    hook = plain.get_submodule(BLOCK).register_forward_hook(move)
    right = written(plain, 3, **options)
    hook.remove()
    add_edit(plain, BLOCK, "answer[1:2]")
    torch.testing.assert_close(written(plain, 3, **options), right)
    assert not torch.allclose(right, base, atol=1e-2)
