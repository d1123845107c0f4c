"""A callback that runs another one, which adapts the model, and adds something to its training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.stack import AdapterStack

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig

# hooks in which a method has a schedule of its own
_STEPS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


def _passes_hooks_on(cls: type[Around]) -> type[Around]:
    """Let each of Lightning's hooks that a class does not have itself call the same hook of its method."""

    def passed_on(hook: str) -> Callable[..., Any]:
        def call(self: Around, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.method, hook)(*args, **kwargs)

        return call

    for hook in vars(Callback):
        if not hook.startswith("_") and hook != "state_key" and hook not in vars(cls):
            setattr(cls, hook, passed_on(hook))
    return cls


@_passes_hooks_on
class Around(AdapterCallback):
    """Base of callbacks that wrap a method: the adapter is the method's, under its name and with its options.

    Every hook of Lightning is passed on to the method, which is not given to the Trainer itself. A subclass adds what
    it does in hooks of its own, which call `super()`'s.

    Args:
        method: the callback that says what is trained. It is copied, not changed.
        **options: see `AdapterOptions`; where one is not given, it is the method's own.

    Raises:
        ValueError: the method computes an edit, or changes what it trains in steps of its own.
    """

    def __init__(self, method: AdapterCallback, **options: Unpack[AdapterOptions]) -> None:
        kind, name = type(self).__name__, type(method).__name__
        if method.computed:
            raise ValueError(f"{kind} changes how a method is trained, and {name} is computed: give it a tuned one.")
        if own := [hook for hook in _STEPS if getattr(type(method), hook) is not getattr(AdapterCallback, hook)]:
            raise ValueError(
                f"{kind} decides what each step trains, and {name} does so itself ({own[0]}): use it alone, or give "
                f"{kind} a method without a schedule, such as LoRA."
            )
        self.method = copy.copy(method)
        shared: dict[str, Any] = {key: getattr(method, key) for key in AdapterOptions.__annotations__}
        super().__init__(**(shared | options))  # type: ignore[typeddict-item]
        for key in shared:
            setattr(self.method, key, getattr(self, key))
        self.exempt: Mapping[str, str] = method.exempt
        self.batch_keys = method.batch_keys

    # -- the method's ------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> AdapterStack | None:  # type: ignore[override]
        """The adapters of the backbone that the method has adapted."""
        return self.method.stack

    @stack.setter
    def stack(self, stack: AdapterStack | None) -> None:
        self.method = copy.copy(self.method)  # a copy of this callback has the same one
        self.method.stack = stack

    @property
    def names(self) -> tuple[str, ...]:
        return self.method.names

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        return self.method.make_config(backbone)

    def make_configs(self, backbone: nn.Module) -> dict[str, PeftConfig]:
        return self.method.make_configs(backbone)

    def trainable_parameters(self, backbone: nn.Module) -> int | None:
        return self.method.trainable_parameters(backbone)

    def report_lines(
        self, module: L.LightningModule, stack: AdapterStack, names: Any
    ) -> tuple[list[tuple[str, str]], str]:
        return self.method.report_lines(module, stack, names)

    def _inject(self, module: nn.Module, backbone_name: str) -> list[Adapter]:
        return self.method._inject(module, backbone_name)

    def _note_answers(self, batch: Any) -> None:
        self.method._note_answers(batch)

    # -- Lightning's hooks that need more than to be passed on -------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.method.run_by = self
        self.method.setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        return {"method": self.method.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.method.load_state_dict(state_dict["method"])
