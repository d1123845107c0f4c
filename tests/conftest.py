"""What several tests need: tiny models, a tiny tokenizer, the real model, the TruthfulQA files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on the network; must be set before transformers is imported

import pytest
import torch
from tiny_models import VOCABULARY, tiny
from torch import Tensor

# tiny models gain nothing from a second thread, and threads of several processes on few cores cost a multiple
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run all cases of the tests of which a run takes a sample")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `sampled(n)`, keep every n-th case, unless all are asked for."""
    if config.getoption("--thorough"):
        return
    seen: Counter[str] = Counter()
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        marker, name = item.get_closest_marker("sampled"), item.nodeid.partition("[")[0]
        (left if marker is not None and seen[name] % marker.args[0] else kept).append(item)
        seen[name] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A real byte-pair tokenizer of 64 tokens, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(
        ["Q: What is it?\nA: It is true. It is not false.\n\nQ: Who is he? A: He is she"], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Callable[[str], Path]:
    """A folder with a tiny model and tokenizer, as a user's `pretrained`."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny(kind).save_pretrained(made[kind])
            tiny_tokenizer.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A folder with `base`, a tiny chat model, and folders of its adapters: see `talkers.make_adapters`."""
    from talkers import make_adapters, make_base

    folder = tmp_path_factory.mktemp("talker")
    return make_adapters(make_base(folder / "base", tiny_tokenizer), folder)


@pytest.fixture(autouse=True)
def the_environment_is_each_tests_own() -> Iterator[None]:
    """Lightning leaves seeds and ranks in the environment, from where distributed strategies take them up again, in
    this process and in those it starts: `seed_everything` in one test would decide how another's adapter begins. And
    they set the number of threads, with which the last bits of sums change."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(1)


@pytest.fixture
def tokens() -> Tensor:
    """Token ids `[3, 9]`, no special tokens among them."""
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def all_threads() -> Iterator[None]:
    """This process's share of the cores, for the real model."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, which `make model` makes."""
    folder = Path(os.environ.get("LIGHTNING_PEFT_SMOLLM2", ROOT / "models" / "SmolLM2-135M-Instruct"))
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no SmolLM2 weights in {folder}: run `make model`")
    return folder


@pytest.fixture(scope="session")
def gemma3_folder() -> Path:
    """The folder of Gemma 3 270M, which `make gemma` makes and nothing else does."""
    folder = Path(os.environ.get("LIGHTNING_PEFT_GEMMA3", ROOT / "models" / "gemma-3-270m"))
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no Gemma 3 weights in {folder}: run `make gemma`")
    return folder


@pytest.fixture(scope="session")
def truthfulqa_data() -> Path:
    """The TruthfulQA files, where they stand beside the project."""
    folder = ROOT.parent / "shared" / "data" / "truthfulqa"
    if not folder.is_dir():
        pytest.skip("the TruthfulQA files are not beside the project, in ../shared/data/truthfulqa")
    return folder
