"""Access to what peft keeps to itself and this package needs: the one file to read when peft changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft.utils.other import AuxiliaryTrainingWrapper


def whole_wrapper() -> type[AuxiliaryTrainingWrapper]:
    """Return the class of the wrappers around modules that are trained whole, or in part, beside an adapter."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return AuxiliaryTrainingWrapper


def changes_parameters(layer: nn.Module) -> bool:
    """Return whether a layer adapts a parameter, which is another tensor for the length of a call (peft 0.21)."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def adapters_on(layer: Any) -> set[str]:
    """Return the names of the adapters that a tuner layer carries."""
    return layer._get_available_adapters()


def adapters_in(wrapper: Any) -> set[str]:
    """Return the names of the adapters that a `whole_wrapper` carries."""
    return wrapper._adapters


def set_active(layer: Any, names: Sequence[str]) -> None:
    """Choose the adapters that act in a layer; peft's own switch would turn their gradients on as well."""
    layer._active_adapter = list(names)


def activate(layer: Any, names: Sequence[str]) -> None:
    """Let these adapters act in a layer, and the base alone where there is none."""
    set_active(layer, names)
    layer._disable_adapters = not names


def check_merge_allowed(tuner: Any) -> None:
    """Raise `NotImplementedError` where a tuner cannot be written into weights."""
    tuner._check_merge_allowed()


def cast_adapter(tuner: Any, name: str) -> None:
    """Turn an adapter to float32, where the tuner can; all that is cast can be trained afterwards."""
    tuner._cast_adapter_dtype(adapter_name=name)


def tasks_of_call(tuner: Any, task_ids: Any) -> AbstractContextManager[Any]:
    """Return a context in which Poly's layers see the tasks of a call."""
    return tuner._manage_pre_hooks(task_ids)


def during_call(tuner: Any, **of_call: Any) -> AbstractContextManager[Any]:
    """Return a context in which a tuner's layers see what a call gives besides its tokens."""
    return tuner._enable_peft_forward_hooks(**of_call)


def forget_call(tuner: Any) -> None:
    """Let go of the graph that ShadowPEFT holds of its last call."""
    tuner._seed_shadow_state = None


def boundary_hooks(tuner: Any) -> Iterable[Any]:
    """Return the handles of the hooks that ShadowPEFT has put on the backbone itself."""
    return getattr(tuner, "_boundary_hook_handles", ())


def adaption_parents(tuner: Any, name: str) -> list[Any]:
    """Return the modules that hold an adaption prompt's wrappers."""
    return tuner._parents[name]


def keep_default_config(model: Any, config: Any) -> None:
    """Put a configuration where CPT looks for its settings, whatever the adapter is called."""
    model._peft_config["default"] = config


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let no adapter act for a while; those that are merged stay."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not (m.disable_adapters or m.merged)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
