"""The laws, one function each."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.backbone.modules import state_tensors
from lightning_peft.fitting.alive import Reached
from lightning_peft.fitting.checkpoint_files import read_checkpoint
from lightning_peft.fitting.checkpoints import restore_adapters
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import adapters
from lightning_peft.stack.steering import steering
from lightning_peft.testing.cell import Cell, adapter_tensors, rows, take, trainable
from lightning_peft.testing.citizen import citizen
from lightning_peft.testing.comparing import DoesNotApply, LawBroken, are_close, check_different, check_equal
from lightning_peft.testing.lockstep import in_lockstep
from lightning_peft.testing.traces import first_difference, handles_on, traces


def identity(cell: Cell) -> None:
    """Check that injected but untrained adapters give the base's outputs, to 1e-6 of the largest."""
    module, _, callback = cell.adapted(noise=0.0)
    base = cell.base()
    for batch in cell.batches:
        check_equal(cell.look(module, batch, callback), cell.look(base, batch), 1e-6, "untrained and base outputs")


def frozen(cell: Cell) -> None:
    """Check that steps with weight decay leave all but what is declared trainable bit-equal, and move the adapter."""
    module = cell.train(1).lightning_module
    stack = adapters(module)
    untrained, _, _ = cell.adapted(noise=0.0)
    before, after = adapter_tensors(untrained), adapter_tensors(module)
    for part in stack.parts:
        keys = [key for key in after if key.startswith(f"{part.name}:")]
        if all(key in before and torch.equal(before[key], after[key]) for key in keys):
            raise LawBroken(f"training moved nothing of adapter {part.name!r}.")
    backbone = _name_of(module, stack.backbone)
    _take_off(module)
    pristine, state = state_tensors(cell.base()), state_tensors(module)
    inside = {key for key in pristine if backbone == "" or key.startswith(f"{backbone}.")}
    if strange := (state.keys() ^ pristine.keys()):
        raise LawBroken(f"removing the adapters left {min(strange)} behind, or took it away.")
    if changed := [key for key in sorted(inside) if not torch.equal(state[key].cpu(), pristine[key])]:
        raise LawBroken(f"training moved {len(changed)} frozen tensors, the first is {changed[0]}.")


def off(cell: Cell) -> None:
    """Check that disabled adapters give the base's outputs, bit for bit, and enabled ones do not."""
    module, stack, callback = cell.adapted()
    base = cell.base()
    for batch in cell.batches:
        expected = cell.look(base, batch)
        with stack.disabled():
            check_equal(cell.look(module, batch, callback), expected, 0.0, "disabled and base outputs")
        check_different(cell.look(module, batch, callback), expected, "enabled and base outputs")


def merge(cell: Cell) -> None:
    """Check that merged = unmerged to 1e-5, or that a method that cannot be merged says so and stays as it was."""
    module, stack, callback = cell.adapted()
    unmerged = [cell.look(module, batch, callback) for batch in cell.batches]
    if reason := cell.callback.exempt.get("merge"):
        try:
            stack.merge()
        except ValueError:
            for batch, expected in zip(cell.batches, unmerged, strict=True):
                check_equal(
                    cell.look(module, batch, callback), expected, 0.0, "outputs before and after a refused merge"
                )
            raise DoesNotApply(f"{reason}; refused with a clear error") from None
        raise LawBroken("the method declares that it cannot be merged, and merging it raised nothing.")
    stack.merge()
    for batch, expected in zip(cell.batches, unmerged, strict=True):
        check_equal(cell.look(module, batch, callback), expected, 1e-5, "merged and unmerged outputs")
    stack.unmerge()
    for batch, expected in zip(cell.batches, unmerged, strict=True):
        check_equal(cell.look(module, batch, callback), expected, 1e-5, "outputs before merging and after unmerging")


