"""Write a layer offset or an ablation into weights, where it is exactly a change of these."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.backbone.modules import base_modules, is_linear
from lightning_peft.backbone.structure import blocks
from lightning_peft.positions import plain_text


def unit(vector: Tensor) -> Tensor:
    """Scale a vector to length 1; a zero vector stays zero."""
    return vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)


def innermost(module: nn.Module) -> nn.Module:
    """Return the module itself, where other adapters wrap it."""
    wrapper: Any = module
    return wrapper.get_base_layer() if hasattr(wrapper, "base_layer") else module


def check_write(matrix: nn.Module, operation: str, name: str) -> None:
    """Raise `ValueError` unless an edit of the output of the module called `name` can be written into this matrix."""
    if operation == "add":
        if not (is_linear(matrix) or type(matrix) is nn.Embedding or _ends_in_bias(matrix)):
            raise ValueError(
                f"An offset of {name} cannot be merged: no bias in the {type(matrix).__name__} adds the same to its "
                "output, as that of its last matrix does where nothing follows but the residual sum."
            )
        return
    weight: Any = getattr(matrix, "weight", None)
    if not (is_linear(matrix) or isinstance(matrix, nn.Embedding)) or not weight.is_floating_point():
        raise ValueError(
            f"An ablation of {name} cannot be merged: a direction is taken out of plain matrices and embeddings, not "
            f"of a {type(matrix).__name__}; to ablate all that write to the residual stream comes to the same."
        )


def _ends_in_bias(module: nn.Module) -> bool:
    """Return whether a module that is no matrix adds a bias last of all, as PyTorch's own normalisation does."""
    return type(module) is nn.LayerNorm and module.bias is not None


def written(matrix: nn.Module, vector: Tensor, operation: str, alpha: float) -> dict[str, Tensor]:
    """Return the parameters of a matrix or an embedding with an edit of its output in them, in their own precision.

    Args:
        matrix: a linear layer, `Conv1D` or embedding; of an offset also a normalisation with a bias.
        vector: `[outputs]`.
        operation: `"add"`: `b + alpha * v`; `"ablate"`: `W - alpha * d dᵀ W` and `b - alpha * d dᵀ b`.
        alpha: the strength.
    """
    weight, bias = getattr(matrix, "weight", None), getattr(matrix, "bias", None)
    assert isinstance(weight, Tensor)
    if operation == "add" and isinstance(matrix, nn.Embedding):
        return {"weight": (weight.detach() + alpha * vector.to(weight.device)).to(weight.dtype)}
    if operation == "add":
        dtype = weight.dtype if bias is None else bias.dtype
        before = 0.0 if bias is None else bias.detach()
        change = alpha * vector.detach().to(weight.device)
        return {"bias": (before + change).to(dtype if dtype.is_floating_point else torch.float32)}
    d = unit(vector.detach()).to(weight.device)
    changed = {}
    for key, value in {"weight": weight, "bias": bias}.items():
        if value is not None:
            rows = value.detach().to(d.dtype)
            first = key == "weight" and isinstance(matrix, nn.Linear)  # of all only nn.Linear has its outputs first
            rows = rows.T if first else rows
            rows = rows - alpha * (rows @ d)[..., None] * d
            changed[key] = (rows.T if first else rows).to(value.dtype).contiguous()
    return changed


def final_matrices(backbone: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Return, for each of these modules, the matrix in it whose bias is one of its output, where there is one.

    A block that adds its feed-forward part to the residual stream (GPT-2, LLaMA, GPT-NeoX, OPT) has one, one that
    normalises the sum or the part (BERT, Gemma 2) has none. It is not looked up but tried: two tokens go through the
    backbone, and each module is run once more with something added to what its last matrix gives. A module that cannot
    be run once more has none.

    Args:
        backbone: in evaluation mode or not; adapters act as they stand.
        names: of the modules, adapters' wrappers left out.
    """
    named, last_names = dict(base_modules(backbone)), {}
    for block in blocks(backbone):
        for name in names:
            if name == block.name:
                last_names[name] = block.spans()[-1].last
            for span in block.spans():
                if all(matrix.startswith(f"{name}.") for matrix in span.matrices) and name.startswith(f"{block.name}."):
                    last_names[name] = span.last
    if next(backbone.parameters()).is_meta:  # without values nothing can be tried; with them it will be
        return {name: named[last] for name, last in last_names.items()}
    call = _call(backbone)
    exact: dict[str, nn.Module] = {}
    handles = []
    for name, last in last_names.items() if call else ():
        matrix = named[last]

        def attempt(
            module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name, matrix: nn.Module = matrix
        ) -> None:
            try:
                before = _first(module.forward(*args, **kwargs))
            except Exception:  # it changes what it is given, such as a mask or a cache
                return
            if not torch.isfinite(before).all():  # an adapter's NaN has reached it, so that nothing can be tried
                exact[name] = matrix
                return
            added = before.abs().max() * unit(torch.linspace(-1, 2, before.shape[-1]).to(before))
            moved = matrix.register_forward_hook(
                lambda _, __, out: out + added if isinstance(out, Tensor) else None, prepend=True
            )
            try:
                after = _first(module.forward(*args, **kwargs))
            finally:
                moved.remove()
            tolerance = 16 * torch.finfo(before.dtype).eps * float(before.abs().max())
            if is_linear(matrix) and torch.allclose(after, before + added, rtol=0.0, atol=tolerance):
                exact[name] = matrix

        handles.append(named[name].register_forward_hook(attempt, with_kwargs=True))
    try:
        if handles:
            with evaluating(backbone), plain_text(backbone), torch.no_grad():
                backbone(**call)
    except Exception as error:
        raise ValueError(
            f"Which biases of {type(backbone).__name__} would add the same cannot be tried, since it does not run on "
            f"two tokens alone ({type(error).__name__}: {error}): keep the adapter beside its base."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return exact


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _call(backbone: nn.Module) -> Mapping[str, Tensor]:
    """Return the shortest call that the backbone takes; nothing, where it is unknown."""
    config: Any = getattr(backbone, "config", None)
    device = next(backbone.parameters()).device
    accepted = inspect.signature(type(backbone).forward).parameters
    if "pixel_values" in accepted and isinstance(size := getattr(config, "image_size", None), int):
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), size, size, device=device)}
    if "input_ids" not in accepted:
        return {}
    tokens = torch.ones(1, 2, dtype=torch.long, device=device)
    call: dict[str, Any] = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        call["decoder_input_ids"] = tokens
    if "use_cache" in accepted:
        call["use_cache"] = False
    return call
