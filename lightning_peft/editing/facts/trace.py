"""Causal tracing: in which layers a subject's feed-forward outputs bring back what noise on its name destroyed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import frozen
from lightning_peft.editing.facts.fact import Fact
from lightning_peft.editing.facts.keys import memory_sites
from lightning_peft.editing.facts.prompt_tokens import Prompt, Rows, Tokenizer, encode, object_log_probs
from lightning_peft.editing.facts.values import hooked


@torch.no_grad()
def causal_trace(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    noise: float = 3.0,
    samples: int = 3,
    window: int | None = None,
    seed: int = 0,
    within: str | None = None,
) -> Tensor:
    """Measure the average indirect effect of each layer's feed-forward outputs at the subject's last token.

    The embeddings of the subject are made noisy; then the outputs of a window of layers around each layer are put back
    to what they were without noise, at the subject's last token alone. The effect is how much likelier the true object
    becomes (Meng et al. 2022, arXiv:2202.05262, §2). Where a fact is found need not be where it is best rewritten
    (Hase et al. 2023, arXiv:2301.04213): compare with `score_facts` on facts set aside.

    Args:
        model: a causal language model.
        tokenizer: its (fast) tokenizer.
        facts: some that it knows.
        noise: its standard deviation, in those of the embeddings.
        samples: how many noises a fact.
        window: how many layers are put back together; default a fifth of them, as the authors' 10 of 48.
        seed: of the noise.
        within: as `memory_sites`'.

    Returns:
        `[layers]`, differences of probabilities.
    """
    sites = memory_sites(model, within=within)
    count = len(sites)
    half = (max(count // 5, 1) if window is None else window) / 2
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    spread = float(table.weight.float().std())
    generator = torch.Generator().manual_seed(seed)
    effects = torch.zeros(count)
    for fact in facts:
        rows = encode(tokenizer, [Prompt(fact.relation, fact.subject, fact.true)], next(model.parameters()).device)
        last, subject = int(rows.subject), slice(int(rows.begin), int(rows.subject) + 1)
        clean: dict[str, Tensor] = {}
        look = {site.name: _keeper(clean, site.name, last) for site in sites}
        with frozen(model), hooked(model, look):
            object_log_probs(model, rows)
        # one row for each layer that is put back, and one where nothing is
        many = Rows(*(tensor.expand(count + 1, *tensor.shape[1:]) for tensor in vars(rows).values()))
        hooks: dict[str, Any] = {}
        for i, site in enumerate(sites):
            near = [layer for layer in range(count) if i - half <= layer < i + half or layer == i]
            hooks[site.name] = _restorer(clean[site.name], near, last, count + 1)
        for _ in range(samples):
            shape = (subject.stop - subject.start, table.weight.shape[1])
            shift = noise * spread * torch.randn(shape, generator=generator)
            handle = table.register_forward_hook(_noiser(shift, subject))
            try:
                with frozen(model), hooked(model, hooks):
                    probabilities = object_log_probs(model, many, share=False).exp().cpu()
            finally:
                handle.remove()
            effects += probabilities[:-1] - probabilities[-1]
    return effects / (samples * len(facts))


def choose_layers(effects: Tensor, count: int = 1) -> list[int]:
    """Choose `count` consecutive layers to edit, the last being the one of the largest effect.

    The last layer of a model is left out, since no later attention could carry on what it says at the subject.

    Example:
        >>> choose_layers(torch.tensor([0.0, 0.1, 0.4, 0.2, 0.9]), 2)
        [1, 2]
    """
    best = int(effects[: max(len(effects) - 1, 1)].argmax())
    return list(range(max(best - count + 1, 0), best + 1))


def _keeper(clean: dict[str, Tensor], name: str, place: int) -> Any:
    def keep(_: nn.Module, args: Any, output: Tensor) -> None:
        clean[name] = output.reshape(-1, output.shape[-1])[place].clone()  # of the one row there is

    return keep


def _restorer(value: Tensor, rows: list[int], place: int, batch: int) -> Any:
    def restore(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        restored = output.clone().unflatten(0, (batch, -1)) if output.dim() == 2 else output.clone()
        restored[rows, place] = value
        return restored.reshape(output.shape)

    return restore


def _noiser(shift: Tensor, places: slice) -> Any:
    def disturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, places] += shift.to(output)
        return output

    return disturb
