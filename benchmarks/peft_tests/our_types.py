"""Our peft types as rows of the lists that peft's tests are parametrised with."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig

import lightning_peft  # noqa: F401 - registers the types
from lightning_peft.tuners.bottleneck import BottleneckConfig
from lightning_peft.tuners.head_offsets import HeadOffsetsConfig
from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig
from lightning_peft.tuners.prefix import PrefixConfig
from lightning_peft.tuners.ssb import SSBConfig
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

Row = tuple[Any, ...]

TYPES: dict[type[PeftConfig], str] = {
    SSBConfig: "SSB",
    BottleneckConfig: "BOTTLENECK",
    PrefixConfig: "ATTENTION_PREFIX",
    WeightDeltasConfig: "WEIGHT_DELTAS",
    LayerOffsetsConfig: "LAYER_OFFSETS",
    HeadOffsetsConfig: "HEAD_OFFSETS",
    LoraConfig: "LORA",  # peft's own, to see that the tests run here as they do there
}

# a bottleneck that is a linear map, which alone can be merged
_LINEAR = {"size": 4, "activation": "linear", "biases": False}
_EVERYWHERE = {"positions": "all"}

# the targets of some configuration on `model_id`, one of the models in peft's test_custom_models.py
_CUSTOM: list[tuple[str, type[PeftConfig], dict[str, Any]]] = [
    ("MLP", SSBConfig, {"target_modules": "lin0"}),
    ("MLP", SSBConfig, {"target_modules": ["lin0"]}),
    ("MLP", SSBConfig, {"target_modules": ["lin1"], "sides": "input"}),
    ("MLP", SSBConfig, {"target_modules": ["lin0", "lin1"], "sides": "output"}),
    ("MLP", SSBConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("EmbConv1D", SSBConfig, {"target_modules": ["conv1d", "lin0"]}),
    ("MLP", BottleneckConfig, {"target_modules": "lin0", "size": 4}),
    ("MLP", BottleneckConfig, {"target_modules": ["lin0", "lin1"], "size": 4}),
    ("MLP", BottleneckConfig, {"target_modules": ["lin0"], **_LINEAR}),
    ("MLP", BottleneckConfig, {"target_modules": ["lin0", "lin1"], "placement": "parallel", **_LINEAR}),
    ("MLP", BottleneckConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **_LINEAR}),
    ("EmbConv1D", BottleneckConfig, {"target_modules": ["conv1d"], **_LINEAR}),
    ("MLP", WeightDeltasConfig, {"target_parameters": "lin0.weight"}),
    ("MLP", WeightDeltasConfig, {"target_parameters": ["lin0.weight", "lin1.bias"]}),
    ("MLP", WeightDeltasConfig, {"target_parameters": ["lin0.weight"], "masked": ["lin0.weight"]}),
    ("MLP", WeightDeltasConfig, {"target_parameters": ["lin0.weight"], "modules_to_save": ["lin1"]}),
    ("EmbConv1D", WeightDeltasConfig, {"target_parameters": ["emb.weight", "conv1d.weight"]}),
    ("Conv2d", WeightDeltasConfig, {"target_parameters": ["conv2d.weight"]}),
    ("MLP_LayerNorm", WeightDeltasConfig, {"target_parameters": ["layernorm0.weight"]}),
    ("MHA", WeightDeltasConfig, {"target_parameters": ["mha.in_proj_weight"]}),
    ("MlpUsingParameters", WeightDeltasConfig, {"target_parameters": ["lin0.weight"]}),
    ("MLP", LayerOffsetsConfig, {"target_modules": "lin0", "width": 20, **_EVERYWHERE}),
    ("MLP", LayerOffsetsConfig, {"target_modules": ["lin0"], "width": 20, **_EVERYWHERE}),
    ("MLP", LayerOffsetsConfig, {"target_modules": ["lin1"], "width": 2, **_EVERYWHERE}),
    ("MLP", LayerOffsetsConfig, {"target_modules": ["lin0"], "width": 20, "operation": "ablate", **_EVERYWHERE}),
    ("MLP", LayerOffsetsConfig, {"target_modules": ["lin0"], "width": 20, "modules_to_save": ["lin1"], **_EVERYWHERE}),
    ("MLP_LayerNorm", LayerOffsetsConfig, {"target_modules": ["layernorm0"], "width": 10, **_EVERYWHERE}),
    ("MLP", HeadOffsetsConfig, {"target_modules": "lin0", "head_dim": 5, **_EVERYWHERE}),
    ("MLP", HeadOffsetsConfig, {"target_modules": ["lin0"], "head_dim": 5, **_EVERYWHERE}),
    ("MLP", HeadOffsetsConfig, {"target_modules": ["lin1"], "head_dim": 5, **_EVERYWHERE}),
    ("MLP", HeadOffsetsConfig, {"heads": {"lin1": [0, 2]}, "head_dim": 5, **_EVERYWHERE}),
    ("MLP", HeadOffsetsConfig, {"target_modules": ["lin0"], "head_dim": 5, "modules_to_save": ["lin1"], **_EVERYWHERE}),
    ("EmbConv1D", HeadOffsetsConfig, {"target_modules": ["conv1d"], "head_dim": 5, **_EVERYWHERE}),
    ("MLP", LoraConfig, {"target_modules": ["lin0"]}),
]

_SAME, _OTHER = ("lin0", "lin0"), ("lin0", "lin1")
# of each type two configurations for two adapters of one MLP, as keyword arguments for a layer
_TWO: list[tuple[type[PeftConfig], Any]] = [
    (SSBConfig, lambda name: {"target_modules": [name]}),
    (BottleneckConfig, lambda name: {"target_modules": [name], **_LINEAR}),
    (WeightDeltasConfig, lambda name: {"target_parameters": [f"{name}.weight"]}),
    (
        LayerOffsetsConfig,
        lambda name: {"target_modules": [name], "width": {"lin0": 20, "lin1": 2}[name], **_EVERYWHERE},
    ),
    (HeadOffsetsConfig, lambda name: {"target_modules": [name], "head_dim": 5, **_EVERYWHERE}),
    (LoraConfig, lambda name: {"target_modules": [name], "init_lora_weights": False}),
]

_OUTPUTS = r".*(attn|SelfAttention|EncDecAttention)\.(out_proj|c_proj|o_proj|o)"
_BLOCKS = r".*(layers|h|block)\.\d+"
# values too: in models this small the queries alone hardly move the logits
_PROJECTIONS = r".*(q_proj|v_proj|c_attn|SelfAttention\.q|SelfAttention\.v)"
# of each type configurations for transformers models; None is the type's default
_MODELS: list[tuple[type[PeftConfig], dict[str, Any]]] = [
    (SSBConfig, {"target_modules": None}),
    (BottleneckConfig, {"target_modules": None, **_LINEAR}),
    (BottleneckConfig, {"target_modules": None, "reduction": 4}),
    (PrefixConfig, {"target_modules": None, "length": 5, "init": "paper"}),
    (WeightDeltasConfig, {"target_parameters": _PROJECTIONS + r"\.weight"}),
    (LayerOffsetsConfig, {"target_modules": _BLOCKS, "width": 32, **_EVERYWHERE}),
    (HeadOffsetsConfig, {"target_modules": _OUTPUTS, "head_dim": 8, **_EVERYWHERE}),
    (LayerOffsetsConfig, {"target_modules": _BLOCKS, "width": 32}),
    (HeadOffsetsConfig, {"target_modules": _OUTPUTS, "head_dim": 8}),
    (LoraConfig, {"target_modules": None}),
]


class _Completed:
    """A configuration of which peft's tests give only `target_modules`, of a `DeepMLP(size=256)` or an `MLP`."""

    @staticmethod
    def of(cls: type[PeftConfig], **completion: Any) -> type[PeftConfig]:
        def __init__(self: Any, target_modules: list[str], **options: Any) -> None:
            values = {key: value(target_modules) for key, value in completion.items()}
            given = {} if "target_parameters" in completion else {"target_modules": target_modules}
            cls.__init__(self, **given, **values, **options)

        return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


