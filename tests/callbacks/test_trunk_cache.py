"""The frozen trunk cache: the same losses, less work, and a refusal wherever the trunk is not the same each time."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tuning import QUIET, Classifier, base_weights, one_sentence, points, python, same, trainer

from lightning_peft.backbone.structure import blocks
from lightning_peft.callbacks import PEFT, LoRA, TopLayers, TrunkCache

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
pytestmark += [pytest.mark.filterwarnings("ignore:.*TrunkCache has read nothing", "ignore:.*lr_scheduler")]

CAUSAL = ("llama", "wide_llama", "gpt2", "gpt_neox", "opt")


class Texts(Dataset):
    """Rows of 4 to 8 tokens, `[T]` each; an answer begins at the third."""

    def __init__(self, rows: int = 12, length: int | None = None) -> None:
        generator = torch.Generator().manual_seed(4)
        lengths = [4 + i % 5 if length is None else length for i in range(rows)]
        self.rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]

    def loader(self, side: str = "right", width: int | None = None, **options: Any) -> DataLoader:
        def collate(rows: list[Tensor]) -> dict[str, Tensor]:
            longest = max(map(len, rows)) if width is None else width
            ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest).long()
            for i, row in enumerate(rows):
                where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
                ids[i, where], mask[i, where] = row, 1
            first = mask.cumsum(-1) < 3
            labels = ids.masked_fill((mask == 0) | first, -100)
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        return DataLoader(self, **({"batch_size": 4} | options), collate_fn=collate)


class Causal(L.LightningModule):
    """A language model that notes its losses and how often its first block is computed."""

    def __init__(self, kind: str = "llama", positions: bool = True) -> None:
        super().__init__()
        self.backbone, self.positions = tiny(kind), positions
        self.losses: list[float] = []

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.positions:
            inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return inputs

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.backbone(**self.inputs(batch)).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Pooled(Causal):
    """An encoder or an image model with a head on its first state."""

    def __init__(self, kind: str) -> None:
        nn.Module.__init__(self)
        L.LightningModule.__init__(self)
        import transformers as t

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        if kind == "bert":
            self.backbone = t.BertModel(t.BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
        else:
            self.backbone = t.ViTModel(t.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)).eval()
        self.head = nn.Linear(16, 2)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            states = self.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            classes = batch["attention_mask"].sum(-1) % 2
        else:
            states, classes = self.backbone(pixel_values=batch[0]), batch[1]
        loss = nn.functional.cross_entropy(self.head(states.last_hidden_state[:, 0]), classes)
        self.losses.append(loss.item())
        return loss


class Plain(Classifier):
    """The hand-written network, noting its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.save_hyperparameters()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def images() -> DataLoader:
    pixels = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader([(pixels[i], i % 2) for i in range(12)], batch_size=4)


KINDS = (*CAUSAL, "bert", "vit", "plain")


def made(kind: str) -> tuple[Any, DataLoader, dict[str, Any]]:
    """A module, its data, and where LoRA goes: the last of three blocks."""
    if kind == "plain":
        return Plain(), points(12), {"backbone": "net", "target_modules": ["linear"]}
    if kind == "vit":
        return Pooled("vit"), images(), {"backbone": "backbone"}
    return (Pooled("bert") if kind == "bert" else Causal(kind)), Texts().loader(width=8), {}


def computed(module: Any) -> list[int]:
    """Rows that the first block is really run on, noted from now on, batch by batch."""
    noted: list[int] = []
    backbone = getattr(module, "backbone", None) or module.net
    inner = next(
        m for m in blocks(backbone)[0].module.modules() if isinstance(m, nn.Linear) or "Conv1D" in str(type(m))
    )
    inner.register_forward_pre_hook(lambda _, args: noted.append(args[0].shape[0]))
    return noted


def run(module: Any, data: Any, *callbacks: Any, lora: dict[str, Any] | None = None, **options: Any) -> list[float]:
    """Losses of a training with LoRA in the last block."""
    torch.manual_seed(5)
    options = {"max_steps": -1, "max_epochs": 3} | options
    val = options.pop("val", None)
    adapter = LoRA(**({"r": 2, "layers": [2]} | (lora or {})))
    trainer(adapter, *callbacks, **options).fit(module, data, val)
    return module.losses


