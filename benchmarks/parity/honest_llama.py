"""Write the numbers of ITI's authors' code (Li et al. 2023) that `tests/parity/with_honest_llama.py` reads.

The project's own environment. A clone of github.com/likenneth/honest_llama at 2c6b2179be7b5aa8f0a171688cf9e01b812ca327
(MIT); its path is the argument:

python benchmarks/parity/honest_llama.py honest_llama

Run by import: `get_com_directions`, `get_top_heads` and `get_interventions_dict` of `legacy/llama_utils.py`, and the
`Collector` and `ITI_Intervener` of `interveners.py`, as hooks on the input of each output projection where pyvene puts
them. What these files import and the functions do not need (baukit, OpenAI, TruthfulQA's metrics) are stubs.

Written here again, because it stands inside the `main` of their scripts: the draw of the inner split, the sum of a
layer's directions into one vector, and "the last token of every call", which `legacy/llama_validate_2fold.py` edits
(the later `validation/validate_2fold.py` leaves the prompt's call out). All in single precision; theirs is in half.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "tests/parity/fixtures/honest_llama"
COMMIT = "2c6b2179be7b5aa8f0a171688cf9e01b812ca327"
STUBS = ("llama", "baukit", "openai", "einops", "truthfulqa", "pyvene")
STUBS += tuple(f"truthfulqa.{name}" for name in ("utilities", "models", "metrics", "configs", "presets", "evaluate"))
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
QUESTIONS, SEED, HEADS, ALPHA, VAL_RATIO, NEW = 160, 42, 3, 15.0, 0.2, 4


def tiny_llama() -> nn.Module:
    """Return a random model with weights large enough that its heads differ."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=40, attn_implementation="eager", **SIZES)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 20 if parameter.dim() > 1 else 1
    return model


def statements() -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Return texts `[N, 4]`, labels `[N]`, how many each question has, and texts that end in a question `[M, 8]`."""
    generator = torch.Generator().manual_seed(1)
    counts = [int(n) for n in torch.randint(2, 6, (QUESTIONS,), generator=generator)]
    labels = torch.cat([torch.arange(count) % 2 for count in counts])
    texts = torch.randint(3, 40, (len(labels), 4), generator=generator)
    telling = torch.rand(len(labels), generator=generator) < 0.9
    texts[:, -1] = torch.where(telling, 3 + 18 * labels + texts[:, -1] % 4, texts[:, -1])
    return texts, labels, counts, torch.randint(3, 40, (50, 8), generator=generator)


def imported(path: Path, name: str) -> Any:
    """Import a file of theirs beside stubs."""
    for stub in STUBS:
        sys.modules.setdefault(stub, MagicMock(__name__=stub))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def hooked(model: nn.Module, interveners: dict[int, Callable[[Tensor, Any], Tensor]]) -> Iterator[None]:
    """Let an intervener of theirs change the input of a layer's output projection."""
    hooks = [
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, intervene=intervene: (intervene(args[0], None),)
        )
        for layer, intervene in interveners.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def collected(interveners: Any, model: nn.Module, texts: Tensor) -> np.ndarray:
    """Return the head outputs at each text's last token, `[N, layers, heads, head_dim]`, one text a call."""
    collectors = {layer: interveners.Collector(multiplier=0, head=-1) for layer in range(SIZES["num_hidden_layers"])}
    with hooked(model, collectors):
        for text in texts:
            model(input_ids=text[None])
    states = torch.stack([torch.stack(collector.states) for collector in collectors.values()], 1)
    return states.unflatten(-1, (SIZES["num_attention_heads"], -1)).numpy()


