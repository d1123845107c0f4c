"""The laws that every adaptation obeys on every architecture (DESIGN §7).

A cell is a law, a method and an architecture. Whether it applies follows from what method and architecture declare
they can do, never from a failing test; the last test prints how many cells do not apply.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from edits import HEADS, close, fill, rough
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from statements import Statements, trainer
from torch import Tensor, nn

from lightning_peft import load_adapter, save_adapter
from lightning_peft.callbacks import PEFT
from lightning_peft.editing import HeadSite, head_offsets_config, head_sites
from lightning_peft.positions import answering
from lightning_peft.tuners.stack import AdapterStack, stack_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class HandWritten(nn.Module):
    """A causal language model that knows nothing of transformers: two blocks of attention."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Embedding(64, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}) for _ in range(3)
        )
        self.out = nn.Linear(width, 64)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        batch, length = input_ids.shape
        positions = torch.arange(length) if position_ids is None else position_ids
        x = self.embed(input_ids) + self.place(positions)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            # a pad may look at itself, so that no row of the softmax is empty
            allowed = allowed & (attention_mask[:, None, None].bool() | torch.eye(length, dtype=torch.bool))
        for block in self.blocks:
            q, k, v = block["qkv"](x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            z = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            x = x + block["proj"](z.transpose(1, 2).reshape(batch, length, -1))
        return self.out(x)


def hand_written() -> nn.Module:
    torch.manual_seed(0)
    return HandWritten().eval()


@dataclass(frozen=True)
class Architecture:
    build: Callable[[], nn.Module]
    matrices: tuple[str, ...]  # what LoRA adapts
    sites: Callable[[nn.Module], list[HeadSite]] = head_sites
    generates: bool = True


@dataclass(frozen=True)
class Method:
    config: Callable[[nn.Module, Architecture], PeftConfig]
    count: Callable[[nn.Module, Architecture], int]  # trainable parameters, by the closed formula
    merges: bool = True


def offsets(positions: str) -> Callable[[nn.Module, Architecture], PeftConfig]:
    return lambda model, of: head_offsets_config(of.sites(model), HEADS, 2.0, positions)


def lora_count(model: nn.Module, of: Architecture) -> int:
    shapes = [m.weight.shape for name, m in model.named_modules() if name.endswith(of.matrices)]
    return sum(2 * (inputs + outputs) for inputs, outputs in shapes)


def offsets_count(model: nn.Module, of: Architecture) -> int:
    return len(HEADS) * of.sites(model)[0].head_dim


ARCHITECTURES = {
    "gpt2": Architecture(lambda: rough("gpt2"), ("attn.c_attn", "attn.c_proj")),
    "llama": Architecture(lambda: rough("llama"), ("q_proj", "o_proj", "down_proj")),
    "gpt_neox": Architecture(lambda: rough("gpt_neox"), ("query_key_value", "attention.dense")),
    "plain": Architecture(
        hand_written, ("qkv", "proj"), lambda model: head_sites(model, r"blocks\.\d+\.proj", 4), generates=False
    ),
}
METHODS = {
    "LoRA": Method(
        lambda _, of: LoraConfig(r=2, lora_alpha=4, target_modules=list(of.matrices)),
        lora_count,
    ),
    "HeadOffsets": Method(offsets("all"), offsets_count),
    "HeadOffsets of answers": Method(offsets("answer"), offsets_count, merges=False),
}
NEEDS: dict[str, tuple[str, ...]] = {  # what a law asks of the architecture
    "identity": (),
    "frozen": (),
    "off": (),
    "merge": (),  # of every method: where it declares that it cannot, the law asks for a clear error
    "round trip": (),
    "padding": (),
    "causality": (),
    "cache": ("generates",),
    "count": (),
    "resume": (),
}


def missing(law: str, architecture: str) -> list[str]:
    return [capability for capability in NEEDS[law] if not getattr(ARCHITECTURES[architecture], capability)]


def cells(law: str) -> pytest.MarkDecorator:
    """Run a test in every cell of a law that applies."""
    applying = [(m, a) for m in METHODS for a in ARCHITECTURES if not missing(law, a)]
    return pytest.mark.parametrize(("method", "architecture"), applying)


def adapted(method: str, architecture: str, filled: bool = True) -> tuple[nn.Module, AdapterStack]:
    of = ARCHITECTURES[architecture]
    model = of.build()
    stack = stack_of(model)
    stack.add(METHODS[method].config(model, of), "adapter")
    if filled:
        fill(stack, "adapter", size=0.3)  # larger ones saturate attention, and rounding shows
    return model, stack


def base(architecture: str) -> nn.Module:
    return ARCHITECTURES[architecture].build()


def run(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits, position ids always given."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None, start: list[int] | None = None) -> Tensor:
    """Logits with the answers beginning at position 3, or where `start` says."""
    with answering(model, start=torch.tensor([3] * len(ids) if start is None else start)):
        return run(model, ids, mask)


def pads(model: nn.Module, tokens: Tensor, side: str) -> Iterator[tuple[Tensor, Tensor]]:
    """For each length, the row's logits in a padded batch and alone."""
    lengths = (9, 6, 5)
    ids, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    real = [slice(0, n) if side == "right" else slice(9 - n, 9) for n in lengths]
    for row, (n, where) in enumerate(zip(lengths, real, strict=True)):
        ids[row, where], mask[row, where] = tokens[row, :n], 1
    order = torch.tensor([2, 0, 1])
    together = logits(model, ids[order], mask[order])[order.argsort()]
    for row, (n, where) in enumerate(zip(lengths, real, strict=True)):
        yield together[row, where], logits(model, tokens[row : row + 1, :n])[0]


@cells("identity")
def test_identity(method: str, architecture: str, tokens: Tensor) -> None:
    """Injected but not trained: the logits are the base model's."""
    model, _ = adapted(method, architecture, filled=False)
    assert torch.equal(logits(model, tokens), logits(base(architecture), tokens))


@cells("frozen")
def test_frozen(method: str, architecture: str, tokens: Tensor) -> None:
    """After steps with weight decay, everything but the adapter is bit-equal, and the adapter is not."""
    model, stack = adapted(method, architecture, filled=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = {key: value.clone() for key, value in stack.tensors(stack["adapter"]).items()}
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(model, tokens).square().mean().backward()
        optimizer.step()
    after = stack.tensors(stack["adapter"])
    assert all(not torch.equal(after[key], value) for key, value in before.items())
    stack.remove("adapter")
    pristine = base(architecture).state_dict()
    assert model.state_dict().keys() == pristine.keys()
    assert all(torch.equal(value, pristine[name]) for name, value in model.state_dict().items())


@cells("off")
def test_off(method: str, architecture: str, tokens: Tensor) -> None:
    """Disabled: the logits are the base model's bit for bit; enabled they are not."""
    model, stack = adapted(method, architecture)
    expected = logits(base(architecture), tokens)
    with stack.disabled():
        assert torch.equal(logits(model, tokens), expected)
    assert not close(logits(model, tokens), expected, 1e-3)


@cells("merge")
def test_merge(method: str, architecture: str, tokens: Tensor) -> None:
    """Merged = unmerged; a method that cannot be merged says so and stays as it was."""
    model, stack = adapted(method, architecture)
    unmerged = logits(model, tokens)
    if METHODS[method].merges:
        stack.merge()
        assert close(logits(model, tokens), unmerged)
        stack.unmerge()
        assert close(logits(model, tokens), unmerged)
    else:
        with pytest.raises(ValueError, match='only positions="all" can be merged'):
            stack.merge()
        assert torch.equal(logits(model, tokens), unmerged)


@cells("round trip")
def test_round_trip(method: str, architecture: str, tokens: Tensor, tmp_path: Path) -> None:
    """Saved and loaded on a fresh base, the logits are bit-equal; the file holds the adapter and little else."""
    model, stack = adapted(method, architecture)
    save_adapter(model, tmp_path)
    again = base(architecture)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    tensors = stack.tensors(stack["adapter"])
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size <= (tmp_path / "adapter_model.safetensors").stat().st_size <= size + 512 + 256 * len(tensors)


@cells("padding")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(method: str, architecture: str, side: str, tokens: Tensor) -> None:
    """Neither padding nor the order of a batch changes a row's result."""
    model, _ = adapted(method, architecture)
    for padded, alone in pads(model, tokens, side):
        assert close(padded, alone)


@cells("causality")
def test_causality(method: str, architecture: str, tokens: Tensor) -> None:
    """Other tokens in the future leave the logits of the past alone."""
    model, _ = adapted(method, architecture)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 64
    before, after = logits(model, tokens), logits(model, changed)
    assert close(after[:, :6], before[:, :6], 1e-6)
    assert not close(after[:, 6:], before[:, 6:], 1e-2)


@cells("cache")
def test_cache(method: str, architecture: str, tokens: Tensor) -> None:
    """Generation with the key-value cache = without, and step by step = at once."""
    model, stack = adapted(method, architecture)
    fill(stack, "adapter", size=2.0)  # so much that other tokens are chosen
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    with stack.disabled():
        assert not torch.equal(model.generate(tokens, **options), cached)
    whole = logits(model, tokens)
    with torch.no_grad(), answering(model, start=torch.tensor([3, 3, 3])):
        past = model(input_ids=tokens[:, :5], use_cache=True)
        rest = model(input_ids=tokens[:, 5:], past_key_values=past.past_key_values)
    assert close(torch.cat([past.logits, rest.logits], 1), whole)


@cells("count")
def test_count(method: str, architecture: str) -> None:
    """The number of trainable parameters is the closed formula's."""
    model, _ = adapted(method, architecture)
    expected = METHODS[method].count(base(architecture), ARCHITECTURES[architecture])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected > 0


# -- resume: the second half of the training runs in another process ------------------------------------------------


class Trained(L.LightningModule):
    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.backbone = base(architecture)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        predicted = run(self.backbone, batch["input_ids"], batch["attention_mask"])[:, :-1]
        return nn.functional.cross_entropy(predicted.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.02, weight_decay=0.1)


def train(method: str, architecture: str, epochs: int, ckpt_path: Path | None = None) -> L.Trainer:
    torch.manual_seed(5)  # LoRA's A is random
    module = Trained(architecture)
    config = METHODS[method].config(module.backbone, ARCHITECTURES[architecture])
    made = trainer(PEFT(config, name="adapter"), max_epochs=epochs)
    made.fit(module, Statements().loader(), ckpt_path=ckpt_path)
    return made


def trained_tensors(made: L.Trainer) -> dict[str, Tensor]:
    stack = stack_of(made.lightning_module.get_submodule("backbone"))
    return {key: value.clone() for key, value in stack.tensors(stack["adapter"]).items()}


def resume(folder: Path) -> None:
    """What the other process does: continue every cell's training from its checkpoint."""
    for checkpoint in folder.glob("*.ckpt"):
        method, architecture = checkpoint.stem.split("-")
        save_file(trained_tensors(train(method, architecture, 2, checkpoint)), checkpoint.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of every cell here, its second epoch in one other process."""
    folder = tmp_path_factory.mktemp("resume")
    for method in METHODS:
        for architecture in ARCHITECTURES:
            train(method, architecture, 1).save_checkpoint(folder / f"{method}-{architecture}.ckpt")
    tests = Path(__file__).parent
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in another order are other sums
    code = "import sys, test_laws; test_laws.resume(test_laws.Path(sys.argv[1]))"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@cells("resume")
def test_resume(method: str, architecture: str, resumed: Path) -> None:
    """2N steps = N steps, saved, loaded in a new process, N steps."""
    made = train(method, architecture, 2)
    whole, half = trained_tensors(made), trained_tensors(train(method, architecture, 1))
    continued = load_file(resumed / f"{method}-{architecture}.safetensors")
    assert made.global_step == 2 * len(Statements().loader())
    assert continued.keys() == whole.keys()
    assert all(torch.equal(continued[key], whole[key]) for key in whole)
    assert not any(torch.equal(half[key], whole[key]) for key in whole)


# -- how much of the table is covered -------------------------------------------------------------------------------


def test_every_law_is_tested_and_the_cells_that_do_not_apply_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    tested = {name.removeprefix("test_").replace("_", " ") for name in globals() if name.startswith("test_")}
    assert set(NEEDS) <= tested
    table = [(law, m, a) for law in NEEDS for m in METHODS for a in ARCHITECTURES]
    without = [(law, m, a, missing(law, a)) for law, m, a in table if missing(law, a)]
    unmerged = [m for m, method in METHODS.items() if not method.merges]
    with capsys.disabled():
        print(f"\nlaws: {len(without)} of {len(table)} cells do not apply")
        for law, method, architecture, capabilities in without:
            print(f"  {law}: {method} on {architecture} (declares no {', '.join(capabilities)})")
        print(f"  merge is an error for {', '.join(unmerged)}, as declared")
    assert {law for law, *_ in without} == {"cache"} and len(without) == len(METHODS)
