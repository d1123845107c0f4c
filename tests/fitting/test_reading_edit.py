"""An edit of labelled texts is a place and a formula, and the same in `fit` and without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from statements import Module
from statements import trainer as quiet
from tiny_models import tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_peft import ComputedAdapter, adapters, edit, edit_caa, edit_iti
from lightning_peft.backbone.layers import LayerSite
from lightning_peft.callbacks import CAA, ITI, Ablation, ActAdd, LoRA, ReadingEdit, RepE
from lightning_peft.editing import caa_vectors, layer_offsets_config, layer_sites
from lightning_peft.stack.computed import saved_key
from lightning_peft.stack.stack import stack_of

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = [f"Q: {who} is {what}? A: {answer}" for who in ("he", "she", "it") for what in ("true", "false", "who")
         for answer in ("It is.", "It is not so.")]  # fmt: skip
LABEL = [i % 2 for i in range(len(TEXTS))]
GROUP = [i // 2 for i in range(len(TEXTS))]
ENDS = ["Q: he is it? A: true Q: who is it?", "Q: she is it? A: not Q: what?", "Q: it is so? A: he Q: she is?"]


class Data(L.LightningDataModule):
    """The same texts in the same batches."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.made = tokenizer

    def train_dataloader(self) -> DataLoader:
        def collate(rows: list[int]) -> dict[str, Tensor]:
            batch = self.made([TEXTS[i] for i in rows], padding=True, return_tensors="pt")
            label, group = ([column[i] for i in rows] for column in (LABEL, GROUP))
            return {**batch, "label": torch.tensor(label), "group": torch.tensor(group)}

        return DataLoader(range(len(TEXTS)), batch_size=16, collate_fn=collate)  # type: ignore[arg-type]


def fitted(method: ReadingEdit[Any], tokenizer: Any) -> Module:
    module = Module()
    module.tokenizer = tokenizer
    quiet(method).fit(module, datamodule=Data(tokenizer))
    return module


def check_same(module: nn.Module, other: nn.Module, name: str) -> None:
    one, two = adapters(module), adapters(other)
    a, b = one.tensors(one[name]), two.tensors(two[name])
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and any(v.any() for v in a.values())
    assert one[name].record == two[name].record and one[name].config.to_dict() == two[name].config.to_dict()


