"""Steered generation against the same model unsteered, and against pyvene 0.1.8 on the same edit.

    python benchmarks/steered_generation.py [--model FOLDER | --random] [--pairs 30] [--quick]

Greedy generation by transformers' own `generate`. The edit is a random offset on 48 heads (ITI's default), served in
three ways: hooks (the adapter on the model, at answer positions), baked (biases in the weights, every position), and
pyvene, whose functions add the same to the same inputs. Each is timed against the unsteered model in turn, in one
process, who comes first changing each time; the median ratio has a 95% interval by bootstrap over pairs. First it is
shown that all three, where they edit every position, give the same tokens. `--random` takes a random model of
SmolLM2's shape. About 15 minutes on two cores.

pyvene is no dependency: `pip install --no-deps pyvene==0.1.8` (its own dependencies are not needed for this, and
bring ipywidgets and plotnine); without it that side is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from pairs import alternately, machine, milliseconds, quiet, ratio, verdict
from torch import Tensor

from lightning_peft import bake, load_adapter, save_adapter
from lightning_peft.editing import head_offsets_config, head_sites
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.head_offsets import HeadOffsetsLayer

HEADS, SIZE = 48, 1.0  # how many, and the length of each offset
BOUNDS = {"hooks": 1.05, "baked": 1.02}  # of the time unsteered, for the interval's upper end

Generate = Callable[[], Tensor]


def base(folder: str | None) -> Any:
    """SmolLM2-135M, or a random model of its shape."""
    if folder is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def save_edit(model: Any, folder: Path, positions: str) -> None:
    """Random offsets on `HEADS` heads, saved; the model is bare again afterwards."""
    generator = torch.Generator().manual_seed(0)
    sites = head_sites(model)
    count = sites[0].num_heads
    chosen = torch.randperm(len(sites) * count, generator=generator)[:HEADS].tolist()
    heads = [(number // count, number % count) for number in chosen]
    stack = stack_of(model)
    part = stack.add(head_offsets_config(sites, heads, 1.0, positions), "edit", computed=True)
    for tensor in stack.tensors(part).values():
        values = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(SIZE * torch.nn.functional.normalize(values, dim=-1))
    save_adapter(model, folder)
    stack.remove("edit")


def with_pyvene(model: Any, edited: Any, prompts: Tensor, options: dict[str, Any]) -> Generate:
    """pyvene adds to the inputs of the same projections what the head offsets of `edited` are."""
    import pyvene

    def adding(shift: Tensor) -> Callable[[Tensor, Any], Tensor]:
        return lambda inputs, _: inputs + shift

    layers = [(n, layer) for n, layer in edited.named_modules() if isinstance(layer, HeadOffsetsLayer)]
    places = [
        {
            "component": f"model.layers[{name.split('.')[2]}].self_attn.o_proj.input",
            "intervention": adding(layer.displacement("default").detach()),
        }
        for name, layer in layers
    ]
    wrapped = pyvene.IntervenableModel(places, model=model)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    return lambda: wrapped.generate(inputs, intervene_on_prompt=True, **options)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--random", action="store_true", help="a random model of SmolLM2's shape")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens generated")
    parser.add_argument("--quick", action="store_true", help="few short generations, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.pairs, given.rows, given.prompt, given.new = 6, [1], 16, 12
    quiet()

    folder = None if given.random else given.model
    sides = {name: base(folder) for name in ("unsteered", "hooks", "everywhere", "pyvene")}
    with tempfile.TemporaryDirectory() as made:
        for positions in ("answer", "all"):
            save_edit(sides["unsteered"], Path(made, positions), positions)
        load_adapter(sides["hooks"], Path(made, "answer"))
        load_adapter(sides["everywhere"], Path(made, "all"))
        bake(sides["unsteered"], Path(made, "answer"), Path(made, "baked"))
        sides["baked"] = base(str(Path(made, "baked")))
    print(f"{machine()}\n{HEADS} heads, prompts of {given.prompt} tokens, {given.new} tokens generated")
    for rows in given.rows:
        compare(sides, rows, given)


def compare(sides: dict[str, Any], rows: int, given: argparse.Namespace) -> None:
    prompts = torch.randint(5, 10_000, (rows, given.prompt), generator=torch.Generator().manual_seed(rows))
    options: dict[str, Any] = {"max_new_tokens": given.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generating(model: Any) -> Generate:
        return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    ways = {name: generating(sides[name]) for name in ("unsteered", "hooks", "everywhere", "baked")}
    if importlib.util.find_spec("pyvene"):
        ways["pyvene"] = with_pyvene(sides["pyvene"], sides["everywhere"], prompts, options)
    else:
        print("pyvene is not installed, and left out.")
    said = {name: way() for name, way in ways.items()}  # which warms them up as well
    print(f"\n{rows} rows")
    expected = said.pop("everywhere")
    verdict(
        "the adapter at every position, baked and pyvene give the same tokens",
        all(torch.equal(said[name], expected) for name in ("baked", "pyvene") if name in said),
    )
    verdict("which are not those of the unsteered model", not torch.equal(said["unsteered"], expected))
    for name in [name for name in said if name != "unsteered"]:
        theirs, ours = alternately(ways[name], ways["unsteered"], given.pairs)
        found = ratio(theirs, ours)
        print(f"{name} {milliseconds(theirs)}, unsteered {milliseconds(ours)}: {found}")
        if name in BOUNDS:
            verdict(f"{name} take at most {BOUNDS[name]} times as long (upper end)", found.high <= BOUNDS[name])
    if "pyvene" in ways:
        theirs, ours = alternately(ways["pyvene"], ways["hooks"], given.pairs)
        print(f"pyvene / hooks: {ratio(theirs, ours)}")


if __name__ == "__main__":
    main()
