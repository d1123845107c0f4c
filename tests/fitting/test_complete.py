"""Every tensor that is trained has a key of its own in checkpoints and folders, or one sentence names it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig
from tiny_models import VOCABULARY, tiny
from torch import nn
from torch.utils.data import DataLoader
from tuning import QUIET, trainer

from lightning_peft import adapters
from lightning_peft.backbone.modules import flat_key
from lightning_peft.callbacks import PEFT
from lightning_peft.fitting.checkpoint_files import export_checkpoint
from lightning_peft.fitting.checkpoint_names import META
from lightning_peft.fitting.checkpoints import keep_adapters, load_from_checkpoint, restore_adapters
from lightning_peft.fitting.complete import check_complete
from lightning_peft.stack.adapter_files.folder import AdapterError, read_folder
from lightning_peft.stack.stack import find_stacks, stack_of
from lightning_peft.tuners.bottleneck import BottleneckConfig
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore::DeprecationWarning")]

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# each of several, in every order, on a mixture of experts
ADAPTERS: dict[str, PeftConfig] = {
    "of_experts": LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS),
    "of_half": LoraConfig(r=2, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS[1:], bias="all"),
    "of_scales": IA3Config(target_modules=["q_proj", "o_proj"], feedforward_modules=[]),
    "of_bottleneck": BottleneckConfig(target_modules=["o_proj"], size=2),
    "of_deltas": WeightDeltasConfig(target_parameters=r".*(q_proj|norm)\.weight"),
}


class Language(L.LightningModule):
    def __init__(self, kind: str = "qwen3_moe") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = tiny(kind)
        self.head = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss + self.head.weight.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def words() -> DataLoader[Any]:
    ids = torch.randint(1, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1))
    return DataLoader(ids, batch_size=2)  # type: ignore[arg-type]


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


NESTS = [*itertools.permutations(ADAPTERS, 2), *itertools.islice(itertools.permutations(ADAPTERS), 0, 120, 40)]


@pytest.mark.parametrize("first", ADAPTERS)
def test_saved_keys_are_as_many_as_trained_tensors_however_adapters_are_nested(first: str) -> None:
    for names in [(first,), *(nest for nest in NESTS if nest[0] == first)]:
        module = Language()
        stack = stack_of(module.model)
        for name in names:
            stack.add(copy.deepcopy(ADAPTERS[name]), name)
        stack.train(names)
        check_complete(module, find_stacks(module))
        checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
        keep_adapters(module, checkpoint)
        state, wanted = checkpoint["state_dict"], trained(module)
        storages = {value.untyped_storage().data_ptr() for value in state.values()}
        assert storages >= {p.untyped_storage().data_ptr() for p in wanted.values()}, names
        assert len(storages) == len(state), names
        described = checkpoint[META]["backbones"]["model"]
        for part in described["parts"]:
            assert all(f"model.{saved}" in state for saved in part["keys"].values()), names


def test_a_checkpoint_of_nested_adapters_resumes_loads_and_exports(tmp_path: Path) -> None:
    def callback() -> PEFT:
        return PEFT(LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS), backbone="model")

    torch.manual_seed(0)
    run = trainer(callback(), max_epochs=1)
    run.fit(Language(), words())
    run.save_checkpoint(tmp_path / "half.ckpt")
    half = copy.deepcopy(adapters(run.lightning_module).backbone)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert len(state) == len(trained(run.lightning_module))

    loaded = load_from_checkpoint(Language, tmp_path / "half.ckpt")
    ids = next(iter(words()))
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(ids).logits, half.eval()(ids).logits)

    resumed = trainer(callback(), max_epochs=1)
    resumed.fit(Language(), words(), ckpt_path=str(tmp_path / "half.ckpt"))
    after = trained(resumed.lightning_module)
    assert all(torch.equal(p, after[name]) for name, p in trained(run.lightning_module).items())

    export_checkpoint(tmp_path / "half.ckpt", tmp_path / "folder")
    _, tensors, _ = read_folder(tmp_path / "folder")
    stack = adapters(run.lightning_module)
    assert tensors.keys() == stack.keys(stack.parts[0]).keys()


class Alike(Language):
    """A head in which two weights have one name as soon as compiled modules are seen through."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2, bias=False)})
        self.extra.register_parameter("weight", nn.Parameter(torch.ones(2, 2)))


def test_two_tensors_of_one_key_are_named_before_training_starts() -> None:
    lora = PEFT(LoraConfig(r=2, target_modules=["q_proj"]), backbone="model")
    with pytest.raises(AdapterError, match=r"extra\.weight and extra\._orig_mod\.weight would both be saved"):
        trainer(lora).fit(Alike(), words())


def test_a_tensor_without_a_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Language()
    stack = stack_of(module.model)
    part = stack.add(LoraConfig(r=2, target_modules=["q_proj"]), "lora")
    keys = part.injection.keys()
    check_complete(module, find_stacks(module))
    key, live = next((key, live) for key, live in keys.items() if "lora_B" in key)
    monkeypatch.setattr(part.injection, "keys", lambda: {k: v for k, v in keys.items() if k != key})
    with pytest.raises(AdapterError, match=f"{live} is trained, but adapter 'lora' has no key for it in a folder"):
        check_complete(module, find_stacks(module))


class Attending(L.LightningModule):
    """PyTorch's attention, in which peft wraps the whole and, inside, its output projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True), "out": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net["out"](self.net["attention"](x, x, x)[0])


def test_a_checkpoint_whose_names_leave_out_wrappers_is_restored() -> None:
    module = Attending()
    stack = stack_of(module.net)
    stack.add(LoraConfig(r=2, target_modules=["attention", "out"], bias="all"), "lora")
    with torch.no_grad():
        for parameter in trained(module).values():
            parameter.normal_()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    keep_adapters(module, checkpoint)
    flat = {flat_key(name): value for name, value in checkpoint["state_dict"].items()}
    assert flat.keys() != checkpoint["state_dict"].keys() and len(flat) == len(checkpoint["state_dict"])
    checkpoint["state_dict"] = flat
    del checkpoint[META]["renamed"]
    fresh, x = Attending(), torch.randn(2, 3, 8)
    restore_adapters(fresh, checkpoint, "the checkpoint")
    fresh.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(fresh.eval()(x), module.eval()(x))
