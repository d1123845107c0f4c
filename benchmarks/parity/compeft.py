"""Write the numbers of ComPEFT's authors' code (Yadav et al. 2023) that `tests/parity/with_compeft.py` reads.

The project's own environment. A clone of github.com/prateeky2806/ComPEFT at d80ba585818e1692f7be830a6b5fe5c53aae7cdc
(BSD-3); its path is the argument:

python benchmarks/parity/compeft.py ComPEFT

Run by import: for LoRA `get_compressed_lora_weights` of `src/qlora/ties_utils.py`, for IA³
`compress_and_update_parms` of `src/bert_eval.py`, and `replace_noise_and_constant` of `src/merge_utils.py`, which
nothing of theirs calls. As published the second fails, because it takes two values where `topk_values_mask` of
`src/utils.py` returns three: it is given that of `ties_utils.py`, which is the same but for that. Modules that these
files import and the functions do not need (their trainer, their data) are stubs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import peft
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "tests/parity/fixtures/compeft"
COMMIT = "d80ba585818e1692f7be830a6b5fe5c53aae7cdc"
CASES = [{"k": k, "alpha": alpha} for k in (5, 20, 50) for alpha in (1.0, 4.0)]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ["query", "value"]},
    "ia3": {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
}


def tuned(method: str) -> nn.Module:
    """Return a tiny BERT whose adapter has moved from its start."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, max_position_embeddings=16, **sizes))
    kind = {"lora": LoraConfig, "ia3": IA3Config}[method]
    model = get_peft_model(bert, kind(**CONFIGS[method]))
    generator = torch.Generator().manual_seed(1)
    weights = get_peft_model_state_dict(model)
    moved = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in weights.items()}
    set_peft_model_state_dict(model, moved)
    return model


def authors(clone: Path) -> tuple[Any, Any]:
    """Import their `src/bert_eval.py` and `src/qlora/ties_utils.py`."""
    sys.path[:0] = [str(clone / "src/qlora"), str(clone / "src")]
    for name in ("fire", "bigmodelvis", "trainer", "data", "evaluate"):
        sys.modules[name] = MagicMock(__name__=name)
    import bert_eval
    import ties_utils

    bert_eval.topk_values_mask = ties_utils.topk_values_mask
    return bert_eval, ties_utils


def noise_and_constant(clone: Path) -> Any:
    """Return their `replace_noise_and_constant`, compiled alone: its module reads paths of their machines."""
    import ast

    tree = ast.parse((clone / "src/merge_utils.py").read_text())
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "replace_noise_and_constant"]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, []), "merge_utils.py", "exec"), names)
    return names["replace_noise_and_constant"]


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in sorted(values)])


def main(clone: str) -> None:
    """Write an adapter, and what each function made of it in each case."""
    (evaluation, ties), constant = authors(Path(clone)), noise_and_constant(Path(clone))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for method, start in (("lora", 0.0), ("ia3", 1.0)):
        stored = {f"tuned.{name}": value for name, value in get_peft_model_state_dict(tuned(method)).items()}
        for number, case in enumerate(CASES):
            model = tuned(method)
            weights = get_peft_model_state_dict(model)
            change = flat(weights) - start
            _, mask = ties.topk_values_mask(change, K=case["k"], return_mask=True)
            changed = constant(change.clone(), ~mask, case["alpha"], change.sign()) + start

            if method == "lora":
                made = ties.get_compressed_lora_weights(weights, case["k"], case["alpha"])
            else:
                evaluation.compress_and_update_parms(model, case["k"], case["alpha"], method)
                made = get_peft_model_state_dict(model)
            stored |= {f"{number}.all.{name}": value.detach().clone() for name, value in made.items()}
            sizes = [weights[name].numel() for name in sorted(weights)]
            parts = dict(zip(sorted(weights), changed.split(sizes), strict=True))
            stored |= {f"{number}.kept.{name}": part.reshape(weights[name].shape) for name, part in parts.items()}
        save_file({name: value.contiguous() for name, value in stored.items()}, FOLDER / f"{method}.safetensors")
    record = {"commit": COMMIT, "peft": peft.__version__, "torch": torch.__version__, "cases": CASES}
    (FOLDER / "cases.json").write_text(json.dumps(record | {"configs": CONFIGS}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
