"""How long the singular vectors of a model's weights take, against a training step, and how much memory.

    python benchmarks/singular_values.py [--model FOLDER] [--times 3] [--top K]

`SingularValues` computes them once, in the first call, for every linear layer of the blocks. Both are done in turn, in
one process, who comes first changing each time: all decompositions, and one training step with the adapter on 4 × 128
tokens. Prints the median of the ratios, pair by pair, with its 95% interval. About 5 minutes on two cores.
"""

from __future__ import annotations

import argparse

import torch
from pairs import alternately, machine, milliseconds, quiet, ratio
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from lightning_peft.tuners.singular_values import SingularValuesConfig, SingularValuesLayer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--top", type=int, default=None)
    options = parser.parse_args(arguments)
    quiet()
    backbone = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    weights = sum(parameter.nbytes for parameter in backbone.parameters())
    model = get_peft_model(backbone, SingularValuesConfig(top=options.top))
    layers = [module for module in model.modules() if isinstance(module, SingularValuesLayer)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(0, 1000, (4, 128), generator=torch.Generator().manual_seed(0))

    def decompose() -> None:
        for layer in layers:
            layer._basis = None
            layer.basis()

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    decompose()
    step()
    vectors = sum(layer.basis().outputs.nbytes + layer.basis().inputs.nbytes for layer in layers)
    seconds = alternately(decompose, step, options.times)
    print(machine())
    print(f"{len(layers)} weights: {milliseconds(seconds[0])}; a training step: {milliseconds(seconds[1])}")
    print(f"decompositions / training step: {ratio(*seconds)}")
    print(f"singular vectors: {vectors / 1e6:.0f} MB, beside {weights / 1e6:.0f} MB of weights")


if __name__ == "__main__":
    main()
