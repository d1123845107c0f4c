"""AdapterHub's configurations, named or written out, alone or in a union, as options of methods."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_peft.adapterhub.folder import CONFIG, SavedAdapter
from lightning_peft.adapterhub.options import (
    BottleneckOptions,
    LowRankOptions,
    Options,
    PrefixOptions,
    ReftOptions,
    read,
)
from lightning_peft.stack.adapter_files.folder import AdapterError

_SEQUENTIAL = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu"}
_SEQUENTIAL |= {"original_ln_before": True}
_DOUBLE = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16, "non_linearity": "swish"}
_PARALLEL = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 2, "non_linearity": "relu"}
_PARALLEL |= {"is_parallel": True, "scaling": 4.0}
_COMPACTER = {"phm_layer": True, "reduction_factor": 32, "non_linearity": "gelu"}
_INVERTIBLE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
_PREFIX = {"architecture": "prefix_tuning"}
_LORA = {"architecture": "lora"}
_IA3 = {"r": 1, "alpha": 1, "attn_matrices": ["k", "v"], "composition_mode": "scale", "intermediate_lora": True}
_GATED = {"use_gating": True}
_REFT = {"architecture": "reft", "layers": "all", "prefix_positions": 3, "suffix_positions": 0, "r": 1}


def _union(*configs: Mapping[str, Any]) -> dict[str, Any]:
    return {"architecture": "union", "configs": [dict(config) for config in configs]}


# what the strings in AdapterHub's ADAPTER_CONFIG_MAP stand for
NAMED: dict[str, dict[str, Any]] = {
    "seq_bn": _SEQUENTIAL,
    "double_seq_bn": _DOUBLE,
    "par_bn": _PARALLEL,
    "scaled_par_bn": {**_PARALLEL, "scaling": "learned"},
    "seq_bn_inv": {**_SEQUENTIAL, **_INVERTIBLE},
    "double_seq_bn_inv": {**_DOUBLE, **_INVERTIBLE},
    "compacter++": {**_SEQUENTIAL, **_COMPACTER},
    "compacter": {**_DOUBLE, **_COMPACTER},
    "prefix_tuning": _PREFIX,
    "prefix_tuning_flat": {**_PREFIX, "flat": True},
    "lora": _LORA,
    "ia3": {**_LORA, **_IA3},
    "dora": {**_LORA, "use_dora": True},
    "vera": {**_LORA, "vera_d": 0.1, "vera_b": 0.0},
    "dvora": {**_LORA, "use_dora": True, "vera_d": 0.1, "vera_b": 0.0},
    "loreft": {**_REFT, "orthogonality": True, "subtract_projection": True},
    "noreft": {**_REFT, "orthogonality": False, "subtract_projection": True},
    "direft": {**_REFT, "orthogonality": False, "subtract_projection": False},
    "mam": _union({**_PREFIX, "bottleneck_size": 800}, _PARALLEL),
    "unipelt": _union(
        {**_PREFIX, **_GATED, "prefix_length": 10}, {**_SEQUENTIAL, **_GATED}, {**_LORA, **_GATED, "alpha": 2}
    ),
}
NAMED |= {
    "pfeiffer": NAMED["seq_bn"],
    "houlsby": NAMED["double_seq_bn"],
    "parallel": NAMED["par_bn"],
    "scaled_parallel": NAMED["scaled_par_bn"],
    "pfeiffer+inv": NAMED["seq_bn_inv"],
    "houlsby+inv": NAMED["double_seq_bn_inv"],
}
_KINDS: dict[str | None, type[Options]] = {
    None: BottleneckOptions,
    "bottleneck": BottleneckOptions,
    "prefix_tuning": PrefixOptions,
    "lora": LowRankOptions,
    "reft": ReftOptions,
}
# activations as the versions named them whose files do not say which version they are
_FORMER_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def methods(saved: SavedAdapter) -> list[Options]:
    """Return the methods that an adapter consists of, several for a union.

    Raises:
        AdapterError: the configuration is unknown, or has an option that nothing here is equal to.
    """
    source = str(saved.folder / CONFIG)
    config = saved.config if isinstance(saved.config, Mapping) else _named(saved.config, source)
    return [_method(values, saved, source) for values in _members(config, source)]


def _members(config: Mapping[str, Any], source: str) -> Iterator[Mapping[str, Any]]:
    if config.get("architecture") != "union":
        yield config
        return
    members = config.get("configs")
    if not isinstance(members, list) or not members or not all(isinstance(member, dict) for member in members):
        raise AdapterError(f"{source} holds a union of AdapterHub without a list of configs.")
    yield from members


def _method(values: Mapping[str, Any], saved: SavedAdapter, source: str) -> Options:
    architecture = values.get("architecture")
    if not isinstance(architecture, str | None) or architecture not in _KINDS:
        raise AdapterError(
            f"{source} is of AdapterHub's architecture {architecture!r}, which is not imported; bottlenecks, prefixes, "
            "LoRA, IA3 and ReFT are."
        )
    return read(_KINDS[architecture], _as_now(values, saved), source)


def _as_now(values: Mapping[str, Any], saved: SavedAdapter) -> dict[str, Any]:
    """Return a configuration as AdapterHub itself corrects it when it reads a file of a former version."""
    current = dict(values)
    activation = current.get("non_linearity")
    if not saved.version and isinstance(activation, str):
        current["non_linearity"] = _FORMER_ACTIVATIONS.get(activation, activation)
    if isinstance(former := current.pop("invertible_adapter", None), dict):
        current["inv_adapter"] = former.get("block_type")
    if saved.kind == "text_task" and not any("invertible" in key for key in saved.tensors):
        current.pop("inv_adapter", None)  # a task's adapter named those of its language, and had none
    if current.get("architecture") == "lora" and _before_scaling_was_right(saved.version):
        current["alpha"] = current.get("r", 8)
    return current


def _before_scaling_was_right(version: str) -> bool:
    """Return whether LoRA was trained without its scaling alpha / r: by `adapters` before 1.1.0."""
    match = re.match(r"adapters\.(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)


def _named(text: str, source: str) -> dict[str, Any]:
    """Return what a string such as `seq_bn[reduction_factor=8]|lora` stands for."""
    members = [_named_member(part.strip(), source) for part in text.split("|")]
    return members[0] if len(members) == 1 else _union(*members)


def _named_member(text: str, source: str) -> dict[str, Any]:
    match = re.fullmatch(r"([^\[\]]+)(?:\[(.*)\])?", text)
    if match is None or match[1] not in NAMED:
        raise AdapterError(
            f"{source} has the config {text!r}, which is none of AdapterHub's names {', '.join(NAMED)}; if it is a "
            "hash, put in its place what AdapterConfig.load(...).to_dict() of AdapterHub gives."
        )
    try:
        changes = ast.literal_eval("{" + re.sub(r"(\w+)=", r"'\1':", match[2] or "") + "}")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise AdapterError(f"{source} has the config {text!r}, whose options cannot be read.") from error
    if not isinstance(changes, dict):
        raise AdapterError(f"{source} has the config {text!r}, whose options are no name=value.")
    config = NAMED[match[1]]
    if config.get("architecture") == "union":
        return {**config, "configs": [{**member, **changes} for member in config["configs"]]}
    return {**config, **changes}
