"""A fully fine-tuned checkpoint as an adapter: its difference to the base it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_peft.backbone.fingerprint import fingerprint, mismatch
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.adapter_files.saving import write_described
from lightning_peft.stack.configs import config_to_json


def checkpoint_difference(tuned: str | Path, base: str | Path, output: str | Path) -> Path:
    """Write `τ = θ_tuned - θ_base` of two transformers folders as a weight-deltas adapter.

    On the base its dial is Ilharco et al.'s (2023, arXiv:2212.04089): `θ_base + t τ` with t = 1 the tuned model, to the
    rounding of one sum in float32, t = 0 the base bit for bit, negative values forgetting. `combine` sums several.
    Parameters that are the same in both are left out.

    Args:
        tuned: the folder of the fine-tuned model.
        base: folder or hub name of the model it was tuned from.
        output: where to write the adapter.

    Raises:
        AdapterError: the base is not found, parameters have other names or shapes, or none differs.
    """
    import transformers

    from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
    from lightning_peft.tuners.weight_deltas.config import storage
    from lightning_peft.tuners.weight_deltas.owners import places

    try:
        config = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{base} is neither a folder with a transformers config.json nor a model that is reached on the hub."
        ) from error
    cls: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    before, after = (cls.from_pretrained(str(path), dtype="auto") for path in (base, tuned))
    identity, tuned_identity = fingerprint(before), fingerprint(after)
    if identity["names"] != tuned_identity["names"]:
        raise AdapterError(f"{tuned} was not tuned from {base}: {mismatch(identity, tuned_identity)}.")
    values = {}
    for (old, *_), (new, *_) in zip(places(before), places(after), strict=True):
        assert old.parameter is not None and new.parameter is not None
        if not old.parameter.is_floating_point():
            raise AdapterError(f"{base} is quantised, and differences are of plain weights: name its original.")
        if not torch.equal(old.parameter, new.parameter):
            kind = storage(old.parameter.dtype)
            values[old.full_name] = new.parameter.detach().to(kind) - old.parameter.detach().to(kind)
    if not values:
        raise AdapterError(f"{tuned} and {base} have the same weights: there is nothing to write.")
    owners = {name: name.rpartition(".") for name in values}
    tensors = {
        f"base_model.model.{owner}{dot}weight_deltas.values.{parameter}": values[name]
        for name, (owner, dot, parameter) in owners.items()
    }
    part = {
        "name": "default",
        "config": config_to_json(WeightDeltasConfig(target_parameters=sorted(values))),
        "computed": False,
        "strength": 1.0,
        "record": {"method": "difference of checkpoints", "tuned": Path(tuned).name, "base": Path(base).name},
    }
    return write_described({"fingerprint": identity, "parts": [part]}, [tensors], Path(output), base=str(base))
