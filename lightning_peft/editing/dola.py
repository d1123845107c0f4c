"""DoLa: contrast what the last layer says with what an earlier one says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.editing.early_exit import find_early_exit, first_tensor

Layers = Literal["low", "high"] | int | Sequence[int]


class DoLa:
    """Context in which a causal language model's logits are contrasts of two layers (Chuang et al. 2023,
    arXiv:2309.03883).

    Of each token, the logits are `log p_N - log p_j`: p_N is the model's own distribution, p_j that of an earlier
    layer's state put through the final norm and the head. Layer j is chosen for every token by itself, as the candidate
    whose distribution has the largest Jensen-Shannon divergence from p_N; no row depends on its batch. Tokens with
    `p_N < relative_top * max p_N` are implausible and get `implausible` instead. Whatever asks the model for logits
    gets these: `generate` greedily, with beams or sampling, with and without a cache. A `loss` is not contrasted.

    Enter it when all adapters are on the model; making it runs the model on a few tokens.

    Args:
        model: a causal language model of transformers, adapted or not.
        layers: the candidates. Layer j is the state behind j blocks, 0 the embeddings, N = the number of blocks.
            `"low"`: even numbers in [0, N/2), without 0 where the head is the embedding's matrix, which would say each
            token itself; `"high"`: even numbers in [N/2, N); one number (the paper's static DoLa); or several.
        relative_top: from 0 (every token is plausible) to 1.
        implausible: the logit of implausible tokens, in place of minus infinity, with which nothing could be summed.
        normalise: make the contrasts log-probabilities, over all tokens, before the implausible ones are replaced.
        reference: as the authors' code (voidism/DoLa) rather than their paper: no final norm for earlier layers, and
            the divergence `(KL(m || p_N) + KL(m || p_j)) / 2` with `m` the mean of both, in which the arguments of KL
            stand the other way round.

    Raises:
        ValueError: no such layers, a share outside of [0, 1], or a model whose earlier states cannot be read.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        ...                                      num_attention_heads=4, vocab_size=40)).eval()
        >>> with DoLa(model, "high"):
        ...     tokens = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, repetition_penalty=1.2)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "high",
        relative_top: float = 0.1,
        *,
        implausible: float = -1000.0,
        normalise: bool = False,
        reference: bool = False,
    ) -> None:
        if not 0 <= relative_top <= 1:
            raise ValueError(f"relative_top must be from 0 to 1, got {relative_top}.")
        self._exit = find_early_exit(model)
        self.layers = candidate_layers(layers, len(self._exit.blocks), self._exit.tied)
        self.relative_top, self.implausible = relative_top, implausible
        self.normalise, self.reference = normalise, reference
        self._states: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> DoLa:
        for layer in self.layers:
            if layer:
                self._handles.append(self._exit.blocks[layer - 1].register_forward_hook(self._keeper(layer)))
            else:
                self._handles.append(
                    self._exit.blocks[0].register_forward_pre_hook(self._keep_embeddings, with_kwargs=True)
                )
        self._handles.append(self._exit.model.register_forward_hook(self._contrast, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._states.clear()

    def _keeper(self, layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._states[layer] = first_tensor(output)

        return keep

    def _keep_embeddings(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states[0] = args[0] if args else kwargs["hidden_states"]

    def _contrast(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(getattr(output, "logits", None), Tensor):
            raise ValueError("DoLa needs the model's output by name: leave return_dict as it is.")
        columns = kwargs.get("logits_to_keep", 0)
        columns = slice(-columns, None) if isinstance(columns, int) else columns  # -0 keeps all
        output.logits, _ = contrast(
            output.logits,
            (self._early(layer, columns) for layer in self.layers),
            self.relative_top,
            implausible=self.implausible,
            normalise=self.normalise,
            reference=self.reference,
        )
        self._states.clear()
        return output

    def _early(self, layer: int, columns: Any) -> Tensor:
        state = self._states[layer][:, columns]
        # the authors' last hidden state is normed, the others are not
        bare = self.reference and layer < len(self._exit.blocks)
        return self._exit.head(state if bare else self._exit.state(state))


def contrast(
    final: Tensor,
    early: Iterable[Tensor],
    relative_top: float = 0.1,
    *,
    implausible: float = -1000.0,
    normalise: bool = False,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """Subtract the farthest candidate's log-probabilities from the last layer's, token by token.

    Args:
        final: logits of the last layer, `[..., V]`.
        early: logits of each candidate, `[..., V]`; one at a time is kept. Of equally far ones the first is taken.
        relative_top, implausible, normalise, reference: as `DoLa`.

    Returns:
        Contrasts `[..., V]` in float32, and the numbers of the candidates taken, `[...]`.

    Example:
        >>> scores, taken = contrast(torch.tensor([2.0, 1.0, -3.0]), [torch.tensor([2.0, 1.0, -3.0]), torch.zeros(3)])
        >>> [round(score, 2) for score in scores.tolist()], int(taken)
        ([0.78, -0.22, -1000.0], 1)
    """
    final = final.float().log_softmax(-1)
    best = torch.zeros_like(final)
    farthest = final.new_full(final.shape[:-1], -math.inf)
    taken = torch.zeros(final.shape[:-1], dtype=torch.long, device=final.device)
    for number, logits in enumerate(early):
        logprobs = logits.to(final.device).float().log_softmax(-1)
        far = jensen_shannon(final, logprobs, reverse=reference)
        farther = far > farthest
        best = torch.where(farther[..., None], logprobs, best)
        taken = taken.masked_fill(farther, number)
        farthest = torch.where(farther, far, farthest)
    scores = final - best
    if normalise:
        scores = scores.log_softmax(-1)
    if relative_top > 0:
        least = final.amax(-1, keepdim=True) + math.log(relative_top)
        scores = scores.masked_fill(final < least, implausible)
    return scores, taken


def jensen_shannon(p: Tensor, q: Tensor, reverse: bool = False) -> Tensor:
    """Return the Jensen-Shannon divergence in nats, `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`.

    Args:
        p, q: log-probabilities, `[..., V]`.
        reverse: turn the arguments of both KL round, which is what DoLa's authors compute.

    Returns:
        `[...]`, from 0 to log 2; reversed, without such a bound.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
        >>> round(float(jensen_shannon(p, q)), 4)
        0.1017
    """
    m = torch.logaddexp(p, q) - math.log(2)
    if reverse:
        return (m.exp() * (m - (p + q) / 2)).sum(-1)
    return ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2


def candidate_layers(layers: Layers, depth: int, tied: bool = False) -> tuple[int, ...]:
    """Return the numbers of the layers that `layers` means in a model of `depth` blocks; see `DoLa`.

    Example:
        >>> candidate_layers("low", 12, tied=True), candidate_layers("high", 12), candidate_layers(3, 12)
        ((2, 4), (6, 8, 10), (3,))
    """
    if layers == "low":
        chosen = [layer for layer in range(0, depth, 2) if 2 * layer < depth and (layer or not tied)]
    elif layers == "high":
        chosen = [layer for layer in range(0, depth, 2) if 2 * layer >= depth]
    elif isinstance(layers, str):
        raise ValueError(f'layers must be "low", "high", a number or several, got {layers!r}.')
    else:
        chosen = [layers] if isinstance(layers, int) else list(layers)
    if not chosen or not all(0 <= layer <= depth for layer in chosen):
        raise ValueError(f"layers={layers!r} names no layers of a model of {depth} blocks: give numbers, 0 to {depth}.")
    return tuple(chosen)
