"""Adapters that training never reaches are named, and weights that are trained beside an adapter are refused."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration
from tuning import QUIET, Classifier, fit, one_sentence, points, trainer

from lightning_peft.callbacks import FullFineTuning, LoRA
from lightning_peft.fitting.alive import Reached

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Fused(nn.Module):
    """Code that reads the weight of a layer instead of calling it, as fused kernels do."""

    def __init__(self, read: tuple[str, ...]) -> None:
        super().__init__()
        self.read = read
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            layer: Any = getattr(self, name)
            x = nn.functional.linear(x, layer.weight, layer.bias) if name in self.read else layer(x)
        return x


class Experts(nn.Module):
    """A list of experts in each block, of which the router takes one."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(4)) for _ in range(2)]
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": experts}) for experts in blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block["experts"][2](x)  # type: ignore[index]
        return x


class Module(L.LightningModule):
    """A network trained to give zeros."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def rows(count: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.randn(count, 4), batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("epochs", "most", "steps"), [(3, -1, 4), (1, -1, 4), (1, 2, 2)])
def test_a_part_that_is_not_called_is_named_after_the_first_epoch(epochs: int, most: int, steps: int) -> None:
    words = rf"of the 2 parameters of 'lora' .* in {steps} steps is second\.lora_A"
    with pytest.warns(UserWarning, match=words) as found:
        trainer(LoRA(r=2), max_epochs=epochs, max_steps=most).fit(Module(Fused(("second",))), rows())
    assert sum("has not reached" in str(warning.message) for warning in found) == 1


def test_it_is_named_within_a_long_epoch_too() -> None:
    with pytest.warns(UserWarning, match="in 50 steps is first"):
        trainer(LoRA(r=2), max_steps=55).fit(Module(Fused(("first",))), rows(200))


def test_an_adapter_that_is_never_called_stops_the_run() -> None:
    with pytest.raises(ValueError, match="Adapter 'lora' trains to nothing: the first of the 4 parameters") as error:
        trainer(LoRA(r=2, backbone="net"), max_epochs=1).fit(ModuleWithHead(Fused(("first", "second"))), rows())
    assert one_sentence(str(error.value))


class ModuleWithHead(Module):
    """So that something is trained in any case."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.net(batch)).square().mean()


def test_weights_that_are_read_with_their_change_are_reached(recwarn: pytest.WarningsRecorder) -> None:
    trainer(FullFineTuning(), max_epochs=1).fit(Module(Fused(("first", "second"))), rows())
    assert not [w for w in recwarn if "has not reached" in str(w.message)]


def test_experts_may_rest(recwarn: pytest.WarningsRecorder) -> None:
    trainer(LoRA(r=2), max_epochs=1).fit(Module(Experts()), rows())
    assert not [w for w in recwarn if "has not reached" in str(w.message)]
    names = {f"layers.{block}.experts.{i}.0.weight": nn.Parameter(torch.zeros(1)) for block in (0, 1) for i in (0, 1)}
    names["layers.0.experts.1.0.weight"].grad = torch.zeros(1)
    reached = Reached(names)
    reached.look()
    assert reached.unreached() == ["layers.1.experts.0.0.weight", "layers.1.experts.1.0.weight"]


def test_an_embedding_that_a_t5_does_not_call_is_named() -> None:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)

    class Translator(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(input_ids=batch, labels=batch).loss

    data: Any = DataLoader(torch.randint(1, 20, (4, 5)), batch_size=2)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"is shared\.lora_embedding"):
        trainer(LoRA(r=2, target_modules=["q", "shared"]), max_epochs=1).fit(
            Translator(T5ForConditionalGeneration(config)), data
        )


# -- weights of the backbone that are trained beside the adapter ----------------------------------------------------

MESSAGE = "weights of the frozen backbone are trained beside its adapter, the first is "


class InSetup(Classifier):
    def setup(self, stage: str) -> None:
        self.net.blocks[0].norm.requires_grad_(True)


class InConfigureOptimizers(Classifier):
    def configure_optimizers(self) -> Any:
        self.net.blocks[0].norm.requires_grad_(True)
        return super().configure_optimizers()


class InTraining(Classifier):
    """Unfreezes in the middle of an epoch, and gives the optimizer what it unfroze."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            norm = self.net.blocks[0].norm.requires_grad_(True)
            self.optimizers().optimizer.add_param_group({"params": list(norm.parameters())})  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [InSetup, InConfigureOptimizers, InTraining])
def test_a_norm_that_is_unfrozen_is_refused_when_it_happens(kind: type[Classifier]) -> None:
    with pytest.raises(ValueError, match=rf"2 {MESSAGE}net\.blocks\.0\.norm\.weight") as error:
        fit(kind(), LoRA(r=2, backbone="net"), max_steps=10)
    assert one_sentence(str(error.value))


class Later(BaseFinetuning):
    """Unfreezes a block at the second epoch, as Lightning's own page on the callback does."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        pass

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.blocks[1].norm, optimizer)


@pytest.mark.parametrize("first", [True, False])
def test_a_finetuning_callback_is_refused_when_it_unfreezes(first: bool) -> None:
    lora = LoRA(r=2, backbone="net")
    with pytest.raises(ValueError, match=MESSAGE):
        fit(Classifier(), *((lora, Later()) if first else (Later(), lora)), max_steps=-1, max_epochs=3)


def test_backbone_finetuning_is_refused() -> None:
    class Named(Module):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
            self.backbone = self.net

    with pytest.raises(ValueError, match=f"{MESSAGE}|Nothing in Named is trainable"):
        trainer(LoRA(r=2, backbone="net"), BackboneFinetuning(1), max_epochs=3).fit(Named(), rows())


def test_what_train_head_names_is_trained_beside_the_adapter_and_saved(tmp_path: Any) -> None:
    def callback() -> LoRA:
        return LoRA(r=2, backbone="net", train_head="blocks.0.norm")

    path, module, other = tmp_path / "norm.ckpt", Classifier(), Classifier()
    fit(module, callback()).save_checkpoint(path)
    trainer(callback()).test(other, points(), ckpt_path=path)
    ours, theirs = (m.net.blocks[0].norm.weight for m in (module, other))
    assert torch.equal(ours, theirs) and not torch.equal(ours, torch.ones_like(ours))
