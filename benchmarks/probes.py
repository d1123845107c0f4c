"""Logistic probes of many heads at once against scikit-learn, head by head, at the same optimum.

    python benchmarks/probes.py [--model FOLDER [--data FOLDER]] [--heads 270 1024] [--rounds 5] [--quick]

Both sides get the same raw activations `[N, heads, width]` and standardise them. scikit-learn's fits are given two ways
to use the cores, BLAS's own threads and a thread for each head; a sample is tried, and the faster way is measured. Who
comes first changes with every round; medians count. Prints, for every solver, its dtype and the largest entry of the
gradient, divided by the number of statements, in float64: what "the same optimum" means. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from pairs import alternately, machine, quiet, ratio, verdict
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from lightning_peft.editing.probes import LogisticProbes

SHAPES = {270: (3600, 64), 1024: (2350, 128)}  # SmolLM2-135M on one release, LLaMA-7B on a fold and its validation


def synthetic(heads: int, statements: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations like a model's: correlated features, heavy tails, questions in common, a head in three that knows."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (statements,), generator=generator)
    question = torch.arange(statements) // 7
    x = torch.empty(statements, heads, width)
    spectrum = torch.arange(1, width + 1) ** -0.5  # standard deviations along the principal axes
    for head in range(heads):
        axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        z = torch.randn(statements, width, generator=generator)
        z = z + torch.randn(int(question[-1]) + 1, width, generator=generator)[question]
        z = z * (1 + 0.5 * torch.rand(statements, 1, generator=generator).pow(4) * 4)  # a few statements stand out
        z[:, width // 4] += (0.0, 0.4, 1.0)[head % 3] * (2.0 * y - 1)
        x[:, head] = 0.05 * ((z * spectrum) @ axes.T + torch.randn(width, generator=generator))
    return x, y


def captured(model: str, data: str, heads: int) -> tuple[Tensor, Tensor]:
    """A model's own activations: the last token's, of the statements of a question set."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_peft.editing import capture_tokens, head_sites
    from lightning_peft.truthfulqa.prompts import statement
    from lightning_peft.truthfulqa.questions import load_questions

    tokenizer = AutoTokenizer.from_pretrained(model)
    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    pairs = [(question.text, choice) for question in load_questions(data) for choice in question.choices]
    pairs = [(text, choice) for text, choice in pairs if choice.mc2 >= 0][:3600]
    tokens = [tokenizer(statement(text, choice.text))["input_ids"] for text, choice in pairs]
    x = capture_tokens(backbone, head_sites(backbone), tokens).flatten(1, 2)
    if x.shape[1] < heads:
        raise SystemExit(f"{model} has {x.shape[1]} heads, not {heads}: pass --heads {x.shape[1]}.")
    return x[:, :heads].contiguous(), torch.tensor([choice.mc2 for _, choice in pairs])


def sklearn_fits(
    x: np.ndarray, y: np.ndarray, solver: str, tol: float, threads: int, a_thread_a_head: bool
) -> tuple[Tensor, Tensor]:
    """Coefficients and intercepts in raw space, one regression a head."""

    def fit(head: int) -> tuple[np.ndarray, float]:
        scaler = StandardScaler()
        z = scaler.fit_transform(x[:, head])
        fitted = LogisticRegression(C=1.0, solver=solver, tol=tol, max_iter=10_000).fit(z, y)
        coef = fitted.coef_[0].astype(np.float64) / scaler.scale_
        return coef, float(fitted.intercept_[0]) - coef @ scaler.mean_

    with warnings.catch_warnings(), threadpool_limits(1 if a_thread_a_head else threads):
        warnings.simplefilter("ignore")
        if a_thread_a_head:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(fit, range(x.shape[1])))
        else:
            found = [fit(head) for head in range(x.shape[1])]
    return torch.from_numpy(np.stack([c for c, _ in found])), torch.tensor([b for _, b in found], dtype=torch.float64)


