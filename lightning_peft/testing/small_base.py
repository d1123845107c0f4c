"""A tiny model on disk with a tokenizer of its own, from which transformers makes pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_peft.testing.models import VOCABULARY


def save_base(model: Any, folder: Path) -> None:
    """Save a model, and a tokenizer of one token a word: `"w3 w4"` is `[3, 4]`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0").save_pretrained(folder)


def text_generation(model: Any, tokenizer: Path) -> str:
    """Return what a pipeline writes, given a model or a folder."""
    from transformers import AutoTokenizer, pipeline

    write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tokenizer), device="cpu")
    (written,) = write("w5 w6 w7", max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return str(written["generated_text"])
