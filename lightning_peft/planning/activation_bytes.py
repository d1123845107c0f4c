"""The bytes that autograd keeps for backward, without computing or allocating anything."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.planning.trained_bytes import first_line
from lightning_peft.replaced import replaced

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def activation_bytes(
    module: L.LightningModule,
    backbone: nn.Module,
    shape: tuple[int, int],
    precision: str,
    whole_batch: bool,
    notes: list[str],
) -> int | None:
    """Return `kept_for_backward` of a typical call, or None and note why it cannot be found.

    Args:
        module: on the meta device, adapters in place.
        backbone: what in it is adapted.
        shape: batch size and length.
        precision: the Trainer's.
        whole_batch: the module's `forward` takes a dict of text inputs and labels. Else the module is run on its
            `example_input_array`, where it has one, or the backbone on padded texts or images.
        notes: what had to be assumed is added here.
    """
    example, inputs = _example(module, shape[0]), _inputs(backbone, *shape)
    try:
        if example is not None:
            return kept_for_backward(module, *example, precision=precision)
        if inputs is None:
            name = type(module).__name__
            notes.append(f"No bound on activations: what {name} takes is not known; set its example_input_array.")
            return None
        if whole_batch:
            labels = torch.empty(shape, dtype=torch.long, device="meta")
            return kept_for_backward(module, inputs | {"labels": labels}, precision=precision)
        if module is not backbone:
            notes.append("The bound is the backbone's; what the module computes around it is not in it.")
        return kept_for_backward(backbone, precision=precision, **inputs)
    except Exception as error:  # anything a forward may do with values that there are not
        notes.append(f"No bound on activations: a forward without values failed ({first_line(error)}).")
        return None


def kept_for_backward(module: nn.Module, *args: Any, precision: str = "32-true", **kwargs: Any) -> int:
    """Return the bytes of the tensors that autograd holds between the forward and the backward of one call.

    The call runs on torch's fake tensors: shapes, dtypes and the choice of kernels are those of the CPU, but there is
    no storage and nothing is computed. Each tensor that an operation saves for backward is counted once by its
    storage; the module's own parameters and buffers are not. Where the output has `logits`, the mean cross-entropy
    of all of them in float32 is part of the call.

    It leaves out the temporary memory of single operations, gradients, and the allocator's rounding.

    Args:
        module: on the meta device, adapters in place and in the mode (training or not) it will have.
        *args: of its forward; tensors on the meta device stand for inputs of their shape.
        precision: the Trainer's; in `"bf16-mixed"` and `"16-mixed"` the call is made under autocast.
        **kwargs: of its forward.

    Raises:
        RuntimeError: the call depends on values, for which there are none; the class is torch's own.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     module, x = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh()), torch.empty(5, 8)
        >>> kept_for_backward(module, x)  # the input of the layer, and the output of tanh
        240
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # what is not a parameter, buffer or input (a tensor kept as an attribute) is small and real
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twins: dict[int, Tensor] = {}

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in twins:  # tied weights stay one
                twin = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                twins[id(value)] = twin.requires_grad_(value.requires_grad)
            return twins[id(value)]
        if isinstance(value, Mapping):
            return {key: fake(item) for key, item in value.items()}
        return type(value)(map(fake, value)) if isinstance(value, list | tuple) else value

    held: dict[int, torch.UntypedStorage] = {}  # storages are kept alive, so that no two have one identity

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        held[storage._cdata] = storage
        return saved

    autocast = torch.autocast("cpu", _AUTOCAST[precision]) if precision in _AUTOCAST else nullcontext()
    with _without_weights(module), mode, torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        state = {name: fake(value) for name, value in named}
        state_storages = {value.untyped_storage()._cdata for value in state.values()}
        inputs, options = fake(args), fake(kwargs)
        with autocast:
            output = torch.func.functional_call(module, state, inputs, options, tie_weights=False)
            loss = _loss(output)  # noqa: F841 - what it keeps is counted
    return sum(storage.nbytes() for identity, storage in held.items() if identity not in state_storages)


@contextmanager
def _without_weights(module: nn.Module) -> Iterator[None]:
    """Let quantised layers answer without their packed weights; as frozen linear layers they keep no activation."""
    quantised: list[Any] = [layer for layer in module.modules() if is_quantized(layer)]
    with ExitStack() as stack:
        for layer in quantised:
            stack.enter_context(replaced(layer, "forward", partial(_spread, layer.out_features), instead=True))
        yield


def _spread(width: int, x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True).expand(*x.shape[:-1], width).clone(memory_format=torch.contiguous_format)


def _loss(output: Any) -> Tensor:
    """Return a scalar of the output: cross-entropy of logits, else the sum of the first tensor."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return (output if isinstance(output, Tensor) else output[0]).sum()
    rows = logits.flatten(0, -2).float()
    return nn.functional.cross_entropy(rows, rows.new_zeros(len(rows), dtype=torch.long))


def _example(module: L.LightningModule, rows: int) -> tuple[Tensor, ...] | None:
    """Return inputs like Lightning's `example_input_array`, with another number of rows."""
    example: Any = module.example_input_array
    if example is None:
        return None
    inputs = tuple(example.values()) if isinstance(example, dict) else example
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device="meta") for t in inputs)


def _inputs(backbone: nn.Module, batch_size: int, length: int) -> dict[str, Tensor] | None:
    """Return padded texts, or images, as a transformers model's inputs, without values."""
    config: Any = getattr(backbone, "config", None)
    names = inspect.signature(backbone.forward).parameters
    ids = torch.empty(batch_size, length, dtype=torch.long, device="meta")
    if "input_ids" in names:
        texts = {"input_ids": ids, "attention_mask": ids, "position_ids": ids, "decoder_input_ids": ids}
        return {name: value for name, value in texts.items() if name in names}
    if "pixel_values" in names and hasattr(config, "image_size"):
        sides = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        return {"pixel_values": torch.empty(batch_size, config.num_channels, *sides, device="meta")}
    return None
