"""The value a memory should give: found by a few gradient steps on one vector, the model being frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.backbone.evaluating import frozen
from lightning_peft.backbone.heads import HeadSite
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.editing.facts.fact import Fact
from lightning_peft.editing.facts.prompt_tokens import Prompt, Rows, Tokenizer, encode, next_logits, with_object


@dataclass(frozen=True)
class Search:
    """The settings of the search for a value; names and defaults are the authors' for GPT-2 XL (Meng et al. 2022).

    Args:
        v_num_grad_steps: steps of Adam, at most.
        v_lr: its learning rate.
        v_weight_decay: weight of `‖δ‖ / ‖m‖²`, m being what is given without δ.
        clamp_norm_factor: `‖δ‖` is kept within this times `‖m‖`.
        kl_factor: weight of the change in what is expected after "{subject} is a", its essence.
        stop: the loss at which the search ends early.

    Raises:
        ValueError: a number out of its range.
    """

    v_num_grad_steps: int = 20
    v_lr: float = 0.5
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625
    stop: float = 0.05

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            positive = name in ("v_num_grad_steps", "v_lr", "clamp_norm_factor")
            if value < 0 or (positive and value == 0):
                raise ValueError(f"{name} must be {'above' if positive else 'at least'} 0, got {value}.")


@dataclass(frozen=True)
class Value:
    """The output that one memory should give, and the key it is for.

    Args:
        key: `[width]`, k*: the mean input at the subject's last token, over the prefixes.
        delta: `[outputs]`, v* − W k*: what its output must change by there.
        log_prob: of the new object at the last step, mean over prefixes and tokens, in nats.
        steps: how many were taken.
    """

    key: Tensor
    delta: Tensor
    log_prob: float
    steps: int


def find_values(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    site: HeadSite,
    prefixes: Sequence[str],
    search: Search,
    reference: str | None = None,
    batch_size: int = 8,
) -> list[Value]:
    """Search for the change of a memory's output that makes the model say the new object, for each fact alone.

    Minimises, over δ added to the output at the subject's last token, `−log P(new)` averaged over the prefixes, plus
    `kl_factor · KL` between what is expected after "{subject} is a" with and without δ, plus a pull towards 0
    (Meng et al. 2022, arXiv:2202.05262, eq. 4). The paper puts one vector in place of the output in every context; here
    δ is added to each context's own, as in the authors' code. Facts in one batch do not see each other.

    Args:
        model: a causal language model; what acts on it acts here too.
        tokenizer: its (fast) tokenizer.
        facts: what it shall say.
        site: one of `memory_sites`.
        prefixes: from `random_prefixes`, or `[""]`.
        search: how.
        reference: the module whose output's norm bounds δ; default the site's own.
        batch_size: facts a batch.

    Returns:
        One value a fact.

    Raises:
        ValueError: as `encode`; a loss that is not finite.
    """
    values: list[Value] = []
    with frozen(model):
        for begin in range(0, len(facts), batch_size):
            batch = facts[begin : begin + batch_size]
            values += _find(model, tokenizer, batch, site, prefixes, search, reference or site.name)
    return values


def _find(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    site: HeadSite,
    prefixes: Sequence[str],
    search: Search,
    reference: str,
) -> list[Value]:
    prompts = []
    for fact in facts:
        prompts += [*with_object(fact, fact.new, prefixes), Prompt("{} is a", fact.subject)]
    rows = encode(tokenizer, prompts, next(model.parameters()).device)
    keep, group = rows.keep, len(prefixes) + 1  # a fact's rows: one a prefix, and the essence
    keys, outputs = at_subject(model, rows, site.name)
    if reference != site.name:
        _, outputs = at_subject(model, rows, reference)
    key, bound = (x.float().unflatten(0, (-1, group))[:, :-1].mean(1) for x in (keys, outputs))
    norm = bound.norm(dim=-1)
    delta = norm.new_zeros(len(facts), matrix_shape(model.get_submodule(site.name))[1], requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=search.v_lr)
    live = torch.arange(len(facts), device=norm.device)  # the facts still searched for
    log_prob, steps = norm.new_zeros(len(facts)), torch.zeros_like(live)
    essence: Tensor | None = None
    place: Tensor = rows.subject
    shift: Tensor = delta

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        at_subject = F.one_hot(place, rows.input_ids.shape[1]).to(output.dtype)
        # some models flatten rows and columns before their feed-forward part
        return output + (at_subject[..., None] * shift[:, None].to(output.dtype)).reshape(output.shape)

    with torch.enable_grad(), hooked(model, {site.name: add}):
        for step in range(1, search.v_num_grad_steps + 1):
            index = (live[:, None] * group + torch.arange(group, device=live.device)).flatten()
            place, shift = rows.subject[index], delta[live].repeat_interleave(group, dim=0)
            logits = next_logits(model, rows.input_ids[index], rows.attention_mask[index], keep)
            expected = logits.log_softmax(-1).unflatten(0, (-1, group))
            targets, mask = (
                x[index, 1 - keep :].unflatten(0, (-1, group))[:, :-1] for x in (rows.input_ids, rows.objects)
            )
            chosen = expected[:, :-1, :-1].gather(-1, targets[..., None])[..., 0]
            new_log_prob = ((chosen * mask).sum(-1) / mask.sum(-1)).mean(-1)
            now = expected[:, -1, -1]
            essence = now.detach() if essence is None else essence  # δ is still 0, and all facts are here
            drift = F.kl_div(essence[live], now, log_target=True, reduction="none").sum(-1)  # KL(now ‖ before)
            pull = delta[live].norm(dim=-1) / norm[live].square()
            loss = -new_log_prob + search.kl_factor * drift + search.v_weight_decay * pull
            if not torch.isfinite(loss).all():
                wrong = facts[int(live[~torch.isfinite(loss)][0])]
                raise ValueError(f"The loss for {wrong.prompt!r} is not finite after {step} steps: lower v_lr.")
            log_prob[live], steps[live] = new_log_prob.detach(), step
            going = loss.detach() >= search.stop
            if not going.any():
                break
            before = delta.detach().clone()
            optimizer.zero_grad()
            loss[going].sum().backward()
            optimizer.step()
            live = live[going]
            with torch.no_grad():
                longest = search.clamp_norm_factor * norm[live]
                moved = delta[live]
                before[live] = moved * (longest / moved.norm(dim=-1).clamp(min=1e-12)).clamp(max=1)[:, None]
                delta.copy_(before)
    columns = (key, delta.detach(), log_prob, steps)
    return [Value(k.cpu(), d.cpu(), float(p), int(s)) for k, d, p, s in zip(*columns, strict=True)]


def read_at_subject(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    module: str,
    prefixes: Sequence[str],
    batch_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Return a module's mean input and output at each fact's subject's last token, over the prefixes, `[n, width]`."""
    means: list[tuple[Tensor, Tensor]] = []
    with frozen(model):
        for begin in range(0, len(facts), batch_size):
            batch = facts[begin : begin + batch_size]
            prompts = [prompt for fact in batch for prompt in with_object(fact, "", prefixes)]
            rows = encode(tokenizer, prompts, next(model.parameters()).device)
            key, output = (x.float().unflatten(0, (len(batch), -1)) for x in at_subject(model, rows, module))
            means.append((key.mean(1).cpu(), output.mean(1).cpu()))
    inputs, outputs = zip(*means, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


@torch.no_grad()
def at_subject(model: nn.Module, rows: Rows, module: str) -> tuple[Tensor, Tensor]:
    """Return a module's input and output at the subject's last token of each row, `[B, width]`; no further is run."""
    states: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple | list) else output
        place = rows.subject.to(output.device)
        each = torch.arange(len(place), device=output.device)
        states.extend(x.reshape(*rows.input_ids.shape, -1)[each, place] for x in (args[0], output))
        raise _Reached

    with hooked(model, {module: look}), suppress(_Reached):
        next_logits(model, rows.input_ids, rows.attention_mask, 1)
    return states[0], states[1]


class _Reached(Exception):
    """A signal that the module was reached: the layers behind it need not run."""


@contextmanager
def hooked(model: nn.Module, hooks: dict[str, Any]) -> Iterator[None]:
    """Run with forward hooks on modules, named as they are without adapters."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
