"""Write the numbers of composable-sft's LT-SFT (Ansell et al. 2022) that `tests/parity/with_composable_sft.py` reads.

Environment (Python 3.11): pip install torch==2.13.0 transformers==4.36.2 accelerate==0.25.0 datasets==2.15.0
A clone of github.com/cambridgeltl/composable-sft at 29f7872d018555ee84fb9620ba7d69df426a7bdb; its path is the argument:

python benchmarks/parity/composable_sft.py composable-sft

Their Trainer is run as it is, on tiny models in float64 of which every parameter may be chosen. Four of its
surroundings are fixed, so that a run can be repeated elsewhere: examples come in order, the learning rate is constant,
nothing decays, and the loss is the mean cross-entropy in float64 (transformers' own is in float32 since 4.40).

Their L1 penalty has no gradient: `_original_params` are copied with `copy_` while autograd records, so that in
`abs(p - original)` the slope by `p` and that by its copy cancel. Cases "detached" cut the copies from the graph first,
which gives the penalty that the paper has; the others are run as published.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "tests/parity/fixtures/composable_sft"
ROWS, BATCH, PHASE, CLASSES = 12, 4, 6, 24  # an epoch is 3 steps, a phase 6
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": CLASSES, "max_position_embeddings": 16, "attn_implementation": "eager"}
OPTIMIZERS = {"sgd": 0.5, "adam": 0.01}  # learning rates
PENALTIES = ((0.0, 0.0, False), (3.0, 0.5, False), (3.0, 0.5, True))  # L1, largest norm of a gradient, see above
KEPT = 60  # entries, a multiple of all numbers of iterations


def models() -> dict[str, nn.Module]:
    """Return the tiny models, random and in float64."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gpt2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    torch.manual_seed(0)
    made = {
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **TEXT, **no_dropout)),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=CLASSES, n_positions=16, attn_pdrop=0.0, **gpt2)
        ),
        "vit": transformers.ViTModel(
            transformers.ViTConfig(**SIZES, **no_dropout, image_size=4, patch_size=2), add_pooling_layer=False
        ),
    }
    for model in made.values():
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return {name: model.double() for name, model in made.items()}


def examples(kind: str) -> dict[str, Tensor]:
    """Return the inputs and labels of all rows."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(ROWS, 3, 4, 4, generator=generator, dtype=torch.float64)}
        return inputs | {"labels": torch.randint(5, (ROWS,), generator=generator)}
    ids = torch.randint(3, CLASSES, (ROWS, 5), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(3, CLASSES, (ROWS, 5), generator=generator)}


class InOrder(transformers.Trainer):
    """A Trainer that reads its examples in order and takes the loss in the model's precision."""

    def _get_train_sampler(self) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False) -> Tensor:
        labels = inputs["labels"].flatten()
        output = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = output.logits if "logits" in output else output.last_hidden_state[:, 0]  # a ViT has no head here
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels)


def tuned(sft: Any, model: nn.Module, data: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Tensor]:
    """Run their fine-tuning in place, and return the masks."""
    arguments = transformers.TrainingArguments(
        "/tmp/composable_sft",
        per_device_train_batch_size=BATCH,
        learning_rate=OPTIMIZERS[case["optimizer"]],
        optim={"sgd": "sgd", "adam": "adamw_torch"}[case["optimizer"]],
        lr_scheduler_type="constant",
        max_grad_norm=case["clip"],
        weight_decay=0.0,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
    )
    rows = [{name: value[row] for name, value in data.items()} for row in range(ROWS)]
    trainer = sft.LotteryTicketSparseFineTuner(InOrder)(
        model=model,
        args=arguments,
        train_dataset=rows,
        sft_args=sft.SftArguments(
            ft_params_num=KEPT,
            n_ft_iterations=case["iterations"],
            full_l1_reg=case["l1"],
            sparse_l1_reg=case["l1"],
            full_ft_max_steps_per_iteration=PHASE,
            sparse_ft_max_steps_per_iteration=PHASE,
        ),
    )
    if case["detached"]:
        trainer._original_params = {name: value.detach() for name, value in trainer._original_params.items()}
    trainer.train()
    return {name: mask.detach() for name, mask in trainer._mask.items()}


def main(clone: str) -> None:
    """Write an initial model, its examples, and what each case made of it."""
    sys.path.insert(0, str(Path(clone) / "src"))
    import sft

    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    cases = [
        {"optimizer": optimizer, "iterations": iterations, "l1": l1, "clip": clip, "detached": detached}
        for optimizer, iterations, (l1, clip, detached) in itertools.product(OPTIMIZERS, (1, 2, 3), PENALTIES)
        if detached or not l1 or (optimizer, iterations) == ("adam", 2)
    ]
    for kind, model in models().items():
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        data = examples(kind)
        stored = {f"start.{n}": v for n, v in start.items()} | {f"data.{n}": v for n, v in data.items()}
        for number, case in enumerate(cases):
            if kind == "vit" and case["iterations"] != 2:
                continue
            for name, parameter in model.named_parameters():
                parameter.data.copy_(start[name])
            masks = tuned(sft, model, data, case)
            for name, parameter in model.named_parameters():
                change = parameter.detach() - start[name]
                assert not change[~masks[name]].any()
                stored[f"{number}.kept.{name}"] = masks[name].flatten().nonzero()[:, 0].to(torch.int16)
                stored[f"{number}.change.{name}"] = change[masks[name]]
            print(kind, case, sum(int(mask.sum()) for mask in masks.values()))
        save_file({name: value.contiguous() for name, value in stored.items()}, FOLDER / f"{kind}.safetensors")
    record = {
        "commit": "29f7872d018555ee84fb9620ba7d69df426a7bdb",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "kept": KEPT,
        "phase": PHASE,
        "batch": BATCH,
        "learning_rates": OPTIMIZERS,
        "cases": cases,
    }
    (FOLDER / "cases.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
