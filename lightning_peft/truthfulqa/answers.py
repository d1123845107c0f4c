"""Free answers as a part of a comparison: how they are asked for, and who judges them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lightning_peft.truthfulqa.judges.protocol import Kind
from lightning_peft.truthfulqa.presets import Preset, Prompting


@dataclass
class Answers:
    """Greedy answers to the test questions, under every row's model and prompt, held against the references.

    With two judges there are also the shares of true, of informative answers, and of those that are both. A judge is
    an adapter folder in which `lightning-peft judge` has left its `judge.json`.

    Args:
        preset: how a question is put; see `Prompting`. `"qa"` has six questions before it, or a row's demonstrations.
        max_new_tokens: an answer's length at most.
        batch_size: questions answered, or judged, at a time.
        truth_judge: the folder of a judge of truth.
        info_judge: the folder of a judge of informativeness.
        judge_base: the judges' base model; default the one that their folders name.
    """

    preset: Preset = "qa"
    max_new_tokens: int = 50
    batch_size: int = 16
    truth_judge: str | None = None
    info_judge: str | None = None
    judge_base: str | None = None

    @property
    def judges(self) -> dict[Kind, Path]:
        """The judges' folders; both or none."""
        if self.truth_judge is None or self.info_judge is None:
            return {}
        return {"truth": Path(self.truth_judge), "info": Path(self.info_judge)}

    def prompting(self, instruction: str | None) -> Prompting:
        """Return how a question is put, behind an instruction where there is one."""
        return Prompting(self.preset, instruction, max_new_tokens=self.max_new_tokens)

    def check(self) -> None:
        """Raise `ValueError` in one sentence for what would fail once answers are written."""
        from lightning_peft.truthfulqa.judges import load_quality

        self.prompting(None)
        if self.batch_size < 1:
            raise ValueError(f"batch_size of the answers must be at least 1, got {self.batch_size}.")
        if missing := [name for name in ("sacrebleu", "rouge_score") if find_spec(name) is None]:
            raise ValueError(
                f"Free answers need {' and '.join(missing)} for BLEU and ROUGE: pip install lightning-peft[generation]."
            )
        if (self.truth_judge is None) != (self.info_judge is None):
            raise ValueError("Name both a truth_judge and an info_judge, or neither: True*Info needs the two.")
        for kind, folder in self.judges.items():
            config = folder / "adapter_config.json"
            if not config.is_file():
                raise ValueError(
                    f"{kind}_judge is {folder}, which holds no adapter_config.json: name an adapter folder."
                )
            if not (self.judge_base or json.loads(config.read_text("utf-8")).get("base_model_name_or_path")):
                raise ValueError(f"{kind}_judge is {folder}, which does not name its base model: set judge_base.")
            if (judged := load_quality(folder).kind) != kind:
                raise ValueError(f"{kind}_judge is {folder}, whose judge.json is of a judge of {judged}.")
