"""Edits of heads of several sizes, of parallel residual streams, and of a language model inside another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from tuning import QUIET

from lightning_peft import load_adapter, save_adapter
from lightning_peft.editing import Capture, compute_iti, head_sites, layer_offsets_config, layer_sites
from lightning_peft.editing.iti import head_shapes
from lightning_peft.stack.outer_generate import heed_outer_generate
from lightning_peft.stack.stack import OtherBaseWarning, adapters, stack_of

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}
GEMMA = {
    **TEXT,
    "head_dim": 8,
    "sliding_window": 16,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])


def gemma4() -> nn.Module:
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma4TextConfig(**GEMMA, global_head_dim=16, layer_types=layers)
    return transformers.Gemma4ForCausalLM(config).eval()


def gemma3n() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **GEMMA, altup_num_inputs=3, laurel_rank=4, activation_sparsity_pattern=[0.0] * 2
    )
    return transformers.Gemma3nForCausalLM(config).eval()


def test_heads_of_different_sizes_are_edited_saved_and_read(tmp_path: Path) -> None:
    model, generator = gemma4(), torch.Generator().manual_seed(0)
    sites = head_sites(model)
    ids, label = torch.randint(5, 60, (24, 5), generator=generator), torch.arange(24) % 2
    ids[:, -1] = torch.where(label == 1, 5, 7)
    with Capture(model, sites) as capture:
        activations = capture(ids)
    assert activations.shape == (24, 2, 4, 16) and not activations[:, 0, :, 8:].any()
    for direction in ("mass_mean", "random"):
        edit = compute_iti(activations, label, torch.arange(24) // 2, 8, direction, shapes=head_shapes(sites))
        torch.testing.assert_close(edit.directions.norm(dim=-1), torch.ones(8))
        assert all(
            not d[sites[layer].head_dim :].any() for (layer, _), d in zip(edit.heads, edit.directions, strict=True)
        )
    stack_of(model).put("iti", edit.adapter(sites, 5.0, "all"))
    tensors = stack_of(model).tensors(adapters(model)["iti"])
    assert sorted(tuple(tensor.shape) for tensor in tensors.values()) == [(4, 8), (4, 16)]
    expected = model(IDS).logits
    save_adapter(model, tmp_path)
    again = gemma4()
    plain = again(IDS).logits
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS).logits, expected) and not torch.equal(plain, expected)


def test_parallel_streams_are_read_at_the_active_one_and_all_moved() -> None:
    model = gemma3n()
    sites = layer_sites(model)[:1]
    block, seen = model.get_submodule(sites[0].name), list[Tensor]()
    handle = block.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad(), Capture(model, sites) as capture:
        values = capture(IDS)
    handle.remove()
    assert seen[0].shape == (3, 3, 4, 32) and torch.equal(values[:, 0], seen[0][0, :, -1])
    vector = torch.linspace(-1, 1, 32)
    handle = block.register_forward_hook(lambda _, __, out: out + vector)
    expected = model(IDS).logits
    handle.remove()
    part = stack_of(model).add(layer_offsets_config(sites, positions="all"), "edit", computed=True)
    for offsets in stack_of(model).live(part).values():
        offsets.copy_(vector[None])
    torch.testing.assert_close(model(IDS).logits, expected)


def test_an_edit_of_the_language_model_alone_knows_where_the_whole_models_answer_begins() -> None:
    torch.manual_seed(0)
    sight = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **sight),
        image_token_index=63,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    inner = model.get_submodule("model.language_model")
    edits = {}
    for name, backbone in (("whole", model), ("inner", inner)):
        stack = stack_of(backbone)
        part = stack.add(layer_offsets_config(layer_sites(backbone)[:1], positions="answer"), name, computed=True)
        for offsets in stack.live(part).values():
            offsets.copy_(torch.linspace(-3, 3, 32)[None])
        heed_outer_generate(model)
        edits[name] = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
        stack.remove(name)
    assert torch.equal(edits["whole"], edits["inner"])
    assert "generate" not in vars(model)


def test_a_base_with_a_token_more_takes_an_adapter_on_demand(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()

    model = base()
    part = stack_of(model).add(layer_offsets_config(layer_sites(model)[:1], positions="all"), "edit", computed=True)
    for offsets in stack_of(model).live(part).values():
        offsets.fill_(0.5)
    save_adapter(model, tmp_path)
    longer = base()
    longer.resize_token_embeddings(65)
    with pytest.raises(ValueError, match=r"strict_base=False \(in commands --no-strict-base\) loads it all the same"):
        load_adapter(longer, tmp_path)
    with pytest.warns(OtherBaseWarning, match="it is loaded all the same") as warned:
        load_adapter(longer, tmp_path, strict_base=False)
    assert len(warned) == 1
    torch.testing.assert_close(longer(IDS).logits[..., :64], model(IDS).logits)
    sibling = base()
    with torch.no_grad():
        sibling.get_parameter("model.layers.1.self_attn.q_proj.weight").add_(0.1)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors hold other values: model\.layers\.1\.self_attn\.q_proj"):
        load_adapter(sibling, tmp_path)
