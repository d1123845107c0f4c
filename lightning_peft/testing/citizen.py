"""The law *citizen*: through peft's and transformers' own calls an adapter does what LoRA does."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.stack.adapter_files.folder import adapter_folders, read_folder
from lightning_peft.stack.adapter_files.saving import save_adapter
from lightning_peft.stack.injection.registry import injection_for
from lightning_peft.testing.cell import Cell
from lightning_peft.testing.comparing import DoesNotApply, LawBroken, check_different, check_equal
from lightning_peft.testing.small_base import save_base, text_generation

EXACT = 1e-6  # of the largest output


def citizen(cell: Cell) -> None:
    """Check that peft's and transformers' own calls do with each adapter what they do with LoRA.

    Got, added, set, disabled, deleted; loaded on the meta device; with and without float32 adapters on a bfloat16 base;
    saved and loaded by peft, `AutoPeftModel` and transformers; copied, pickled; a step of transformers' Trainer, where
    a folder can be trained, and, of a decoder, a pipeline.
    """
    failures: list[str] = []
    applied = False
    for name, adapter in _adapters(cell):
        calls = adapter.calls()
        applied = applied or bool(calls)
        for call, check in calls.items():
            try:
                with redirect_stdout(io.StringIO()):  # transformers' Trainer prints its losses
                    check()
            except LawBroken as error:
                failures.append(f"{name}, {call}: {error}")
            except Exception as error:
                failures.append(
                    f"{name}, {call}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
    if failures:
        raise LawBroken(f"{len(failures)} calls do not do what they do with LoRA: {' | '.join(failures)}")
    if not applied:
        raise DoesNotApply("a prompt stands before the model and not in it, where transformers has no calls for it")


def _adapters(cell: Cell) -> Iterator[tuple[str, _Citizen]]:
    """Yield each adapter of a cell, alone, in its folder; those on top of a task of others see these switched off."""
    module, stack, callback = cell.adapted()
    name = next(name for name, part in module.named_modules() if part is stack.backbone)
    if not name:
        raise DoesNotApply("the module is itself the backbone, which peft would have to wrap")
    batch = cell.batches[0]
    base = cell.look(cell.base(), batch)
    with tempfile.TemporaryDirectory() as root:
        save_adapter(module, Path(root, "saved"))
        for part, folder in zip(stack.parts, adapter_folders(Path(root, "saved")), strict=True):
            for other in stack.parts:
                stack.enable(other is part, other.name)
            outputs = cell.look(module, batch, callback)
            yield part.name, _Citizen(cell, name, folder, base, outputs, Path(root))


@dataclass
class _Citizen:
    """One saved adapter, and what a module computes with and without it.

    Args:
        cell: the adaptation.
        name: of the backbone in the module.
        folder: the adapter's.
        base: the module's outputs without it.
        outputs: with it.
        root: a folder to write to.
    """

    cell: Cell
    name: str
    folder: Path
    base: Tensor
    outputs: Tensor
    root: Path

    def __post_init__(self) -> None:
        self.config, tensors, _ = read_folder(self.folder)
        self.config.inference_mode = False
        self.final = injection_for(self.config).is_final(self.config, tensors)

    def calls(self) -> dict[str, Callable[[], None]]:
        """Return the checks that apply, by the call that each is of."""
        if self.config.is_prompt_learning:
            return {}
        checks: dict[str, Callable[[], None]] = {
            "PeftModel.from_pretrained": self.loaded,
            "PeftModel.from_pretrained(low_cpu_mem_usage=True)": self.loaded_on_meta,
            "PeftModel.save_pretrained": self.saved,
            "PeftModel.add_adapter, set_adapter": self.added,
            "PeftModel.disable_adapter": self.disabled,
            "PeftModel.delete_adapter of an inactive adapter": self.inactive_deleted,
            "PeftModel.delete_adapter of the active adapter": self.active_deleted,
            "PeftModel.delete_adapter of the only adapter": self.only_deleted,
            "copy.deepcopy": self.copied,
            "pickle": self.pickled,
        }
        if not self._quantized():
            checks["get_peft_model(autocast_adapter_dtype=…)"] = self.precise
        if self._of_transformers() and not self._quantized():
            checks |= {
                "AutoPeftModel.from_pretrained": self.found_by_peft,
                "transformers' load_adapter": self.loaded_by_transformers,
                "transformers' load_adapter(low_cpu_mem_usage=True)": self.loaded_on_meta_by_transformers,
                "transformers' from_pretrained(folder)": self.found_by_transformers,
                "transformers' add_adapter, set_adapter, disable_adapters": self.added_by_transformers,
                "transformers' delete_adapter": self.deleted_by_transformers,
                "transformers' save_pretrained": self.saved_by_transformers,
            }
            if not self.final:
                checks["transformers' Trainer"] = self.trained_by_transformers
            if self._generates():
                checks["transformers' pipeline"] = self.generating_pipeline
        return checks

    # -- through peft ------------------------------------------------------------------------------------------------

    def loaded(self) -> None:
        self._check(self._load(), self.outputs, "loaded")

    def loaded_on_meta(self) -> None:
        model = self._load(low_cpu_mem_usage=True)
        if left := [name for name, value in model.named_parameters() if value.is_meta]:
            raise LawBroken(f"{left[0]} has no values.")
        self._check(model, self.outputs, "loaded")

    def saved(self) -> None:
        from peft import PeftModel

        self._load().save_pretrained(str(self.root / "by-peft"))
        self._check(PeftModel.from_pretrained(self._backbone(), str(self.root / "by-peft")), self.outputs, "saved", 0.0)

    def added(self) -> None:
        model = self._load()
        model.add_adapter("other", copy.deepcopy(self.config))
        self._check(model, self.outputs, "with a further adapter")
        model.set_adapter("other")
        if model.active_adapter != "other" or {*model.peft_config} != {"default", "other"}:
            raise LawBroken("the adapter that was set is not the active one.")
        check_different(self._look(model), self.outputs, "another adapter's outputs and the first one's")
        model.set_adapter("default")
        self._check(model, self.outputs, "set again")

    def disabled(self) -> None:
        model = self._load()
        with model.disable_adapter():
            self._check(model, self.base, "disabled", 0.0)
        self._check(model, self.outputs, "enabled again")

    def inactive_deleted(self) -> None:
        model = self._load()
        model.add_adapter("other", copy.deepcopy(self.config))
        model.delete_adapter("other")
        self._check_gone(model, "other")
        self._check(model, self.outputs, "after the other was deleted")

    def active_deleted(self) -> None:
        model = self._load()
        model.add_adapter("other", copy.deepcopy(self.config))
        model.set_adapter("other")
        model.delete_adapter("other")
        self._check_gone(model, "other")
        if list(model.active_adapters) != ["default"]:
            raise LawBroken(f"{list(model.active_adapters)} is active afterwards, where 'default' is left.")
        self._check(model, self.outputs, "after the active one was deleted")

    def only_deleted(self) -> None:
        model = self._load()
        model.delete_adapter("default")
        self._check_gone(model, "default")

    def copied(self) -> None:
        model = self._load()
        self._check(copy.deepcopy(model), self.outputs, "copied", 0.0)

    def pickled(self) -> None:
        self._check(pickle.loads(pickle.dumps(self._load())), self.outputs, "pickled", 0.0)

    def precise(self) -> None:
        from peft import get_peft_model

        for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
            backbone = self._backbone().to(torch.bfloat16)
            model = get_peft_model(backbone, copy.deepcopy(self.config), autocast_adapter_dtype=autocast)
            wrong = {
                name: value.dtype
                for name, value in model.named_parameters()
                if value.requires_grad and value.dtype != expected and "modules_to_save" not in name
            }
            if wrong:
                name, dtype = next(iter(wrong.items()))
                raise LawBroken(f"with autocast_adapter_dtype={autocast} {name} is {dtype}, not {expected}.")

    def found_by_peft(self) -> None:
        import peft

        if self._generates():
            model = peft.AutoPeftModelForCausalLM.from_pretrained(self._with_base())
            self._check(model, self.outputs, "found by its base's name")
        if self.config.task_type is None:
            model = peft.AutoPeftModel.from_pretrained(self._with_base())
            self._check(model, self.outputs, "found by its base's class")

    # -- through transformers ----------------------------------------------------------------------------------------

    def loaded_by_transformers(self) -> None:
        model = self._backbone()
        model.load_adapter(str(self.folder))
        self._check(model, self.by_transformers, "loaded by transformers")

    def loaded_on_meta_by_transformers(self) -> None:
        model = self._backbone()
        model.load_adapter(str(self.folder), low_cpu_mem_usage=True)
        self._check(model, self.by_transformers, "loaded by transformers")

    def found_by_transformers(self) -> None:
        self._check(
            type(self._backbone()).from_pretrained(self._with_base()), self.by_transformers, "found by transformers"
        )

    def added_by_transformers(self) -> None:
        from peft.utils import ModulesToSaveWrapper

        model = self._backbone()
        model.load_adapter(str(self.folder), adapter_name="one")
        model.add_adapter(copy.deepcopy(self.config), adapter_name="other")
        if model.active_adapters() != ["other"]:
            raise LawBroken(f"{model.active_adapters()} is active, not the adapter that was added last.")
        check_different(self._look(model), self.by_transformers, "another adapter's outputs and the first one's")
        model.set_adapter("one")
        self._check(model, self.by_transformers, "set by transformers")
        if not model.get_adapter_state_dict("one"):
            raise LawBroken("get_adapter_state_dict has nothing of the adapter.")
        model.disable_adapters()
        self._check(model, self.base, "disabled by transformers", 0.0)
        model.enable_adapters()
        for module in model.modules():  # transformers 5.23 leaves copies in modules_to_save off, LoRA's too
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(True)
        self._check(model, self.by_transformers, "enabled by transformers")

    def deleted_by_transformers(self) -> None:
        model = self._backbone()
        model.load_adapter(str(self.folder), adapter_name="one")
        model.add_adapter(copy.deepcopy(self.config), adapter_name="other")
        model.delete_adapter("other")
        self._check_gone(model, "other")
        model.set_adapter("one")
        self._check(model, self.by_transformers, "after the other was deleted")
        model.delete_adapter("one")
        self._check_gone(model, "one")
        self._check(model, self.base, "after all were deleted")

    def saved_by_transformers(self) -> None:
        model, folder = self._backbone(), self.root / "by-transformers"
        model.load_adapter(str(self.folder))
        model.save_pretrained(folder)
        again = self._backbone()
        again.load_adapter(str(folder))
        self._check(again, self.by_transformers, "saved by transformers", 0.0)

    def trained_by_transformers(self) -> None:
        from transformers import Trainer, TrainingArguments

        model = self._backbone()
        model.load_adapter(str(self.folder), is_trainable=True)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        arguments = TrainingArguments(
            output_dir=str(self.root / "trainer"),
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=0.02,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Trainer(model, arguments, train_dataset=_rows(self.cell.batches[0])).train()
        after = dict(model.named_parameters())
        if moved := [name for name in before if name not in trained and not after[name].equal(before[name])]:
            raise LawBroken(f"a step moved {moved[0]}, which is frozen.")
        if all(after[name].equal(before[name]) for name in trained):
            raise LawBroken("a step moved nothing.")

    def generating_pipeline(self) -> None:
        folder = self._with_base()
        model = self._backbone()
        model.load_adapter(str(self.folder))
        expected = text_generation(model, Path(folder, "base"))
        if text_generation(folder, Path(folder, "base")) != expected:
            raise LawBroken("the pipeline of the folder writes another text than one of the model with the adapter.")

    @functools.cached_property
    def by_transformers(self) -> Tensor:
        """The outputs expected of transformers: of a type of peft's own, those with a folder that peft has written.

        transformers 5.23 does not load DoRA's magnitudes, for one, whoever has written them.
        """
        if not type(self.config).__module__.startswith("peft."):
            return self.outputs
        folder = str(self.root / "peft-for-transformers")
        self._load().save_pretrained(folder)
        model = self._backbone()
        model.load_adapter(folder)
        return self._look(model)

    # -- what they need ----------------------------------------------------------------------------------------------

    def _backbone(self) -> Any:
        return self.cell.base().get_submodule(self.name)

    def _load(self, **options: Any) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(self._backbone(), str(self.folder), **options)

    @torch.no_grad()
    def _look(self, model: nn.Module) -> Tensor:
        """Return the module's outputs with this model in the place of its backbone."""
        module = self.cell.base()
        module.set_submodule(self.name, model)
        return self.cell.outputs(module.eval(), self.cell.batches[0])

    def _check(self, model: nn.Module, expected: Tensor, moment: str, tolerance: float = EXACT) -> None:
        check_equal(self._look(model), expected, tolerance, f"outputs {moment} and those expected")

    def _check_gone(self, model: Any, name: str) -> None:
        if name in getattr(model, "peft_config", {}):
            raise LawBroken("its configuration stays.")
        if left := [key for key, _ in model.named_parameters() if name in key.split(".")]:
            raise LawBroken(f"{left[0]} stays.")

    def _quantized(self) -> bool:
        return any(is_quantized(module) for module in self._backbone().modules())

    def _of_transformers(self) -> bool:
        from transformers import PreTrainedModel

        return isinstance(self._backbone(), PreTrainedModel)

    def _generates(self) -> bool:
        model = self._backbone()
        return bool(model.can_generate()) and not model.config.is_encoder_decoder

    def _with_base(self) -> str:
        """Return a folder of the adapter that names a saved base, which is in it."""
        folder = self.root / f"{self.folder.name} with base"
        if not folder.exists():
            shutil.copytree(self.folder, folder)
            save_base(self._backbone(), folder / "base")
            file = folder / "adapter_config.json"
            values = json.loads(file.read_text()) | {"base_model_name_or_path": str(folder / "base")}
            file.write_text(json.dumps(values))
        return str(folder)


def _rows(batch: Any) -> list[dict[str, Tensor]]:
    """Return the rows of a batch as transformers' Trainer takes them."""
    rows = [{key: value[row] for key, value in batch.items()} for row in range(len(next(iter(batch.values()))))]
    for row in rows:
        row.setdefault("labels", row.get("decoder_input_ids", row.get("input_ids")))
    return rows
