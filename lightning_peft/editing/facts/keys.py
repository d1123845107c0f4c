"""The memories of a language model: each block's last feed-forward matrix, and the covariance of what enters it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite
from lightning_peft.backbone.language_model import part_blocks
from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.backbone.structure import matrix_shape, width
from lightning_peft.editing.facts.prompt_tokens import Tokenizer
from lightning_peft.editing.ranks import of_all_ranks
from lightning_peft.editing.reading import Way, read_texts


def memory_sites(model: nn.Module, layers: Sequence[int] | None = None, within: str | None = None) -> list[HeadSite]:
    """Find each block's matrix that leads from the feed-forward part back to the residual stream.

    Its input is a key and its output a value, in the reading of Geva et al. 2021, arXiv:2012.14913. It is found by
    structure: `down_proj`, GPT-2's Conv1D `c_proj`, GPT-NeoX's `dense_4h_to_h`, OPT's `fc2`, …

    Args:
        model: a causal language model, with or without adapters.
        layers: which blocks, from 0; default all.
        within: of which part of the model, see `part_blocks`; default its language model.

    Returns:
        Sites whose input is read as one head of the full width.

    Raises:
        ValueError: no language model, no blocks, several stacks of them, a block without one feed-forward part, no such
            layer, or a quantised matrix.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> memory_sites(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40)))[1].name
        'transformer.h.1.mlp.c_proj'
    """
    generates = getattr(model, "can_generate", None)
    if callable(generates) and not generates():
        raise ValueError(f"{type(model).__name__} does not predict next tokens: facts are edited in language models.")
    all_blocks = part_blocks(model, within)
    if len({block.stack for block in all_blocks}) != 1:  # an encoder's, say
        raise ValueError(f"Facts are edited in a model with one list of blocks; {type(model).__name__} has not one.")
    numbers = range(len(all_blocks)) if layers is None else layers
    if outside := [layer for layer in numbers if not 0 <= layer < len(all_blocks)]:
        raise ValueError(f"The model has layers 0 to {len(all_blocks) - 1}, but layer {outside[0]} was asked for.")
    stream, sites = width(model, all_blocks), []
    for layer in numbers:
        block = all_blocks[layer]
        if block.mlp is None or len(block.mlp.matrices) > 3:
            raise ValueError(f"{block.name} has not one feed-forward part with one last matrix, so no fact to edit.")
        module: Any = model.get_submodule(block.mlp.last)
        if is_quantized(getattr(module, "base_layer", module)):
            raise ValueError(
                f"{block.mlp.last} is quantised, and a rewritten fact would be rounded away when merged: load the "
                "model unquantised, or choose layers that are not."
            )
        inputs, outputs = matrix_shape(module)
        if outputs != stream:
            raise ValueError(f"{block.mlp.last} gives {outputs} features, but the residual stream has {stream}.")
        sites.append(HeadSite(block.mlp.last, layer, 1, inputs))
    return sites


class KeyMoments:
    """Second moments `E[k kᵀ]` of the keys of some layers, gathered batch after batch.

    Args:
        sites: from `memory_sites`.

    Attributes:
        sums: `[layers, width, width]` float64, `Σ k kᵀ`.
        count: how many keys.

    Example:
        >>> moments = KeyMoments([HeadSite("down", 0, 1, 2)])
        >>> moments.update(torch.tensor([[[[1.0, 0.0]]], [[[0.0, 2.0]]]]))
        >>> moments.matrix(0)
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]], dtype=torch.float64)
    """

    def __init__(self, sites: Sequence[HeadSite]) -> None:
        self.sites = list(sites)
        size = sites[0].head_dim
        self.sums = torch.zeros(len(sites), size, size, dtype=torch.float64)
        self.count = 0

    def update(self, keys: Tensor) -> None:
        """Add keys `[N, layers, 1, width]`.

        Raises:
            ValueError: keys that are not finite.
        """
        for layer, rows in enumerate(keys.squeeze(2).unbind(1)):
            if not torch.isfinite(rows).all():
                raise ValueError(f"The inputs of {self.sites[layer].name} contain NaN or infinite values.")
            rows = rows.double()
            self.sums[layer] += rows.T @ rows
        self.count += len(keys)

    def only(self, number: int) -> KeyMoments:
        """Return the moments of the site of this number alone."""
        chosen = KeyMoments([self.sites[number]])
        chosen.sums, chosen.count = self.sums[number][None], self.count
        return chosen

    def gather(self) -> None:
        """Add what the other ranks have gathered; without ranks, nothing."""
        sums, counts = zip(*of_all_ranks((self.sums, self.count)), strict=True)
        self.sums, self.count = torch.stack(sums).sum(0), sum(counts)

    def matrix(self, number: int, shrinkage: float = 0.0) -> Tensor:
        """Return `(1 - s) C + s tr(C)/d I` of the site of this number, float64 `[width, width]`.

        Few tokens tell little of most directions, and `C` of fewer tokens than features cannot be inverted; drawn
        towards a multiple of the identity it can (Ledoit and Wolf 2004), at the price that rare directions are
        treated as alike.

        Args:
            number: of the site.
            shrinkage: s, in [0, 1].

        Raises:
            ValueError: the matrix is singular.
        """
        if not 0.0 <= shrinkage <= 1.0:
            raise ValueError(f"shrinkage must be between 0 and 1, got {shrinkage}.")
        size = self.sums.shape[-1]
        moment = self.sums[number] / max(self.count, 1)
        moment = (1 - shrinkage) * moment + shrinkage * (moment.trace() / size) * torch.eye(size, dtype=moment.dtype)
        factor, failed = torch.linalg.cholesky_ex(moment)
        pivots = factor.diagonal().square()
        if failed or float(pivots.min()) <= size * torch.finfo(moment.dtype).eps * float(pivots.max()):
            raise ValueError(
                f"The key covariance of {self.sites[number].name} is singular: {self.count} tokens were read for "
                f"{size} features; read more text, or set shrinkage above {shrinkage:g}."
            )
        return moment


def key_moments(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], layers: Sequence[int], tokens: int | None = None
) -> KeyMoments:
    """Read the second moment of the keys of some layers over all tokens of texts.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: ordinary text: the more, the better the edit leaves everything else alone.
        layers: which blocks, from 0.
        tokens: read no further text once so many tokens were taken; default all.

    Raises:
        ValueError: as `memory_sites`; no text.
    """
    moments = KeyMoments(memory_sites(model, layers))
    sequences: list[list[int]] = []
    for text in texts:
        if tokens is not None and sum(map(len, sequences)) >= tokens:
            break
        sequences.append(list(tokenizer(text)["input_ids"]))
    sequences = [ids for ids in sequences if ids]
    if not sequences:
        raise ValueError("A key covariance needs texts to be read from, and there is none.")
    token_numbers = [list(range(len(ids))) for ids in sequences]
    for _, keys in read_texts(model, moments.sites, sequences, token_numbers, Way(share=False, batch_size=8)):
        moments.update(keys)
    return moments