METHODS: dict[str, Callable[[], ReadingEdit[Any]]] = {
    "iti": lambda: ITI(num_heads=3, val_fraction=0.3),
    "gated iti": lambda: ITI(num_heads=3, val_fraction=0.3, gate="adaptive", strength="accuracy"),
    "caa": lambda: CAA(multiplier=2.0),
    "gated caa": lambda: CAA(layers="1:", gate="conditional"),
    "repe": lambda: RepE(),
    "ablation": lambda: Ablation(),
    "act_add": lambda: ActAdd("true", "not so"),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_without_a_trainer_it_is_what_fit_gives(
    make: Callable[[], ReadingEdit[Any]], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    module, model, method = fitted(make(), tiny_tokenizer), tiny("llama"), make()
    put = edit(model, tiny_tokenizer, TEXTS, LABEL, GROUP, method)
    assert put is adapters(model)[method.name] and put.computed and method.edit_ is not None
    check_same(module.backbone, model, method.name)


def test_labels_may_be_truth_values_and_no_text_is_one_sentence(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model, other = tiny("llama"), tiny("llama")
    edit_caa(model, tiny_tokenizer, TEXTS, [bool(i) for i in LABEL], GROUP)
    edit_caa(other, tiny_tokenizer, TEXTS, LABEL, GROUP)
    check_same(model, other, "caa")
    with pytest.raises(ValueError, match=r"^There is no text to read: give texts of both labels\.$"):
        edit_caa(model, tiny_tokenizer, [], [], [])


def test_the_named_functions_take_the_options_of_their_method(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("llama")
    edit_iti(model, tiny_tokenizer, TEXTS, torch.tensor(LABEL), GROUP, num_heads=3, val_fraction=0.3)
    check_same(fitted(METHODS["iti"](), tiny_tokenizer).backbone, model, "iti")
    model = tiny("llama")
    edit_caa(model, tiny_tokenizer, TEXTS, LABEL, GROUP, multiplier=2.0)
    check_same(fitted(METHODS["caa"](), tiny_tokenizer).backbone, model, "caa")


def test_sigma_is_taken_over_other_texts_where_they_are_given(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model, options = tiny("llama"), {"num_heads": 3, "val_fraction": 0.3}
    put = edit_iti(model, tiny_tokenizer, TEXTS, LABEL, GROUP, sigma_texts=ENDS, **options)
    assert put.record["sigma_texts"] == len(ENDS)
    check_same(fitted(ITI(question_ends=True, sigma_texts=ENDS, **options), tiny_tokenizer).backbone, model, "iti")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^ITI takes sigma over texts that end in a question, and has none: gi"):
        edit_iti(tiny("llama"), tiny_tokenizer, TEXTS, LABEL, GROUP, question_ends=True, **options)


def test_a_second_edit_of_a_lightning_module_reads_it_without_the_first(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    module = Module()
    first = edit_caa(module, tiny_tokenizer, TEXTS, LABEL, GROUP)
    again = edit_caa(module, tiny_tokenizer, TEXTS, LABEL, GROUP)
    assert adapters(module).parts == [again] and again is not first and again.record == first.record


def test_what_is_on_the_model_acts_while_texts_are_read_and_the_model_keeps_its_mode(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    module, callback = Module(), LoRA(r=2)
    callback.apply(module)
    lora = adapters(module)["lora"]
    generator = torch.Generator().manual_seed(0)
    for tensor in adapters(module).live(lora).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    module.backbone.train()
    put = edit_caa(module, tiny_tokenizer, TEXTS, LABEL, GROUP)
    assert module.backbone.training and [part.name for part in adapters(module).parts] == ["lora", "caa"]
    assert put.record["norms"] != edit_caa(tiny("llama"), tiny_tokenizer, TEXTS, LABEL, GROUP).record["norms"]


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (
            LABEL[1:],
            {},
            r"^Each text needs one label and one group, but there are 18 texts, 17 labels and 18 groups\.$",
        ),
        (
            [1] * len(TEXTS),
            {"num_heads": 3},
            r"^Statements of both classes are needed, truth 0 and 1; the .* are \[1\]\.$",
        ),
        ([2, *LABEL[1:]], {}, r"^ITI reads label as 1 \(wanted, true\) or 0 \(not\), got 0, 1, 2: make them so, or "),
        (LABEL, {"num_heads": 13}, r"^num_heads is 13, but the model has 12 heads\.$"),
    ],
)
def test_what_cannot_be_computed_is_one_sentence_and_leaves_the_model_as_it_was(
    label: list[int], options: dict[str, Any], message: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny("llama").train()
    with pytest.raises(ValueError, match=message):
        edit_iti(model, tiny_tokenizer, TEXTS, label, GROUP, **options)
    assert not stack_of(model).parts and model.training and all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class MiddleLayer(ReadingEdit[LayerSite]):
    """A method of a user's own: CAA, written down again."""

    default_name = "middle"

    def find_sites(self, backbone: nn.Module) -> Sequence[LayerSite]:
        sites = layer_sites(backbone, "block")
        return sites[len(sites) // 2 :][:1]

    def empty_config(self, sites: Sequence[LayerSite]) -> Any:
        return layer_offsets_config(sites, alpha=2.0)

    def edit(self, activations: Tensor, label: Tensor, group: Tensor, sites: Sequence[LayerSite]) -> ComputedAdapter:
        vectors = caa_vectors(activations, label, group)
        keys = [saved_key(site.name, "layer_edits.layer_offsets") for site in sites]
        return ComputedAdapter(self.empty_config(sites), dict(zip(keys, vectors[:, None], strict=True)), {"by": "hand"})


def test_a_method_of_ones_own_is_a_place_and_a_formula(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    module, ours = fitted(MiddleLayer(), tiny_tokenizer), tiny("llama")
    edit(ours, tiny_tokenizer, TEXTS, LABEL, GROUP, CAA(multiplier=2.0))
    stack, other = adapters(module), adapters(ours)
    own, caa = stack.tensors(stack["middle"]), other.tensors(other["caa"])
    assert own.keys() == caa.keys() and all(torch.equal(own[key], caa[key]) for key in own)
    assert stack["middle"].record == {"by": "hand"}


def test_what_the_user_had_put_on_the_module_comes_back_after_fit(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    module = Module()

    def own(batch: Any, batch_idx: int) -> None:
        raise AssertionError("an edit trains nothing")

    module.training_step = own  # type: ignore[method-assign]
    before = dict(vars(module))
    quiet(CAA()).fit(module, datamodule=Data(tiny_tokenizer))
    assert module.__dict__["training_step"] is own and "configure_optimizers" not in module.__dict__
    assert module.automatic_optimization and before.keys() <= vars(module).keys()
