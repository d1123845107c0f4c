"""The adapters on one backbone: an ordered stack that can be saved, loaded, scaled, switched off and merged.

peft refuses adapters of different types in one `PeftModel`, and injecting one over another renames keys. So a stack
is an ordered list of parts, tuned parts inner and edits outer. Each part is an ordinary peft adapter: it is put on the
backbone in place (`injection.py`, `prompts.py`, `adaption.py`), and its keys are saved as if it stood alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from lightning_peft.backbone.fingerprint import fingerprint, mismatch, without
from lightning_peft.backbone.fused import unfuse
from lightning_peft.backbone.modules import state_tensors, with_nested_keys
from lightning_peft.backbone.peft_private import activate, adapters_in, adapters_on, whole_wrapper
from lightning_peft.backbone.quantization import protect
from lightning_peft.backbone.sharded import whole, write
from lightning_peft.backbone.shared import Own, undo
from lightning_peft.backbone.task_heads import task_heads
from lightning_peft.moved.names import keep_old_names
from lightning_peft.replaced import Handle
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.adapter_files.folder import AdapterError, check_finite, check_kind
from lightning_peft.stack.checks import check_containers, check_name, check_scale, check_strangers, check_targets
from lightning_peft.stack.computed import ComputedAdapter
from lightning_peft.stack.configs import auto_mapping, check_numbers, config_to_json
from lightning_peft.stack.injection.head_training import saved_heads
from lightning_peft.stack.injection.initialisation import check_repeatable, check_undoable
from lightning_peft.stack.injection.registry import injection_for
from lightning_peft.stack.injection.rehearsal import (
    check_initialized,
    check_layers,
    one_sentence,
    outside_parametrizations,
)
from lightning_peft.stack.injection.writing import write as merge_parts

if TYPE_CHECKING:
    from peft import PeftConfig

_ATTRIBUTE = "_lightning_peft_stack"
# stacks that somebody holds and that have no adapter, by the identity of the backbone, which they keep alive
_EMPTY: WeakValueDictionary[int, AdapterStack] = WeakValueDictionary()


class OtherBaseWarning(UserWarning):
    """An adapter is loaded on another base model than it was made for."""


class AdapterStack:
    """The adapters on one backbone, innermost first. `adapters(module)` gives the stack of a module.

    Args:
        backbone: the frozen model; adapters are injected into it in place and its class does not change.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.parts: list[Adapter] = []
        self.base: dict[str, Any] = {}  # fingerprint of the backbone before the first adapter
        self._reading: dict[str, Any] | None = None  # the same, while nothing else can change the backbone
        self.strict_base = True  # whether what was made for another base is refused, or loaded with a warning
        self._own: list[Own] = []  # what merged modules have for themselves and share otherwise
        self._while_adapted: list[Handle] = []
        self._changing = 0  # contexts in which the last adapter may be gone for a moment

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_while_adapted": []}  # they reach beyond the backbone that is copied

    def add(
        self, config: PeftConfig, name: str = "default", computed: bool = False, record: dict[str, Any] | None = None
    ) -> Adapter:
        """Freeze the backbone and put an adapter on it, outermost.

        Args:
            config: any peft configuration; it is copied, not changed.
            name: the adapter's name, unique in the stack.
            computed: its weights are computed (an edit), not trained.
            record: how they were computed.

        Raises:
            ValueError: the name is taken or a module's, a number of the configuration is not finite, no module matches
                its targets, the backbone has nothing this
                method could act on, it cannot go with what is there, or a tuned adapter would come on top of an edit.
                The backbone is then as it was.
        """
        if any(part.name == name for part in self.parts):
            raise ValueError(f"The backbone already has an adapter named {name!r}.")
        if not computed and any(part.computed for part in self.parts):
            edits = ", ".join(repr(part.name) for part in self.parts if part.computed)
            raise ValueError(f"Adapter {name!r} is tuned and belongs below the edit {edits}: tune first, then edit.")
        check_numbers(config)
        check_repeatable(config)
        check_initialized(self.backbone)
        config = outside_parametrizations(config, self.backbone)
        ours = {part.name for stack in find_stacks(self.backbone).values() for part in stack.parts}
        check_strangers(self.backbone, ours)
        check_name(name, self.backbone)
        check_targets(config, self.backbone)
        kind = injection_for(config)
        kind.check(self.backbone, config, name, [part.injection for part in self.parts], computed)
        self.unmerge()
        protect(self.backbone)
        base = self._base()
        flags = self._flags()
        # peft warns of a second configuration on one model; here that is the point, so it is shown a bare model
        configs = self.backbone.__dict__.pop("peft_config", {})
        live_config = copy.deepcopy(config)
        try:
            # an initialisation that reads or changes weights must see the base's own
            with self._switched_off():
                with one_sentence(self.backbone, config):
                    injection = kind(self.backbone, live_config, name)
                layers = list(injection.layers())
                check_layers(self.backbone, layers, live_config)
                check_containers(self.backbone, set(layers), ours)
            part = Adapter(name, injection.kept_config(config), injection, computed, dict(record or {}))
            part.scaling = {m: float(m.scaling[name]) for m in injection.layers() if name in getattr(m, "scaling", {})}
        except Exception:
            kind.clean_up(self.backbone, live_config, name)
            if configs:
                self.backbone.__dict__["peft_config"] = configs
            _set(flags)
            self._activate()
            raise
        self.base = base
        self.backbone.__dict__["peft_config"] = {**configs, name: live_config}
        self.backbone.__dict__[_ATTRIBUTE] = self
        self.parts.append(part)
        injection.note_trained()
        _set(flags)  # peft freezes all that is not of the kind it puts on
        self._activate()
        return part

    def put(self, name: str, made: ComputedAdapter) -> Adapter:
        """Put a computed adapter on the backbone, outermost, in place of one of the same name.

        Raises:
            ValueError: as `add`.
            AdapterError: the tensors are not those of the configuration, or not finite. The name is then free.
        """
        with self.changing():
            if name in self:
                self.remove(name)
            part = self.add(made.config, name, computed=True, record=dict(made.record))
            try:
                self.load_tensors(part, made.tensors, "the computed edit")
            except Exception:
                self.remove(name)
                raise
        return part

    def remove(self, name: str) -> None:
        """Take one adapter out. Where no other adapter sits on a module, the module itself comes back.

        After the last one the backbone is as it was before the first, but frozen.

        Raises:
            ValueError: the adapter was made by changing the base's weights, as PiSSA does.
        """
        part = self[name]
        check_undoable(part.config, name, "taken out")
        self.unmerge()
        self.parts.remove(part)
        configs = self.backbone.__dict__.pop("peft_config")
        if remaining := {key: config for key, config in configs.items() if key != name}:
            self.backbone.__dict__["peft_config"] = remaining
        part.injection.take_out()
        self._activate()
        self._leave_bare()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let adapters be exchanged: handles and state that need an adapter stay, even while there is none."""
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1
            self._leave_bare()

    def _leave_bare(self) -> None:
        if not self.parts and not self._changing:
            self.backbone.__dict__.pop(_ATTRIBUTE, None)
            _EMPTY[id(self.backbone)] = self
            for handle in self._while_adapted:
                handle.remove()
            self._while_adapted.clear()

    def while_adapted(self, handle: Handle) -> None:
        """Remove a handle when the last adapter is taken off."""
        if handle not in self._while_adapted:
            self._while_adapted.append(handle)

    def __getitem__(self, name: str) -> Adapter:
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(f"No adapter named {name!r}; there are: {', '.join(p.name for p in self.parts) or 'none'}.")

    def __contains__(self, name: object) -> bool:
        return any(part.name == name for part in self.parts)

    def scale(self, scale: float, name: str | None = None) -> None:
        """Turn the dial of one adapter, or of all: 1 as made, 0 equal to the base, negative reversed.

        A head that is trained whole beside an adapter has no dial, and stays as it was trained.

        Raises:
            ValueError: the method has no scaling, or began by changing the base's weights, as PiSSA does.
        """
        parts = self.parts if name is None else [self[name]]
        check_scale(scale)
        for part in parts:
            check_undoable(part.config, part.name, "scaled")
            if not part.scaling:
                raise ValueError(f"Adapter {part.name!r} ({type(part.config).__name__}) has no dial to scale.")
        self.unmerge()
        for part in parts:
            for module, base in part.scaling.items():
                module.scaling[part.name] = base * scale  # type: ignore[union-attr, operator, index]
            part.scale = scale

    def enable(self, enabled: bool = True, name: str | None = None) -> None:
        """Switch one adapter, or all, on or off. Off, the outputs are the base model's, bit for bit.

        Raises:
            ValueError: an adapter to be switched off was made by changing the base's weights, as PiSSA does.
        """
        parts = self.parts if name is None else [self[name]]
        for part in parts:
            if not enabled:
                check_undoable(part.config, part.name, "switched off")
        self.unmerge()
        for part in parts:
            part.enabled = enabled
        self._activate()

    @contextmanager
    def disabled(self, name: str | None = None) -> Iterator[None]:
        """Switch one adapter, or all, off for a while.

        Raises:
            ValueError: as `enable`.
        """
        for part in self.parts if name is None else [self[name]]:
            check_undoable(part.config, part.name, "switched off")
        with self._switched_off(name):
            yield

    @contextmanager
    def _switched_off(self, name: str | None = None) -> Iterator[None]:
        if not self.parts:
            yield
            return
        before = [part.enabled for part in self.parts]
        self.unmerge()
        for part in self.parts if name is None else [self[name]]:
            part.enabled = False
        self._activate()
        try:
            yield
        finally:
            for part, enabled in zip(self.parts, before, strict=True):
                part.enabled = enabled
            self._activate()

    def merge(self) -> None:
        """Write every enabled adapter into the weights, inner ones first: exactly, or not at all.

        Each layer is tried on a copy before, weights in half precision are computed in float32 and rounded once, and a
        weight that another module has too, such as a tied output embedding, changes for the adapted module alone.
        `unmerge` undoes it, and so does whatever changes the adapters: `scale`, `enable`, `add`, `remove`. Head offsets
        come out bit for bit; peft takes LoRA out by subtraction, to rounding.

        Raises:
            ValueError: a method (or its configuration) cannot be merged, or not into one of its layers. Nothing is
                merged then.
        """
        parts = [part for part in _in_merge_order(self.parts) if part.enabled]
        try:
            merge_parts(self.backbone, [part.injection for part in parts], self._own)
        except Exception:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Take merged adapters out of the weights again."""
        for part in reversed(_in_merge_order(self.parts)):
            for module in part.injection.layers():
                if module.merged:
                    module.unmerge()
        undo(self._own)
        self._own.clear()

    def freeze(self) -> None:
        """Let nothing on this backbone be trained further: a further adapter builds on it as it is."""
        self.backbone.requires_grad_(False)

    def train(self, names: Collection[str]) -> None:
        """Let the adapters of these names be trained, saved biases included, and no other."""
        parameters = dict(self.backbone.named_parameters(remove_duplicate=False))
        for part in self.parts:
            keys = self.keys(part)
            for key in part.injection.trained:
                parameters[keys[key]].requires_grad_(part.name in names)

    def _flags(self) -> dict[nn.Parameter, bool]:
        """Return which parameters of adapters are trained."""
        if not self.parts:
            return {}
        parameters = dict(self.backbone.named_parameters(remove_duplicate=False))
        live = (name for part in self.parts for name in self.keys(part).values() if name in parameters)
        return {parameters[name]: parameters[name].requires_grad for name in live}

    def _activate(self) -> None:
        """Set each layer's active adapters, leaving `requires_grad` alone (peft's own switch does not)."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        wrapper = whole_wrapper()

        enabled = [part.name for part in self.parts if part.enabled]
        unfuse(self.backbone, bool(enabled))
        for module in self.backbone.modules():
            if isinstance(module, BaseTunerLayer):
                available = adapters_on(module)
                activate(module, [name for name in enabled if name in available])
            elif isinstance(module, wrapper):
                activate(module, [name for name in enabled if name in adapters_in(module)])
        for part in self.parts:
            part.injection.switch(part.enabled)

    def keys(self, part: Adapter) -> dict[str, str]:
        """Return the part's tensors: peft's key in a saved folder -> the name in the backbone's state."""
        return part.injection.keys()

    def live(self, part: Adapter) -> dict[str, Tensor]:
        """Return the part's tensors themselves, to be written to, under their names in the backbone's state."""
        state = state_tensors(self.backbone)
        return {name: state[name].detach() for name in self.keys(part).values()}

    def tensors(self, part: Adapter) -> dict[str, Tensor]:
        """Return the part's tensors under the keys of a saved peft folder; if sharded, all processes must call this."""
        state = state_tensors(self.backbone)
        return {key: whole(state[name].detach()) for key, name in self.keys(part).items()}

    def parameters(self, part: Adapter) -> dict[str, nn.Parameter]:
        """Return the part's parameters by their names in the backbone; if sharded, this process's handles on them."""
        every = dict(self.backbone.named_parameters(remove_duplicate=False))
        return {name: every[name] for name in self.keys(part).values() if name in every}

    def load_tensors(
        self, part: Adapter, tensors: Mapping[str, Tensor], source: str, keys: Mapping[str, str] | None = None
    ) -> None:
        """Copy saved tensors into a part, after checking every key, shape and value.

        Args:
            part: the part.
            tensors: the saved tensors.
            source: their origin, for messages.
            keys: the part's keys, where they are known.

        Raises:
            AdapterError: a key is missing or unknown, a shape differs, or a value is not finite.
        """
        keys = self.keys(part) if keys is None else keys
        state, tensors = state_tensors(self.backbone), with_nested_keys(part.injection.spread(tensors), keys)
        check_same_keys(set(keys), set(tensors), f"{source} and adapter {part.name!r}")
        for key, name in keys.items():
            if state[name].shape != tensors[key].shape:
                shapes = f"has shape {tuple(tensors[key].shape)}, the model needs {tuple(state[name].shape)}"
                raise AdapterError(f"{source}: {key} {shapes}.")
            check_kind(tensors[key], state[name], f"{source}: {key}")
        check_finite(tensors, source)
        self.unmerge()
        for key, name in keys.items():
            write(state[name], tensors[key])

    def describe(self) -> dict[str, Any]:
        """Describe the base's fingerprint and class and every part, JSON-able: enough to build the stack again."""
        return {
            "fingerprint": without(self.base, saved_heads(part.config for part in self.parts)),
            "auto_mapping": auto_mapping(self.backbone),
            "parts": [
                {
                    "name": part.name,
                    "config": config_to_json(part.config),
                    "task_type": part.injection.task_type,
                    "computed": part.computed,
                    "strength": part.scale,
                    "record": part.record,
                    "keys": self.keys(part),
                }
                for part in self.parts
            ],
        }

    @contextmanager
    def reading_base_once(self) -> Iterator[None]:
        """Take the bare backbone's fingerprint only once for a while, as nothing but adapters changes the backbone."""
        self._reading = {}
        try:
            yield
        finally:
            self._reading = None

    def _base(self) -> dict[str, Any]:
        """Return the fingerprint of the backbone without adapters."""
        if self.parts:
            return self.base
        if self._reading is None:
            return fingerprint(self.backbone)
        self._reading = self._reading or fingerprint(self.backbone)
        return self._reading

    def check_base(self, expected: Mapping[str, Any], source: str, heads: Collection[str] = ()) -> None:
        """Check that the backbone is the one that a saved adapter was made for.

        Args:
            expected: the fingerprint that was saved; empty where none was.
            source: the saved adapter's name in messages.
            heads: the modules of the backbone that the saved adapter replaces whole.

        Raises:
            AdapterError: it is another base, and `strict_base` holds.
        """
        if not expected:
            return
        current = self._base()
        if difference := mismatch(dict(expected), without(current, heads)):
            problem = f"{source} was made for another base model: {difference}"
            if self.strict_base:
                raise AdapterError(
                    f"{problem}; a head that is built anew each time belongs in train_head, and strict_base=False (in "
                    "commands --no-strict-base) loads it all the same."
                )
            warnings.warn(f"{problem}; it is loaded all the same.", OtherBaseWarning, stacklevel=2)
        held = {*without(dict(expected), heads)["samples"]} if expected.get("samples") else set()
        lost = [
            head
            for head in task_heads(self.backbone)
            if held and head not in heads and not any(name.startswith(f"{head}.") for name in held)
        ]
        if lost:
            warnings.warn(
                f"{source} knows nothing of the head {', '.join(lost)}, which stays as it was built: if it was built "
                "anew, so will be its predictions.",
                stacklevel=2,
            )


