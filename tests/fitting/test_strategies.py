"""Two processes train the adapter that one does, on the same batches, and its checkpoints go on exactly: DDP, FSDP2.

Everything that needs two processes is run by two_processes.py, once a strategy; the tests read what that left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import test_whole_fit
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, ROOT, Classifier, classifier, fit, one_sentence, same, trainer
from two_processes import EPOCHS, WHOLE, Runs, lora, one_process, stacked

from lightning_peft import adapters, export_checkpoint, load_adapter, load_from_checkpoint
from lightning_peft.callbacks import AdapterEMA
from lightning_peft.fitting.strategies import check_fsdp, prepare

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

LIMIT = 240  # seconds; idle, it takes about 20
STRATEGIES = ("ddp", "fsdp2")
KINDS = ("full", "sharded")  # one file, or a folder with a part for each process
RUNS = [("ddp", "ddp"), ("ddp", "stack"), *(("fsdp2", f"{kind}{more}") for kind in KINDS for more in ("", "-stack"))]


def launch(strategy: str, folder: Path) -> None:
    """Run every scenario of a strategy; both processes are gone afterwards, whatever happens."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")}  # no seed left by another test
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "two_processes.py"), strategy, str(folder)]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the second process is in the first one's group
        log.seek(0)
        assert code == 0, log.read()[-5000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in (*STRATEGIES, "one")}
    one = one_process(made["one"])
    one.through_and_on("lora", Classifier, lambda: [lora(), AdapterEMA(0.7)])
    one.through_and_on("stack", Classifier, stacked)
    one.fit("applied", classifier("configure_model"), lora())
    for strategy in STRATEGIES:
        launch(strategy, made[strategy])
    return made


def adapter(path: Path, kind: type[L.LightningModule] = Classifier) -> dict[str, Tensor]:
    """What a checkpoint holds, read by one process."""
    module = load_from_checkpoint(kind, path)
    outside = {name: value for name, value in module.state_dict().items() if name.startswith("head.")}
    return outside | tensors(module.net)


def tensors(backbone: nn.Module) -> dict[str, Tensor]:
    stack = adapters(backbone)
    return {f"{part.name}/{key}": value for part in stack.parts for key, value in stack.tensors(part).items()}


def close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize(("strategy", "run"), RUNS)
def test_two_processes_train_what_one_does(folders: dict[str, Path], strategy: str, run: str, epoch: int) -> None:
    kind = "stack" if "stack" in run else "lora"
    one = adapter(folders["one"] / f"{kind}-through-epoch={epoch}.ckpt")
    two = adapter(folders[strategy] / f"{run}-through-epoch={epoch}.ckpt")
    close(one, two)
    start = classifier()
    fit(start, *(stacked() if kind == "stack" else [lora()]), max_steps=0)
    assert not any(value.any() for name, value in tensors(start.net).items() if "lora_B" in name)
    assert all(value.any() for name, value in two.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "run"), RUNS)
def test_a_resumed_run_goes_on_exactly(folders: dict[str, Path], strategy: str, run: str) -> None:
    for epoch in range(1, EPOCHS):
        through, on = (adapter(folders[strategy] / f"{run}-{way}-epoch={epoch}.ckpt") for way in ("through", "on"))
        assert same(through, on)
    assert not (folders[strategy] / f"{run}-on-epoch=0.ckpt").exists()  # it did not begin again


