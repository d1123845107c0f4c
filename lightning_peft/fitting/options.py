"""The options that every callback which trains an adapter passes on to `PEFT`."""

from __future__ import annotations

from typing import TypedDict


class AdapterOptions(TypedDict, total=False):
    """What any tuning callback takes besides its method's own arguments.

    Args:
        train_head: train and save the task head that stands inside the backbone, beside the adapter. `True` (the
            default) takes the heads that can be told: those of transformers' classification, token, question-answering
            and regression models, and the last classifier of timm and torchvision networks; never a language-model
            head or a weight that another module shares. A name, or a list of names, takes these modules instead;
            `False` none.
        strict_base: refuse a checkpoint that was made on another base model (the default), instead of warning once.
        check_finite: stop the run where the loss or the adapter is no longer finite (the default), naming the step and
            the tensor. Turn it off for a loss that is to overflow now and then, as with a loss scaling of one's own.
    """

    train_head: bool | str | list[str]
    strict_base: bool
    check_finite: bool
