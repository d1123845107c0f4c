"""Adapters in loops of one's own: on plain modules, with Fabric, saved alone, resumed, on two processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from tiny_models import tiny
from torch import Tensor, nn
from tuning import ROOT

from lightning_peft import AdapterError, adapters, load_adapter, load_trained, save_adapter, trained_only
from lightning_peft.callbacks import IA3, BitFit, LoRA

ROWS = 8


class Net(nn.Module):
    """A plain module: a body with BatchNorm and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 4, generator=generator), torch.arange(ROWS) % 3


def lora() -> LoRA:
    return LoRA(r=2, backbone="body", target_modules=["0", "3"])


def begin(fabric: Fabric) -> tuple[Any, Any]:
    torch.manual_seed(3)
    net = Net()
    lora().apply(net)
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=0.01, weight_decay=0.1)
    return fabric.setup(net, optimizer)


def train(fabric: Fabric, net: Any, optimizer: Any, steps: int, rows: slice = slice(None)) -> None:
    x, y = points()
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(net(x[rows]), y[rows]))
        optimizer.step()


def one(precision: Any = "32-true") -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision=precision)


def state(net: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_resumed_from_what_was_trained_equals_one_in_one_go(precision: str, tmp_path: Path) -> None:
    fabric = one(precision)
    whole, optimizer = begin(fabric)
    train(fabric, whole, optimizer, 4)
    half, optimizer = begin(fabric)
    train(fabric, half, optimizer, 2)
    saved = {"model": half, "optimizer": optimizer, "step": 2}
    fabric.save(tmp_path / "half.ckpt", saved, filter={"model": trained_only(half)})
    again, optimizer = begin(fabric)
    rest = load_trained(fabric, tmp_path / "half.ckpt", {"model": again, "optimizer": optimizer})
    train(fabric, again, optimizer, 2)
    assert rest == {"step": 2} and same(state(whole), state(again))
    held = torch.load(tmp_path / "half.ckpt")["model"]
    assert {key.partition(".lora_")[0] for key in held} == {"body.0", "body.3", "head.weight", "head.bias"}


def test_frozen_parts_stay_as_they_were_in_training_mode() -> None:
    net, bare = Net(), Net()
    lora().apply(net)
    net.train()
    modes = {name: part.training for name, part in net.body.named_modules()}
    assert net.head.training and not modes["1"] and not modes["2"] and not modes["0.base_layer"]
    assert modes["0.lora_A.lora"]
    net(points()[0])
    assert torch.equal(net.body[1].running_mean, bare.body[1].running_mean)
    net.eval()
    assert not any(part.training for part in net.modules())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not other.train().body[1].training and not net.training
    adapters(net).remove("lora")
    assert net.train().body[1].training and "train" not in vars(net.body)


def test_dropout_of_the_backbone_is_kept_where_it_is_asked_for() -> None:
    net = Net()
    LoRA(r=2, backbone="body", target_modules=["0"], backbone_dropout=True).apply(net)
    net.train()
    assert net.body[2].training and not net.body[1].training


PLAIN = {"lora": LoRA(r=2), "ia3": IA3(), "bitfit": BitFit(add_missing=True)}


@pytest.mark.parametrize("callback", PLAIN.values(), ids=PLAIN)
def test_a_plain_model_is_its_own_backbone(callback: Any, tmp_path: Path, tokens: Tensor) -> None:
    model: Any = tiny("llama")
    (part,) = callback.apply(model)
    assert adapters(model).backbone is model and adapters(model).parts == [part]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.1)
    save_adapter(model, tmp_path)
    again: Any = tiny("llama")
    load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_the_transformers_model_in_a_plain_module_is_the_backbone() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = tiny("llama"), nn.Linear(2, 2)

    around: Any = Around()
    LoRA(r=2).apply(around)
    assert adapters(around).backbone is around.model and around.head.weight.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(r=2).apply(one().setup(Net())), "Fabric has set up this Net already"),
        (
            lambda: LoRA(r=2, backbone="boddy").apply(Net()),
            "Net has no submodule 'boddy' with parameters",
        ),
        (lambda: trained_only(Net()), "Net has no adapters: put them on before"),
    ],
)
def test_what_cannot_be_is_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    fabric = one()
    net, _ = begin(fabric)
    fabric.save(tmp_path / "x.ckpt", {"model": net}, filter={"model": trained_only(net)})
    other = Net()
    LoRA(r=2, backbone="body", target_modules=["0"]).apply(other)
    before = state(other)
    with pytest.raises(AdapterError, match=r"x\.ckpt and the module 'model' do not fit: 2 tensors are unknown"):
        load_trained(fabric, tmp_path / "x.ckpt", {"model": fabric.setup(other)})
    with pytest.raises(AdapterError, match="holds no module 'net', but 'model'"):
        load_trained(fabric, tmp_path / "x.ckpt", {"net": net})
    assert same(before, state(other))


def test_two_processes_train_as_one_does_on_both_their_rows(tmp_path: Path) -> None:
    code = "import test_fabric; test_fabric.on_two_processes()"
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests'), str(Path(__file__).parent)]}\n{code}\n"
    )
    ran = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    fabric = one()
    net, optimizer = begin(fabric)
    train(fabric, net, optimizer, 3)
    folder: Any = Net()
    load_adapter(folder.body, tmp_path / "adapter")
    expected = {k: v for part in adapters(net).parts for k, v in adapters(net).tensors(part).items()}
    (part,) = adapters(folder).parts
    for key, value in adapters(folder).tensors(part).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    saved = torch.load(tmp_path / "two.ckpt")["model"]
    assert saved.keys() == {name for name in first if trained_only(net)(name, None)} and len(saved) == 6


def on_two_processes() -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.manual_seed(7 + fabric.global_rank)  # what the ranks draw is made the same by DDP
    net, optimizer = begin(fabric)
    train(fabric, net, optimizer, 3, slice(fabric.global_rank, None, 2))
    fabric.save("two.ckpt", {"model": net, "optimizer": optimizer}, filter={"model": trained_only(net)})
    if fabric.is_global_zero:
        save_adapter(net, "adapter")
    torch.save(net.state_dict(), f"rank{fabric.global_rank}.pt")
