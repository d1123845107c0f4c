"""Where LoRA begins: every initialisation trains from the base's outputs; EVA looks at data once and moves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from edits import fill, logits
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, Classifier, Language, fit, moved, one_sentence, points, same, texts, trainer, weights

from lightning_peft import adapters
from lightning_peft.callbacks import LoRA
from lightning_peft.fitting.checkpoints import load_from_checkpoint
from lightning_peft.stack.adapter_files.saving import save_adapter

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
INITS = ("gaussian", "orthogonal", "mica", "eva", "pissa", "olora")


def factors(module: nn.Module, which: str) -> dict[str, Tensor]:
    stack = adapters(module)
    return {key: value for key, value in stack.tensors(stack["lora"]).items() if which in key}


@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_trains_from_the_bases_outputs(init: str) -> None:
    module, base = Language(), tiny("llama")
    ids = next(iter(texts()))[0]
    fit(module, LoRA(r=2, init=init), max_steps=-1, max_epochs=0)
    before = weights(module)
    torch.testing.assert_close(logits(module.model, ids), logits(base, ids), rtol=1e-5, atol=1e-5)
    fit(module, LoRA(r=2, init=init))
    changed = moved(before, weights(module))
    assert changed and all(".lora_A." in name or ".lora_B." in name for name in changed)
    assert any(".lora_B." in name for name in changed) != (init == "mica")


@pytest.mark.parametrize("kind", ["net", "llama"])
def test_eva_begins_at_the_strongest_directions_of_the_inputs(kind: str) -> None:
    module: Any = Classifier() if kind == "net" else Language()
    data, name = (points(), "input") if kind == "net" else (texts(), "model.layers.1.self_attn.q_proj")
    backbone = module.net if kind == "net" else module.model
    seen: list[Tensor] = []
    handle = backbone.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in data:
        backbone.eval()(batch[0])
    handle.remove()
    expected = torch.linalg.svd(torch.cat([x.flatten(0, -2) for x in seen]), full_matrices=False)[2][:3]
    options: dict[str, Any] = {"backbone": "net"} if kind == "net" else {}
    fit(module, LoRA(r=3, init="eva", **options), max_steps=-1, max_epochs=0)
    found = factors(module, f"{name}.lora_A")
    (rows,) = found.values()
    torch.testing.assert_close((rows @ expected.T).abs(), torch.eye(3), rtol=0, atol=1e-3)
    assert not any(value.any() for value in factors(module, "lora_B").values())


def test_eva_counts_tokens_with_labels_alone() -> None:
    class Padded(Language):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", 0.0)
            return self.model(**batch).loss

    ids = next(iter(texts()))[0]
    mask = (torch.arange(9) < 6).expand(4, -1)
    made = []
    for labels in (ids.masked_fill(~mask, -100), None):
        module = Padded()
        batch = {"input_ids": ids, "labels": ids if labels is None else labels}
        torch.manual_seed(5)
        trainer(LoRA(r=2, init="eva"), max_steps=-1, max_epochs=0).fit(
            module, torch.utils.data.DataLoader([batch], None)
        )
        made.append(factors(module, "lora_A"))
    assert not same(made[0], made[1])


def test_looking_at_data_moves_nothing_and_draws_nothing() -> None:
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))  # type: ignore[assignment]
            self.batches: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.training:
                self.batches.append(batch[0])
            return super().training_step(batch, batch_idx)

    runs = []
    for init in (True, "eva"):
        torch.manual_seed(1)
        module = Normed()
        before = weights(module.head)
        shuffled = torch.utils.data.DataLoader(points().dataset, batch_size=4, shuffle=True)
        torch.manual_seed(5)
        trainer(LoRA(r=2, init=init, backbone="net"), max_steps=3).fit(module, shuffled)
        runs.append(torch.cat(module.batches))
        assert moved(before, weights(module.head))
    assert torch.equal(runs[0], runs[1])


def test_eva_looks_once(tmp_path: Path) -> None:
    def eva() -> LoRA:
        return LoRA(r=2, init="eva", init_batches=2, backbone="net")

    options: dict[str, Any] = {"max_steps": -1}
    whole, half, resumed = Classifier(), Classifier(), Classifier()
    fit(whole, eva(), max_epochs=2, **options)
    fit(half, eva(), max_epochs=1, **options).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, eva(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt", **options)
    assert same(weights(whole), weights(resumed))
    loaded = load_from_checkpoint(Classifier, tmp_path / "half.ckpt")
    assert adapters(loaded)["lora"].record == {"eva": {"batches": 2}}
    before = factors(loaded, "lora_A")
    before = {key: value.clone() for key, value in before.items()}
    fit(loaded, eva(), max_epochs=0, **options)
    assert same(before, factors(loaded, "lora_A"))


def test_eva_of_a_module_that_optimizes_by_hand_is_one_sentence() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"^Manual optimizes by hand in its training_step, which cannot be") as error:
        fit(Manual(), LoRA(r=2, init="eva", backbone="net"))
    assert one_sentence(str(error.value))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_loftq_without_cuda_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"on CUDA alone, and there is none") as error:
        fit(Language(), LoRA(r=2, init="loftq"))
    assert one_sentence(str(error.value))


def test_activated_lora_acts_from_its_invocation_on(tmp_path: Path) -> None:
    module = Language()
    LoRA(r=2, variant="alora", invocation_tokens=[5, 6]).apply(module)
    stack, base = adapters(module), tiny("llama")
    fill(stack, "lora")
    ids = torch.tensor([[9, 8, 5, 6, 7, 3], [9, 8, 7, 5, 6, 3], [9, 8, 7, 6, 5, 3]])
    changed = (logits(module.model, ids) != logits(base, ids)).any(-1)
    assert changed.tolist() == [[False] * 2 + [True] * 4, [False] * 3 + [True] * 3, [False] * 6]
    model: Any = module.model
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached, plain = (model.generate(ids[:1], use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    with pytest.raises(ValueError, match=r"^LoraConfig cannot be merged: "):
        stack.merge()
    save_adapter(module, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    assert torch.equal(logits(theirs, ids), logits(module.model, ids))