def pair(
    kind: str = "llama", loader: Any = None, cache: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, ...]:
    """Losses without and with the cache, and on how many rows the first block ran with it."""
    results: list[Any] = []
    for callbacks in ((), (TrunkCache(**(cache or {})),)):
        module, data, lora = made(kind)
        noted = computed(module)
        lora = lora | options.get("lora", {})
        given = {name: value() if name == "val" else value for name, value in options.items() if name != "lora"}
        results.append(run(module, data if loader is None else loader(), *callbacks, lora=lora, **given))
    return *results, noted


def close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= 1e-5 * abs(x) for x, y in zip(a, b, strict=True))


# -- the same losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_uncached_ones_bit_for_bit_at_equal_padding(kind: str) -> None:
    plain, cached, noted = pair(kind)
    assert cached == plain and len(set(plain)) == 9
    assert noted == [4] * 3  # the first epoch's three batches


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_the_same_and_the_model_is_put_back(kind: str) -> None:
    modules = []
    for callbacks in ((), (TrunkCache(),)):
        module, data, lora = made(kind)
        run(module, data, *callbacks, lora=lora)
        modules.append(module)
    assert same(modules[0].state_dict(), modules[1].state_dict())
    for one, other in zip(modules[0].modules(), modules[1].modules(), strict=True):
        assert "forward" not in other.__dict__
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert len(one._forward_hooks) == len(other._forward_hooks)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_shuffled_and_padded_anew_losses_are_the_uncached_ones_to_rounding(kind: str, side: str) -> None:
    plain, cached, noted = pair(kind, lambda: Texts().loader(side, shuffle=True))
    assert close(plain, cached)
    assert sum(noted) == 12  # position ids are given: a row is known however it is padded


def test_an_encoder_padded_on_the_right_is_read_at_every_width() -> None:
    plain, cached, noted = pair("bert", lambda: Texts().loader("right", shuffle=True))
    assert close(plain, cached) and sum(noted) == 12


@pytest.mark.parametrize("kind", CAUSAL)
def test_without_position_ids_tokens_at_other_places_are_other_rows(kind: str) -> None:
    losses = []
    for callbacks in ((), (TrunkCache(),)):
        module = Causal(kind, positions=False)
        noted = computed(module)
        losses.append(run(module, Texts().loader("left", shuffle=True), *callbacks))
    assert close(*losses) and sum(noted) > 12


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
        {"lora": {"dropout": 0.3}},
    ],
    ids=str,
)
def test_it_goes_with_other_settings(options: dict[str, Any]) -> None:
    plain, cached, noted = pair(**options)
    assert cached == plain and sum(noted) == 12


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_in_a_file_it_is_the_same(kind: str, tmp_path: Any) -> None:
    plain, cached, noted = pair(kind, cache={"folder": str(tmp_path / "new")})
    assert cached == plain and sum(noted) == 12
    assert not list((tmp_path / "new").iterdir())


def test_kept_in_bfloat16_it_is_close() -> None:
    plain, cached, noted = pair(cache={"dtype": "bfloat16"})
    assert cached != plain and sum(noted) == 12
    assert all(abs(a - b) < 0.02 * a for a, b in zip(plain, cached, strict=True))


def test_workers_read_it_too() -> None:
    plain, cached, noted = pair(loader=lambda: Texts().loader(width=8, num_workers=1), max_epochs=2)
    assert cached == plain and sum(noted) == 12


def test_validation_reads_what_training_kept_and_the_other_way_round() -> None:
    plain, cached, noted = pair(val=lambda: Texts().loader(width=8, batch_size=6), max_epochs=2)
    assert close(plain, cached) and sum(noted) == 12
    plain, cached, noted = pair(val=lambda: Texts(18).loader(width=8), max_epochs=2, num_sanity_val_steps=1)
    assert close(plain, cached) and sum(noted) == 4 + 12 + 6  # the sanity check keeps nothing