def round_trip(cell: Cell) -> None:
    """Check that saving and loading keep the outputs bit-equal, and that the files hold only what was trained."""
    module, stack, callback = cell.adapted()
    again = cell.base()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(module, folder)
        load_adapter(again.get_submodule(_name_of(module, stack.backbone)), folder)
    for batch in cell.batches:
        loaded = cell.look(again.eval(), batch, _speaking(callback, again))
        check_equal(loaded, cell.look(module, batch, callback), 0.0, "loaded and saved outputs")
    trained = cell.train(1).lightning_module
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(trained, folder)
        files = list(Path(folder).rglob("*.safetensors"))
        saved = sum(file.stat().st_size for file in files)
    parameters = trainable(adapters(trained).backbone).values()
    size, tensors = sum(p.numel() * p.element_size() for p in parameters), len(adapter_tensors(trained))
    if saved > 1.01 * size + 512 * len(files) + 256 * tensors:
        raise LawBroken(f"the files have {saved} bytes for {size} bytes of trainable parameters.")


def complete(cell: Cell) -> None:
    """Check that each trained tensor has a key of its own in checkpoint and folder, and comes back from both."""
    trainer, untrained = cell.train(1), dict(cell.adapted(noise=0.0)[0].named_parameters())
    module: Any = trainer.lightning_module.eval()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, saved = _written(trainer, Path(folder))
        for where, loaded in (("checkpoint", _restored(cell, checkpoint)), ("folder", _reloaded(cell, module, saved))):
            for batch in cell.batches:
                now, before = cell.look(loaded.eval(), batch), cell.look(module, batch)
                check_equal(now, before, 0.0, f"outputs before saving and after loading the {where}")
    # each tensor that training has moved is marked by a number of its own, which must then be found
    inside = {id(parameter) for parameter in adapters(module).backbone.parameters()}
    moved = [n for n, p in trainable(module).items() if n not in untrained or not torch.equal(p, untrained[n])]
    marks = {float(number): name for number, name in enumerate(moved, 1)}
    with torch.no_grad():
        for mark, name in marks.items():
            module.get_parameter(name).fill_(mark)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, saved = _written(trainer, Path(folder))
        entries = [tensor.float() for tensor in checkpoint["state_dict"].values() if tensor.is_floating_point()]
        stored = [value for file in saved.rglob("*.safetensors") for value in load_file(file).values()]
    for mark, name in marks.items():
        parameter = module.get_parameter(name)
        if not any(entry.shape == parameter.shape and bool((entry == mark).all()) for entry in entries):
            raise LawBroken(f"{name} was trained, and the checkpoint does not hold it.")
        if id(parameter) in inside and not any(bool((value == mark).any()) for value in stored):
            raise LawBroken(f"{name} was trained, and the folder does not hold it.")


def _written(trainer: L.Trainer, folder: Path) -> tuple[dict[str, Any], Path]:
    """Save the module; return its checkpoint, read back, and the folder of its adapters."""
    trainer.save_checkpoint(folder / "saved.ckpt")
    save_adapter(trainer.lightning_module, folder / "adapter")
    return read_checkpoint(folder / "saved.ckpt"), folder / "adapter"


def _restored(cell: Cell, checkpoint: dict[str, Any]) -> L.LightningModule:
    fresh = cell.make_module()
    restore_adapters(fresh, checkpoint, "the checkpoint")
    fresh.load_state_dict(checkpoint["state_dict"], strict=False)
    return fresh


def _reloaded(cell: Cell, module: L.LightningModule, folder: Path) -> L.LightningModule:
    """Return a fresh module with the adapters of a folder; what no folder holds is as in the trained module."""
    fresh, name = cell.make_module(), _name_of(module, adapters(module).backbone)
    outside = {key: v for key, v in state_tensors(module).items() if name and not key.startswith(f"{name}.")}
    fresh.load_state_dict(outside, strict=False)
    load_adapter(fresh.get_submodule(name), folder)
    return fresh


def padding(cell: Cell) -> None:
    """Check that neither padding, on either side, nor the order and company of rows change a row's result."""
    module, _, callback = cell.adapted()
    for batch in cell.batches:
        order = torch.arange(rows(batch)).flip(0)
        whole = cell.look(module, batch, callback)
        check_equal(cell.look(module, take(batch, order), callback), whole[order], 1e-5, "rows in another order")
        for variant in _padded(batch):
            together = cell.look(module, variant, callback)
            for row, alone, real in _alone(variant):
                result = cell.look(module, alone, callback)[0]
                token_wise = together.dim() > 2 and together.shape[1] == len(real)
                check_equal(
                    together[row][real] if token_wise else together[row], result, 1e-5, "a row padded and alone"
                )