def gradient(x: Tensor, y: Tensor, coef: Tensor, intercept: Tensor) -> float:
    """The largest entry of any head's gradient, in float64, in the space of the standardised features, over N."""
    largest = 0.0
    sign = 2.0 * y.double() - 1
    for head in range(x.shape[1]):
        raw = x[:, head].double()
        mean, scale = raw.mean(0), raw.std(0, unbiased=False)
        pull = sign * torch.sigmoid(-sign * ((raw - mean) @ coef[head] + (intercept[head] + coef[head] @ mean)))
        slope = coef[head] * scale - ((raw - mean) / scale).T @ pull
        largest = max(largest, float(slope.abs().max()), float(pull.sum().abs()))
    return largest / len(y)


def compare(x: Tensor, y: Tensor, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    in_float64 = x.numpy().astype(np.float64)
    # solver, dtype, tolerance (sklearn's is for the largest entry of the gradient over N), bound, ours
    rivals = [
        ("newton-cholesky", x.numpy(), 1e-6, 1.0, torch.float32),
        ("lbfgs", in_float64, 1e-6, 3.0, torch.float32),
        ("newton-cholesky", in_float64, 1e-10, 1.0, torch.float64),
    ]
    labels = y.numpy()
    for solver, features, tol, bound, dtype in rivals:
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def ours(dtype: torch.dtype = dtype, found: dict[str, tuple[Tensor, Tensor]] = found) -> None:
            probes = LogisticProbes(dtype=dtype).fit(x, y)
            found["ours"] = probes.coef_, probes.intercept_

        sample = features[:, : max(8, features.shape[1] // 20)]
        ways = [_way(sample, labels, solver, tol, threads, a_thread_a_head) for a_thread_a_head in (False, True)]
        seconds = [statistics.median(times) for times in alternately(ways[0], ways[1], 3)]
        a_thread_a_head = seconds[1] < seconds[0]

        def theirs(
            features: np.ndarray = features,
            solver: str = solver,
            tol: float = tol,
            way: bool = a_thread_a_head,
            found: dict[str, tuple[Tensor, Tensor]] = found,
        ) -> None:
            found["theirs"] = sklearn_fits(features, labels, solver, tol, threads, way)

        LogisticProbes(dtype=dtype).fit(x[:, :8], y)
        mine, others = alternately(ours, theirs, rounds)
        way = "a thread a head" if a_thread_a_head else "BLAS's threads"
        grown = ratio(others, mine)
        print(
            f"\nours, {str(dtype).removeprefix('torch.')}: {statistics.median(mine):.2f} s, "
            f"gradient {gradient(x, y, *found['ours']):.1e}\n"
            f"scikit-learn {solver}, {features.dtype}, {way}: {statistics.median(others):.2f} s, "
            f"gradient {gradient(x, y, *found['theirs']):.1e}\n"
            f"coefficients differ by {_difference(found):.1e} of each head's largest; {grown} times as fast"
        )
        verdict(f"at least {bound} times as fast as {solver}", grown.median >= bound)


def _way(
    sample: np.ndarray, labels: np.ndarray, solver: str, tol: float, threads: int, a_thread_a_head: bool
) -> Callable[[], object]:
    return lambda: sklearn_fits(sample, labels, solver, tol, threads, a_thread_a_head)


def _difference(found: dict[str, tuple[Tensor, Tensor]]) -> float:
    mine, other = found["ours"][0], found["theirs"][0]
    return float(((mine - other).abs().amax(-1) / other.abs().amax(-1)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="take the activations of this model in place of synthetic ones")
    parser.add_argument("--data", default="package", help="question set for --model")
    parser.add_argument("--heads", type=int, nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a few heads and rounds, to see that it runs")
    options = parser.parse_args()
    quiet()
    print(machine())
    for heads in options.heads:
        statements, width = SHAPES.get(heads, SHAPES[270])
        if options.quick:
            heads, options.rounds = 24, 2
        x, y = captured(options.model, options.data, heads) if options.model else synthetic(heads, statements, width)
        what = options.model or "synthetic activations"
        print(f"\n{x.shape[1]} heads of {x.shape[2]}, {len(x)} statements, {what}, {options.threads} threads")
        compare(x, y, options.rounds, options.threads)
        if options.quick:
            break


if __name__ == "__main__":
    main()
