"""An edit touches exactly the tokens its policy names: with and without cache, padded on either side, in any batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, get_peft_model
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from lightning_peft import bake, save_adapter, steering
from lightning_peft.editing import head_offsets_config, head_sites, layer_offsets_config, layer_sites
from lightning_peft.editing.reading import Way, read_texts
from lightning_peft.effects import cross_entropy, kl
from lightning_peft.positions import PlainTextWarning, PositionsError, answering, plain_text, policies, track
from lightning_peft.stack.stack import AdapterStack, stack_of


def edited(kind: str, positions: str = "answer") -> tuple[nn.Module, AdapterStack]:
    model = tiny(kind)
    stack = stack_of(model)
    sites = head_sites(model)
    part = stack.add(head_offsets_config(sites, [(0, 1), (1, 0), (2, 3)], 2.0, positions), "edit", computed=True)
    generator = torch.Generator().manual_seed(3)
    for tensor in stack.tensors(part).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model, stack


def head_offsets(model: nn.Module) -> PeftConfig:
    return head_offsets_config(head_sites(model))


def layer_offsets(model: nn.Module) -> PeftConfig:
    return layer_offsets_config(layer_sites(model))


def position_ids(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def plain_generate(model: nn.Module, prompt: Tensor, start: int, steps: int) -> Tensor:
    """Greedy decoding without cache, with the answer's start given: what `generate` must equal."""
    ids = prompt
    for _ in range(steps):
        with torch.no_grad(), answering(model, start=torch.tensor([start])):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompt.shape[1] :]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_generate_with_cache_equals_no_cache(kind: str, tokens: Tensor) -> None:
    model, stack = edited(kind)
    prompt = tokens[:1]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)[:, prompt.shape[1] :]
    uncached = model.generate(prompt, attention_mask=mask, use_cache=False, **options)[:, prompt.shape[1] :]
    assert torch.equal(cached, uncached)
    with stack.disabled():
        base = model.generate(prompt, attention_mask=mask, use_cache=True, **options)[:, prompt.shape[1] :]
    assert not torch.equal(cached, base), "the edit must show, or this test says nothing"


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_generate_equals_scoring_positions(kind: str, tokens: Tensor) -> None:
    model, _ = edited(kind)
    model.generation_config.eos_token_id = None
    prompt = tokens[:1]
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert torch.equal(made[:, prompt.shape[1] :], plain_generate(model, prompt, prompt.shape[1] - 1, 6))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_batch_equals_alone(kind: str, beams: int, tokens: Tensor) -> None:
    model, _ = edited(kind)
    lengths = (9, 5, 3)
    ids, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = tokens[row, :length], 1
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    together = model.generate(ids, attention_mask=mask, **options)[:, -6:]
    for row, length in enumerate(lengths):
        prompt = tokens[row : row + 1, :length]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, -6:]
        assert torch.equal(together[row], alone[0]), f"row {row}"


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(kind: str, side: str, tokens: Tensor) -> None:
    model, _ = edited(kind)
    row, starts = tokens[:1, :6], torch.tensor([3])
    with torch.no_grad(), answering(model, start=starts):
        alone = model(input_ids=row, attention_mask=torch.ones_like(row), position_ids=torch.arange(6)[None]).logits
    ids, mask = tokens.clone(), torch.ones_like(tokens)
    real = slice(0, 6) if side == "right" else slice(3, 9)
    ids[0], mask[0] = 0, 0
    ids[0, real], mask[0, real] = row[0], 1
    with torch.no_grad(), answering(model, start=torch.tensor([3, 2, 5])):
        batch = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits
    torch.testing.assert_close(batch[0, real], alone[0], atol=1e-4, rtol=1e-4)


def test_answer_leaves_the_prompt_alone_and_reaches_the_last_prompt_token(tokens: Tensor) -> None:
    model, stack = edited("llama")
    with torch.no_grad():
        with stack.disabled():
            base = model(input_ids=tokens).logits
        with answering(model, start=torch.tensor([4, 4, 4])):
            moved = model(input_ids=tokens).logits
    same = [torch.equal(base[:, t], moved[:, t]) for t in range(tokens.shape[1])]
    assert same == [True] * 4 + [False] * 5


def test_generated_begins_one_token_later(tokens: Tensor) -> None:
    model, stack = edited("llama", "generated")
    with torch.no_grad():
        with stack.disabled():
            base = model(input_ids=tokens).logits
        with answering(model, start=torch.tensor([4, 4, 4])):
            moved = model(input_ids=tokens).logits
    assert [torch.equal(base[:, t], moved[:, t]) for t in range(9)] == [True] * 5 + [False] * 4


def test_labels_say_where_the_answer_begins(tokens: Tensor) -> None:
    model, _ = edited("llama")
    labels = torch.full_like(tokens, -100)
    labels[:, 5:] = tokens[:, 5:]
    with torch.no_grad():
        by_labels = model(input_ids=tokens, labels=labels).logits
        with answering(model, start=torch.tensor([4, 4, 4])):
            by_start = model(input_ids=tokens).logits
        with answering(model, mask=torch.arange(9).ge(4).expand(3, 9)):
            by_mask = model(input_ids=tokens).logits
    assert torch.equal(by_labels, by_start) and torch.equal(by_labels, by_mask)