def causality(cell: Cell) -> None:
    """Check that in a causal model other tokens in the future leave the past alone."""
    module, _, callback = cell.adapted()
    base, batch = cell.base(), cell.batches[0]
    if not _has_tokens(batch):
        raise DoesNotApply("the batch holds no tokens")
    batch = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    cut = batch["input_ids"].shape[1] // 2
    changed = batch["input_ids"].clone()
    changed[:, cut:] = changed[:, cut:].roll(1, 0).roll(1, 1)
    variant = batch | {"input_ids": changed}
    was, now = cell.look(base, batch), cell.look(base, variant)
    if was.dim() < 3 or was.shape[1] != changed.shape[1] or not are_close(now[:, :cut], was[:, :cut], 1e-6):
        raise DoesNotApply("the base model is not causal")
    was, now = cell.look(module, batch, callback), cell.look(module, variant, callback)
    check_equal(now[:, :cut], was[:, :cut], 1e-6, "outputs before the changed tokens")
    check_different(now[:, cut:], was[:, cut:], "outputs at the changed tokens")


def cache(cell: Cell) -> None:
    """Check that generation with the key-value cache = without."""
    _, stack, _ = cell.adapted()
    backbone: Any = stack.backbone
    batch = cell.batches[0]
    if not (_has_tokens(batch) and hasattr(backbone, "generate") and backbone.can_generate()):
        raise DoesNotApply("the base model does not generate")
    left = next(_padded(batch), batch)
    inputs = {key: left[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (backbone.generate(**inputs, **options, use_cache=use) for use in (True, False))
    if not torch.equal(cached, plain):
        raise LawBroken("other tokens are generated with the key-value cache than without.")


def threads(cell: Cell) -> None:
    """Check that two threads generating on one adapted model write what each writes alone."""
    _, stack, _ = cell.adapted()
    backbone: Any = stack.backbone
    batch = cell.batches[0]
    if not (_has_tokens(batch) and hasattr(backbone, "generate") and backbone.can_generate()):
        raise DoesNotApply("the base model does not generate")
    # they differ in rows, length and how long they write, so that what is noted for one call fits no other
    prompts, steps = [take(batch, torch.tensor([0])), next(_padded(batch))], [4, 7]

    def write(number: int) -> Tensor:
        options = {"max_new_tokens": steps[number], "min_new_tokens": steps[number], "do_sample": False}
        ids, mask = (prompts[number][key][:, 2 * (1 - number) :] for key in ("input_ids", "attention_mask"))
        return backbone.generate(input_ids=ids, attention_mask=mask, **options)

    alone = [write(number) for number in range(len(prompts))]
    for number, written in enumerate(in_lockstep(backbone, write, len(prompts))):
        if isinstance(written, Exception):
            message = f"{type(written).__name__}: {written}"
            raise LawBroken(f"a thread that generates beside another ends in {message}") from written
        if not torch.equal(written, alone[number]):
            raise LawBroken("a thread that generates beside another writes other tokens than alone.")


def alive(cell: Cell) -> None:
    """Check that backward from the training loss reaches all trained parameters; a gradient of zero counts."""
    module, stack, _ = cell.adapted()
    reached = Reached(trainable(stack.backbone))
    for number, batch in enumerate(cell.batches):
        output: Any = module.training_step(batch, number)
        (output["loss"] if isinstance(output, Mapping) else output).backward()
        reached.look()
    if unreached := reached.unreached():
        raise LawBroken(f"backward never reaches {len(unreached)} trained parameters, the first is {unreached[0]}.")


def restored(cell: Cell) -> None:
    """Check that adapters, taken off or after `steering`, leave attributes, methods, hooks and outputs as before.

    Only the frozen backbone stays so, where the adapter was not a loaded one put on for a while.
    """
    module, fitted, callback = cell.base(), cell.train(1), copy.deepcopy(cell.callback)
    before, outputs = traces(module), [cell.look(module, batch) for batch in cell.batches]

    def check(moment: str) -> None:
        if difference := first_difference(before, traces(module)):
            raise LawBroken(f"{moment} {difference}.")
        for batch, expected in zip(cell.batches, outputs, strict=True):
            check_equal(cell.look(module, batch), expected, 0.0, f"{moment} the outputs and those from before")

    flags = [parameter.requires_grad for parameter in module.parameters()]
    callback.apply(module)
    module.eval()
    backbone = adapters(module).backbone
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(module, folder)
        _take_off(module)
        check("after the adapters were taken off,")
        for parameter, flag in zip(module.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        with steering(backbone, folder):
            pass
    check("after steering,")
    if flags != [parameter.requires_grad for parameter in module.parameters()]:
        raise LawBroken("after steering, other parameters require gradients than before.")
    _take_off(trained := fitted.lightning_module)
    bare = cell.make_module()
    assert bare.hparams is not None  # which Lightning makes when it fits
    if strange := traces(bare).keys() ^ traces(trained).keys():
        raise LawBroken(f"after training, taking the adapters off left {min(strange)!r} behind, or took it away.")
    if left := handles_on(*trained.modules(), fitted, fitted.strategy, fitted.precision_plugin):
        raise LawBroken(f"after training, {left[0]} is still replaced on an instance.")


def _take_off(module: L.LightningModule) -> None:
    stack = adapters(module)
    for part in reversed(list(stack.parts)):
        stack.remove(part.name)


def count(cell: Cell) -> None:
    """Check that the number of trainable parameters is the closed formula's."""
    if cell.count is None:
        raise DoesNotApply("no formula was given")
    _, stack, _ = cell.adapted(noise=0.0)
    trained, expected = sum(p.numel() for p in trainable(stack.backbone).values()), cell.count(cell.base())
    if trained != expected:
        raise LawBroken(f"{trained} parameters are trainable, the formula says {expected}.")


def resume(cell: Cell) -> None:
    """Check that twice N steps = N steps, saved, loaded into new objects, N steps, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "half.ckpt")
        cell.train(1).save_checkpoint(path)
        continued = adapter_tensors(cell.train(2, path).lightning_module)
    check_resumed(cell, continued)


def check_resumed(cell: Cell, continued: Mapping[str, Tensor]) -> None:
    """Check the second half of `resume`, for a training that was continued elsewhere."""
    whole = adapter_tensors(cell.train(2).lightning_module)
    if whole.keys() != continued.keys():
        raise LawBroken("the resumed adapter has other tensors than the one trained in one go.")
    if different := [key for key in whole if not torch.equal(whole[key], continued[key])]:
        raise LawBroken(f"{len(different)} of {len(whole)} resumed tensors differ, the first is {different[0]}.")


LAWS: dict[str, Callable[[Cell], None]] = {
    "identity": identity,
    "frozen": frozen,
    "off": off,
    "merge": merge,
    "round trip": round_trip,
    "complete": complete,
    "padding": padding,
    "causality": causality,
    "cache": cache,
    "threads": threads,
    "alive": alive,
    "restored": restored,
    "citizen": citizen,
    "count": count,
    "resume": resume,
}


def _has_tokens(batch: Any) -> bool:
    return isinstance(batch, Mapping) and "input_ids" in batch and "attention_mask" in batch


def _padded(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the batch padded on the left and on the right, rows of different lengths."""
    if not _has_tokens(batch):
        return
    ids = batch["input_ids"]
    count, length = ids.shape
    for side in ("left", "right"):
        new_ids, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row in range(count):
            real = max(2, length - row)
            where = slice(0, real) if side == "right" else slice(length - real, length)
            new_ids[row, where], mask[row, where] = ids[row, :real], 1
        rest = {key: value for key, value in batch.items() if not _token_wise(value, ids) or key == "decoder_input_ids"}
        yield rest | {"input_ids": new_ids, "attention_mask": mask}


def _token_wise(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape


def _alone(batch: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
    """Yield each row without its padding, and which of its columns are real."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    for row in range(len(ids)):
        alone = take(batch, torch.tensor([row]))
        yield (
            row,
            {k: v[:, mask[row]] if _token_wise(batch[k], ids) else v for k, v in alone.items()},
            mask[row],
        )


def _name_of(module: L.LightningModule, backbone: nn.Module) -> str:
    return next(name for name, m in module.named_modules() if m is backbone)


def _speaking(callback: Any, module: L.LightningModule) -> Any:
    """Return a copy of a callback that tells this module's adapters where answers begin."""
    speaking = copy.copy(callback)
    speaking.stack = adapters(module)
    return speaking
