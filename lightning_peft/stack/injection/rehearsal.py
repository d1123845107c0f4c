"""Try an adapter on the layers it was put on, and a merge on a copy of them, before either is relied on.

peft wraps some kinds of layers in a way that fails in the first call, begins as another function, or computes another
function merged than not: convolutions that are dilated or pad otherwise than with zeros, linear layers with a forward
of their own, weights that are computed. Which ones differs between methods and versions, so it is not listed but tried.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.layer_inputs import computes_weight, is_plain, layer_input
from lightning_peft.backbone.modules import base_modules, standalone_name
from lightning_peft.backbone.peft_private import adapters_on

_SAME = 2e-6  # of the largest output, computed in float64; some methods compute parts in float32


def check_layers(backbone: nn.Module, layers: Collection[Any], config: Any) -> None:
    """Raise `ValueError` in one sentence where a method does not work on a layer it was put on.

    Args:
        backbone: the model.
        layers: the wrappers (peft's `BaseTunerLayer`) of one adapter.
        config: its configuration.
    """
    for layer in layers:
        base = _owner(layer)
        if isinstance(base, nn.Embedding) and base.max_norm is not None:
            raise _refusal(backbone, layer, config, "max_norm rewrites its weight whenever it is read; set it to None")
        if not _can_be_tried(layer) or is_plain(base) or (x := layer_input(base)) is None:
            continue
        try:
            with _evaluating(layer), torch.no_grad():
                expected = base(x)
        except RuntimeError:  # not even alone, such as a half-precision kernel that a device lacks
            continue
        if reason := _misfit(layer, x, expected, starts_as_identity(config)):
            raise _refusal(backbone, layer, config, reason)


def check_merges(backbone: nn.Module, names: Sequence[str]) -> None:
    """Raise `ValueError` in one sentence where merging would give a layer another function; nothing is changed.

    Of layers of the same kind and shape that are exactly a matrix product, one is tried.

    Args:
        backbone: the model with its adapters, not merged.
        names: the adapters to merge, in the order in which they are merged.
    """
    tried = set()
    for layer in _outermost(backbone):
        base, carried = layer.get_base_layer(), [n for n in names if _carriers(layer, n)]
        if not carried or any(module.merged for module in _chain(layer)):
            continue
        if computes_weight(base):
            raise _refusal(
                backbone,
                layer,
                None,
                "its weight is computed anew in each call; make it plain by torch.nn.utils' "
                "parametrize.remove_parametrizations, remove_weight_norm or remove_spectral_norm",
            )
        kind = (*(type(module) for module in _chain(layer)), repr(base), *carried)
        if (is_plain(base) and kind in tried) or (x := layer_input(base)) is None:
            continue
        tried.add(kind)
        if reason := _wrong_merge(layer, x, carried):
            raise _refusal(backbone, layer, None, reason)


def check_initialized(backbone: nn.Module) -> None:
    """Raise `ValueError` where a parameter gets its shape in the first call only."""
    for name, parameter in backbone.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape before the first call of its lazy layer: call the model once first.")


def outside_parametrizations(config: Any, backbone: nn.Module) -> Any:
    """Return the configuration, with the modules that `torch.nn.utils.parametrize` puts under layers excluded.

    `target_modules=["0"]` matches `0.parametrizations.weight.0` as well, which peft cannot replace.
    """
    if not any(".parametrizations." in name for name, _ in backbone.named_modules()):
        return config
    if not getattr(config, "target_modules", None) or not hasattr(config, "exclude_modules"):
        return config
    excluded = config.exclude_modules or []
    ends = [rf"(?:.*\.)?{re.escape(name)}" for name in excluded] if not isinstance(excluded, str) else [excluded]
    config = copy.copy(config)
    config.exclude_modules = "|".join([*ends, r"(?:.*\.)?parametrizations\..*"])
    return config


def starts_as_identity(config: Any) -> bool:
    """Return whether a configuration promises that an untrained adapter changes nothing."""
    flags = [value for name, value in vars(config).items() if name.startswith("init_") and name.endswith("weights")]
    return bool(flags) and all(flag is True for flag in flags)


def _misfit(layer: Any, x: Tensor, expected: Any, identity: bool) -> str | None:
    """Return what is wrong with a fresh adapter on a layer."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    try:
        with _evaluating(layer), torch.enable_grad():
            output = layer(x)
            if isinstance(output, Tensor) and trained and output.requires_grad:
                torch.autograd.grad(output.float().sum(), trained, allow_unused=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        return f"there the method fails with {_sentence(error)!r}; choose another"
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return "there the method gives another shape; choose another"
    if identity and not _same(output, expected, 32 * torch.finfo(output.dtype).eps):
        return "there the method begins as another function than the layer's own; choose another"
    return None


def _wrong_merge(layer: Any, x: Tensor, names: list[str]) -> str | None:
    """Return what is wrong with merging adapters into a layer, tried on a copy in float64."""
    trial: Any = _copy(layer).double().eval()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        try:
            expected = trial(x)
        except (RuntimeError, TypeError, ValueError):  # it acts only within its model
            return None
        try:
            for name in names:
                for wrapper in _carriers(trial, name):
                    wrapper.merge(safe_merge=False, adapter_names=[name])
            merged = trial(x)
        except NotImplementedError:  # on a plain layer it is the method that cannot, which it says when asked to
            return None if is_plain(layer.get_base_layer()) else "the method does not know how; choose another"
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            return f"there the method fails with {_sentence(error)!r}; choose another"
    if not isinstance(merged, Tensor) or not torch.isfinite(expected).all():
        return None
    if not _same(merged, expected, _SAME):
        distance = float((merged - expected).abs().max() / expected.abs().max())
        return f"merged it would compute something else, by {distance:.1g} of the largest output; choose another method"
    return None


def _copy(layer: nn.Module) -> nn.Module:
    """Return a copy, also where tensors are computed from others, as with peft's `ensure_weight_tying`."""
    held = [tensor for module in layer.modules() for tensor in _tensors(vars(module))]
    return copy.deepcopy(layer, {id(t): t.detach().clone() for t in held if not t.is_leaf})


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield tensors in dictionaries, and in dictionaries in them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _refusal(backbone: nn.Module, layer: Any, config: Any, reason: str) -> ValueError:
    name = next((n for n, module in backbone.named_modules() if module is layer), "")
    name = standalone_name(backbone, name).removesuffix(".weight_deltas")
    where = f"{name}, {type(_owner(layer)).__name__}({_owner(layer).extra_repr()})"
    if config is None:
        return ValueError(f"An adapter cannot be merged into {where}: {reason}, or keep it beside its base.")
    return ValueError(f"{type(config).__name__} cannot adapt {where}: {reason}, or leave it out of the targets.")


@contextmanager
def one_sentence(backbone: nn.Module, config: Any) -> Iterator[None]:
    """Turn peft's error for a kind of layer that it does not know into one `ValueError` that names the layer."""
    try:
        yield
    except (TypeError, NotImplementedError, ValueError, IndexError) as error:
        leaves = (item for item in base_modules(backbone) if item[0] and not any(item[1].children()))
        named = next((f" ({name})" for name, module in leaves if repr(module) in str(error)), "")
        if type(error) is ValueError and not named and ". " not in str(error):
            raise
        message = f"{type(config).__name__} cannot be put on the backbone{named}: {_sentence(error)}."
        raise ValueError(message) from error


def _sentence(error: Exception) -> str:
    """Return an error's message, on one line and without full stops."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\.\s+(?=[A-Z`])", "; ", text).rstrip(".")


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def _owner(layer: Any) -> Any:
    """Return the module that a layer wraps, or beside whose parameters it stands."""
    owner = getattr(layer, "_owner", None)
    return owner[0] if isinstance(owner, tuple) else layer.get_base_layer()


def _can_be_tried(layer: Any) -> bool:
    """Return whether a wrapper acts by itself, given its module's input; edits may need to know their model."""
    return hasattr(layer, "base_layer") and getattr(layer, "acts_alone", type(layer).__module__.startswith("peft."))


def _chain(layer: Any) -> list[Any]:
    """Return the wrappers around one module, from this one inwards."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrappers = []
    while isinstance(layer, BaseTunerLayer) and hasattr(layer, "base_layer"):
        wrappers.append(layer)
        layer = layer.base_layer
    return wrappers


def _outermost(backbone: nn.Module) -> Iterator[Any]:
    """Yield for each wrapped module the outermost wrapper that acts by itself, and all in it too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: set[nn.Module] = set()
    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer) and module not in inside:
            chain = _chain(module)
            inside |= set(chain)
            while chain and not all(map(_can_be_tried, chain)):
                chain.pop(0)
            if chain:
                yield chain[0]


def _carriers(layer: nn.Module, name: str) -> list[Any]:
    """Return the tuner layers in and around one module that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners = (module for module in layer.modules() if isinstance(module, BaseTunerLayer))
    return [module for module in tuners if name in adapters_on(module)]


@contextmanager
def _evaluating(layer: nn.Module) -> Iterator[None]:
    training = [module for module in layer.modules() if module.training]
    layer.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
