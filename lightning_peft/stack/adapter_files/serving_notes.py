"""How a server can run an adapter, as far as its type allows: the last part of a model card."""

from __future__ import annotations

from typing import Any

from lightning_peft.stack.adapter_files.readme import code
from lightning_peft.stack.injection.initialisation import begins_in_weights, changes_base

_FOLDER, _BASE = "path/to/this/folder", "BASE"
# what LoRA can have besides its two matrices, which servers do not read
_FURTHER = ("use_dora", "modules_to_save", "target_parameters", "layer_replication", "alora_invocation_tokens")


def serving_notes(config: Any, kind: str, compressed: bool) -> list[str]:
    """Return paragraphs of Markdown.

    Args:
        config: the adapter's configuration.
        kind: the name of peft's type.
        compressed: whether the folder is compressed.
    """
    from lightning_peft.stack.adapter_files.as_lora import is_low_rank  # which writes folders, and so these cards

    if compressed:
        return ["Decompress it first: the card of the folder that `lightning-peft decompress` writes says more."]
    if config.is_prompt_learning:
        return [
            "It is no change of weights, so nothing can be merged, and the usual servers (vLLM, TGI, llama.cpp) do not "
            "load it: run it under transformers."
        ]
    if hasattr(config, "positions"):
        return _edit(config)
    if kind == "LORA" and not (further := [name for name in _FURTHER if getattr(config, name, None)]):
        return _lora(config)
    if kind != "LORA" and is_low_rank(config):
        return [f"{_UNKNOWN}. This adapter can be written as one that computes the same:", _AS_LORA]
    why = f"Servers read no {', '.join(f'`{name}`' for name in further)}" if kind == "LORA" else _UNKNOWN
    return [f"{why}: merge it, and serve the model that comes out. Where that cannot be, the command says so.", _MERGE]


_AS_LORA = f"```bash\nlightning-peft export {_FOLDER} plain-lora --as-lora\n```"
_UNKNOWN = "vLLM, TGI and llama.cpp load LoRA alone"
_MERGE = f"```bash\nlightning-peft merge {_FOLDER} merged --base {_BASE}\n```"


def _lora(config: Any) -> list[str]:
    if lost := ", ".join(f"`{name}`" for name in _lost(config)):
        misread = f"Servers do not read {lost}, and would compute something else"
        if changes_base(config) and not begins_in_weights(config):
            return [f"{misread}: merge it, and serve the model that comes out.", _MERGE]
        return [f"{misread}. Write it as a LoRA that does without:", _AS_LORA]
    rank = max([config.r, *(getattr(config, "rank_pattern", None) or {}).values()])
    commands = [
        f"vllm serve {_BASE} --enable-lora --max-lora-rank {_power(rank)} --lora-modules adapter={_FOLDER}",
        f"LORA_ADAPTERS=adapter={_FOLDER} text-generation-launcher --model-id {_BASE}",
        f"python convert_lora_to_gguf.py {_FOLDER} --base {_BASE} --outfile adapter.gguf  # of llama.cpp, then",
        "llama-server -m base.gguf --lora adapter.gguf",
    ]
    return [
        "vLLM, TGI and llama.cpp load LoRA beside a base that they know, where it adapts linear layers that they know:",
        "\n".join(["```bash", *commands, "```"]),
        "Anywhere else, write it into the base:",
        _MERGE,
    ]


def _lost(config: Any) -> list[str]:
    """Return the settings of a LoRA that change what it computes, and that servers pass over."""
    fields = ("rank_pattern", "alpha_pattern", *(("init_lora_weights",) if changes_base(config) else ()))
    return [name for name in fields if getattr(config, name, None)]


def _edit(config: Any) -> list[str]:
    if getattr(config, "gate", None) is not None or getattr(config, "tokens", 1) > 1:
        return [
            "How it acts depends on each input, which no weights hold: run it under transformers, as above. No server "
            "loads it."
        ]
    commands = [f"lightning-peft bake {_FOLDER} baked --base {_BASE}        # then serve baked with anything"]
    if getattr(config, "operation", "add") == "add":
        commands += [
            f"lightning-peft bake {_FOLDER} vector.gguf --base {_BASE}  # llama-cli --control-vector vector.gguf"
        ]
    return [
        "No server loads it as it is. Written into weights, or as a control vector of llama.cpp, it acts at every "
        f"token; as saved, at {code(config.positions)} positions. The command measures what that changes, and says "
        "where the architecture has no place for it.",
        "\n".join(["```bash", *commands, "```"]),
    ]


def _power(rank: int) -> int:
    """Return the least power of two that a rank fits in, from 8 on, which vLLM wants."""
    return max(8, 1 << (rank - 1).bit_length())
