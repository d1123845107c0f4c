"""Adapters act also where PyTorch's fused encoder would read weights past them, and off is fused again."""

from __future__ import annotations

import pytest
import torch
from edits import fill
from peft import LoraConfig
from torch import Tensor, nn
from tuning import one_sentence

from lightning_peft.backbone.defaults import every_matrix
from lightning_peft.stack.stack import stack_of


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.fixture
def states() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grad", [False, True])
def test_lora_in_a_fused_encoder_acts_and_off_is_the_base_bit_for_bit(grad: bool, states: Tensor) -> None:
    model = encoder()
    with torch.set_grad_enabled(grad):
        expected = model.requires_grad_(False)(states)
    stack = stack_of(model)
    stack.add(LoraConfig(r=2, target_modules=["linear1"]), "lora")
    fill(stack, "lora")
    with torch.set_grad_enabled(grad):
        assert not torch.allclose(model(states), expected, atol=1e-3)
        with stack.disabled():
            assert torch.equal(model(states), expected)
    stack.remove("lora")
    assert all(layer.activation_relu_or_gelu for layer in model.layers)


def test_the_default_leaves_out_what_is_never_called() -> None:
    assert every_matrix(encoder()) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]


@pytest.mark.parametrize("targets", [["out_proj"], r".*out_proj"])
def test_a_layer_that_is_never_called_cannot_be_adapted(targets: list[str] | str) -> None:
    message = r"^layers\.0\.self_attn\.out_proj is never called, since nn\.MultiheadAttention reads its weight"
    with pytest.raises(ValueError, match=message) as error:
        stack_of(encoder()).add(LoraConfig(r=2, target_modules=targets))
    assert one_sentence(str(error.value))


def test_attention_itself_can_be_adapted(states: Tensor) -> None:
    model = encoder()
    expected = model(states)
    stack = stack_of(model)
    stack.add(LoraConfig(r=2, target_modules=["self_attn"]), "lora")
    fill(stack, "lora")
    assert not torch.allclose(model(states), expected, atol=1e-3)
