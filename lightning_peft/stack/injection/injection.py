"""One peft method on a backbone: put on, named, switched and taken off, the backbone staying the same object.

Most methods wrap modules in place. Those that share weights between layers keep them in their tuner, which is not
part of the backbone: here such weights become a child of the backbone, so that optimizers, devices and checkpoints
find them, once each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import STATE, AdapterState, standalone_name, state_tensors
from lightning_peft.backbone.parameter_order import keep_parameter_order
from lightning_peft.backbone.peft_private import (
    adapters_in,
    adapters_on,
    boundary_hooks,
    cast_adapter,
    changes_parameters,
    check_merge_allowed,
    set_active,
    whole_wrapper,
)
from lightning_peft.backbone.quantization import check_merge
from lightning_peft.positions import untrack
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.injection.own_forward import Invocation, OwnForward, task_of

_PREFIX = "base_model.model."  # what PeftModel puts before the name of every tensor in the backbone
_HALF = (torch.float16, torch.bfloat16)
_TUNER = "base_model."  # and before what the tuner itself holds


class Injection:
    """A tuner (`BaseTuner`) built on the backbone in place.

    Args:
        backbone: the model.
        config: the configuration; peft fills it in.
        name: the adapter's name.
    """

    task_type: str | None = None  # what a saved configuration must say, where it was left open
    calls: type[OwnForward] | None = None  # what the method does around the backbone's calls, beside its modules
    start: float | None = None  # what every tensor of the method starts at, where that is one number
    trains_copies = False  # of the base's own weights, in the base's precision
    changes_every_block = False  # whatever modules it is on

    @classmethod
    def check(cls, backbone: nn.Module, config: Any, name: str, others: list[Injection], computed: bool) -> None:
        """Raise `ValueError` in one sentence where this cannot be put on the backbone; nothing is changed.

        Args:
            backbone: the model.
            config: the configuration.
            name: the adapter's name.
            others: the adapters on the backbone already.
            computed: whether it is an edit.
        """
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "tuner_layer_cls"):
            raise ValueError(f"{type(config).__name__} is of no kind that this package can put on a backbone.")
        for other in others:
            if other.config.peft_type == config.peft_type and other.has_state:
                raise ValueError(
                    f"{type(config).__name__} shares weights between layers, so a backbone carries one, and has "
                    f"{other.name!r} already."
                )
        cls.check_others(config, others, computed)

    @classmethod
    def check_others(cls, config: Any, others: list[Injection], computed: bool) -> None:
        """Raise `ValueError` where it cannot go with the adapters on the backbone."""
        for other in others:
            other.check_below(config, computed)
            if other.own_forward is not None and cls.own_calls(config) is not None:
                pair = f"{type(other.config).__name__} and {type(config).__name__}"
                raise ValueError(f"{pair} both act on the backbone's calls, so they cannot be on one backbone.")

    @classmethod
    def own_calls(cls, config: Any) -> type[OwnForward] | None:
        """Return the class that acts around the backbone's calls; None where all happens inside its modules."""
        return Invocation if getattr(config, "alora_invocation_tokens", None) else cls.calls

    @classmethod
    def is_final(cls, config: Any, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether a folder's tensors are a result alone, without the network that computed it in training."""
        return False

    def check_below(self, config: Any, computed: bool) -> None:
        """Raise `ValueError` where another adapter cannot be put on top of this one."""

    @classmethod
    def clean_up(cls, backbone: nn.Module, config: Any, name: str) -> None:
        """Remove the remains of a failed attempt."""
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        take_out(backbone, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].tuner_layer_cls, name)
        forget_state(backbone, name)

    def __init__(self, backbone: nn.Module, config: Any, name: str) -> None:
        if self.own_calls(config) is not None:  # `PeftModel` calls the backbone in a way that depends on its task
            self.task_type = config.task_type = str(getattr(config.task_type, "value", None) or self._task(backbone))
        self.backbone, self.config, self.name = backbone, config, name
        self.tuner: Any = self._build()
        state = self._state()
        self.has_state = bool(state)
        self._keep(state)
        self.own_forward = self._own_forward()
        turns = getattr(config, "target_parameters", None) and any(map(changes_parameters, backbone.modules()))
        self._turns = OwnForward(backbone, self.tuner) if turns else None
        self.trained: set[str] = set()  # the keys of those tensors that training the adapter means
        self.noted: dict[str, str] = {}  # all keys when it was put on; later wrappers give other names

    def note_trained(self) -> None:
        """Note the parameters that peft would train, since others may freeze them, and the keys as they are now."""
        self.noted, state = self.keys(), state_tensors(self.backbone)
        self.trained = {key for key, live in self.noted.items() if state[live].requires_grad}

    def count_trained(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many numbers were trained for a folder's tensors; what is saved beside does not count."""
        return sum(tensor.numel() for key, tensor in tensors.items() if key in self.trained)

    def _task(self, backbone: nn.Module) -> str:
        task = task_of(backbone)
        return task if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else "FEATURE_EXTRACTION"

    def _build(self) -> Any:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[self.config.peft_type]
        keep_parameter_order(self.backbone)
        tuner = tuner_class(self.backbone, {self.name: self.config}, self.name)
        keep_parameter_order(self.backbone)
        _to_float32(tuner, self.name)
        return tuner

    def _state(self) -> dict[str, nn.Module]:
        """Return the modules that the tuner holds outside the backbone."""
        return {name: child for name, child in self.tuner.named_children() if child is not self.backbone}

    def _own_forward(self) -> OwnForward | None:
        calls = self.own_calls(self.config)
        return None if calls is None else calls(self.backbone, self.tuner)

    def kept_config(self, config: Any) -> Any:
        """Return a copy of the configuration that was given, from which the adapter is made again."""
        return copy.deepcopy(config)

    def _saved_config(self) -> Any:
        """Return the configuration by which peft chooses the tensors to save."""
        return copy.copy(self.config)

    def layers(self) -> Iterator[Any]:
        """Yield the tuner layers (`BaseTunerLayer`) that carry the adapter."""
        for module in self.backbone.modules():
            if isinstance(module, self.tuner.tuner_layer_cls) and self.name in adapters_on(module):
                yield module

    def keys(self) -> dict[str, str]:
        """Return the adapter's tensors: peft's key in a saved folder -> the name in the backbone's state.

        Raises:
            AdapterError: two tensors would have one key.
        """
        from peft import get_peft_model_state_dict

        configs = {**self.backbone.__dict__.get("peft_config", {}), self.name: self._saved_config()}
        model = _PeftNames(self.tuner, configs)
        # peft only selects and renames entries, so names may stand in for tensors
        state = {name: value for name, value in state_tensors(model).items() if f".{STATE}." not in name}
        names: dict[str, Any] = {name: name for name in state}
        selected = get_peft_model_state_dict(
            model, state_dict=names, adapter_name=self.name, save_embedding_layers=False
        )
        state_names = {id(value): name for name, value in state.items()}  # SHiRA looks up some tensors itself
        named = {key: value if isinstance(value, str) else state_names[id(value)] for key, value in selected.items()}
        keys: dict[str, str] = {}
        for key, name in named.items():
            live = self._live(name)
            if (first_live := keys.setdefault(self._alone(key), live)) != live:
                raise AdapterError(f"{first_live} and {live} would both be saved as {self._alone(key)}, and one lost.")
        return keys

    def places(self) -> list[str]:
        """Return the modules the adapter is on, by the names they have without adapters."""
        live = (n for n in self.keys().values() if not n.startswith(f"{STATE}.") and ".modules_to_save." not in n)
        mark = getattr(self.tuner, "child", self.tuner.prefix)
        return list(dict.fromkeys(standalone_name(self.backbone, name.split(f".{mark}")[0]) for name in live))

    def check_merge(self) -> None:
        """Raise `ValueError` where the adapter cannot be written into the weights."""
        try:
            check_merge_allowed(self.tuner)
        except NotImplementedError as error:
            raise self.cannot_merge() from error
        if getattr(self.tuner, "changes_weights", True):
            check_merge(self.layers(), type(self.config).__name__)

    def cannot_merge(self) -> ValueError:
        return ValueError(f"{type(self.config).__name__} cannot be merged: no weights compute what it does.")

    def switch(self, on: bool) -> None:
        """Switch on or off what is outside tuner layers."""
        for calls in (self.own_forward, self._turns):
            if calls is not None:
                calls.switch(on)

    def spread(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return saved tensors under the keys that `keys` has now."""
        return tensors

    def take_out(self) -> None:
        """Put the backbone back as it was without this adapter."""
        self.switch(False)
        for handle in boundary_hooks(self.tuner):
            handle.remove()
        take_out(self.backbone, self.tuner.tuner_layer_cls, self.name)
        forget_state(self.backbone, self.name)

    def _alone(self, key: str) -> str:
        """Return peft's key in a saved folder, as it is where no other adapter is on the backbone."""
        inside = key.startswith(_PREFIX)
        return _PREFIX + standalone_name(self.backbone, key.removeprefix(_PREFIX), self.name) if inside else key

    def _live(self, name: str) -> str:
        """Return the name in the backbone's state of what `PeftModel` would call `name`."""
        if name.startswith(_PREFIX):
            return name.removeprefix(_PREFIX)
        return f"{STATE}.{self.name}.{name.removeprefix(_TUNER)}"

    def _keep(self, modules: Mapping[str, nn.Module]) -> None:
        """Make modules that stand outside the backbone's own a child of it."""
        if modules:
            if not hasattr(self.backbone, STATE):
                self.backbone.add_module(STATE, AdapterState())
            getattr(self.backbone, STATE)[self.name] = nn.ModuleDict(modules)


class _PeftNames(nn.Module):
    """The part of a `PeftModel` around the tuner that peft's own functions for saving need."""

    def __init__(self, tuner: Any, configs: dict[str, Any]) -> None:
        super().__init__()
        self.base_model, self.peft_config = tuner, configs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def _to_float32(tuner: Any, name: str) -> None:
    """Keep an adapter on a half-precision base in float32, as `get_peft_model` does: half rounds small steps away."""
    if all(parameter.dtype not in _HALF for parameter in tuner.parameters()):
        return
    if hasattr(tuner, "_cast_adapter_dtype"):
        flags = {key: p.requires_grad for key, p in tuner.named_parameters(remove_duplicate=False)}
        cast_adapter(tuner, name)
        for key, parameter in tuner.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(flags[key])  # peft would train all that it has cast
    for layer in tuner.modules():
        for attribute in getattr(layer, "other_param_names", ()):
            held = getattr(layer, attribute, None)
            if isinstance(held, nn.ParameterDict) and name in held:
                held[name].requires_grad_(False)  # and what it has moved to the base's precision


def take_out(backbone: nn.Module, cls: Any, name: str) -> None:
    """Delete an adapter from every wrapper of `cls`, and put back the modules whose wrapper holds no other."""
    whole = whole_wrapper()

    children: list[tuple[nn.Module, str, Any]] = [
        (parent, n, child) for parent in backbone.modules() for n, child in parent.named_children()
    ]
    # listed first: where layers share a dictionary, the first deletion is everybody's
    wrappers = [c for c in children if isinstance(c[2], cls) and name in adapters_on(c[2])]
    for _, _, layer in wrappers:
        set_active(layer, [])  # so that peft need not choose, and warn of, another
        layer.delete_adapter(name)
    for parent, child_name, layer in reversed(wrappers):  # inner ones first, where one adapter's are nested
        # a layer that stands beside the module's own parameters has taken itself out
        if not adapters_on(layer) - {name} and hasattr(layer, "base_layer"):
            for beside in [child for child in layer.children() if hasattr(child, "attach")]:
                beside.attach(layer.base_layer)  # what stood beside the wrapper stands beside the module itself
            setattr(parent, child_name, layer.base_layer)
    for parent, child_name, child in children:
        if isinstance(child, whole) and name in adapters_in(child):
            child.delete_adapter(name, [])
            if not adapters_in(child):
                setattr(parent, child_name, child.original_module)
    keep_parameter_order(backbone)
    untrack(backbone)


def forget_state(backbone: nn.Module, name: str) -> None:
    """Take an adapter's modules out of the backbone's `AdapterState`, and that itself with the last of them."""
    state = getattr(backbone, STATE, None)
    if state is not None and name in state:
        del state[name]
        if not len(state):
            delattr(backbone, STATE)
