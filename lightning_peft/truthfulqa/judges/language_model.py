"""A judge that is a causal language model: of the hub, or a base model with an adapter trained here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_peft.backbone.accepted_arguments import accepted_arguments
from lightning_peft.backbone.token_numbers import token_numbers
from lightning_peft.backbone.window import check_lengths
from lightning_peft.truthfulqa.judges.protocol import Kind, judge_prompt
from lightning_peft.truthfulqa.prompts import encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# open judges, trained on the same judgements as the original's; 7 billion parameters each
HUB: dict[Kind, str] = {
    "truth": "allenai/truthfulqa-truth-judge-llama2-7B",
    "info": "allenai/truthfulqa-info-judge-llama2-7B",
}


class LanguageModelJudge:
    """P(` yes`) after `Q: …`, `A: …`, `True:` (or `Helpful:`), over the whole vocabulary as in the original.

    Args:
        model: a causal language model of transformers, with whatever adapter is active.
        tokenizer: the model's.
        kind: `"truth"` or `"info"`.
        batch_size: prompts a forward pass.

    Raises:
        ValueError: the tokenizer begins ` yes` and ` no` with the same token.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, kind: Kind, batch_size: int = 16) -> None:
        self.model, self.tokenizer, self.kind, self.batch_size = model.eval(), tokenizer, kind, batch_size
        self._accepts = accepted_arguments(model)
        prompt = judge_prompt("Why?", "Because.", kind)
        (yes, start), (no, _) = (encode_pair(tokenizer, prompt, verdict) for verdict in (" yes", " no"))
        if yes[start] == no[start]:
            raise ValueError("This tokenizer begins ' yes' and ' no' with the same token: the judge cannot answer.")
        self._yes = yes[start]

    @classmethod
    def from_pretrained(
        cls, name: str | None = None, kind: Kind = "truth", dtype: str = "auto", batch_size: int = 16
    ) -> LanguageModelJudge:
        """Load a judge of the Hugging Face hub or a folder.

        Args:
            name: the model; default the open judge of this kind, `allenai/truthfulqa-…-judge-llama2-7B`.
            kind: `"truth"` or `"info"`.
            dtype: the name of a torch dtype, or `"auto"` for that of the weights.
            batch_size: prompts a forward pass.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = HUB[kind] if name is None else name
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return cls(model, AutoTokenizer.from_pretrained(name), kind, batch_size)

    @classmethod
    def from_adapter(
        cls,
        folder: str | Path,
        kind: Kind = "truth",
        base: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> LanguageModelJudge:
        """Load a judge trained here, or anywhere: an adapter folder of peft's on its base model.

        Args:
            folder: with `adapter_config.json`.
            kind: `"truth"` or `"info"`.
            base: the base model; default the one that the folder names.
            dtype: the name of a torch dtype, to load the base in.
            batch_size: prompts a forward pass.

        Raises:
            ValueError: the folder holds no adapter, or names no base.
        """
        from peft import PeftConfig, PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(f"{folder} holds no adapter_config.json: name the folder of one adapter.")
        base = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        if not base:
            raise ValueError(f"{folder} does not name its base model: name it.")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(folder))
        return cls(model, AutoTokenizer.from_pretrained(base), kind, batch_size)

    @torch.no_grad()
    def score(self, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Return the probability of ` yes` for each answer, `[N]` float32 on the CPU.

        Raises:
            ContextWindowError: questions with their answers are longer than the model can read.
        """
        prompts = [judge_prompt(q, a, self.kind) for q, a in zip(questions, answers, strict=True)]
        # the verdict is encoded too, so that the prompt's last token is what it was in training
        rows = [ids[:start] for ids, start in (encode_pair(self.tokenizer, prompt, " yes") for prompt in prompts)]
        check_lengths(self.model, map(len, rows), "answers to judge, with their questions,")
        scores = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            scores[batch] = self._probabilities([rows[i] for i in batch])
        return scores

    def _probabilities(self, rows: list[list[int]]) -> Tensor:
        """Score one batch, padded on the left so that the last column predicts every verdict."""
        device = next(self.model.parameters()).device
        width = max(map(len, rows))
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        inputs = {
            "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device),
            "attention_mask": mask,
            **token_numbers(self.model, mask),
        }
        options = {"logits_to_keep": 1} if "logits_to_keep" in self._accepts else {}
        logits = self.model(**inputs, **options).logits[:, -1]
        return logits.float().softmax(-1)[:, self._yes].cpu()