@torch.no_grad()
def edited(interveners: Any, model: nn.Module, interventions: dict[str, Any], text: Tensor) -> Tensor:
    """Return the logits `[NEW + 1, vocabulary]` of the last prompt token and of each further token, by the cache."""
    made = {}
    for name, heads in interventions.items():
        vector = torch.zeros(SIZES["num_attention_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"])
        for head, direction, std in heads:
            vector[head] = torch.from_numpy(direction * std)
        intervener = interveners.ITI_Intervener.__new__(interveners.ITI_Intervener)  # its __init__ needs CUDA
        intervener.direction, intervener.multiplier, intervener.states, intervener.actions = (
            vector.flatten(),
            ALPHA,
            [],
            [],
        )
        made[int(name.split(".")[2])] = intervener
    logits, cache = [], None
    with hooked(model, made):
        for call in (text[:-NEW], *text[-NEW:].split(1)):
            output = model(input_ids=call[None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0, -1])
    return torch.stack(logits)


def main(clone: str) -> None:
    """Write the model, its activations, and what their functions make of them."""
    utils, interveners = (
        imported(Path(clone) / file, name)
        for file, name in (("legacy/llama_utils.py", "llama_utils"), ("interveners.py", "interveners"))
    )
    layers, heads = SIZES["num_hidden_layers"], SIZES["num_attention_heads"]
    model, (texts, labels, counts, ends) = tiny_llama(), statements()
    activations, tuning = collected(interveners, model, texts), collected(interveners, model, ends)

    train = np.array_split(np.arange(QUESTIONS), 2)[1]  # of the first fold, questions of the second half
    np.random.seed(SEED)
    train_set = np.random.choice(train, size=int(len(train) * (1 - VAL_RATIO)), replace=False)
    val_set = np.array([question for question in train if question not in train_set])
    separated = np.split(activations, np.cumsum(counts)[:-1])
    separated_labels = [part.tolist() for part in np.split(labels.numpy(), np.cumsum(counts)[:-1])]
    directions = utils.get_com_directions(layers, heads, train_set, val_set, separated, separated_labels)
    probes, accuracies = utils.train_probes(SEED, train_set, val_set, separated, separated_labels, layers, heads)
    top, _ = utils.get_top_heads(train_set, val_set, separated, separated_labels, layers, heads, SEED, HEADS)
    interventions = utils.get_interventions_dict(top, probes, tuning, heads, True, False, directions)
    by_head = {
        (int(name.split(".")[2]), head): (direction, std)
        for name, rows in interventions.items()
        for head, direction, std in rows
    }
    longest = torch.randint(3, 40, (5 + NEW,), generator=torch.Generator().manual_seed(2))

    FOLDER.mkdir(parents=True, exist_ok=True)
    stored = {
        "texts": texts,
        "labels": labels,
        "question": torch.repeat_interleave(torch.arange(QUESTIONS), torch.tensor(counts)),
        "ends": ends,
        "activations": torch.from_numpy(activations),
        "tuning": torch.from_numpy(tuning),
        "train_set": torch.from_numpy(np.sort(train_set)),
        "com_directions": torch.from_numpy(directions),
        "accuracies": torch.from_numpy(accuracies),
        "coef": torch.from_numpy(np.concatenate([probe.coef_ for probe in probes])),
        "top_heads": torch.tensor([[int(layer), int(head)] for layer, head in top]),
        "direction": torch.stack([torch.from_numpy(by_head[head][0]) for head in map(tuple, top)]),
        "sigma": torch.tensor([by_head[head][1] for head in map(tuple, top)]),
        "text": longest,
        "base_logits": model(input_ids=longest[None]).logits[0, -NEW - 1 :].detach(),
        "logits": edited(interveners, model, interventions, longest),
    }
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in (stored | weights).items()}, FOLDER / "llama.safetensors")
    record = {"commit": COMMIT, "sizes": SIZES, "seed": SEED, "heads": HEADS, "alpha": ALPHA, "new": NEW}
    record |= {"val_ratio": VAL_RATIO, "transformers": transformers.__version__, "torch": torch.__version__}
    (FOLDER / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print("accuracies", accuracies.round(3).tolist(), "top", top)


if __name__ == "__main__":
    main(sys.argv[1])
