"""`fit` with ROME or MEMIT reads keys from any text, then writes facts; afterwards they are a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from edits import close, logits
from statements import Module, Statements, trainer
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor
from tuning import base_weights, one_sentence, same

from lightning_peft import adapters, load_from_checkpoint
from lightning_peft.callbacks import ITI, MEMIT, ROME, LoRA
from lightning_peft.editing.capture import Capture
from lightning_peft.editing.facts import Fact, KeyMoments, Search, compute_rome, memory_sites

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode", "ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*Checkpoint directory"),
]
FACTS = [
    Fact("he", "Who is {}? A:", "true", "false", ("Q: is {}",), ("she", "it")),
    Fact("she", "Q: Who is {}? A:", "false", "true", ("What is {}",), ("he",)),
]
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(7))
DATA = Statements(drop=("label", "group", "prompt_end"))
QUICK: dict[str, Any] = {"v_num_grad_steps": 2, "clamp_norm_factor": 50.0, "shrinkage": 0.1, "prefixes": 0}


def knowing(tokenizer: Any, kind: str = "llama") -> Module:
    """A module that has its tokenizer, as `lightning_peft.models.CausalLM` does."""
    module = Module(kind)
    module.tokenizer = tokenizer
    return module


def rome(**options: Any) -> ROME:
    return ROME(**({"facts": FACTS, "layer": 1} | QUICK | options))


def memit(**options: Any) -> MEMIT:
    return MEMIT(**({"facts": FACTS, "layers": [0, 1]} | QUICK | options))


def fitted(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    made = trainer(*callbacks, **options)
    made.fit(module, DATA.loader(), DATA.loader())
    return made


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_edit_is_that_of_the_keys_read_text_by_text(kind: str, tiny_tokenizer) -> None:
    module, callback = knowing(tiny_tokenizer, kind), rome()
    before = base_weights(module)
    fitted(module, callback)
    model = tiny(kind)
    moments = KeyMoments(memory_sites(model, [1]))
    keys: list[Tensor] = []
    handle = model.get_submodule(moments.sites[0].name).register_forward_pre_hook(lambda _, a: keys.append(a[0]))
    for row in DATA.rows:
        logits(model, row["input_ids"][row["attention_mask"] == 1][None])
    handle.remove()
    moments.update(torch.cat([k.reshape(-1, k.shape[-1]) for k in keys])[:, None, None])
    expected = compute_rome(model, tiny_tokenizer, FACTS, moments, [""], Search(2, clamp_norm_factor=50.0), 0.1)
    name = moments.sites[0].name
    assert callback.edit_ is not None and close(callback.edit_.dense(name), expected.dense(name), 1e-3)
    assert same(base_weights(module), before) and module.steps == 0
    expected.install(model)
    assert close(logits(module.backbone, TOKENS), logits(model, TOKENS), 1e-4)


@pytest.mark.parametrize("make", [rome, memit])
def test_it_is_a_lora_adapter_with_a_dial_an_off_switch_and_a_record(make: Any, tiny_tokenizer) -> None:
    module = knowing(tiny_tokenizer)
    base = logits(module.backbone, TOKENS)
    made = fitted(module, callback := make())
    stack = adapters(module)
    part = stack[callback.name]
    assert part.computed and type(part.config).__name__ == "LoraConfig" and part.config.r == len(FACTS)
    assert part.record == callback.edit_.record and part.record["facts"][0]["new"] == "false"
    stored = sum(tensor.numel() for tensor in stack.tensors(part).values())
    assert made.callback_metrics["edited_parameters"] == stored
    assert not close(logits(module.backbone, TOKENS), base)
    with stack.disabled():
        assert torch.equal(logits(module.backbone, TOKENS), base)


@pytest.mark.parametrize("make", [rome, memit])
def test_a_checkpoint_brings_it_back(make: Any, tmp_path: Path, tiny_tokenizer) -> None:
    module = knowing(tiny_tokenizer, "gpt2")
    made = fitted(module, make(), enable_checkpointing=True, default_root_dir=tmp_path)
    made.save_checkpoint(tmp_path / "edit.ckpt")
    loaded = load_from_checkpoint(Module, tmp_path / "edit.ckpt")
    assert torch.equal(logits(loaded.backbone.eval(), TOKENS), logits(module.backbone.eval(), TOKENS))


@pytest.mark.parametrize("make", [ROME, MEMIT])
def test_without_a_layer_the_trace_chooses(make: Any, tiny_tokenizer) -> None:
    callback = make(facts=FACTS, **QUICK)
    fitted(knowing(tiny_tokenizer), callback)
    best = int(callback.trace_[:-1].argmax())
    assert callback.edit_.record["layers"] == list(range(best if make is ROME else 0, best + 1))


def test_rome_after_lora_is_computed_on_top_of_it(tiny_tokenizer) -> None:
    module = knowing(tiny_tokenizer)
    fitted(module, LoRA(r=2, target_modules=["down_proj"]))
    tuned = logits(module.backbone.eval(), TOKENS)
    fitted(module, rome())
    stack = adapters(module)
    assert [part.name for part in stack.parts] == ["lora", "rome"]
    assert not close(logits(module.backbone, TOKENS), tuned)
    stack.remove("rome")
    assert torch.equal(logits(module.backbone, TOKENS), tuned)


def test_a_second_fit_writes_the_facts_anew(tiny_tokenizer) -> None:
    module = knowing(tiny_tokenizer)
    fitted(module, rome())
    once = logits(module.backbone, TOKENS)
    fitted(module, rome())
    assert close(logits(module.backbone, TOKENS), once)


class Watched(ROME):
    """Tells which prefixes it was given."""

    def _edit(self, model: Any, moments: KeyMoments, prefixes: list[str]) -> Any:
        self.seen = prefixes
        return super()._edit(model, moments, [""])


def test_prefixes_come_from_the_batches_text(tiny_tokenizer) -> None:
    callback = Watched(FACTS, layer=1, **(QUICK | {"prefixes": 3}))
    fitted(knowing(tiny_tokenizer), callback)
    texts = tiny_tokenizer.batch_decode([row["input_ids"].tolist() for row in DATA.rows], skip_special_tokens=True)
    assert len(callback.seen) == 4 and callback.seen[0] == ""
    assert all(any(prefix in " ".join(text.split()) for text in texts) for prefix in callback.seen)


def test_prefixes_may_be_given_as_texts(tiny_tokenizer) -> None:
    callback = Watched(FACTS, layer=1, **(QUICK | {"prefixes": ["It is not", "Who"]}))
    fitted(knowing(tiny_tokenizer), callback)
    assert callback.seen == ["", "It is not", "Who"]


@pytest.mark.parametrize("make", [rome, memit])
def test_computed_as_the_authors_do_it_is_another_edit_and_says_so(make: Any, tiny_tokenizer) -> None:
    edits = {}
    for reference in (True, False):
        callback = make(reference=reference, prefixes=["It is not"])
        fitted(module := knowing(tiny_tokenizer), callback)
        assert adapters(module)[callback.name].record["reference"] is reference
        edits[reference] = callback.edit_
    model, name = tiny("llama"), next(iter(edits[True].factors))
    assert not close(edits[True].dense(name), edits[False].dense(name), 1e-2)
    if make is rome:
        moments = KeyMoments(memory_sites(model, [1]))
        with torch.no_grad(), Capture(model, moments.sites, "all") as capture:
            for batch in DATA.loader():
                moments.update(capture(batch["input_ids"], batch["attention_mask"]))
        search = Search(2, clamp_norm_factor=50.0)
        expected = compute_rome(model, tiny_tokenizer, FACTS, moments, ["", "It is not"], search, 0.1, reference=True)
        assert close(edits[True].dense(name), expected.dense(name), 1e-3)


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda: rome(layer=9), "layer 9"),
        (lambda: memit(layers=[1, 0]), "ascending"),
        (lambda: rome(shrinkage=0.0), "singular"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(callback: Any, said: str, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match=said) as error:
        fitted(knowing(tiny_tokenizer), callback(), limit_train_batches=1)
    assert one_sentence(str(error.value))


def test_a_module_without_a_tokenizer_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="no attribute tokenizer") as error:
        fitted(Module(), rome())
    assert one_sentence(str(error.value))


def test_a_batch_without_text_is_one_sentence(tiny_tokenizer) -> None:
    data = Statements(drop=("input_ids",))
    with pytest.raises(ValueError, match="no input_ids") as error:
        module = knowing(tiny_tokenizer)
        module.on_train_batch_start = lambda *_: None  # type: ignore[method-assign]
        trainer(rome()).fit(module, data.loader())
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    "option",
    [
        {"shrinkage": 2.0},
        {"prefixes": -1},
        {"prefixes": ["It is", ""]},
        {"prefixes": [3]},
        {"v_lr": 0.0},
        {"facts": []},
        {"numbers": [999], "facts": None},
    ],
)
def test_an_argument_out_of_range_is_one_sentence(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        rome(**option)
    assert one_sentence(str(error.value))


def test_another_edit_cannot_share_the_fit(tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="takes the whole of fit"):
        fitted(knowing(tiny_tokenizer), rome(), ITI(num_heads=2))


@pytest.mark.real_model
@pytest.mark.slow
def test_on_a_real_model_rome_makes_the_new_object_the_likelier_one(smollm2: Path) -> None:
    from lightning_peft.editing.facts import key_moments, read_facts, score_facts
    from lightning_peft.effects import text_slice
    from lightning_peft.models import CausalLM

    module, fact = CausalLM(str(smollm2)), read_facts(numbers=[0])
    model, tokenizer = module.backbone, module.tokenizer
    assert score_facts(model, tokenizer, fact)["efficacy"].success == 0
    moments = key_moments(model, tokenizer, text_slice().documents, [5], tokens=500)
    compute_rome(model, tokenizer, fact, moments, search=Search(stop=0.5), shrinkage=0.1).install(model)
    assert score_facts(model, tokenizer, fact)["efficacy"].success == 1
    with adapters(module).disabled():
        assert score_facts(model, tokenizer, fact)["efficacy"].success == 0