def test_row_without_labels_is_not_edited(tokens: Tensor) -> None:
    model, stack = edited("llama")
    labels = torch.full_like(tokens, -100)
    labels[0, 5:] = tokens[0, 5:]
    with torch.no_grad():
        moved = model(input_ids=tokens, labels=labels).logits
        with stack.disabled():
            base = model(input_ids=tokens).logits
    assert torch.equal(moved[1:], base[1:]) and not torch.equal(moved[0], base[0])


def test_plain_text_is_edited_everywhere(tokens: Tensor) -> None:
    answer, _ = edited("llama")
    everywhere, _ = edited("llama", "all")
    with torch.no_grad():
        torch.testing.assert_close(answer(input_ids=tokens).logits, everywhere(input_ids=tokens).logits)


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which no edit has acted on plain text yet."""
    monkeypatch.setattr(policies, "_warned", False)


def plain_text_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if issubclass(warning.category, PlainTextWarning)]


@pytest.mark.usefixtures("unwarned")
def test_a_call_that_does_not_say_where_its_answer_begins_is_warned_of_once(tokens: Tensor) -> None:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for kind in ("llama", "gpt2", "llama"):
            edited(kind)[0](input_ids=tokens)
    [sentence] = plain_text_warnings(caught)
    assert "'answer' positions acts on every token of a call of LlamaForCausalLM" in sentence
    for way in (
        "prompt_end",
        "labels",
        "answering(model",
        "plain_text(model)",
        'positions="all"',
        "lightning-peft lm-eval",
    ):
        assert way in sentence


@pytest.mark.usefixtures("unwarned")
def test_compiled_calls_are_warned_of_too(tokens: Tensor) -> None:
    model, _ = edited("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with plain_text(model):
            quiet = compiled(tokens).logits
        assert plain_text_warnings(caught) == []
        assert torch.equal(compiled(tokens).logits, quiet) and torch.equal(compiled(tokens).logits, quiet)
    assert len(plain_text_warnings(caught)) == 1


@pytest.mark.usefixtures("unwarned")
def test_whoever_says_it_is_not_warned(tokens: Tensor, tmp_path: Path) -> None:
    answer, stack = edited("llama")
    everywhere, _ = edited("llama", "all")
    labels = tokens.masked_fill(torch.arange(9) < 5, -100)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", PlainTextWarning)
        everywhere(input_ids=tokens)
        answer(input_ids=tokens, labels=labels)
        with answering(answer, start=torch.tensor([4])):
            answer(input_ids=tokens)
        with plain_text(answer):
            everywhere_by_word = answer(input_ids=tokens).logits
        with stack.disabled():
            answer(input_ids=tokens)
        cross_entropy(answer, None, tokens)
        kl(answer, "edit", tokens)
        list(read_texts(answer, layer_sites(answer), tokens.tolist(), [[8]] * 3, Way()))
        bake(tiny("llama"), save_adapter(answer, tmp_path / "edit"), tmp_path / "baked")
        answer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2)
    assert torch.equal(everywhere_by_word, everywhere(input_ids=tokens).logits)


def test_plain_text_is_no_more_than_what_stands_in_for_other_signs(tokens: Tensor) -> None:
    model, _ = edited("llama")
    labels = tokens.masked_fill(torch.arange(9) < 5, -100)
    with torch.no_grad():
        by_labels = model(input_ids=tokens, labels=labels).logits
        with plain_text(model):
            assert torch.equal(model(input_ids=tokens, labels=labels).logits, by_labels)
    assert not any(vars(track(model).known).values())


def test_a_cached_past_without_a_start_is_an_error(tokens: Tensor) -> None:
    model, _ = edited("llama")
    with torch.no_grad(), answering(model, start=torch.tensor([8, 8, 8])):
        past = model(input_ids=tokens, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(PositionsError, match="nothing says where the answer began"):
        model(input_ids=tokens[:, :1], past_key_values=past)


def test_chunked_prefill_equals_one_call(tokens: Tensor) -> None:
    model, _ = edited("llama")
    with torch.no_grad(), answering(model, start=torch.tensor([4, 5, 6])):
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :5], use_cache=True)
        second = model(input_ids=tokens[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-4, rtol=1e-4)


def test_outside_forward_is_an_error(tokens: Tensor) -> None:
    model, _ = edited("llama")
    with torch.no_grad(), pytest.raises(PositionsError, match="call the backbone itself"):
        model.model(input_ids=tokens)


def test_wrong_number_of_rows_is_an_error(tokens: Tensor) -> None:
    model, _ = edited("llama")
    with answering(model, start=torch.tensor([1, 1])), pytest.raises(PositionsError, match="2 answer starts"):
        model(input_ids=tokens)


def test_a_copy_has_positions_of_its_own(tokens: Tensor) -> None:
    model, _ = edited("llama")
    twin = copy.deepcopy(model)
    assert track(twin) is not track(model) and track(twin).model is twin
    made = [m.generate(tokens[:1], attention_mask=torch.ones(1, 9), max_new_tokens=4) for m in (model, twin)]
    assert torch.equal(*made)


def test_nothing_is_left_over_from_a_call(tokens: Tensor) -> None:
    model, _ = edited("llama")
    with torch.no_grad(), answering(model, start=torch.tensor([4])):
        model(input_ids=tokens)
    positions = track(model)
    assert positions.running.seen is None and not any(vars(positions.known).values())


def on_it(model: nn.Module) -> dict[str, object]:
    """What stands on the model itself."""
    hooks = {name: list(value) for name, value in vars(model).items() if "_hooks" in name}
    return {name: id(value) for name, value in vars(model).items() if name not in hooks} | hooks


def saved_edit(folder: Path, kind: str = "llama") -> Path:
    model, _ = edited(kind)
    return save_adapter(model, folder / "edit")


def test_the_last_edit_taken_off_leaves_the_model_as_it_was(tokens: Tensor, tmp_path: Path) -> None:
    folder, model = saved_edit(tmp_path), tiny("llama")
    before, written = on_it(model), model.generate(max_new_tokens=3, do_sample=False, bos_token_id=1)
    with steering(model, folder):
        with steering(model, folder, scale=0.5):
            pass
        assert "generate" in vars(model), "the outer edit still needs it"
    assert on_it(model) == before
    stack = stack_of(model)
    for name in ("one", "two"):
        stack.add(layer_offsets_config(layer_sites(model)), name, computed=True)
    stack.remove("one")
    model.generate(tokens[:1], attention_mask=torch.ones(1, 9), max_new_tokens=2)
    stack.remove("two")
    assert on_it(model) == before
    assert torch.equal(model.generate(max_new_tokens=3, do_sample=False, bos_token_id=1), written)
    stack.add(layer_offsets_config(layer_sites(model)), "again", computed=True)
    assert stack_of(model) is stack


@pytest.mark.parametrize("config", [head_offsets, layer_offsets])
def test_what_peft_unloads_leaves_the_model_as_it_was(config: Callable[[nn.Module], PeftConfig]) -> None:
    model = tiny("llama")
    before = on_it(model)
    wrapped = get_peft_model(model, config(model))
    assert "generate" in vars(model)
    assert {name: value for name, value in on_it(wrapped.unload()).items() if name in before} == before
    assert "generate" not in vars(model)


def test_a_generate_that_somebody_put_there_is_called_and_comes_back(tokens: Tensor, tmp_path: Path) -> None:
    folder, model, calls = saved_edit(tmp_path), tiny("llama"), []
    inner = model.generate
    model.generate = own = lambda *a, **k: calls.append(1) or inner(*a, **k)
    with steering(model, folder):
        model.generate(tokens[:1], attention_mask=torch.ones(1, 9), max_new_tokens=2)
    assert calls == [1] and vars(model)["generate"] is own


def test_generate_without_a_prompt_works_where_the_edit_needs_none() -> None:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "bos_token_id": 1}
    everywhere, stack = edited("llama", "all")
    written = everywhere.generate(**options)
    assert torch.equal(written, everywhere.generate(torch.tensor([[1]]), attention_mask=torch.ones(1, 1), **options))
    with stack.disabled():
        assert not torch.equal(written, everywhere.generate(**options))
    with pytest.raises(PositionsError, match=r"^`generate` was called without a prompt of tokens, .*: pass input_ids"):
        edited("llama")[0].generate(**options)


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_a_model_whose_prompt_is_no_tokens_generates_where_the_edit_needs_none(positions: str) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 64, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    tokens = {name: 1 for name in ("decoder_start_token_id", "bos_token_id")} | {"pad_token_id": 0, "eos_token_id": 2}
    more = {"max_source_positions": 20, "max_target_positions": 20, "begin_suppress_tokens": None}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **tokens, **more)).eval()
    options = {"input_features": torch.randn(1, 8, 40), "max_new_tokens": 3, "do_sample": False}
    base = model.generate(**options)
    stack = stack_of(model)
    stack.add(layer_offsets_config(layer_sites(model, part="encoder"), positions=positions), "edit", computed=True)
    if positions == "all":
        assert torch.equal(model.generate(**options), base)
    else:
        with pytest.raises(PositionsError, match="without a prompt of tokens"):
            model.generate(**options)


def test_prefix_tuning_under_offsets_generates_without_a_cache(tokens: Tensor) -> None:
    model = tiny("gpt2")
    stack = stack_of(model)
    stack.add(PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "prefix")
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone = model.generate(input_ids=tokens, use_cache=False, **options)
    stack.add(head_offsets_config(head_sites(model), positions="all"), "offsets")
    for use_cache in (False, True):
        assert torch.equal(model.generate(input_ids=tokens, use_cache=use_cache, **options), alone)
