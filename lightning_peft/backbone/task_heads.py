"""The task heads in a backbone, often newly made: they map features to classes, labels, spans or numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft.backbone.modules import base_modules

_TASKS = (  # of transformers' lists of classes, those that map features to classes, labels, spans or numbers
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "DOCUMENT_QUESTION_ANSWERING",
    "TABLE_QUESTION_ANSWERING",
    "VISUAL_QUESTION_ANSWERING",
    "MULTIPLE_CHOICE",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "AUDIO_FRAME_CLASSIFICATION",
    "AUDIO_XVECTOR",
    "TIME_SERIES_CLASSIFICATION",
    "TIME_SERIES_REGRESSION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
)
_PART = 0.75  # of all parameters: what holds more of a network than this is no head, and only its last layer is


def task_heads(backbone: nn.Module) -> list[str]:
    """Return the names of the modules that are a task's head, in order; none where a head cannot be told.

    These are: in transformers' models for a task, what stands beside the base model; in a network with a
    `get_classifier` (timm's convention), what that returns; in a torchvision network, its last child; in a module
    around one such model, what stands outside it. Never among them are language-model heads, outputs of pretraining
    and weights that are used elsewhere too.

    Args:
        backbone: any module, with or without adapters.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from lightning_peft.backbone.task_heads import task_heads
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> task_heads(BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)))
        ['classifier']
    """
    heads = _library_heads(backbone)
    if heads is None:
        inner = _outermost(backbone)
        if len(inner) != 1:
            return []
        name, model = inner[0]
        outside = [f"{parent}{child}" for parent, child in _beside(backbone, name)]
        heads = outside or [f"{name}.{head}" for head in _library_heads(model) or ()]
    elsewhere = _used_elsewhere(backbone, heads)
    return [head for head in heads if not elsewhere & _identities(backbone.get_submodule(head))]


def _library_heads(module: nn.Module) -> list[str] | None:
    """Return the heads of a model whose library tells them; `None` for any other module."""
    if _is_transformers(module):
        return _transformers_heads(module)
    if callable(getattr(module, "get_classifier", None)):
        return _classifiers(module)
    if _is_torchvision(module):
        return _last_child(module)
    return None


def _is_transformers(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def _is_torchvision(module: nn.Module) -> bool:
    """Return whether a module is a classifier of torchvision's: a part of one is not exported by its file."""
    for cls in type(module).__mro__:
        library, _, where = cls.__module__.partition(".models.")
        if library == "torchvision" and where.removeprefix("video.").isidentifier():
            return cls.__name__ in getattr(sys.modules.get(cls.__module__), "__all__", ())
    return False


def _transformers_heads(model: Any) -> list[str]:
    """Return what stands beside the base model, in a class for a task or a user's own without output embedding."""
    if model.get_output_embeddings() is not None or model.can_generate():
        return []
    has_base = model.base_model is not model
    users_own = not type(model).__module__.startswith("transformers.")
    if not (_is_task_model(model) or (users_own and has_base)):
        return []
    held = {name for name, child in model.named_children() if any(map(_is_transformers, child.modules()))}
    if has_base:
        held.add(model.base_model_prefix)
    beside = [name for name in _with_weights(model) if name not in held]
    if beside or not has_base:
        return beside
    inner = model.base_model_prefix  # transformers' wrapper of a timm network has its head inside
    return [f"{inner}.{head}" for head in _library_heads(model.base_model) or ()]


def _is_task_model(model: nn.Module) -> bool:
    """Return whether the class, or one it derives from, is in transformers' own lists of models for such tasks."""
    from transformers.models.auto import modeling_auto

    names = {cls.__name__ for cls in type(model).__mro__}
    lists = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in _TASKS]
    return any(names & _flat(known.values()) for known in lists)


def _flat(values: Any) -> set[str]:
    """Return the names in a mapping's values, some of which are tuples of names."""
    return {name for value in values for name in ((value,) if isinstance(value, str) else value)}


def _classifiers(model: Any) -> list[str]:
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, list | tuple) else [classifiers]
    named = {module: name for name, module in base_modules(model) if name}
    bare = [_without_adapters(classifier) for classifier in classifiers]
    return [named[c] for c in bare if c in named and any(True for _ in c.parameters())]


def _without_adapters(module: Any) -> nn.Module:
    for inner in ("original_module", "base_layer"):
        while isinstance(getattr(module, inner, None), nn.Module):
            module = getattr(module, inner)
    return module


def _last_child(model: nn.Module) -> list[str]:
    """Return the last child; of one that is most of the network, as VGG's classifier, only the last layer."""
    children = _with_weights(model)
    if not children:
        return []
    last = model.get_submodule(children[-1])
    if sum(p.numel() for p in last.parameters()) <= _PART * sum(p.numel() for p in model.parameters()):
        return children[-1:]
    leaves = [name for name, module in last.named_modules() if name and module._parameters]
    return [f"{children[-1]}.{leaves[-1]}"] if leaves else children[-1:]


def _with_weights(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if any(True for _ in child.parameters())]


def _outermost(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the models of a library in a module, without those that are inside another."""
    models: list[tuple[str, nn.Module]] = []
    for name, module in base_modules(backbone):
        if not any(name.startswith(f"{outer}.") for outer, _ in models) and _library_heads(module) is not None:
            models.append((name, module))
    return models


def _beside(backbone: nn.Module, inner: str) -> Iterator[tuple[str, str]]:
    """Yield what has weights and is not on the path to `inner`: the prefix of its parent's name, and its own."""
    path, prefix, module = inner.split("."), "", backbone
    for step in path:
        for child in _with_weights(module):
            if child != step:
                yield prefix, child
        prefix, module = f"{prefix}{step}.", module.get_submodule(step)


def _used_elsewhere(backbone: nn.Module, heads: list[str]) -> set[int]:
    """Return the ids of the parameters that are reached by names outside these modules too."""
    inside = tuple(f"{head}." for head in heads)
    return {id(p) for n, p in backbone.named_parameters(remove_duplicate=False) if not n.startswith(inside)}


def _identities(module: nn.Module) -> set[int]:
    parameters: Iterator[Tensor] = module.parameters()
    return {id(parameter) for parameter in parameters}
