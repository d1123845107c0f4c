"""bitsandbytes' linear layers, made to stay as they were quantised; importing this imports bitsandbytes.

bitsandbytes' own layers change while they are used: on some CPUs they repack their weights in evaluation (with loss,
for some shapes only, and so that no gradient passes any more), and reading their state undoes that, wrongly. They cast
their bias in place, take the precision to compute in from the first input they happen to see, lose the scales of int8
when a parent module moves, and cannot read back a 4-bit state they wrote. A frozen base must do none of that. These
subclasses need nothing of their own, so an existing layer becomes one by a change of class (`protect`, `adopt`).
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

# said in every call of every int8 layer
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda r: "inputs will be cast" not in str(r.msg))


class Linear4bit(bnb.nn.Linear4bit):
    """A linear map `[..., inputs] -> [..., outputs]` with a frozen weight in 4 bits.

    It computes in `compute_dtype` and answers in the input's; where that is None, it does as `nn.Linear` would.
    """

    weight: Any

    def forward(self, x: Tensor) -> Tensor:
        rows, bias = _prepared(x, self.bias, self.compute_dtype)
        y = bnb.matmul_4bit(rows, self.weight, quant_state=self.weight.quant_state, bias=bias)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        start = f"{prefix}weight."
        saved = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        if saved:
            state = bnb.functional.QuantState.from_dict(saved, self.weight.device)
            self.weight.quant_state = self.quant_state = state
            unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(start)]


class Loaded4bit(Linear4bit):
    """A 4-bit layer of bitsandbytes whose weight stays as it is: it computes what it did, bit for bit.

    Where bitsandbytes would repack the weight for a CPU's own kernel, a copy is packed and kept beside it: whoever
    reads the weight (gradients, DoRA, `state_dict`, another device) finds it in the one known layout.
    """

    packed: tuple[Any, Tensor, Any] | None = None  # what it was packed from, the copy, and the copy's scales

    def forward(self, x: Tensor) -> Tensor:
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(self)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        rows = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        weight, state = self._repacked() if self._repacks(x) else (self.weight, self.weight.quant_state)
        return bnb.matmul_4bit(rows, weight, quant_state=state, bias=bias).to(x.dtype)

    def _repacks(self, x: Tensor) -> bool:
        """Return whether bitsandbytes would compute this by the CPU's own kernel, which has no gradient."""
        if x.device.type != "cpu" or not getattr(self, "support_avx512bf16_for_cpu", False):
            return False
        (outputs, inputs), block = self.weight.quant_state.shape, self.weight.quant_state.blocksize
        return not self.training and not x.requires_grad and outputs % 32 == 0 and inputs % block == 0

    def _repacked(self) -> tuple[Tensor, Any]:
        weight, state = self.weight, self.weight.quant_state
        source = (weight.data_ptr(), weight._version, id(state))
        if self.packed is None or self.packed[0] != source:
            self.packed = (source, *bnb.functional._convert_weight_packed_for_cpu(weight.data, copy.copy(state)))
        return self.packed[1:]


class Linear8bit(bnb.nn.Linear8bitLt):
    """A linear map `[..., inputs] -> [..., outputs]` with a frozen weight in 8 bits; on GPUs its input too, by row."""

    weight: Any

    def forward(self, x: Tensor) -> Tensor:
        rows, bias = _prepared(x, self.bias, None)
        return bnb.matmul(rows, self.weight, bias=bias, state=self.state).reshape(*x.shape[:-1], -1)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear8bit:
        super()._apply(fn, recurse)
        settle(self)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # bitsandbytes looks for the scales on the weight
        self.weight.SCB = self.state.SCB
        super()._load_from_state_dict(state_dict, prefix, *args)
        settle(self)


