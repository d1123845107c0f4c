"""A model to talk to, from what training, editing, exporting, baking or merging left."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lightning_peft.backbone.quantization import Quantization, QuantType, quantize
from lightning_peft.fitting.checkpoint_files import outside_backbones
from lightning_peft.generation.adapted import AdaptedModel
from lightning_peft.generation.prompts import check_chats
from lightning_peft.generation.sources import as_folder, base_of, is_checkpoint, is_model
from lightning_peft.stack.adapter_files.bases import check_dtype, load_base
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.adapter_files.saving import load_adapter
from lightning_peft.stack.checks import check_scale

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(
    source: str | Path,
    base: str | Path | None = None,
    *,
    scale: float | Mapping[str, float] = 1.0,
    dtype: str = "auto",
    quantize: QuantType | None = None,
    device: str | None = None,
    backbone: str | None = None,
    strict_base: bool = True,
    trust: bool = False,
    chat: bool = False,
) -> AdaptedModel:
    """Load an adapted language model to talk to.

    Args:
        source: a folder of an adapter or of a stack (this package's or plain peft's, compressed or not); a Lightning
            checkpoint with adapters; or the folder of a whole model, such as a baked or a merged one.
        base: the base model, a folder or a name on the hub; default: the one that the adapter's folder names, or that
            the checkpoint's module was made of.
        scale: the strength of all adapters, or of some, by name: 1 as saved.
        dtype: to load the base in; `"auto"` is its own.
        quantize: keep the base's linear layers in 4 or 8 bits: `"nf4"`, `"fp4"` or `"int8"`.
        device: default: a GPU where there is one.
        backbone: which backbone's adapters, where a checkpoint's module had several.
        strict_base: refuse an adapter that was made for another base model, instead of warning.
        trust: unpickle a checkpoint, which runs code in it.
        chat: refuse a base that has no chat template, before its weights are loaded.

    Returns:
        The model, in evaluation mode, with its adapters and the tokenizer: the one saved beside the adapter, if there
        is one, or else the base's.

    Raises:
        FileNotFoundError: there is no such source.
        AdapterError: it cannot be read, names no base, or is for another one.
        ValueError: no such base, device or dtype, a base without tokenizer or that does not generate, or a method
            without a dial at another scale than 0 or 1.

    Example:
        >>> from lightning_peft.generation import answers, load
        >>> adapted = load("polite", scale=2.0)  # doctest: +SKIP
        >>> answers(adapted, ["Where is the station?"], chat=True)  # doctest: +SKIP
    """
    source, base = Path(source), None if base is None else str(base)
    check_dtype(dtype)
    how = _Placement(dtype, quantize, _device(device))
    for value in scale.values() if isinstance(scale, Mapping) else [scale]:
        check_scale(value)
    if is_model(source):
        if base is not None or isinstance(scale, Mapping) or scale != 1:
            raise ValueError(
                f"{source} is a whole model and no adapter: leave {'the scale' if base is None else 'the base'} out."
            )
        tokenizer = _tokenizer(source, str(source), chat)
        return AdaptedModel(how.placed(_pretrained(str(source), dtype)), tokenizer, str(source))
    with as_folder(source, backbone, trust) as folder:
        if is_checkpoint(source) and (left := outside_backbones(source, trust)):
            warnings.warn(f"Not used, standing outside the language model: {', '.join(left)}.", stacklevel=2)
        named = base or base_of(source, folder, trust)
        try:
            tokenizer = _tokenizer(folder, named, chat)
            model = load_base(folder, named, dtype)[0] if strict_base else _pretrained(named, dtype)
        except ValueError as error:
            if base is None and not isinstance(error, AdapterError):
                named_by = f"{source} names it as its base: give another with --base"
                raise ValueError(f"{str(error).rstrip('.')}; {named_by}.") from error
            raise
        adapted = AdaptedModel(how.placed(model), tokenizer, named)
        load_adapter(adapted.model, folder, strict_base=strict_base)
    adapted.model.eval()  # what is put on begins in training mode
    if isinstance(scale, Mapping):
        for name, value in scale.items():
            adapted.scale(value, name)
    elif scale != 1:
        adapted.scale(scale)
    return adapted


class _Placement:
    """Where and in how many bits a base is kept."""

    def __init__(self, dtype: str, kind: QuantType | None, device: torch.device) -> None:
        self.dtype, self.how, self.device = dtype, None if kind is None else Quantization(kind), device

    def placed(self, model: Any) -> Any:
        """Return the model in its place."""
        if self.how is not None:
            try:
                quantize(model, self.how, device=self.device)
            except ModuleNotFoundError as error:
                raise ValueError(str(error)) from error
        # one that transformers has quantised stays where it was loaded
        return model if getattr(model, "is_quantized", False) else model.to(self.device)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"There is no device {name!r} here ({str(error).splitlines()[0]}).") from error
    return device


def _pretrained(name: str, dtype: str) -> Any:
    """Return a model of the class that its configuration names."""
    import transformers

    config = _config(name)
    named = [getattr(transformers, cls, None) for cls in config.architectures or ()]
    default = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    cls: Any = next((cls for cls in named if cls is not None), default)
    try:
        return cls.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be loaded ({str(error).strip().splitlines()[0]}).") from error


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is neither a folder with a transformers config.json nor a model that is reached on the hub."
        ) from error


def _tokenizer(folder: Path, base: str, chat: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was saved with an adapter, else the base's."""
    from transformers import AutoTokenizer

    name = str(folder) if (folder / "tokenizer_config.json").is_file() else base
    _config(base)  # where there is no such model, that is the better sentence
    try:
        tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{base} has no tokenizer that can be loaded ({reason}).") from error
    if chat:
        check_chats(tokenizer, base)
    return tokenizer
