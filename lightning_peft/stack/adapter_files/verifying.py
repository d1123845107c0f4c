"""A check that a written model computes the same as its origin, before it is moved to its name.

No two models are in memory together: of one its outputs for a probe and a digest of each weight are kept, then it is
let go and the next is loaded.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.stack.adapter_files.example_inputs import Probe, find_probe, outputs
from lightning_peft.stack.adapter_files.folder import read_folder
from lightning_peft.stack.configs import config_to_json

EXACT = 1e-5  # of the largest output, in float32
ROUNDED = 3.0  # times what rounding the base alone does, in half precision
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Verification:
    """The comparison of a written model with its origin.

    Args:
        error: the largest difference of outputs, as a share of the largest output; None: only weights were compared.
        allowed: the largest error allowed.
        unreached: adapted modules that the probe does not run, whose weights alone were compared.
    """

    error: float | None
    allowed: float | None
    unreached: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.error is None:
            return "Verified weight by weight, since no input is known that the model takes in this precision"
        text = f"Verified: its outputs differ by {self.error:.1e} of the largest, where {self.allowed:.1e} is allowed"
        if not self.unreached:
            return text
        return f"{text}; what its input does not reach ({', '.join(self.unreached)}) is verified by its weights"


@dataclass(frozen=True)
class Reference:
    """The values that a written model is compared with.

    Args:
        probe: the input; None where none is known.
        outputs: for it, of the model with its adapters, in float32.
        digests: of the weights that are to be written, by name.
        allowed: how far outputs may differ, as a share of the largest.
        unreached: adapted modules that the probe does not run.
    """

    probe: Probe | None
    outputs: list[Tensor]
    digests: Mapping[str, str]
    allowed: float
    unreached: tuple[str, ...] = ()


def verify(folder: Path, cls: Any, dtype: torch.dtype, reference: Reference) -> Verification:
    """Load a written folder and compare it.

    Args:
        folder: of a transformers model.
        cls: its class.
        dtype: to load in.
        reference: the values it must have.

    Raises:
        ValueError: it lacks a weight, holds another, or computes something else.
    """
    written, report = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise _wrong(f"the written {cls.__name__} lacks or does not know {wrong[0]}")
    # not `state_dict`, which bitsandbytes changes quantised weights in
    state = dict(written.named_parameters(remove_duplicate=False)) | dict(written.named_buffers())
    for name, expected in reference.digests.items():
        if name not in state or digest(state[name]) != expected:
            raise _wrong(f"the written {name} is not what the adapter and the base give")
    if reference.probe is None:
        return Verification(None, None)
    error = difference(outputs(written, reference.probe), reference.outputs)
    if not error <= reference.allowed:
        raise _wrong(
            f"the outputs of the written {cls.__name__} differ from the adapted model's by {error:.1e} of the largest, "
            f"where {reference.allowed:.1e} is allowed"
        )
    return Verification(error, reference.allowed, reference.unreached)


def reference(
    load: Callable[[torch.dtype], Any],
    adapt: Callable[[Any], Any],
    expected: Callable[[Any], Mapping[str, Tensor]],
    dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype,
) -> Reference:
    """Compute in float32 the values that a model written in some precision must have.

    Args:
        load: gives the base in a precision.
        adapt: puts the adapters on it.
        expected: writes them into it and gives its weights by name; after this it is let go.
        dtypes: of the weights that are written, by name.
        dtype: the precision the model is written in.
    """
    model = load(torch.float32)
    probe = find_probe(model)
    plain = [] if probe is None else outputs(model, probe)
    adapt(model)
    adapted: list[Tensor] = []
    unreached: tuple[str, ...] = ()
    if probe is not None:
        with _reached(model) as left:
            adapted = outputs(model, probe)
        unreached = tuple(left)
    weights = expected(model)
    digests = {name: digest(weights[name].to(kind)) for name, kind in dtypes.items()}
    del model, weights
    gc.collect()
    allowed = EXACT
    if dtype in HALF and probe is not None:
        try:
            allowed = ROUNDED * difference(outputs(load(dtype), probe), plain)
        except RuntimeError:  # a kernel that this device lacks
            probe = None
    return Reference(probe, adapted, digests, allowed, unreached)


def check_same(made: Path, source: Path) -> None:
    """Raise `ValueError` unless two adapter folders are read as the same configuration, tensors and notes."""
    (config, tensors, notes), (source_config, expected, own_notes) = read_folder(made), read_folder(source)
    if config_to_json(config) != config_to_json(source_config) or notes != own_notes:
        raise _wrong(f"the configuration or notes written for {source} are not its own")
    if tensors.keys() != expected.keys():
        raise _wrong(f"the tensors written for {source} have other names than its own")
    for key, value in expected.items():
        if tensors[key].dtype != value.dtype or digest(tensors[key]) != digest(value):
            raise _wrong(f"the written {key} is not what loading {source} gives")


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of two lists of tensors as a share of the largest value; for other shapes inf."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    pairs = zip(found, expected, strict=True)
    shares = [float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in pairs if b.numel()]
    return max(shares) if all(share == share for share in shares) else float("nan")


def digest(value: Tensor) -> str:
    """Return a fingerprint of a tensor's values and shape; not of its precision, which loading may raise."""
    value = value.detach().cpu()
    value = value.float() if value.dtype in HALF else value
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(f"{tuple(value.shape)}".encode() + flat.numpy().tobytes(), digest_size=16).hexdigest()


@contextmanager
def _reached(model: nn.Module) -> Iterator[list[str]]:
    """Watch which adapted modules run for a while; yield a list, in the end of the names of those that did not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer")
    }
    ran: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: ran.add(module)) for m in adapted.values()]
    left: list[str] = []
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()
    left += [name for name, module in adapted.items() if module not in ran]


def _wrong(problem: str) -> ValueError:
    return ValueError(f"{problem[0].upper()}{problem[1:]}: nothing was kept, so use the adapter beside its base.")