def _prepared(x: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Return the input as rows, the one shape with right gradients of a bias, and the bias, in the dtype to use."""
    if not x.is_floating_point():
        raise TypeError(
            f"A quantised layer was given {x.dtype}, as by a module that casts to the dtype of its weight: name the "
            "layer in skip_modules."
        )
    if dtype is None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.to(dtype).reshape(-1, x.shape[-1]), None if bias is None else bias.to(dtype)


def settle(layer: Any) -> None:
    """Let an int8 layer's state hold its weight, as it is now, and its scales beside it; the weight holds neither."""
    weight, state = layer.weight, layer.state
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
    state.CB, state.SCB = weight.data, scales.to(weight.device)
    weight.CB = weight.SCB = None
    # on CPU this says that inputs are not quantised, which is both faster and nearer: so in evaluation as in training
    state.is_training = True


def protect(layer: Any) -> None:
    """Let a 4-bit layer that bitsandbytes made compute what it does, and never change; others are left alone."""
    if type(layer) in (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            _unpack(layer.weight)
        layer.__class__ = Loaded4bit


def adopt(layer: Any) -> None:
    """Make a layer of bitsandbytes one of the above, in place."""
    protect(layer)
    if type(layer) is bnb.nn.Linear8bitLt:
        layer.__class__ = Linear8bit
        settle(layer)


def _unpack(weight: Any) -> None:
    """Undo a repacking; bitsandbytes' own way leaves the scales in another order, or quantises them once more."""
    state = weight.quant_state
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    weight.quant_state.absmax = scales


def make(linear: Any, transposed: bool, quant_type: str, double_quant: bool, dtype: Any, threshold: float) -> Any:
    """Make the quantised twin of a linear layer, with its bias, on its device.

    Args:
        linear: the layer; its weight is read, not changed.
        transposed: its weight is `[inputs, outputs]`.
        quant_type: `"nf4"`, `"fp4"` or `"int8"`.
        double_quant: quantise the scales of 4-bit blocks as well.
        dtype: to compute in, for 4 bits; None is the input's.
        threshold: of int8's outliers, see `Quantization`.
    """
    weight = linear.weight.detach().T.contiguous() if transposed else linear.weight.detach()
    if weight.is_meta and "dynamic" not in bnb.functional.name2qmap:
        with torch.device("cpu"):  # else bitsandbytes would keep a table without values, for every later layer too
            bnb.functional.name2qmap["dynamic"] = bnb.functional.create_dynamic_map()
    outputs, inputs = weight.shape
    with torch.device("meta"):  # their own weights are never made
        if quant_type == "int8":
            layer: Any = Linear8bit(inputs, outputs, False, has_fp16_weights=False, threshold=threshold)
        else:
            layer = Linear4bit(inputs, outputs, False, dtype, double_quant, quant_type)
    if quant_type == "int8":
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer.weight._quantize(weight.device)
        settle(layer)
    else:
        layer.weight = bnb.nn.Params4bit(
            weight, compress_statistics=double_quant, quant_type=quant_type, module=layer, requires_grad=False
        )
        layer.weight._quantize(weight.device)
        if weight.is_meta and double_quant:  # a state is saved with this by its value, also where only shapes matter
            layer.weight.quant_state.offset = torch.zeros((), device="cpu")
    layer.bias = linear.bias
    layer.train(linear.training)
    return layer


def weight_of(layer: Any) -> Tensor:
    """Return the weight `[outputs, inputs]` that a quantised layer computes with."""
    if _is_4bit(layer):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return layer.weight.data * (scales / 127)[:, None]


def settings_of(layer: Any) -> dict[str, Any]:
    """Return the settings a layer was quantised with: `quant_type`, and `double_quant` where there is such a thing."""
    if _is_4bit(layer):
        return {"quant_type": layer.weight.quant_type, "double_quant": bool(layer.weight.compress_statistics)}
    return {"quant_type": "int8"}


def stored(layer: Any) -> list[Tensor]:
    """Return every tensor that stands for a quantised layer's weight: packed values, scales, code tables."""
    if not _is_4bit(layer):
        return [layer.weight.data, layer.state.SCB]
    state = layer.weight.quant_state
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [layer.weight.data, state.absmax, state.code, *nested]


def _is_4bit(layer: Any) -> bool:
    return isinstance(layer, bnb.nn.Linear4bit)
