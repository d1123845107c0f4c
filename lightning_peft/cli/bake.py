"""`lightning-peft bake`: an edit written into its base for good, or as a control vector for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.arguments import one_sentence, parser

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_peft.stack.adapter_files.baking import Baked
    from lightning_peft.stack.adapter_files.control_vectors import ControlVector


def main(args: list[str]) -> Baked | ControlVector:
    """Bake an adapter folder and print what that changed."""
    options = parser(
        "bake",
        "Write an edit into its base: a transformers folder that loads without this package. It then acts at every "
        "token; how much that changes is measured on this package's own questions and printed.",
    )
    options.add_argument("adapter", help="a folder of an edit, or of a stack that ends in one")
    options.add_argument("output", help="a folder to write, new or empty; or FILE.gguf, a control vector for llama.cpp")
    options.add_argument(
        "--base", help="the base model: a folder, or its name on the hub; default: as the adapter says"
    )
    options.add_argument("--dtype", default="auto", help="to load and to save in; auto is the base's own")
    options.add_argument("--questions", type=int, default=20, help="how many to measure on; 0 measures nothing")
    options.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare what was written with the edit, for a model too large to be loaded twice, or in float32",
    )
    options.add_argument(
        "--no-strict-base",
        action="store_true",
        help="take another base than the adapter was made for, such as one with a token more or tuned further, with a "
        "warning",
    )
    parsed = options.parse_args(args[1:])
    with one_sentence("bake"):
        from lightning_peft.stack.adapter_files.bases import load_base

        if not Path(parsed.adapter).is_dir():
            raise FileNotFoundError(2, "", parsed.adapter)
        strict = not parsed.no_strict_base
        model, base = load_base(parsed.adapter, parsed.base, parsed.dtype, strict)
        causal = model.can_generate() and not model.config.is_encoder_decoder
        batches = _answers(base, parsed.questions) if causal and parsed.questions > 0 else []
        if parsed.output.endswith(".gguf"):
            from lightning_peft.stack.adapter_files.control_vectors import export_control_vector

            vector = export_control_vector(model, parsed.adapter, parsed.output, batches, strict)
            _print_vector(vector, parsed.output)
            return vector
        from lightning_peft.stack.adapter_files.baking import bake

        checks = {"verify": not parsed.no_verify, "strict_base": strict}
        baked = bake(model, parsed.adapter, parsed.output, batches, tokenizer=base, **checks)
        _print_baked(baked, parsed.output)
        return baked


def _answers(base: str, count: int) -> list[dict[str, Tensor]]:
    """Return questions of this package with their best answers, one a batch; none where the base has no tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from lightning_peft.truthfulqa.prompts import encode_pair, question_prompt
    from lightning_peft.truthfulqa.questions import load_questions, subset

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{base} has no tokenizer: what acting at every token changes is not measured.")
        return []
    batches = []
    questions = load_questions("package")
    for question in subset(questions, min(count, len(questions))):
        ids, prompt = encode_pair(tokenizer, question_prompt(question.text, primer=""), f" {question.best}")
        tokens = torch.tensor([ids])
        start = torch.tensor([prompt - 1])
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "prompt_end": start})
    return batches


def _print_baked(baked: Baked, output: str) -> None:
    print(
        f"Wrote {output}, a {baked.cls} that transformers loads by itself; {len(baked.changed)} weights hold the edit."
    )
    print(f"{baked.verification or 'Not verified'}.")
    if baked.flags:
        print(f"Turned on {', '.join(map(str, baked.flags))}, which adds {len(baked.zeros)} biases that are zero.")
    _print_divergence(baked)


def _print_vector(vector: ControlVector, output: str) -> None:
    print(f"Wrote {output}, a control vector for llama.cpp of {len(vector.vectors)} blocks.")
    if vector.first_moved:
        print("llama.cpp adds nothing after the first block: its vector is added after the second.")
    how = "exact" if vector.exact else "approximate, since the edit is no shift of what its blocks give"
    print(f"It is {how}: logits differ by {vector.error:.1e} of the largest from the edit's at every token.")
    _print_divergence(vector)


def _print_divergence(written: Any) -> None:
    where = ", ".join(written.positions) or "all"
    if written.divergence is not None:
        print(f"The adapter acts at {where} tokens, this at all of them: {written.divergence}.")
