"""Head offsets, trained from zero (the second step of LoFiT) or from a computed edit, as one callback."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from torch import Tensor, nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.language_model import part_blocks
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.adapter import Adapter
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.stack.stack import AdapterStack
    from lightning_peft.tuners.head_offsets import HeadOffsetsConfig


class HeadOffsets(AdapterCallback):
    """Train a vector for each attention head, added to the head's output: `z_h + alpha * offset_h`, zero at the start.

    The second step of LoFiT (Yin et al. 2024, arXiv:2406.01563). What ITI computes, trained: with `init_from` the start
    computes what the saved edit does. Trainable parameters: `heads * head_dim`.

    Args:
        heads: `(layer, head)` pairs, both 0-based; default every head. Layers are counted over all attentions.
        alpha: the strength.
        positions: `"all"` tokens, where the offset is a bias and can be merged; only those from the `"answer"`'s
            beginning on; or only `"generated"` ones.
        init_from: a folder with head offsets to start from, such as ITI saves. Heads and positions are then the
            edit's, and its strength is written into the offsets, so that a learning rate means the same as from zero.
        pattern: a regular expression for the end of the names of the attention's output projections. Default: the
            last matrix of each attention in the backbone's blocks.
        num_heads: for models without a configuration, how many heads enter each of them.
        within: the part of the model whose heads are meant, see `lightning_peft.backbone.language_model`; default the
            language model.
        **options: see `AdapterOptions`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import HeadOffsets
        >>> trainer = L.Trainer(callbacks=[HeadOffsets(heads=[(3, 0), (3, 2)])], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "head_offsets"
    law_examples: Mapping[str, LawExample] = {
        "HeadOffsets": LawExample({}, ("attention", "transformers")),
        "HeadOffsets of answers": LawExample({"positions": "answer"}, ("attention", "transformers", "position_ids")),
    }

    def __init__(
        self,
        heads: list[tuple[int, int]] | None = None,
        alpha: float = 1.0,
        positions: Literal["all", "answer", "generated"] = "all",
        init_from: str | None = None,
        pattern: str | None = None,
        num_heads: int | None = None,
        within: str | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        check_heads(heads, positions, init_from)
        super().__init__(**options)
        self.init_from, self.heads, self.alpha, self.positions = init_from, heads, alpha, positions
        self.pattern, self.num_heads, self.within = pattern, num_heads, within
        if positions != "all":
            self.exempt = {"merge": "a bias acts at every position"}

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        if self.init_from is not None:
            return read_edit(self.init_from)[0]
        return head_config(backbone, self.heads, self.alpha, self.positions, self.pattern, self.num_heads, self.within)

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return sum(counts.attention_inputs(backbone))

    def _place(self, stack: AdapterStack, name: str, config: PeftConfig) -> Adapter:
        new = name not in stack
        part = super()._place(stack, name, config)
        if new and self.init_from is not None:
            _, tensors, fingerprint = read_edit(self.init_from)
            stack.check_base(fingerprint, self.init_from)
            stack.load_tensors(part, tensors, self.init_from)
        return part


def head_config(
    backbone: nn.Module,
    heads: list[tuple[int, int]] | None,
    alpha: float,
    positions: str,
    pattern: str | None,
    num_heads: int | None,
    within: str | None = None,
) -> HeadOffsetsConfig:
    """Return the configuration of trained head offsets on a backbone; the arguments are those of `HeadOffsets`.

    Raises:
        ValueError: heads that are not there, or answers of an encoder-decoder.
    """
    from lightning_peft.backbone.heads import head_sites
    from lightning_peft.editing.heads import head_offsets_config

    if positions != "all" and getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"Where an answer begins is not known in an encoder-decoder such as {type(backbone).__name__}: use "
            'positions="all".'
        )
    sites = head_sites(backbone, pattern or _projections(backbone, within), num_heads, within=within)
    pairs = None if heads is None else [(int(layer), int(head)) for layer, head in heads]
    for layer, head in pairs or ():
        if not (0 <= layer < len(sites) and 0 <= head < sites[layer].num_heads):
            raise ValueError(
                f"There is no head {head} in layer {layer}: the model has {len(sites)} layers of "
                f"{sites[0].num_heads} heads."
            )
    return head_offsets_config(sites, pairs, alpha, positions)


def read_edit(folder: str) -> tuple[HeadOffsetsConfig, dict[str, Tensor], dict[str, Any]]:
    """Return saved head offsets to start a training from, their strength written into them.

    Returns:
        The configuration at strength 1, the tensors, and the fingerprint of the base.

    Raises:
        ValueError: the folder holds another adapter, or several.
    """
    from lightning_peft.stack.adapter_files.folder import AdapterError, adapter_folders, read_folder
    from lightning_peft.tuners.head_offsets import HeadOffsetsConfig

    folders = adapter_folders(Path(folder))
    config, tensors, notes = read_folder(folders[0])
    if len(folders) > 1 or not isinstance(config, HeadOffsetsConfig) or config.parameters != "offsets":
        raise AdapterError(f"{folder} holds no head offsets by themselves to start from: save an ITI edit there.")
    # a gate's probe, where there is one, has nothing to do with the strength
    tensors = {k: v * config.alpha if k.endswith(".head_offsets") else v for k, v in tensors.items()}
    config.alpha, config.base_model_name_or_path, config.task_type = 1.0, None, None
    return config, tensors, notes.get("fingerprint", {})


def check_heads(heads: list[tuple[int, int]] | None, positions: str, init_from: str | None = None) -> None:
    """Raise `ValueError` for arguments that fit no model."""
    if init_from is not None and heads is not None:
        raise ValueError("An edit to start from has its own heads: give init_from or heads, not both.")
    if positions not in ("all", "answer", "generated"):
        raise ValueError(f'positions must be "all", "answer" or "generated", got {positions!r}.')
    if heads is not None and (not heads or any(len(pair) != 2 for pair in heads)):
        raise ValueError(f"heads must be pairs of a layer and a head, got {heads}.")


def _projections(backbone: nn.Module, within: str | None) -> str | None:
    """Return a pattern for the last matrices of all attentions, or None where the blocks' structure shows none."""
    names = [span.last for block in part_blocks(backbone, within) for span in block.attention]
    return "|".join(re.escape(name) for name in names) or None
