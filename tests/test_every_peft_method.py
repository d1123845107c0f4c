"""Every method that peft registers goes through this package: fit, exact resume, a folder that plain peft reads."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, same, texts, trainer

from lightning_peft import adapters
from lightning_peft.callbacks import PEFT
from lightning_peft.checkpoint import export_checkpoint
from lightning_peft.tuners.saving import load_adapter, save_adapter

pytestmark = [
    pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:.*", "ignore::torch.jit.TracerWarning")
]
OURS = ("lightning_peft.",)  # methods of this package have tests of their own
METHODS = sorted(
    kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if not config.__module__.startswith(OURS)
)
# what peft's defaults leave open, or make larger than a tiny model
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 8, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "C3A": {"block_size": 4},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 3]},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LILY": {"target_modules": ["q_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "POLY": {"n_tasks": 2, "n_skills": 2, "n_splits": 2, "r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "ROAD": {"group_size": 4},
    "SHADOW": {"target_modules": None},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": [3, 4, 5]},
    "VBLORA": {"vector_length": 4, "num_vectors": 16, "r": 2},
    "WAVEFT": {"n_frequency": 20},
}
CANNOT: dict[str, str] = {
    "XLORA": "it mixes LoRA adapters that it loads from other folders by path",
}


def config_of(method: str) -> PeftConfig:
    made = PEFT_TYPE_TO_CONFIG_MAPPING[method]  # type: ignore[index]
    options = SETTINGS.get(method, {})
    if "target_modules" in made.__dataclass_fields__ and method != "ADAPTION_PROMPT":
        options = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    return made(**options)


class Language(L.LightningModule):
    """A language model with a loss of its own, on logits alone; methods for several tasks are told the task."""

    def __init__(self, tasks: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tasks = tasks
        self.model = tiny("llama")

    def forward(self, ids: Tensor) -> Tensor:
        return logits(self.model, ids, self.tasks)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step)  # for methods that draw at random in training
        return nn.functional.cross_entropy(self(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def logits(model: Any, ids: Tensor, tasks: bool) -> Tensor:
    return model(input_ids=ids, **({"task_ids": torch.arange(len(ids)) % 2} if tasks else {})).logits


def fit(method: str, epochs: int, ckpt_path: Path | None = None) -> L.Trainer:
    torch.manual_seed(3)
    module = Language(method in ("POLY", "MULTITASK_PROMPT_TUNING"))
    made = trainer(PEFT(config_of(method)), max_steps=-1, max_epochs=epochs)
    torch.manual_seed(4)
    made.fit(module, texts(), ckpt_path=ckpt_path)
    return made


def learned(module: nn.Module) -> dict[str, Tensor]:
    stack = adapters(module)
    return {key: value.clone() for key, value in stack.tensors(stack["default"]).items()}


def base_of(module: nn.Module) -> dict[str, Tensor]:
    stack = adapters(module)
    stack.remove("default")
    return stack.backbone.state_dict()


@pytest.fixture(scope="module", autouse=True)
def count() -> Any:
    passed: list[str] = []
    yield passed
    logging.getLogger(__name__).info("counted")
    print(f"\n{len(passed)} of {len(METHODS)} methods of peft: fit, resumed, exported and read by plain peft.")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in CANNOT])
def test_a_method_is_fitted_resumed_exactly_and_exported(method: str, tmp_path: Path, count: list[str]) -> None:
    half = fit(method, 1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    whole, resumed = fit(method, 2).lightning_module, fit(method, 2, tmp_path / "half.ckpt").lightning_module
    untrained = learned_untrained(method)
    assert same(learned(whole), learned(resumed))
    assert not all(torch.equal(value, untrained[key]) for key, value in learned(whole).items())

    ids, tasks = torch.arange(3, 21).reshape(2, 9), whole.tasks
    whole.eval()
    with torch.no_grad():
        expected = logits(whole.model, ids, tasks)
    stack = adapters(whole)
    assert len({id(p) for p in whole.parameters() if p.requires_grad}) == len(
        [p for p in whole.parameters() if p.requires_grad]
    )
    save_adapter(whole, tmp_path / "folder")
    export_checkpoint(tmp_path / "half.ckpt", tmp_path / "exported")
    plain = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "folder")).eval()
    with torch.no_grad():
        theirs = logits(plain, ids, tasks)[:, -ids.shape[1] :]
    assert torch.equal(theirs, expected), float((theirs - expected).abs().max())

    again = tiny("llama")
    load_adapter(again, tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(logits(again.eval(), ids, tasks), expected)
        copied = copy.deepcopy(whole)
        assert torch.equal(logits(copied.model, ids, tasks), expected)
        with stack.disabled():
            assert torch.equal(logits(whole.model, ids, False), logits(tiny("llama"), ids, False))
        assert torch.equal(logits(whole.model, ids, tasks), expected)
    assert same(base_of(whole), tiny("llama").state_dict())
    count.append(method)


def learned_untrained(method: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    module = Language(False)
    torch.manual_seed(4)
    PEFT(config_of(method)).apply(module)
    return learned(module)