def check_same_keys(expected: set[str], found: set[str], what: str) -> None:
    """Raise `AdapterError` in one sentence unless both sets of keys are the same."""
    if missing := sorted(expected - found):
        raise AdapterError(f"{what} do not fit: {len(missing)} tensors are missing, the first is {missing[0]}.")
    if unknown := sorted(found - expected):
        raise AdapterError(f"{what} do not fit: {len(unknown)} tensors are unknown, the first is {unknown[0]}.")


def stack_of(backbone: nn.Module) -> AdapterStack:
    """Return the stack on exactly this backbone, made empty where there is none yet."""
    existing = backbone.__dict__.get(_ATTRIBUTE) or _EMPTY.get(id(backbone))
    if not isinstance(existing, AdapterStack):
        existing = _EMPTY[id(backbone)] = AdapterStack(backbone)
    return existing


def find_stacks(module: nn.Module) -> dict[str, AdapterStack]:
    """Return every non-empty stack in `module`, by the name of its backbone (`""` is the module itself)."""
    stacks = ((name, m.__dict__.get(_ATTRIBUTE)) for name, m in module.named_modules())
    return {name: stack for name, stack in stacks if isinstance(stack, AdapterStack) and stack.parts}


def adapters(module: nn.Module) -> AdapterStack:
    """Return the one stack of adapters in `module`: a LightningModule, or the backbone itself.

    Raises:
        ValueError: there is none, or there are several.
    """
    stacks = find_stacks(module)
    if len(stacks) != 1:
        present = f"adapters on {', '.join(map(repr, stacks))}" if stacks else "no adapter"
        raise ValueError(f"Expected adapters on one backbone in {type(module).__name__}, found {present}.")
    return next(iter(stacks.values()))


def _in_merge_order(parts: list[Adapter]) -> list[Adapter]:
    """Sort parts, inner ones first; a tuner that changes how modules' own parameters read is always innermost."""
    return sorted(parts, key=lambda part: not getattr(type(part.tuner), "innermost", False))


def _set(flags: Mapping[nn.Parameter, bool]) -> None:
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)


keep_old_names(__name__)