def test_batches_of_known_and_unknown_rows_are_computed() -> None:
    class Growing(Texts):
        epoch = 0

        def __getitem__(self, index: int) -> Tensor:
            return self.rows[index] if index % 4 or not self.epoch else self.rows[index] + 1 - self.rows[index] % 2

    data = Growing()

    class NextEpoch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            data.epoch += 1

    losses = []
    for callbacks in ((), (TrunkCache(),)):
        data.epoch = 0
        module = Causal()
        noted = computed(module)
        losses.append(run(module, data.loader(width=8), *callbacks, NextEpoch()))
    assert losses[0] == losses[1]
    assert 12 < sum(noted) <= 24  # in the second epoch again where a row is new, not in the third


def test_a_module_around_the_backbone_may_take_the_whole_batch() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("llama")

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    losses = []
    for callbacks in ((), (TrunkCache(),)):
        module = Causal(positions=False)
        module.backbone = Around()
        module.inputs = lambda batch: {"batch": batch}  # type: ignore[method-assign]
        noted = computed(module)
        losses.append(run(module, Texts().loader(), *callbacks, lora={"backbone": "backbone.inner"}))
    assert close(*losses) and sum(noted) == 12


def test_the_head_alone_may_be_trained() -> None:
    module, plain = Plain(), Plain()
    for each, callbacks in ((plain, ()), (module, (TrunkCache(backbone="net"),))):
        each.net.requires_grad_(False).eval()
        torch.manual_seed(5)
        trainer(Evaluation(), *callbacks, max_steps=-1, max_epochs=2).fit(each, points(12))
    assert module.losses == plain.losses
    assert module.losses[0] != module.losses[3]


class Evaluation(L.Callback):
    """Keeps a network without adapters in evaluation mode."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.net.eval()


def test_whole_layers_may_be_trained() -> None:
    losses = []
    for callbacks in ((), (TrunkCache(),)):
        module = Causal()
        noted = computed(module)
        torch.manual_seed(5)
        trainer(TopLayers(1), *callbacks, max_steps=-1, max_epochs=3).fit(module, Texts().loader(width=8))
        losses.append(module.losses)
    assert losses[0] == losses[1] and noted == [4] * 3


TWO_PROCESSES = """
import os, pathlib, sys
import torch
from tuning import Classifier, points, trainer
from lightning_peft.callbacks import LoRA, TrunkCache

class Noting(Classifier):
    losses, rows = [], []
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

