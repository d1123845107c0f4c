"""The callback that freezes a backbone, injects an adapter, and saves only what was trained."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

import lightning as L
from lightning.fabric.wrappers import is_wrapped
from lightning.pytorch.callbacks import Callback, ModelSummary, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn

from lightning_peft.backbone.modules import uncompiled
from lightning_peft.backbone.nearest_names import nearest_names
from lightning_peft.fitting import optimizers, read_back, strategies
from lightning_peft.fitting.activation_checkpointing import checkpoint_blocks
from lightning_peft.fitting.alive import PATIENCE, Reached
from lightning_peft.fitting.batch_keys import check_keys, check_learnable
from lightning_peft.fitting.checkpoint_hooks import hook_checkpoints
from lightning_peft.fitting.closing_report import ClosingReport, ReportSettings
from lightning_peft.fitting.complete import check_complete
from lightning_peft.fitting.fabric import keep_modes
from lightning_peft.fitting.find_backbone import building_hooks, find_backbone, forget, when_built
from lightning_peft.fitting.finite import FiniteLoss, check_finite_tensors, finite_arguments
from lightning_peft.fitting.frozen import check_frozen
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.lightning_private import starts_processes, state_key
from lightning_peft.fitting.precision import check_precise, forget_precise, keep_precise
from lightning_peft.fitting.report import describe_trained, print_table, summary
from lightning_peft.fitting.same_hook import same_as
from lightning_peft.fitting.train_modes import set_modes, stop_input_gradients
from lightning_peft.positions import Positions, note_batch
from lightning_peft.replaced import Handle, replaced
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.configs import conflicts
from lightning_peft.stack.injection.head_training import saved_heads, with_heads
from lightning_peft.stack.outer_generate import heed_outer_generate
from lightning_peft.stack.stack import AdapterStack, find_stacks, stack_of

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig

_NO_BATCH = object()  # there has been none yet


class EditOptions(TypedDict, total=False):
    """The arguments of every adapting callback, besides those of its method.

    Args:
        backbone: the submodule to freeze and adapt, e.g. `"model"` or `"net.encoder"`. Default: the one transformers
            model, or the only child with parameters; where that is ambiguous an error lists the candidates.
        name: the adapter's name, of several adapters the beginning of their names; default the method's.
        strict_base: refuse a checkpoint that was made on another base model (the default), instead of warning once.
        report: whether `fit` ends with a short report: what was trained or edited, KL on neutral text, two answers
            before and after, the checkpoint, the next commands. Default: where Lightning prints its model summary.
            `ReportSettings` choose the texts.
    """

    backbone: str | None
    name: str
    strict_base: bool
    report: bool | ReportSettings | None


class AdapterOptions(EditOptions, total=False):
    """The arguments of every callback that trains an adapter, besides those of its method.

    Args:
        backbone, name, strict_base, report: as `EditOptions`.
        backbone_dropout: keep the dropout of the frozen backbone in training. By default the backbone runs in
            evaluation mode, so that it is deterministic; its BatchNorm statistics never move.
        gradient_checkpointing: keep only the input of each block that backward passes (those from the first adapter
            on) and compute the rest again in backward: less memory, one more forward of these blocks. Gradients are
            the same, and backward does not enter the blocks below.
        train_head: train and save the task head that stands inside the backbone, beside the adapter. `True` (the
            default) takes the heads that can be told: those of transformers' classification, token, question-answering
            and regression models, and the last classifier of timm and torchvision networks; never a language-model
            head or a weight that another module shares. A name, or a list of names, takes these modules instead;
            `False` none.
        check_finite: stop the run where the loss or the adapter is no longer finite (the default), naming the step and
            the tensor. Turn it off for a loss that is to overflow now and then, as with a loss scaling of one's own.
    """

    backbone_dropout: bool
    gradient_checkpointing: bool
    train_head: bool | str | list[str]
    check_finite: bool


def by_name(positional: Sequence[object], options: EditOptions) -> AdapterOptions:
    """Return options of which some were given by position, as classes derived from `PEFT` and `Edit` did before 0.2."""
    if positional:
        names = ("backbone", "name", "backbone_dropout", "gradient_checkpointing")
        warnings.warn(f"Give {', '.join(names[: len(positional)])} by name since 0.2.", FutureWarning, stacklevel=4)
        options = {**dict(zip(names, positional, strict=False)), **options}  # type: ignore[typeddict-item]
    return cast(AdapterOptions, options)


class AdapterCallback(Callback):
    """Base of the callbacks that freeze a backbone, put an adapter on it, and save only what was trained or computed.

    Works on any LightningModule: a transformers model or a hand-written `nn.Module`, built in `__init__`, `setup` or
    `configure_model`. What stands outside the backbone (heads) stays trainable. Checkpoints hold the adapter and
    what is outside the backbone; `ckpt_path` restores them, after checking that the base is the same. A subclass says
    in `make_config` which adapter it is.

    Args:
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at `setup` or fit start, in one sentence: unknown target module or backbone, a weight-averaging
            callback placed before this one, a launcher that would lose the adapter, nothing trainable, optimizers
            that do not hold every trainable parameter exactly once. While training, with the step: weights of the
            backbone that are trained beside the adapter, a loss or an adapter that is not finite.
    """

    default_name = "default"
    batch_keys: tuple[str, ...] = ()  # what a training batch must hold
    computed = False  # whether the weights are computed (an edit) rather than trained
    exempt: Mapping[str, str] = {}  # laws (lightning_peft.testing) that cannot apply: name -> reason
    law_examples: Mapping[str, LawExample] = {}  # rows of their table; a class without has one, of its defaults

    def __init__(self, **options: Unpack[AdapterOptions]) -> None:
        if unknown := sorted(options.keys() - AdapterOptions.__annotations__.keys()):
            known = [*inspect.signature(type(self)).parameters, *AdapterOptions.__annotations__]
            near = nearest_names(unknown[0], known)
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}; the nearest are {near}.")
        self.backbone = options.get("backbone")
        self.name = options.get("name", self.default_name)
        self.backbone_dropout = options.get("backbone_dropout", False)
        self.gradient_checkpointing = options.get("gradient_checkpointing", False)
        self.train_head = options.get("train_head", not self.computed)
        self.strict_base = options.get("strict_base", True)
        self.check_finite = options.get("check_finite", True)
        self.report = options.get("report")
        self._report: ClosingReport | None = None  # of the fit that runs, in the process that prints it
        self._reporting: list[Handle] = []
        self._checkpointed: list[Handle] = []
        self._noted: list[Positions] = []
        self._first: Any = None  # the first training batch, while it is trained on
        self.stack: AdapterStack | None = None
        self.run_by: AdapterCallback | None = None  # the callback of the Trainer's list that runs this one
        self._trained: set[str] = set()  # names of what is trained, when fit starts
        self._optimized = 0  # how many parameters the optimizers hold
        self._parameters: dict[str, nn.Parameter] = {}  # what is trained of the adapters, when training starts
        self._loss, self._reached = FiniteLoss(), Reached({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "lacks" in cls.__dict__:
            warnings.warn(f"{cls.__name__}.lacks is called exempt since 0.2.", FutureWarning, stacklevel=2)
            cls.exempt = cls.__dict__["lacks"]
        if "__init__" in cls.__dict__:
            cls.__init__ = finite_arguments(cls.__init__)  # type: ignore[method-assign]

    @property
    def listed(self) -> AdapterCallback:
        """The callback that stands in the Trainer's list: this one, or the one that runs it."""
        return self.run_by or self

    @property
    def state_key(self) -> str:
        return state_key(self, self.name)

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        """Return the configuration for this backbone. It is built here, so that importing a method is cheap."""
        raise NotImplementedError(f"{type(self).__name__} does not say which adapter it is.")

    def trainable_parameters(self, backbone: nn.Module) -> int | None:
        """Return the number of trainable parameters by the closed formula on the method's card.

        The law on counts compares the adapter with this formula. It is for the places that the method adapts by
        default, whatever `layers` is.

        Args:
            backbone: the bare backbone; a task head inside it is not counted.

        Returns:
            The number; None where the method has no formula for its settings.
        """
        return None

    def make_configs(self, backbone: nn.Module) -> dict[str, PeftConfig]:
        """Return the adapters of this callback: name -> configuration, innermost first."""
        return {self.name: self.make_config(backbone)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this callback's adapters."""
        return (self.name,)

    def apply(self, module: nn.Module) -> list[Adapter]:
        """Freeze and inject now, without a Trainer: for launchers that fork or spawn, and for loops of one's own.

        Args:
            module: a LightningModule; or any other module, which is the backbone itself unless `backbone` names a part
                of it, or one transformers model is in it. `train()` of such a backbone then leaves its frozen parts in
                evaluation mode. With Lightning Fabric, before `fabric.setup`.

        Raises:
            ValueError: there is no such backbone, or it is not built yet, or Fabric has wrapped the module already.
        """
        if not isinstance(module, L.LightningModule):
            return self._apply_plainly(module)
        name = find_backbone(module, self.backbone, final=not building_hooks(module))
        if name is None:
            raise ValueError(
                f"{type(module).__name__} may not have built its backbone yet: build it, then apply, or name it with "
                "the argument backbone."
            )
        return self._inject(module, name)

    def _apply_plainly(self, module: nn.Module) -> list[Adapter]:
        if is_wrapped(module):
            raise ValueError(
                f"Fabric has set up this {type(module.module).__name__} already, and its optimizer knows no adapter: "
                f"call {type(self).__name__}.apply(module) first, then make the optimizer, then fabric.setup."
            )
        name = find_backbone(module, self.backbone, final=self.backbone is not None)
        parts = self._inject(module, name or "")
        assert self.stack is not None
        keep_modes(self.stack, self.backbone_dropout)
        return parts

    # -- Lightning's hooks, in the order in which they run -----------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._check_callbacks(trainer)
        self._check_launcher(trainer, pl_module)
        strategies.prepare(trainer, pl_module)
        keep_precise(trainer)
        if stage == "fit":
            read_back.watch(trainer, pl_module)

        def place(name: str) -> None:
            self._inject(pl_module, name)
            if stage == "fit":
                self._choose_trained(trainer)

        self.stack = None
        when_built(pl_module, self.backbone, place)
        if stage == "fit" and self.stack is None:
            self._check_copies(trainer, pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.stack is not None
        check_precise(self.stack)
        self._prepare_optimizers(trainer, pl_module)
        check_complete(pl_module, find_stacks(pl_module))
        self._trained = strategies.trained_names(pl_module)
        stop_input_gradients(self.stack.backbone)
        self._report = None
        if trainer.is_global_zero:
            edits, shows = self._numbers_to_edit(self.stack), self._shows_summary(trainer)
            if shows:
                print_table(pl_module, self.stack, edits)
            for logger in trainer.loggers:
                logger.log_metrics(summary(pl_module, self.stack, edits), step=0)
            # of several callbacks the last speaks for all
            if _adapting(trainer)[-1] is self.listed and (self.report or (self.report is None and shows)):
                self._report = ClosingReport(
                    self.report if isinstance(self.report, ReportSettings) else ReportSettings()
                )
        # Lightning warns of modules in evaluation mode when training starts, and we choose that mode right after
        self.stack.backbone.train()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_in_place(pl_module)
        self._set_modes(trainer)
        self._first = _NO_BATCH
        if self.computed:
            return
        assert self.stack is not None
        by_adapter = [self.stack.parameters(self.stack[name]) for name in self.names]
        self._parameters = {n: p for parameters in by_adapter for n, p in parameters.items() if p.requires_grad}
        if not self._parameters:
            raise ValueError(f"Nothing of adapter {self.name!r} is trainable any more: something froze it before fit.")
        self._loss = FiniteLoss()
        # strategies that keep gradients in a form of their own leave the parameters' own empty
        hidden = isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy)
        self._reached = Reached({} if hidden else self._parameters)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategies.check_unchanged(trainer, pl_module, self._trained)
        self._check_in_place(pl_module)
        if not self.computed:
            optimizers.check(pl_module, trainer.optimizers)
            self._check_frozen(trainer, pl_module)
        self._set_modes(trainer)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._first is not None:  # to look at it waits for the device, which is done once
            check_learnable(type(self).__name__, self._first, loss)
            self._first = None

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reached.look()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.computed:
            self._check_frozen(trainer, pl_module)
            self._reached.report(repr(self.name))
            self._check_finite()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_reporting()
        forget(pl_module)
        read_back.forget(trainer)
        self._stop_checkpointing()
        forget_precise(trainer)
        strategies.explain(pl_module, exception)
        strategies.release(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop_reporting()
        read_back.stop(trainer)
        self._stop_checkpointing()
        strategies.release(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        check_keys(type(self).__name__, self.batch_keys, batch)
        self._first = batch if self._first is _NO_BATCH else None
        if self._report is not None:
            self._report.note(batch, validating=False)
        self._note_answers(batch)
        if not self.computed and self._optimized != optimizers.held(trainer.optimizers):
            self._check_frozen(trainer, pl_module)  # a callback that unfreezes gives the optimizer a group

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._note_answers(None)
        if self.computed:
            return
        if self.check_finite and isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            self._loss.note(outputs["loss"], trainer.global_step)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._check_finite()  # where metrics are read, the device is waited for anyway
        if trainer.global_step == PATIENCE:
            self._reached.report(repr(self.name))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep_out_of_averages(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep_out_of_averages(trainer, pl_module)
        if self._report is not None:
            # after the other callbacks: some write the last checkpoint now, or put an average in the weights' place
            by = functools.partial(self._give_report, trainer, pl_module)
            self._reporting.append(replaced(pl_module, "on_train_end", by, once=True))

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        if self._report is not None:
            self._report.note(batch, validating=True)
        self._note_answers(batch)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._note_answers(None)

    on_test_batch_start = on_predict_batch_start = same_as("on_validation_batch_start")
    on_test_batch_end = on_predict_batch_end = same_as("on_validation_batch_end")

    # -- what is reported --------------------------------------------------------------------------------------------

    def report_lines(
        self, module: L.LightningModule, stack: AdapterStack, names: Sequence[str]
    ) -> tuple[list[tuple[str, str]], str]:
        """Return what the report says of the adapters of a fit: headings and texts; and what to do where KL is large.

        Args:
            module: the fitted module.
            stack: its adapters.
            names: of those that were trained or computed, this callback's and other callbacks' of the same Trainer.
        """
        lines = [("trained", line) for line in describe_trained(module, stack, names)]
        dial = all(stack[name].scaling for name in names)
        dialled = "adapters(module).scale(0.5) turns it down; " if dial else ""
        return lines, f"{dialled}train for fewer steps, or at a smaller learning rate."

    def _numbers_to_edit(self, stack: AdapterStack) -> dict[str, int]:
        """Return how many numbers of each adapter fit computes, where it computes them."""
        return {}

    def _shows_summary(self, trainer: L.Trainer) -> bool:
        return any(isinstance(callback, ModelSummary) for callback in _callbacks(trainer))

    def _give_report(self, trainer: L.Trainer, module: L.LightningModule, original: Callable[[], None]) -> None:
        original()
        report, self._report = self._report, None
        if report is None or self.stack is None:
            return
        stack = self.stack
        names = [name for callback in _adapting(trainer) if callback.stack is stack for name in callback.names]
        report.give(trainer, module, stack, names, lambda: self.listed.report_lines(module, stack, names))

    def _stop_reporting(self) -> None:
        self._report = None
        while self._reporting:
            self._reporting.pop().remove()

    # -- what they do ------------------------------------------------------------------------------------------------

    def _inject(self, module: nn.Module, backbone_name: str) -> list[Adapter]:
        """Freeze and inject, once; a later call finds the adapters in place."""
        backbone = uncompiled(module.get_submodule(backbone_name))
        # the hook that ran in between may have wrapped the backbone, in a way of the user's own
        existing = [stack for stack in find_stacks(backbone).values() if any(name in stack for name in self.names)]
        stack = self.stack = existing[0] if existing else stack_of(backbone)
        stack.strict_base = self.strict_base
        if not all(name in stack for name in self.names):
            strategies.check_whole(module, stack.backbone, type(self).__name__)
        with strategies.same_on_every_rank(module, stack):
            parts = [self._place(stack, name, config) for name, config in self._configs(stack).items()]
        heed_outer_generate(module)
        if isinstance(module, L.LightningModule):
            hook_checkpoints(module, stack, self.check_finite)
        return parts

    def _configs(self, stack: AdapterStack) -> dict[str, PeftConfig]:
        """Return every adapter's configuration; a task head inside the backbone is trained with the first."""
        others = saved_heads([part.config for part in stack.parts if part.name not in self.names])
        named = getattr(self, "target_modules", None)
        return with_heads(self.make_configs(stack.backbone), stack.backbone, self.train_head, named, others)

    def _place(self, stack: AdapterStack, name: str, config: PeftConfig) -> Adapter:
        if name not in stack:
            return stack.add(config, name, self.computed)
        part = stack[name]
        differences = conflicts(part.config, config, self.computed)
        if differences:
            raise ValueError(
                f"The backbone already has an adapter {name!r} with other settings: {'; '.join(differences)}."
            )
        return part

    def _choose_trained(self, trainer: L.Trainer) -> None:
        """Let this adapter act and be trained; leave one that no callback of this Trainer names as it is."""
        assert self.stack is not None
        for name in self.names:
            self.stack.enable(True, name)
        self.stack.train(_adapters_of(trainer))
        # learning-rate and batch-size finders train before this callback's further hooks run
        self._set_modes(trainer)

    def _set_modes(self, trainer: L.Trainer) -> None:
        assert self.stack is not None
        frozen = {part.name for part in self.stack.parts} - _adapters_of(trainer)
        if self.gradient_checkpointing:
            self._checkpointed += checkpoint_blocks(self.stack.backbone)
        set_modes(self.stack.backbone, self.backbone_dropout, frozen)

    def _stop_checkpointing(self) -> None:
        for handle in self._checkpointed:
            handle.remove()
        self._checkpointed = []

    def _prepare_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.optimizers:
            optimizers.repair(pl_module, trainer.optimizers)
        optimizers.check(pl_module, trainer.optimizers)
        self._check_frozen(trainer, pl_module)

    def _check_frozen(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        check_frozen(module)
        self._optimized = optimizers.held(trainer.optimizers)

    def _check_finite(self) -> None:
        if self.check_finite:
            self._loss.check()
            check_finite_tensors(self._parameters, f"Adapter {self.name!r}")

    def _note_answers(self, batch: Any) -> None:
        """Let edits know where the answers of this batch begin; `None` forgets it."""
        assert self.stack is not None
        self._noted = note_batch(self._noted, self.stack.backbone, batch)

    def _check_callbacks(self, trainer: L.Trainer) -> None:
        callbacks = _callbacks(trainer)
        for callback in callbacks[: callbacks.index(self.listed)]:
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} comes before {type(self).__name__} and has already copied the module "
                    f"without the adapter: put {type(self).__name__} first in the list of callbacks."
                )

    def _check_copies(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse averaging before the backbone is built: it copies in `setup`, or after `configure_model`."""
        late = "configure_model" not in building_hooks(module)
        for callback in _callbacks(trainer):
            if isinstance(callback, StochasticWeightAveraging) or (late and isinstance(callback, WeightAveraging)):
                raise ValueError(
                    f"{type(callback).__name__} copies {type(module).__name__} before its backbone is built: build it "
                    "in __init__, or use AdapterEMA."
                )

    def _check_in_place(self, module: L.LightningModule) -> None:
        assert self.stack is not None
        if self.stack not in find_stacks(module).values():
            raise ValueError(
                f"{type(module).__name__} has replaced the backbone that {type(self).__name__} put its adapter on: "
                "build it in __init__, setup or configure_model."
            )

    def _check_launcher(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if starts_processes(trainer.strategy.launcher) and not _has_adapters(module, self.names):
            raise ValueError(
                "This strategy starts its processes from a copy of the module and would lose the adapter afterwards: "
                f'use strategy="ddp", or call {type(self).__name__}.apply(module) before fit.'
            )


def keep_out_of_averages(trainer: L.Trainer, module: nn.Module) -> None:
    """Give averaged copies of the module its frozen weights bit for bit: averaging them would move them by rounding."""
    for callback in _callbacks(trainer):
        copied = callback._average_model if isinstance(callback, WeightAveraging) else None
        if copied is not None:
            for average, current in zip(copied.module.parameters(), module.parameters(), strict=True):
                if not current.requires_grad:
                    average.data.copy_(current.data)


def _callbacks(trainer: L.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _adapting(trainer: L.Trainer) -> list[AdapterCallback]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, AdapterCallback)]


def _adapters_of(trainer: L.Trainer) -> set[str]:
    return {name for callback in _adapting(trainer) for name in callback.names}


def _has_adapters(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(all(name in stack for name in names) for stack in find_stacks(module).values())
