"""What an edit of chosen tokens computes, by a plain hook that counts columns; and adapters that should equal it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_peft.stack.stack import AdapterStack, stack_of
from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig

VECTOR = 1.5 * torch.randn(32, generator=torch.Generator().manual_seed(2))
# whether a policy edits the token of column i of a text without padding, whose prompt has p tokens
MOVED: dict[str, Callable[[int, int], bool]] = {
    "answer": lambda p, i: i >= p - 1,
    "generated": lambda p, i: i >= p,
    "generated[0:2]": lambda p, i: p <= i < p + 2,
    "answer[1:2]": lambda p, i: i == p,
    "prompt[-2:]": lambda p, i: p - 2 <= i < p,
    "all[2:4]": lambda p, i: 2 <= i < 4,
}


def rough(model: Any) -> Any:
    """Make a random model's logits depend on what a block adds to the stream, and let nothing end its texts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in name for part in ("embed", "A_log", "conv")):
                parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def add_edit(model: Any, block: str, positions: str) -> AdapterStack:
    """Move the output of a block of width 32 by `VECTOR`."""
    stack = stack_of(model)
    stack.add(LayerOffsetsConfig(target_modules=[block], width=32, positions=positions), "edit", computed=True)
    for tensor in stack.tensors(stack["edit"]).values():
        tensor.copy_(VECTOR.reshape(tensor.shape))
    return stack


@torch.no_grad()
def hooked(model: Any, block: str, positions: str | None, prompt: Tensor, steps: int, **inputs: Any) -> Tensor:
    """Return the logits `[steps, V]` of greedy decoding without a cache, a hook moving columns of a block's output.

    Args:
        model: without an adapter.
        block: the module's name.
        positions: one of `MOVED`; None moves nothing.
        prompt: `[1, P]`, without padding.
        steps: how many tokens are written.
        **inputs: further arguments; one that is a function is called with the ids so far.
    """

    def move(module: Any, args: Any, output: Any) -> Any:
        x = (output if isinstance(output, Tensor) else output[0]).clone()
        for column in range(x.shape[1]):
            if positions is not None and MOVED[positions](prompt.shape[1], column):
                x[:, column] += VECTOR
        return x if isinstance(output, Tensor) else (x, *output[1:])

    handle, ids, logits = model.get_submodule(block).register_forward_hook(move), prompt, []
    for _ in range(steps):
        given = {name: value(ids) if callable(value) else value for name, value in inputs.items()}
        logits.append(model(input_ids=ids, use_cache=False, **given).logits[0, -1].float())
        ids = torch.cat([ids, logits[-1].argmax().reshape(1, 1)], 1)
    handle.remove()
    return torch.stack(logits)


def written(model: Any, steps: int, **options: Any) -> Tensor:
    """Return the logits `[B, steps, V]` of greedy `generate`."""
    options = {"max_new_tokens": steps, "do_sample": False, "output_logits": True} | options
    return torch.stack([step.float() for step in model.generate(**options, return_dict_in_generate=True).logits], 1)


def left_padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of prompts of any lengths."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
