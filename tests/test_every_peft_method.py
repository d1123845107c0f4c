"""Every method that peft registers goes through this package: fit, exact resume, a folder that plain peft reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, moved, same, texts, trainer

from lightning_peft import adapters
from lightning_peft.callbacks import PEFT
from lightning_peft.fitting.checkpoint_files import export_checkpoint
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.traces import first_difference, traces

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
    "XLORA": {"hidden_size": 32, "xlora_size": 8, "xlora_dropout_p": 0.0},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRA adapters in folders, which X-LoRA mixes."""
    folder = tmp_path_factory.mktemp("experts")
    for number in range(2):
        torch.manual_seed(number)
        model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(str(folder / str(number)))
    return folder


@pytest.fixture(scope="module")
def passed(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The methods that have passed; how many is printed at the end."""
    found: list[str] = []
    yield found
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{len(found)} of {len(METHODS)} methods of peft: fit, resumed, exported, read by plain peft")


def base() -> Any:
    model: Any = tiny("llama")
    model.config.use_cache = False  # X-LoRA asks for it
    return model


def config_of(method: str, experts: Path) -> PeftConfig:
    made = PEFT_TYPE_TO_CONFIG_MAPPING[method]  # type: ignore[index]
    options = SETTINGS.get(method, {})
    if method == "XLORA":
        options = options | {"adapters": {str(number): str(experts / str(number)) for number in range(2)}}
    elif "target_modules" in made.__dataclass_fields__ and method != "ADAPTION_PROMPT":
        options = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    return made(**options)


class Language(L.LightningModule):
    """A language model with a loss of its own, on logits alone; methods for several tasks are told the task."""

    def __init__(self, tasks: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tasks = tasks
        self.model = base()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step)  # for methods that draw at random in training
        found = logits(self.model, batch[0], self.tasks)
        return nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def logits(model: Any, ids: Tensor, tasks: bool) -> Tensor:
    """Of the real tokens: plain peft gives those of virtual ones too."""
    found = model(input_ids=ids, **({"task_ids": torch.arange(len(ids)) % 2} if tasks else {})).logits
    return found[:, -ids.shape[1] :]


def fit(config: PeftConfig, epochs: int, ckpt_path: Path | None = None) -> Language:
    module = Language(config.peft_type in ("POLY", "MULTITASK_PROMPT_TUNING"))
    torch.manual_seed(4)
    trainer(PEFT(config), max_steps=-1, max_epochs=epochs).fit(module, texts(), ckpt_path=ckpt_path)
    return module.eval()


def learned(module: nn.Module) -> dict[str, Tensor]:
    stack = adapters(module)
    return {key: value.clone() for key, value in stack.tensors(stack["default"]).items()}


def test_peft_registers_45_methods() -> None:
    assert len(METHODS) == 45


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_fitted_resumed_exported_and_read_by_plain_peft(
    method: str, experts: Path, passed: list[str], tmp_path: Path
) -> None:
    config, ids = config_of(method, experts), torch.arange(3, 21).reshape(2, 9)
    untrained, whole, half = fit(config, 0), fit(config, 2), fit(config, 1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(config, 2, tmp_path / "half.ckpt")
    assert same(learned(whole), learned(resumed)) and moved(learned(untrained), learned(whole))
    trained = [p for p in whole.parameters() if p.requires_grad]
    assert len({id(p) for p in trained}) == len(trained) > 0

    with torch.no_grad():
        for module, export in (
            (whole, save_adapter),
            (half, lambda _, to: export_checkpoint(tmp_path / "half.ckpt", to)),
        ):
            folder = tmp_path / f"exported{module is whole}"
            export(module, folder)
            expected = logits(module.model, ids, module.tasks)
            plain, ours = PeftModel.from_pretrained(base(), str(folder)).eval(), base()
            load_adapter(ours, folder)
            assert torch.equal(logits(plain, ids, module.tasks), expected)
            assert torch.equal(logits(ours.eval(), ids, module.tasks), expected)
            assert torch.equal(logits(copy.deepcopy(module).model, ids, module.tasks), expected)

        with adapters(whole).disabled():
            assert torch.equal(logits(whole.model, ids, False), logits(base(), ids, False))
        adapters(whole).remove("default")
        assert same(whole.model.state_dict(), base().state_dict())
    passed.append(method)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_taken_off_the_model_is_as_before(method: str, experts: Path) -> None:
    model, ids = base(), torch.tensor([[3, 4, 5, 6]])
    before, expected = traces(model), model(input_ids=ids).logits
    stack = stack_of(model)
    for _ in range(2):
        stack.add(config_of(method, experts), "default")
        stack.enable(False)
        stack.enable(True)
        stack.remove("default")
        assert first_difference(before, traces(model)) is None
        assert torch.equal(model(input_ids=ids).logits, expected)