@pytest.mark.slow
def test_two_processes_draw_the_same_blocks_and_end_with_the_same_weights(folders: dict[str, Path]) -> None:
    first, second = (torch.load(folders["ddp"] / f"ist.{rank}", weights_only=True) for rank in range(2))
    assert first["drawn"] == second["drawn"] and len({tuple(blocks) for blocks in first["drawn"]}) == 3
    assert torch.equal(first["importance"], second["importance"]) and first["importance"].all()
    assert same(first["trained"], second["trained"])


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, WHOLE.steps))
def test_a_fit_with_everything_goes_on_exactly_from_any_step(folders: dict[str, Path], step: int) -> None:
    whole, resumed = (
        torch.load(folders["ddp"] / part / "last.ckpt", weights_only=True) for part in ("whole", f"from {step}")
    )
    test_whole_fit.same(whole, resumed)
    assert any("modules_to_save" in name for name in whole["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "run"), RUNS)
def test_the_checkpoint_holds_no_frozen_weight(folders: dict[str, Path], strategy: str, run: str) -> None:
    path = folders[strategy] / f"{run}-through-epoch=0.ckpt"
    if path.is_dir():
        from torch.distributed.checkpoint import FileSystemReader

        names = {key.removeprefix("state_dict.") for key in FileSystemReader(path).read_metadata().state_dict_metadata}
    else:
        names = torch.load(path, weights_only=True)["state_dict"].keys()
    names = {name for name in names if not name.startswith("optimizer_")}
    assert names and all(name.startswith("head.") or "lora_" in name or "ia3_" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["full", "sharded", "full-stack", "sharded-stack"])
def test_what_fsdp2_trained_is_exported_and_loaded_by_one_process(
    folders: dict[str, Path], tmp_path: Path, run: str
) -> None:
    path = folders["fsdp2"] / f"{run}-through-epoch=1.ckpt"
    export_checkpoint(path, tmp_path / "adapter")
    backbone = classifier().net
    parts = load_adapter(backbone, tmp_path / "adapter", name="lora")
    expected = {name: value for name, value in adapter(path).items() if not name.startswith("head.")}
    assert len(parts) == (2 if "stack" in run else 1) and same(tensors(backbone), expected)


@pytest.mark.slow
def test_a_sharded_module_can_be_saved_as_a_peft_folder(folders: dict[str, Path]) -> None:
    for rank in range(2):
        backbone = classifier().net
        load_adapter(backbone, folders["fsdp2"] / f"adapter-{rank}", name="lora")
        expected = adapter(folders["fsdp2"] / "folder-epoch=1.ckpt")
        assert same(tensors(backbone), {name: v for name, v in expected.items() if not name.startswith("head.")})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_tests_the_checkpoint_it_is_given(folders: dict[str, Path], kind: str) -> None:
    made = one_process(folders["one"])
    expected = []
    for path in (folders["fsdp2"] / f"{kind}-through-epoch=1.ckpt", None):
        module = Classifier() if path is None else load_from_checkpoint(Classifier, path)
        expected.append(made.trainer(lora()).test(module, made.data(), verbose=False)[0]["test_loss"])
    ranks = [torch.load(folders["fsdp2"] / f"{kind}-losses.{rank}") for rank in range(2)]
    assert [sum(losses) / 2 for losses in zip(*ranks, strict=True)] == pytest.approx(expected, rel=1e-5)
    assert expected[0] < expected[1]


@pytest.mark.slow
def test_a_backbone_built_and_sharded_in_one_hook_has_its_adapter_put_on_in_between(folders: dict[str, Path]) -> None:
    for epoch in range(EPOCHS):
        one, two = (
            torch.load(folders[name] / f"applied-epoch={epoch}.ckpt", weights_only=True)["state_dict"]
            for name in ("one", "fsdp2")
        )
        close(one, two)


# -- the same adapter to begin with ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("when", ["unseeded", "unseeded-applied"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_process_begins_with_rank_zeros_adapter(folders: dict[str, Path], strategy: str, when: str) -> None:
    first, second = (torch.load(folders[strategy] / f"{when}.{rank}", weights_only=True) for rank in range(2))
    assert same(first, second)
    module = Classifier()
    torch.manual_seed(100)
    lora().apply(module)
    assert same(first, tensors(module.net))


# -- wrong use ------------------------------------------------------------------------------------------------------

WRONG = {
    "another base": "the checkpoint was made for another base model: ",
    "other settings": "the checkpoint and adapter 'lora' have other settings: r: 2 != 3.",
    "another adapter": "the checkpoint has no adapter 'ia3'; it has 'lora'.",
    "stack for one": "the checkpoint has the adapters 'lora', 'ia3' and the sharded module 'lora': give the Trainer ",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(folders: dict[str, Path], wrong: str, kind: str) -> None:
    for rank in range(2):
        name, message = torch.load(folders["fsdp2"] / f"{kind}-{wrong}.{rank}", weights_only=True)
        assert name == "AdapterError" and message.startswith(WRONG[wrong]) and one_sentence(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("nan", "the checkpoint: net.input.lora_A.lora.weight holds NaN or infinite values."),
        ("too late", "is sharded before it has its adapter: build it in __init__, or call LoRA.apply(self) in "),
    ],
)
def test_what_cannot_be_sharded_is_one_sentence(folders: dict[str, Path], wrong: str, words: str) -> None:
    for rank in range(2):
        name, message = torch.load(folders["fsdp2"] / f"{wrong}.{rank}", weights_only=True)
        assert name.endswith("Error") and words in message and one_sentence(message)


@pytest.mark.parametrize(
    ("strategy", "options", "module", "words"),
    [
        ({"state_dict_type": "sharded"}, {}, nn.Module, r"sharded checkpoints .* FSDPStrategy\(state_dict_type="),
        ({}, {"gradient_clip_val": 1.0}, nn.Module, r"cannot clip gradients by norm: use Trainer\(gradient_clip_algo"),
        ({}, {}, lambda: quantised(), r"cannot shard weights quantised by bitsandbytes, the first is inner:"),
    ],
    ids=["sharded state", "clipping by norm", "bitsandbytes"],
)
def test_what_the_first_fsdp_cannot_do_is_one_sentence(strategy: Any, options: Any, module: Any, words: str) -> None:
    made: Any = SimpleNamespace(**({"gradient_clip_val": None, "gradient_clip_algorithm": None} | options))
    with pytest.raises(ValueError, match=words) as error:
        check_fsdp(made, FSDPStrategy(**strategy), module())
    assert one_sentence(str(error.value))


def quantised() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = nn.Module()
    module.inner = bitsandbytes.nn.Linear4bit(8, 8)
    return module


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}])
def test_what_the_first_fsdp_can_do_is_let_through(clip: dict[str, Any]) -> None:
    made = trainer(**clip)
    check_fsdp(made, FSDPStrategy(), tiny("llama"))


def test_deepspeed_is_told_to_leave_frozen_weights_out(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # making one needs the deepspeed package
    strategy.exclude_frozen_parameters = False
    prepare(SimpleNamespace(strategy=strategy), classifier())  # type: ignore[arg-type]
    assert strategy.exclude_frozen_parameters


# -- where there is a GPU -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2"])
def test_a_gpu_strategy_saves_the_adapter_alone_and_goes_on(tmp_path: Path, strategy: str) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    runs, found = Runs(tmp_path, 1, lambda: strategy), {}
    for way, path in (("through", None), ("on", tmp_path / "through-epoch=0.ckpt")):
        module = Classifier()
        runs.fit(way, module, lora(), accelerator="gpu", devices=1, ckpt_path=path)
        found[way] = {n: p.detach().cpu().float() for n, p in module.named_parameters() if p.requires_grad}
    assert len(found["on"]) > 2  # head and adapter
    close(found["through"], found["on"])
    if strategy == "fsdp":
        names = torch.load(tmp_path / "through-epoch=1.ckpt", weights_only=True)["state_dict"]
        assert names and all(name.startswith("head.") or "lora_" in name for name in names)
