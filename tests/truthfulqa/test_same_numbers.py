"""The benchmark's numbers are those of release 0.1, whichever LightningModule holds the model.

With `WRITE_NUMBERS=1` in the environment the tests write what the imported package measures to `NUMBERS`; so did
release 0.1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from edits import add_lora
from lightning_peft.compare.decoding import DoLaScoring
from torch import Tensor, nn
from tuning import trainer

from lightning_peft import adapters
from lightning_peft.models import CausalLM, Seq2SeqLM
from lightning_peft.truthfulqa import Evaluate, Evaluation, Prompting, SideEffects, TruthfulQADataModule

NUMBERS = Path(__file__).parents[1] / "data" / "evaluation-0.1.json"
Folder = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore")


def questions(**arguments: Any) -> TruthfulQADataModule:
    effects = arguments.pop("effects", SideEffects(tokens=48, capability=4, length=12))
    prompting = Prompting(max_new_tokens=3)
    return TruthfulQADataModule("package", limit=20, primer="", side_effects=effects, prompting=prompting, **arguments)


def causal(folder: Folder) -> CausalLM:
    """A tiny model under LoRA, with room for whole questions, which are long in the tiny tokenizer's few letters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    module = CausalLM(str(folder("llama")))
    config = AutoConfig.from_pretrained(str(folder("llama")), max_position_embeddings=1024)
    torch.manual_seed(0)
    module.backbone = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    add_lora(module.backbone, ["q_proj"])
    return module


def contrasted(folder: Folder) -> CausalLM:
    module: Any = causal(folder)
    module.scoring = DoLaScoring(layers=[0, 1])
    return module


def encoder_decoder(folder: Folder) -> Seq2SeqLM:
    module = Seq2SeqLM(str(folder("t5")))
    add_lora(module.backbone, ["q", "v"])
    return module


class Own(L.LightningModule):
    """Another's module, which measures with an `Evaluation` of its own."""

    def __init__(self, backbone: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer, self.evaluation = backbone, tokenizer, Evaluation()

    def on_validation_epoch_start(self) -> None:
        self.evaluation.begin(self.model, off=adapters(self).disabled)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        result = self.evaluation.step(batch)
        if result is None:
            loss = self.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
            self.evaluation.add_loss(loss, int((batch["labels"] != -100).sum()))
        return result

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("val_"))

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        return self.evaluation.step(batch)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish())


def own(folder: Folder) -> Own:
    module = causal(folder)
    return Own(module.backbone, module.tokenizer)


MODULES: dict[str, Callable[[Folder], L.LightningModule]] = {
    "causal": causal,
    "contrasted": contrasted,
    "encoder-decoder": encoder_decoder,
    "own": own,
}


class Outputs(L.Callback):
    """Keep what steps return."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.sums.append(float(outputs.double().sum()))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        if outputs is not None:
            self.sums.append(float(outputs.double().sum()))


def measured(module: Any, data: TruthfulQADataModule, *callbacks: L.Callback) -> dict[str, Any]:
    """Return what `validate`, `test` and `predict` of one Trainer say, and the sums of what steps returned."""
    outputs = Outputs()
    run = trainer(outputs, *callbacks)
    before = list(vars(run)["callbacks"])
    logged = {verb: getattr(run, verb)(module, data, verbose=False)[0] for verb in ("validate", "test")}
    written: list[Any] = []
    if not isinstance(module, Own):
        for batch in run.predict(module, data) or []:
            written += batch.tolist() if isinstance(batch, Tensor) else [list(answer) for answer in batch]
    assert vars(run)["callbacks"] == before, "what the data module put on is gone"
    assert not vars(module).keys() & {"validation_step", "test_step", "predict_step"}
    return logged | {"outputs": outputs.sums, "predict": written}


def tiny(name: str, folder: Folder, *callbacks: L.Callback) -> dict[str, Any]:
    effects = SideEffects(tokens=0, capability=4) if name == "encoder-decoder" else None
    return measured(MODULES[name](folder), questions(**({"effects": effects} if effects else {})), *callbacks)


def check(numbers: dict[str, Any], name: str) -> None:
    if os.environ.get("WRITE_NUMBERS"):
        known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
        NUMBERS.write_text(json.dumps(known | {name: numbers}, indent=1) + "\n")
    expected = json.loads(NUMBERS.read_text())[name]
    assert numbers["predict"] == expected["predict"]
    assert numbers["outputs"] == pytest.approx(expected["outputs"], rel=1e-4, abs=1e-3)
    for verb in ("validate", "test"):
        assert dict(numbers[verb]) == pytest.approx(expected[verb], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_every_number_is_that_of_the_last_release(name: str, tiny_folder: Folder) -> None:
    check(tiny(name, tiny_folder), name)


def test_an_evaluation_by_contrast_may_be_a_callbacks(tiny_folder: Folder) -> None:
    check(tiny("causal", tiny_folder, Evaluate(DoLaScoring(layers=[0, 1]))), "contrasted")


class Foreign(L.LightningModule):
    """Knows nothing of the benchmark, and has steps of its own."""

    def __init__(self, module: CausalLM) -> None:
        super().__init__()
        self.backbone, self.tokenizer = module.backbone, module.tokenizer
        self.keys: set[str] = set()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.keys |= batch.keys()

    test_step = predict_step = validation_step


@pytest.mark.parametrize("name", ["causal", "contrasted"])
def test_a_module_that_knows_nothing_of_the_benchmark_gets_the_same_numbers(name: str, tiny_folder: Folder) -> None:
    module = Foreign(causal(tiny_folder))
    given = [Evaluate(DoLaScoring(layers=[0, 1]))] if name == "contrasted" else []
    numbers = measured(module, questions(), *given)
    expected = json.loads(NUMBERS.read_text())[name]
    del expected["validate"]["val_loss"]  # which is the module's own affair
    assert numbers["predict"] == expected["predict"]
    assert numbers["outputs"] == pytest.approx(expected["outputs"], rel=1e-4, abs=1e-3)
    for verb in ("validate", "test"):
        assert dict(numbers[verb]) == pytest.approx(expected[verb], rel=1e-4, abs=1e-5)
    assert "labels" in module.keys and not module.keys & {"mc2", "capability", "document", "ending"}


@pytest.mark.real_model
@pytest.mark.usefixtures("all_threads")
def test_every_number_of_smollm2_is_that_of_the_last_release(smollm2: Path) -> None:
    check(measured(CausalLM(str(smollm2)), questions()), "smollm2")
