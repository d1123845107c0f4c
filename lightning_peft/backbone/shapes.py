"""Build models without their values, on the meta device: nothing is downloaded but a config, nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def shapes_only() -> Iterator[None]:
    """Make modules on the meta device for a while; transformers' `from_pretrained` then reads no weights.

    A transformers model is built from its `config.json` alone (a local folder's, else the hub's), in the dtype that
    `from_pretrained` would give it. Without this, transformers refuses `from_pretrained` on the meta device.

    Raises:
        ValueError: within, `from_pretrained` is to quantise.

    Example:
        >>> from torch import nn
        >>> from lightning_peft.backbone.shapes import shapes_only
        >>> with shapes_only():
        ...     layer = nn.Linear(2**20, 2**20)  # 4 TiB
        >>> layer.weight.device.type, layer.weight.nbytes
        ('meta', 4398046511104)
    """
    from transformers import PreTrainedModel

    model_class: Any = PreTrainedModel
    original = vars(model_class)["from_pretrained"]
    model_class.from_pretrained = classmethod(_from_config)
    try:
        with torch.device("meta"):
            yield
    finally:
        model_class.from_pretrained = original


def _from_config(cls: Any, pretrained: str, *args: Any, config: Any = None, **kwargs: Any) -> Any:
    """Build a model from its config, in the place of `PreTrainedModel.from_pretrained`."""
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        loading = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        config = cls.config_class.from_pretrained(config or pretrained, **loading)
    if kwargs.get("quantization_config", getattr(config, "quantization_config", None)) is not None:
        raise ValueError(
            f"{pretrained} is quantised while it is loaded, of which there are no shapes without its weights: leave "
            "quantization_config out, and quantise by the callback Quantize."
        )
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if dtype == "auto":
        dtype = config.dtype
    options = {key: kwargs[key] for key in ("attn_implementation",) if key in kwargs}
    model = cls._from_config(config, dtype=dtype or torch.get_default_dtype(), **options)
    return model.to("meta")  # some models make parameters by `torch.FloatTensor`, which heeds no device