found = []
for callbacks in ((), (TrunkCache(),)):
    module = Noting()
    module.losses, module.rows = [], []
    module.net.blocks[0].linear.register_forward_pre_hook(lambda _, args: module.rows.append(len(args[0])))
    torch.manual_seed(5)
    lora = LoRA(r=2, backbone="net", target_modules=["linear"], layers=[2])
    options = {"max_steps": -1, "max_epochs": 3, "strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    sampled = points(16, 2)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampled = torch.utils.data.DataLoader(torch.utils.data.Subset(sampled.dataset, range(rank, 16, 2)), 2)
    trainer(lora, *callbacks, **options).fit(module, sampled)
    found.append((module.losses, sum(module.rows)))
(plain, every), (cached, few) = found
assert plain == cached and len(plain) == 12, found
assert (every, few) == (24, 8), found
pathlib.Path(sys.argv[1], f"equal on {module.global_rank}").touch()
"""


@pytest.mark.slow
def test_in_two_processes_each_has_its_own(tmp_path: Any) -> None:
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    python(tmp_path / "script.py", tmp_path, timeout=120)
    assert {path.name for path in tmp_path.glob("equal*")} == {"equal on 0", "equal on 1"}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Any) -> None:
    whole = Causal()
    run(whole, Texts().loader(width=8), TrunkCache(), max_epochs=4)
    half = Causal()
    torch.manual_seed(5)
    first = trainer(LoRA(r=2, layers=[2]), TrunkCache(), max_steps=-1, max_epochs=2)
    first.fit(half, Texts().loader(width=8))
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = Causal()
    trainer(LoRA(r=2, layers=[2]), TrunkCache(), max_steps=-1, max_epochs=4).fit(
        again, Texts().loader(width=8), ckpt_path=tmp_path / "half.ckpt"
    )
    assert again.losses == whole.losses[6:]
    assert same(whole.state_dict(), again.state_dict())


def test_the_base_does_not_move() -> None:
    module = Causal()
    before = base_weights(module)
    run(module, Texts().loader(width=8), TrunkCache())
    assert same(before, base_weights(module))


# -- what a trunk depends on besides the row ------------------------------------------------------------------------


def test_a_changed_trunk_is_computed_anew() -> None:
    class Changes(L.Callback):
        @torch.no_grad()
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 2:
                pl_module.backbone.model.layers[0].mlp.down_proj.weight.mul_(1.5)

    losses = []
    for callbacks in ((), (TrunkCache(),)):
        module = Causal()
        noted = computed(module)
        losses.append(run(module, Texts().loader(width=8), *callbacks, Changes()))
    assert losses[0] == losses[1] and sum(noted) == 24


def test_a_call_for_hidden_states_gets_them() -> None:
    class Hidden(Causal):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                states = self.backbone(**self.inputs(batch), output_hidden_states=True).hidden_states
            self.losses.append(states[1].sum().item())
            return super().training_step(batch, batch_idx)

    losses = [run(Hidden(), Texts().loader(width=8), *callbacks) for callbacks in ((), (TrunkCache(),))]
    assert losses[0] == losses[1]


def test_generation_in_validation_is_left_alone() -> None:
    class Generates(Causal):
        said: list[Tensor]

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.said = [*getattr(self, "said", []), self.backbone.generate(batch["input_ids"], max_new_tokens=4)]

    modules = [Generates(), Generates()]
    for module, callbacks in zip(modules, ((), (TrunkCache(),)), strict=True):
        run(module, Texts(length=6).loader(), *callbacks, val=Texts(4, length=6).loader())
    assert all(torch.equal(a, b) for a, b in zip(modules[0].said, modules[1].said, strict=True))


def test_rows_without_repetition_are_warned_of() -> None:
    class Noise(Texts):
        def __getitem__(self, index: int) -> Tensor:
            return torch.randint(3, VOCABULARY, (6,))

    with pytest.warns(UserWarning, match="TrunkCache has read nothing in the second epoch"):
        run(Causal(), Noise().loader(), TrunkCache(), max_epochs=2)


# -- what is refused ------------------------------------------------------------------------------------------------


def refused(match: str, module: Any, data: Any, *callbacks: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as error:
        run(module, data, *callbacks, **options)
    assert one_sentence(str(error.value))
    assert not any("forward" in m.__dict__ for m in module.modules())


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_a_trained_first_block_is_refused(kind: str) -> None:
    module, data, lora = made(kind)
    refused(r"The first block, .*0, is trained \(.*lora_A", module, data, TrunkCache(), lora=lora | {"layers": [0, 2]})


@pytest.mark.parametrize(("kind", "name"), [("llama", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_trained_embeddings_are_refused(kind: str, name: str) -> None:
    refused(
        r"(embed_tokens|wte)\..*weight is trained and stands below .*2",
        Causal(kind),
        Texts().loader(),
        TrunkCache(),
        lora={"layers": [2], "train_head": name},
    )


@pytest.mark.parametrize("kind", ["gpt2", "plain"])
def test_dropout_in_the_trunk_is_refused(kind: str) -> None:
    module, data, lora = made(kind)
    lora = lora | {"backbone_dropout": True}
    refused("in training mode with p=0.*; keep backbone_dropout=False", module, data, TrunkCache(), lora=lora)


def test_batch_statistics_in_the_trunk_are_refused() -> None:
    class Training(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.net.blocks[0].norm.train()

    module, data, lora = made("plain")
    refused(r"blocks\.0\.norm takes its statistics from the batch", module, data, Training(), TrunkCache(), lora=lora)


def test_an_edit_in_the_trunk_is_refused() -> None:
    from edits import add_offsets

    module = Causal()
    add_offsets(module.backbone, "answer")

    class Only(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            for name, parameter in pl_module.backbone.named_parameters():
                parameter.requires_grad_("layers.2" in name)

    torch.manual_seed(5)
    with pytest.raises(
        ValueError, match=r"Adapter 'edit' edits model\.layers\.0, below the first trained block"
    ) as error:
        trainer(Only(), TrunkCache(), max_epochs=2).fit(module, Texts().loader())
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_learned_prompt_is_refused(config: str) -> None:
    import peft

    adapter = PEFT(getattr(peft, config)(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="Adapter 'default' puts a prompt before the first block") as error:
        trainer(adapter, TrunkCache(), max_epochs=2).fit(Causal(), Texts().loader())
    assert one_sentence(str(error.value))


def test_what_reads_more_than_the_last_states_is_refused() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = nn.Linear(10, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first = x = self.input(x.flatten(1))
            for i, block in enumerate(self.blocks):
                x = block(x)
                first = x if i == 0 else first
            return x + first

    module = Plain()
    module.net = Skips()
    lora = {"backbone": "net", "target_modules": ["blocks.2.0"], "layers": None}
    refused("another result without the blocks below blocks.2", module, points(12), TrunkCache(), lora=lora)


def test_a_model_that_hands_more_from_block_to_block_is_refused() -> None:
    import transformers as t

    class Sequence(Causal):
        def __init__(self) -> None:
            super().__init__()
            config = t.T5Config(
                vocab_size=VOCABULARY, d_model=16, d_ff=16, d_kv=8, num_layers=3, num_heads=2, decoder_start_token_id=0
            )
            self.backbone = t.T5ForConditionalGeneration(config).eval()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.backbone(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    refused("gives more than its hidden states", Sequence(), Texts().loader(), TrunkCache())


def test_a_compiled_model_is_refused() -> None:
    module = Causal()
    module.backbone.model.layers[1].compile()
    refused("is compiled", module, Texts().loader(), TrunkCache())


def test_a_module_without_blocks_is_refused() -> None:
    module = Plain()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.Linear(8, 8))
    lora = {"backbone": "net", "layers": None, "target_modules": ["2"]}
    refused("has no numbered list of blocks", module, points(12), TrunkCache(), lora=lora)


# -- how much is kept -----------------------------------------------------------------------------------------------


def test_what_will_be_kept_is_announced(caplog: Any) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        run(Causal(), Texts(length=8).loader(), TrunkCache())
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(before)
    # 8 tokens x 32 features x 4 bytes
    assert "TrunkCache: 2 blocks below model.layers.2; about 12 rows of 1.02 kB, 12.3 kB in RAM." in caplog.text


def test_more_than_may_be_kept_is_refused_with_both_sizes() -> None:
    refused(
        r"would keep about 12.3 kB \(3 batches of 4 rows, 1.02 kB a row\), which is more than max_bytes=12,000",
        Causal(),
        Texts(length=8).loader(),
        TrunkCache(max_bytes=12_000),
    )


def test_where_the_length_is_unknown_a_full_cache_warns_and_goes_on() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(Texts(length=8).rows)

    def loader() -> DataLoader:
        return DataLoader(Stream(), 4, collate_fn=Texts().loader().collate_fn)

    with pytest.warns(UserWarning, match="TrunkCache is full: max_bytes=9,000"):
        plain, cached, noted = pair(loader=loader, cache={"max_bytes": 9_000})
    assert cached == plain
    assert noted == [4, 4, 4, 4, 4]  # two of the three batches are known in the later epochs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 0}, r"^max_bytes must be at least 1, got 0\.$"),
        ({"dtype": "int8"}, r"^dtype must name a floating-point torch dtype such as bfloat16, got 'int8'\.$"),
        ({"dtype": "half8"}, r"^dtype must name a floating-point torch dtype such as bfloat16, got 'half8'\.$"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrunkCache(**options)
