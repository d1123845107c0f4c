"""Full fine-tuning and top layers: the training is the plain one, and only what was chosen moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, Classifier, Language, fit, one_sentence, points, trainer, weights

from lightning_peft import save_adapter
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks import FullFineTuning, TopLayers
from lightning_peft.tuners.weight_deltas.choice import choose_parameters, choose_top
from lightning_peft.tuners.weight_deltas.masks import deltas

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


class Plain(Language):
    """A language model trained without weight decay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)


def base_moved(module: nn.Module, fresh: nn.Module) -> set[str]:
    """Names of the module's own parameters that are no longer those of a fresh one, adapters left out."""
    now = weights(module)
    return {name for name, value in weights(fresh).items() if not torch.equal(value, now[name])}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_losses_are_those_of_plain_fine_tuning(kind: str) -> None:
    """Dropout included, where it is kept: GPT-2's and BERT's draw the same numbers."""
    ours, plain = Losses(), Losses()
    tuned = Plain(kind)
    fit(tuned, FullFineTuning(backbone_dropout=True), ours, max_steps=8)
    module = Plain(kind)
    module.train()
    fit(module, plain, max_steps=8)
    assert len(ours.losses) == 8 and plain.losses[-1] < plain.losses[0] - 0.5
    assert ours.losses == pytest.approx(plain.losses, rel=1e-4)
    assert base_moved(tuned, Plain(kind)) == set() and len(base_moved(module, Plain(kind))) > 20


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "t5"])
def test_everything_is_trainable_once(kind: str) -> None:
    module = Language(kind)
    FullFineTuning().apply(module)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == sum(
        p.numel() for p in tiny(kind).parameters()
    )


def test_weight_decay_pulls_to_the_pretrained_weights() -> None:
    """With a zero gradient the delta decays, and the weight returns to where it started."""
    module = Classifier()
    FullFineTuning(backbone="net").apply(module)
    delta = deltas(module.net, "full")[0]
    with torch.no_grad():
        delta.value.fill_(1.0)
    delta.value.grad = torch.zeros_like(delta.value)
    torch.optim.AdamW([delta.value], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(module.net.conv.weight, delta.base + 0.95)


def test_a_hand_written_network_is_trained_with_its_batch_norm() -> None:
    module = Classifier()
    fit(module, FullFineTuning(backbone="net"))
    assert base_moved(module, Classifier()) == {"head.weight", "head.bias"}
    assert all(delta.value.any() for delta in deltas(module.net, "full") if "conv.bias" not in delta.full_name)
    assert {delta.full_name for delta in deltas(module.net, "full")} >= {"conv.weight", "blocks.0.norm.weight"}


def test_a_checkpoint_resumes_exactly_and_an_export_is_the_task_vector(tmp_path: Path) -> None:
    once = Classifier()
    fit(once, FullFineTuning(backbone="net"), max_epochs=2, max_steps=-1)
    half = Classifier()
    fit(half, FullFineTuning(backbone="net"), max_epochs=1, max_steps=-1).save_checkpoint(tmp_path / "half.ckpt")
    again = Classifier()
    options = {"max_epochs": 2, "max_steps": -1, "ckpt_path": tmp_path / "half.ckpt"}
    fit(again, FullFineTuning(backbone="net"), **options)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(once).items())
    save_adapter(again, tmp_path / "folder")
    vector = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    for delta in deltas(again.net, "full"):
        owner, _, own = delta.full_name.rpartition(".")
        assert torch.equal(vector[f"base_model.model.{owner}.weight_deltas.values.{own}"], delta.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": [1]}, lambda name: ".1." in name),
        ({"layers": Layers(last=2)}, lambda name: ".1." in name or ".2." in name),
        ({"within": "mlp"}, lambda name: ".mlp." in name),
        ({"layers": Layers(first=1), "within": "attention"}, lambda name: ".0.self_attn." in name),
    ],
)
def test_layers_and_parts_restrict_it(options: dict[str, Any], expected: Any) -> None:
    module = Language("llama")
    fit(module, FullFineTuning(**options))
    found = {delta.full_name for delta in deltas(module.model, "full")}
    assert found == {name for name, _ in tiny("llama").named_parameters() if expected(name)} != set()
    assert all(delta.value.any() for delta in deltas(module.model, "full"))


TOP = {  # what stands after the blocks: (norm, further)
    "llama": ({"model.norm.weight"}, set()),
    "gpt2": ({"transformer.ln_f.weight", "transformer.ln_f.bias"}, set()),
    "gpt_neox": (
        {"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"},
        {"lm_head.weight"},
    ),
    "opt": ({"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"}, set()),
    "t5": ({"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}, set()),
}


@pytest.mark.parametrize("kind", TOP)
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_top_layers_are_the_last_blocks_and_what_stands_after_them(kind: str, final_norm: bool, head: bool) -> None:
    blocks = choose_parameters(tiny(kind), Layers(last=1))
    names = choose_top(tiny(kind), 1, final_norm, head)
    norms, rest = TOP[kind]
    assert set(names) == {*blocks, *(norms if final_norm else ()), *(rest if head else ())}
    assert len(names) == len(set(names))


def test_an_image_classifiers_head_is_above_the_top() -> None:
    names = set(choose_top(tiny("vit"), 1))
    assert {"classifier.weight", "classifier.bias"} <= names
    assert not any("embeddings" in name or ".layer.1." in name or ".layers.1." in name for name in names)


def test_backward_ends_at_the_lowest_trained_block() -> None:
    module = Language("llama")
    fit(module, TopLayers(1))
    seen: list[Tensor | None] = []
    module.model.model.layers[1].register_forward_hook(lambda m, i, output: seen.append(output))
    module.training_step([torch.arange(3, 12)[None]], 0)
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert output is not None and not output.requires_grad


def test_a_saved_top_layer_is_all_that_is_in_a_checkpoint(tmp_path: Path) -> None:
    module = Classifier()
    made = trainer(TopLayers(1, backbone="net"))
    made.fit(module, points())
    made.save_checkpoint(tmp_path / "top.ckpt")
    state = torch.load(tmp_path / "top.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if name.startswith("net.")} == {
        f"net.blocks.2.{owner}.weight_deltas.values.top.{own}"
        for owner in ("linear", "norm")
        for own in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: TopLayers(0), "TopLayers trains at least one block, got k=0."),
        (lambda: TopLayers(4), "asks for 4 blocks, but there are 3."),
        (lambda: FullFineTuning(layers=[7]), "There is no block 7: the blocks are 0 to 2."),
        (lambda: FullFineTuning(within="head"), "or name a part of the model: within='head' is neither"),
    ],
)
def test_what_cannot_be_chosen_is_one_sentence(callback: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit(Language(), callback())
    assert message in str(error.value) and one_sentence(str(error.value))