COMPLETED = [
    SSBConfig,
    LoraConfig,
    _Completed.of(BottleneckConfig, size=lambda names: 4),
    _Completed.of(WeightDeltasConfig, target_parameters=lambda names: [f"{name}.weight" for name in names]),
    _Completed.of(
        LayerOffsetsConfig, width=lambda names: 256 if "layers" in names[0] else 20, positions=lambda names: "all"
    ),
    _Completed.of(HeadOffsetsConfig, head_dim=lambda names: 2, positions=lambda names: "all"),
]


def rows(list_name: str, task_type: str) -> list[Row]:
    """Return our rows for one of the lists of peft's test modules.

    Args:
        list_name: its name in the module.
        task_type: of the module's models.
    """
    if list_name == "TEST_CASES":
        return [(f"{i} {TYPES[cls]}", model_id, cls, kwargs) for i, (model_id, cls, kwargs) in enumerate(_CUSTOM)]
    if list_name == "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES":
        return [
            (f"{TYPES[cls]} {where}", "random start", cls, kwargs(first), kwargs(second))
            for cls, kwargs in _TWO
            for where, (first, second) in (("Same", _SAME), ("Different", _OTHER))
        ]
    if list_name == "MIXED_ADAPTER_TEST_CASES":
        return [
            (f"{TYPES[cls]} {where}", cls(**kwargs(first)), cls(**kwargs(second)))
            for cls, kwargs in _TWO
            for where, (first, second) in (("Same", _SAME), ("Different", _OTHER))
        ]
    if list_name == "ALL_CONFIGS":
        return [(cls, {"task_type": task_type, **kwargs}) for cls, kwargs in _MODELS]
    if list_name == "ALL_CONFIG_CLASSES":
        return [(cls, {"size": 4} if cls is BottleneckConfig else {}) for cls in TYPES]
    raise KeyError(list_name)


def name_of(value: Any) -> str | None:
    """Return the peft type that a test's parameter is of, or None."""
    cls = value if isinstance(value, type) else type(value)
    return next((name for known, name in TYPES.items() if issubclass(cls, known)), None)
