"""The linear layers of a backbone's blocks."""

from __future__ import annotations

from tiny_models import tiny
from torch import nn

from lightning_peft.backbone.linear_layers import linear_layers


def test_the_output_embedding_is_not_among_them() -> None:
    assert linear_layers(tiny("gpt2"))[:4] == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_without_blocks_all_of_the_backbones_are_taken_but_no_convolution() -> None:
    net = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    assert set(linear_layers(net)) <= {"2", "3"} and linear_layers(nn.Sequential(nn.Linear(4, 3))) == ["0"]
