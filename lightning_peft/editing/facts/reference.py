"""ROME and MEMIT as their authors' code computes them (github.com/kmeng01/memit), fact by fact and step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.backbone.evaluating import frozen
from lightning_peft.backbone.heads import HeadSite
from lightning_peft.editing.facts.fact import Fact
from lightning_peft.editing.facts.prompt_tokens import Prompt, Rows, Tokenizer, encode, last_logits, with_object
from lightning_peft.editing.facts.update import Factors, acting, stacked
from lightning_peft.editing.facts.values import Search, at_subject, hooked


@dataclass(frozen=True)
class Target:
    """The output that a module should give at a subject's last token.

    Args:
        output: `[width]`, v* or z, in the model's precision, at least float32.
        log_prob: of the new object at the last step, mean over contexts and tokens, in nats.
        steps: how many times the model was run for it.
    """

    output: Tensor
    log_prob: float
    steps: int


def reference_rome(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    site: HeadSite,
    moment: Tensor,
    prefixes: Sequence[str],
    search: Search,
) -> tuple[Factors, list[Target]]:
    """Return ROME's update of one layer as the authors' `compute_u` and `compute_v` give it, and the values.

    `u = C⁻¹k / ‖C⁻¹k‖` is of the mean key k over the contexts; it is divided by its product with the key of the bare
    prompt, so that the bare prompt, not the mean, is given the value.

    Args:
        model, tokenizer, facts, search: as `compute_rome`.
        site: the matrix to edit.
        moment: `[inputs, inputs]` float64, C.
        prefixes: the contexts; the value starts from the output in the first, the authors' bare prompt.

    Returns:
        A `[n, inputs]` and B `[outputs, n]`, float32, of n facts; and a value a fact.
    """
    inverse = torch.inverse(moment)
    updates: list[Factors] = []
    targets: list[Target] = []
    with frozen(model):
        for fact in facts:
            with acting(model, {site.name: stacked(updates)} if updates else {}):
                keys, _ = _read(model, tokenizer, fact, site.name, prefixes)
                u = inverse @ keys.mean(0)
                u = u / u.norm()
                targets.append(_target(model, tokenizer, fact, site.name, prefixes, search))
                key, output = (states[0] for states in _read(model, tokenizer, fact, site.name, ("",)))
            right = (targets[-1].output.double().cpu() - output) / torch.dot(key, u)
            updates.append((u[None], right[:, None]))
    a, b = stacked(updates)
    return (a.float(), b.float()), targets


def reference_memit(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    sites: Sequence[HeadSite],
    moments: Sequence[Tensor],
    stream: str,
    prefixes: Sequence[str],
    search: Search,
    weight: float,
) -> tuple[dict[str, Factors], list[Target]]:
    """Return MEMIT's updates as the authors' `execute_memit` gives them, and the states z searched for.

    Args:
        model, tokenizer, facts, search: as `compute_memit`.
        sites: the matrices to edit, in ascending order of their layers.
        moments: of each, `[inputs, inputs]` float64, C.
        stream: the block that the last of them is in, whose output is searched for.
        prefixes: the contexts; the bare prompt and all others together each make half of a key.
        weight: λ.

    Returns:
        For each matrix A `[n, inputs]` and B `[outputs, n]`, float32, of n facts; and a state a fact.
    """
    factors: dict[str, Factors] = {}
    with frozen(model):
        targets = [_target(model, tokenizer, fact, stream, prefixes, search) for fact in facts]
        wanted = torch.stack([target.output.double().cpu() for target in targets])
        for i, site in enumerate(sites):
            with acting(model, factors):
                keys = torch.stack([_halves(model, tokenizer, fact, site.name, prefixes) for fact in facts])
                states = torch.cat([_read(model, tokenizer, fact, stream, ("",))[1] for fact in facts])
            solved = torch.linalg.solve(weight * moments[i] + keys.T @ keys, keys.T)
            factors[site.name] = solved.T.contiguous(), ((wanted - states) / (len(sites) - i)).T
    return {name: (a.float(), b.float()) for name, (a, b) in factors.items()}, targets


def _halves(model: nn.Module, tokenizer: Tokenizer, fact: Fact, module: str, prefixes: Sequence[str]) -> Tensor:
    """Return a module's input at the subject, the mean of the bare prompt's and of that in all other contexts."""
    keys, _ = _read(model, tokenizer, fact, module, prefixes)
    bare = torch.tensor([not prefix for prefix in prefixes])
    return torch.stack([keys[kind].mean(0) for kind in (bare, ~bare) if kind.any()]).mean(0)


def _read(
    model: nn.Module, tokenizer: Tokenizer, fact: Fact, module: str, prefixes: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return a module's inputs and outputs at the subject's last token, one row a context, in float64."""
    rows = encode(tokenizer, with_object(fact, "", prefixes), next(model.parameters()).device)
    inputs, outputs = at_subject(model, rows, module)
    return inputs.double().cpu(), outputs.double().cpu()


def _target(
    model: nn.Module, tokenizer: Tokenizer, fact: Fact, module: str, prefixes: Sequence[str], search: Search
) -> Target:
    """Search for a module's output at the subject's last token, as the authors' `compute_v` and `compute_z` do.

    δ is measured by the output in the first context; what is expected of the subject is read right behind it in
    "{subject} is a"; and the last of the runs is not followed by a step.
    """
    prompts = [*with_object(fact, fact.new, prefixes), Prompt("{} is a", fact.subject)]
    rows = encode(tokenizer, prompts, next(model.parameters()).device)
    first = at_subject(model, rows, module)[1][0]
    first = first.to(torch.promote_types(first.dtype, torch.float32))
    delta = torch.zeros_like(first, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=search.v_lr)
    longest = search.clamp_norm_factor * first.norm()
    essence: Tensor | None = None
    log_prob, step = first.new_zeros(()), 0
    with torch.enable_grad(), hooked(model, {module: _adder(delta, rows)}):
        for step in range(1, search.v_num_grad_steps + 1):
            log_prob, now = _log_probs(model, rows)
            essence = now.detach() if essence is None else essence
            drift = F.kl_div(essence, now, log_target=True, reduction="sum")  # KL(now ‖ before)
            pull = delta.norm() / first.norm().square()
            loss = -log_prob + search.kl_factor * drift + search.v_weight_decay * pull
            if not torch.isfinite(loss):
                raise ValueError(f"The loss for {fact.prompt!r} is not finite after {step} steps: lower v_lr.")
            if loss < search.stop or step == search.v_num_grad_steps:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if delta.norm() > longest:
                    delta.copy_(delta * longest / delta.norm())
    return Target(first + delta.detach(), float(log_prob.detach()), step)


def _log_probs(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the new object's log-probability, mean over contexts, and all tokens' behind the last row's subject."""
    logits = last_logits(model, rows.input_ids, rows.attention_mask, rows.input_ids.shape[1])
    expected = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = expected[:-1, :-1].gather(-1, rows.input_ids[:-1, 1:, None])[..., 0]
    mask = rows.objects[:-1, 1:]
    return ((chosen * mask).sum(-1) / mask.sum(-1)).mean(), expected[-1, int(rows.subject[-1])]


def _adder(delta: Tensor, rows: Rows) -> Any:
    at_subject = F.one_hot(rows.subject, rows.input_ids.shape[1]).bool()

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        states: Tensor = output[0] if isinstance(output, tuple | list) else output
        place = at_subject.to(states.device)[..., None]
        # some models flatten rows and columns before their feed-forward part
        moved = states + (place * delta).to(states).reshape(states.shape)
        return moved if states is output else type(output)((moved, *output[1:]))

    return add
