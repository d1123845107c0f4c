"""Gradient checkpointing: the same gradients from fewer saved activations, and no backward below the first adapter."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import VOCABULARY
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tuning import QUIET, Classifier, Language, data_of, one_sentence, same, trainer

from lightning_peft.backbone.structure import blocks
from lightning_peft.callbacks import PEFT, LoRA

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

KINDS = ("llama", "gpt2", "gpt_neox", "opt", "bert", "t5", "vit", "plain")


class Other(Language):
    """An encoder, an encoder-decoder or an image model, trained to give small outputs."""

    def __init__(self, kind: str) -> None:
        L.LightningModule.__init__(self)
        import transformers as t

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        self.kind = kind
        if kind == "bert":
            self.model = t.BertModel(t.BertConfig(vocab_size=VOCABULARY, **sizes))
        elif kind == "vit":
            self.model = t.ViTModel(t.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))
        else:
            config = t.T5Config(
                vocab_size=VOCABULARY, d_model=16, d_ff=64, d_kv=8, num_layers=3, num_heads=2, decoder_start_token_id=0
            )
            self.model = t.T5ForConditionalGeneration(config)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.kind == "t5":
            return self.model(input_ids=batch[0], labels=batch[0]).loss
        return self.model(batch[0]).last_hidden_state.square().mean()


def made(kind: str, **options: Any) -> tuple[Any, DataLoader, PEFT]:
    """A module, its data, and LoRA in it."""
    options = {"r": 2, "dropout": 0.2} | options
    if kind == "plain":
        module = Classifier()
        return module, data_of(module), LoRA(backbone="net", target_modules=["linear"], **options)
    module = Language(kind) if kind in KINDS[:4] else Other(kind)
    if kind == "vit":
        pixels = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return module, DataLoader(torch.utils.data.TensorDataset(pixels), 4), LoRA(**options)
    return module, data_of(module), LoRA(**options)


class Watch(L.Callback):
    """Notes, in the first step, gradients, bytes saved for backward, and blocks whose output requires a gradient."""

    def __init__(self) -> None:
        self.bytes, self.gradients, self.entered = 0, {}, []  # type: ignore[var-annotated]
        self.watching: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx or trainer.current_epoch:
            return
        net = pl_module.net if isinstance(pl_module, Classifier) else pl_module.model
        parameters = {p.data_ptr() for p in pl_module.parameters()}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                self.bytes += tensor.numel() * tensor.element_size()
            return tensor

        def look(block: Any) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.entered += [block.name] * (output if isinstance(output, Tensor) else output[0]).requires_grad

            return hook

        self.handles = [block.module.register_forward_hook(look(block)) for block in blocks(net)]
        self.watching = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        self.watching.__enter__()

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        if self.watching is not None:
            self.watching.__exit__(None, None, None)
            self.watching = None
            for handle in self.handles:
                handle.remove()

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients = self.gradients or {n: p.grad.clone() for n, p in named if p.grad is not None}


def watched(kind: str, **options: Any) -> tuple[Any, Watch]:
    module, data, callback = made(kind, **options)
    watch = Watch()
    torch.manual_seed(5)
    trainer(callback, watch, max_steps=3).fit(module, data)
    return module, watch


@pytest.mark.parametrize("layers", [None, [2]], ids=["every block", "last block"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_bit_equal_and_less_is_saved(kind: str, layers: list[int] | None) -> None:
    module, watch = watched(kind, layers=layers)
    checkpointed, other = watched(kind, layers=layers, gradient_checkpointing=True)
    assert watch.gradients and same(watch.gradients, other.gradients)
    assert same(module.state_dict(), checkpointed.state_dict())
    # what a checkpoint holds besides, its block's input, is not counted: it is one of a block's many tensors
    assert other.bytes < (0.4 if layers is None and kind != "plain" else 0.9) * watch.bytes


@pytest.mark.parametrize("kind", KINDS)
def test_backward_does_not_enter_the_blocks_below_the_first_adapter(kind: str) -> None:
    module, watch = watched(kind, layers=[2], gradient_checkpointing=True)
    trained = blocks(module.net if kind == "plain" else module.model)[2].name
    assert watch.entered[0] == trained and len(set(watch.entered)) == (4 if kind == "t5" else 1)


@pytest.mark.parametrize("kind", ["llama", "plain", "t5"])
def test_afterwards_the_model_is_as_before(kind: str) -> None:
    plain, _ = watched(kind)
    module, _ = watched(kind, gradient_checkpointing=True)
    for one, other in zip(plain.modules(), module.modules(), strict=True):
        assert one.__dict__.keys() == other.__dict__.keys()
        assert not getattr(other, "gradient_checkpointing", False)


def test_after_an_exception_too() -> None:
    class Stops(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("stopped")

    module, data, callback = made("plain", gradient_checkpointing=True)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(callback, Stops()).fit(module, data)
    assert not any("forward" in m.__dict__ for m in module.modules())


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_what_the_module_switched_on_itself_stays_on(kind: str) -> None:
    module, data, callback = made(kind, gradient_checkpointing=True)
    if kind == "llama":
        module.model.gradient_checkpointing_enable()
    else:
        module.net.blocks[0].forward = module.net.blocks[0].forward
    trainer(callback).fit(module, data)
    block = blocks(module.model if kind == "llama" else module.net)[0].module
    assert block.gradient_checkpointing if kind == "llama" else "forward" in block.__dict__


def test_dropout_of_the_backbone_is_the_same_in_forward_and_backward() -> None:
    _, watch = watched("gpt2", backbone_dropout=True)
    _, other = watched("gpt2", backbone_dropout=True, gradient_checkpointing=True)
    _, without = watched("gpt2", gradient_checkpointing=True)
    for name, gradient in watch.gradients.items():
        # attention with dropout sums a gradient in another order
        assert torch.allclose(other.gradients[name], gradient, rtol=1e-5, atol=1e-6)
    assert not all(torch.allclose(without.gradients[name], g, rtol=1e-2) for name, g in watch.gradients.items())


def test_a_backbone_without_blocks_is_one_sentence() -> None:
    module, data, _ = made("plain")
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(10, 8))
    callback = LoRA(backbone="net", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="has no numbered list of blocks, which gradient_checkpointing") as error:
        trainer(callback).fit(module, data)
    assert one_sentence(str(error.value))
