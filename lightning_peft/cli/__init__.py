"""The `lightning-peft` command: one file a command, and Lightning's own verbs."""

from __future__ import annotations

import difflib
import importlib
import sys
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: the file of this folder with its `main(args)`, a line of help, an example."""

    file: str
    does: str
    example: str


_LIGHTNING = Command("verbs", "Lightning's own, configured by YAML", "lightning-peft fit --config configs/lora.yaml")
COMMANDS = {
    "fit": _LIGHTNING,
    "validate": _LIGHTNING,
    "test": _LIGHTNING,
    "predict": _LIGHTNING,
    "generate": Command(
        "generate",
        "an adapted model's answers to prompts, of the command line or a file",
        'lightning-peft generate my-adapter --chat "What is it?"',
    ),
    "chat": Command(
        "chat", "a conversation with an adapted model, beside its base", "lightning-peft chat my-adapter --scale 2"
    ),
    "plan": Command(
        "plan",
        "what fit would train, and the memory it would take; nothing is allocated",
        "lightning-peft plan --config configs/lora.yaml",
    ),
    "compare": Command(
        "compare", "many adaptations, one table", "lightning-peft compare --config configs/compare/quick.yaml"
    ),
    "sweep": Command(
        "sweep",
        "ITI at many numbers of heads and strengths together",
        "lightning-peft sweep --config configs/sweep/iti.yaml",
    ),
    "export": Command(
        "export", "a checkpoint's adapters as a plain peft folder", "lightning-peft export last.ckpt out"
    ),
    "import": Command(
        "import_",
        "an adapter that AdapterHub saved, as a peft folder",
        "lightning-peft import sst-2 out --base bert-base-uncased",
    ),
    "merge": Command(
        "merge",
        "adapters written into their base, as a plain transformers folder",
        "lightning-peft merge out merged --base models/base",
    ),
    "bake": Command(
        "bake",
        "an edit written into its base as biases, or as a control vector for llama.cpp",
        "lightning-peft bake edit baked --base models/base",
    ),
    "combine": Command(
        "combine", "adapters added, negated, interpolated, merged", "lightning-peft combine a b sum --weights 1 -0.5"
    ),
    "compress": Command(
        "compress", "an adapter in a fraction of a bit to two bits a parameter", "lightning-peft compress out small"
    ),
    "decompress": Command(
        "decompress", "a compressed adapter as a plain peft folder again", "lightning-peft decompress small plain"
    ),
    "lm-eval": Command(
        "lm_eval",
        "a saved folder in lm-evaluation-harness, with its tasks",
        "lightning-peft lm-eval edit --base models/base --tasks arc_easy",
    ),
    "judge": Command(
        "judge",
        "how far a judge of answers can be trusted",
        "lightning-peft judge judge-truth --data finetune_truth.jsonl",
    ),
    "completion": Command(
        "completion", "the line that completes commands in bash", 'eval "$(lightning-peft completion)"'
    ),
}


def main(args: list[str] | None = None) -> None:
    """Run the command that `args` names; they default to the command line's.

    Raises:
        SystemExit: the command is unknown, or what it was given cannot be used; the message is one sentence.
    """
    if args is None:
        args = sys.argv[1:]
        sys.path.append("")  # a script's path has not the folder one stands in, where a class_path's module may be
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview(), end="")
    elif args[0] == "completion":
        print(f'complete -o default -W "{" ".join(COMMANDS)}" lightning-peft')
    elif args[0] in COMMANDS or args[0].startswith("-"):
        # an option before the verb, as in `lightning-peft --config x.yaml fit`, is LightningCLI's
        file = COMMANDS[args[0]].file if args[0] in COMMANDS else "verbs"
        with warnings.catch_warnings():
            # it cannot know that these are the command line's
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            importlib.import_module(f"{__name__}.{file}").main(args)
    else:
        near = difflib.get_close_matches(args[0], COMMANDS, n=3, cutoff=0.4) or list(COMMANDS)
        raise SystemExit(f"lightning-peft has no command {args[0]!r}; the nearest are {', '.join(near)}.")


def overview() -> str:
    """Return what `lightning-peft --help` prints: every command."""
    verbs = [name for name, command in COMMANDS.items() if command is _LIGHTNING]
    shown = {", ".join(verbs): _LIGHTNING} | {n: c for n, c in COMMANDS.items() if c is not _LIGHTNING}
    width = max(map(len, shown)) + 2
    lines = [f"  {name:{width}}{c.does}\n  {'':{width}}{c.example}\n" for name, c in shown.items()]
    return (
        "usage: lightning-peft <command> [options]\n\n"
        "Adapt a model by tuning or by editing, and measure which to take.\n\n"
        f"commands:\n{''.join(lines)}\n"
        "`lightning-peft <command> --help` lists a command's options.\n"
    )
