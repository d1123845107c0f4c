"""The harness's model type: every saved folder, every kind of request, the numbers of our own scorers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import add_lora, add_offsets, fill
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PromptTuningConfig
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tuning import QUIET

from lightning_peft import bake, load_adapter, save_adapter, steering
from lightning_peft.callbacks import BitFit, Houlsby, PrefixTuning
from lightning_peft.editing import head_offsets_config, head_sites, layer_offsets_config, layer_sites
from lightning_peft.effects import cross_entropy
from lightning_peft.harness import AdaptedLM
from lightning_peft.packing.batch_scores import by_logprob
from lightning_peft.packing.generation import GreedyWriter
from lightning_peft.positions import PlainTextWarning
from lightning_peft.stack.adapter_files.compression import compress_adapter
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import stack_of

pytestmark = [
    *(pytest.mark.filterwarnings(warning) for warning in QUIET),
    pytest.mark.filterwarnings("ignore:.*generation flags"),
]

# of unlike lengths; two of the same tokens, whose answers begin elsewhere; one without context
PAIRS = [
    ("Q: What is it?\nA:", " It is true."),
    ("Q: What is it?\nA:", " It is not false."),
    ("Q: What is it?\nA:", " It is not false"),
    ("Q: What is it?\nA: It is", " true."),
    ("Q: Who", " is he?"),
    ("", "He is she"),
]
TEXTS = ["Q: What is it?\nA: It is true. It is not false.", "Who is he?"]
PROMPTS = ["Q: What is it?\nA:", "Q: Who", "Q: Who is he? It is true.\nA:"]


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def choices(lm: HFLM) -> list[float]:
    return [score for score, _ in lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)]


def texts(lm: HFLM) -> list[float]:
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True)


def answers(lm: HFLM) -> list[str]:
    options = {"until": ["\n"], "max_gen_toks": 8}
    return lm.generate_until(requests("generate_until", [(prompt, options) for prompt in PROMPTS]), disable_tqdm=True)


def encoded(lm: HFLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if context:
        return lm._encode_pair(context, continuation)
    return [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)


def our_choices(model: nn.Module, lm: HFLM) -> list[float]:
    """Each by itself, as a comparison scores it."""
    scores = []
    for pair in PAIRS:
        context, continuation = encoded(lm, *pair)
        ids = torch.tensor([context + continuation])
        labels = torch.tensor([[-100] * len(context) + continuation])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        scores += by_logprob(model)(batch).tolist()
    return scores


def our_texts(model: nn.Module, lm: HFLM) -> list[float]:
    rows = [[lm.prefix_token_id, *lm.tok_encode(text)] for text in TEXTS]
    measured = cross_entropy(model, None, rows)
    return [-mean * count for mean, count in zip(measured.by_text, measured.tokens, strict=True)]


def our_answers(model: nn.Module, lm: HFLM) -> list[str]:
    rows = [torch.tensor(lm.tok_encode(prompt)) for prompt in PROMPTS]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    written = GreedyWriter(model, lm.tokenizer).write(ids, mask, lambda text: "\n" in text, max_new_tokens=8)
    return [text.split("\n")[0] for text in written]


def lora(model: nn.Module) -> None:
    add_lora(model, ["q_proj", "v_proj"])


def offsets(model: nn.Module) -> None:
    add_offsets(model, "answer")


def generated(model: nn.Module) -> None:
    add_offsets(model, "generated")


def everywhere(model: nn.Module) -> None:
    add_offsets(model, "all")


def decoder(positions: str) -> Callable[[nn.Module], None]:
    def put(model: nn.Module) -> None:
        stack = stack_of(model)
        sites = head_sites(model, part="cross")
        stack.add(head_offsets_config(sites, [(0, 1), (1, 2)], 2.0, positions), "edit", computed=True)
        fill(stack, "edit")

    return put


def layers(model: nn.Module) -> None:
    stack = stack_of(model)
    stack.add(layer_offsets_config(layer_sites(model), positions="answer"), "edit", computed=True)
    fill(stack, "edit", size=0.3)


def stacked(model: nn.Module) -> None:
    lora(model)
    offsets(model)


def prompt(model: nn.Module) -> None:
    stack = stack_of(model)
    stack.add(PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "tuned")
    fill(stack, "tuned")


def tuned_by(callback: Callable[[], Any]) -> Callable[[nn.Module], None]:
    def put(model: nn.Module) -> None:
        stack = stack_of(model)
        stack.add(callback().make_config(model), "tuned")
        fill(stack, "tuned", size=0.1)

    return put


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "LoRA": lora,
    "offsets at answers": offsets,
    "offsets at generated": generated,
    "offsets everywhere": everywhere,
    "layer offsets": layers,
    "LoRA, then offsets": stacked,
    "prompt tuning": prompt,
    "prefix tuning": tuned_by(lambda: PrefixTuning(num_virtual_tokens=3)),
    "BitFit": tuned_by(lambda: BitFit(add_missing=True)),
    "Houlsby": tuned_by(lambda: Houlsby(size=4)),
}
DECODERS = {"decoder everywhere": decoder("all"), "decoder at answers": decoder("answer")}


@pytest.fixture(scope="module")
def saved(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves what a function puts on a tiny model; gives the folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    made: dict[tuple[str, str], Path] = {}

    def folder(name: str, kind: str = "llama") -> Path:
        if (name, kind) not in made:
            auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
            model = auto.from_pretrained(tiny_folder(kind))
            (KINDS | DECODERS)[name](model)
            made[name, kind] = save_adapter(model, tmp_path_factory.mktemp("adapter"))
        return made[name, kind]

    return folder


def loaded(base: str | Path, adapter: Path | None = None) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if "t5" in Path(base).name else AutoModelForCausalLM
    model = auto.from_pretrained(base)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def check(lm: HFLM, model: nn.Module) -> None:
    assert choices(lm) == pytest.approx(our_choices(model, lm), abs=1e-4)
    assert texts(lm) == pytest.approx(our_texts(model, lm), abs=1e-4)
    assert answers(lm) == our_answers(model, lm)


@pytest.mark.parametrize("name", KINDS)
def test_every_folder_gives_the_numbers_and_texts_of_our_own_scorers(name: str, saved: Callable[..., Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlainTextWarning)
        lm = AdaptedLM(adapter=str(saved(name)), batch_size=4)
        check(lm, loaded(lm.chosen.base, saved(name)))
        base = HFLM(lm.chosen.base, batch_size=4, device="cpu")
        assert choices(lm) != pytest.approx(choices(base), abs=1e-2), "the adapter must show, or this says nothing"


@pytest.mark.parametrize("name", ["LoRA", "offsets at answers", "prompt tuning"])
def test_the_batch_does_not_matter(name: str, saved: Callable[..., Path]) -> None:
    alone, together = (AdaptedLM(adapter=str(saved(name)), batch_size=size) for size in (1, 6))
    assert choices(alone) == pytest.approx(choices(together), abs=1e-5)
    assert texts(alone) == pytest.approx(texts(together), abs=1e-5)
    assert answers(alone) == answers(together)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_architectures_with_a_table_of_positions(kind: str, saved: Callable[..., Path]) -> None:
    lm = AdaptedLM(adapter=str(saved("offsets at answers", kind)), batch_size=3)
    check(lm, loaded(lm.chosen.base, saved("offsets at answers", kind)))


def test_an_encoder_decoders_answer_is_all_that_its_decoder_reads(
    saved: Callable[..., Path], tiny_folder: Callable[[str], Path]
) -> None:
    everywhere, lm = (AdaptedLM(adapter=str(saved(name, "t5")), batch_size=2) for name in DECODERS)
    pairs = PAIRS[:5]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlainTextWarning)
        scores = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        written = answers(lm)
    assert scores == everywhere.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert written == answers(everywhere)
    model = loaded(tiny_folder("t5"), saved("decoder at answers", "t5"))
    for (score, _), pair in zip(scores, pairs, strict=True):
        context, continuation = (torch.tensor([ids]) for ids in lm._encode_pair(*pair))
        batch = {"input_ids": context, "attention_mask": torch.ones_like(context), "labels": continuation}
        assert score == pytest.approx(by_logprob(model)(batch).item(), abs=1e-4)


def test_scale_is_the_dial_and_at_zero_nothing_but_the_base(saved: Callable[..., Path]) -> None:
    adapter = saved("LoRA, then offsets")
    off, half = (AdaptedLM(adapter=str(adapter), batch_size=4, scale=scale) for scale in (0, 0.5))
    base = HFLM(off.chosen.base, batch_size=4, device="cpu", logits_cache=False)
    unlike = [pair for number, pair in enumerate(PAIRS) if number != 3]  # the harness reads what they share elsewhere
    plain = HFLM(off.chosen.base, batch_size=4, device="cpu")
    given = requests("loglikelihood", unlike)
    assert off.loglikelihood(given, disable_tqdm=True) == plain.loglikelihood(given, disable_tqdm=True)
    assert choices(off) == pytest.approx(choices(base), abs=1e-5)
    assert texts(off) == texts(plain) and answers(off) == answers(plain)
    with steering(model := loaded(off.chosen.base), adapter, scale=0.5):
        check(half, model)


def test_positions_stand_in_for_the_saved_ones(saved: Callable[..., Path]) -> None:
    given = AdaptedLM(adapter=str(saved("offsets at answers")), positions="all", batch_size=2)
    made = AdaptedLM(adapter=str(saved("offsets everywhere")), batch_size=2)
    assert choices(given) == choices(made) and answers(given) == answers(made)


def test_a_text_longer_than_the_model_reads_is_cut_at_its_left(saved: Callable[..., Path]) -> None:
    adapter = str(saved("offsets at answers"))
    whole, cut = AdaptedLM(adapter=adapter), AdaptedLM(adapter=adapter, max_length=8)
    context, continuation = whole._encode_pair(*PAIRS[0])
    [(score, _)] = cut._loglikelihood_tokens([(PAIRS[0], context, continuation)], disable_tqdm=True)
    rest = (context + continuation)[-9 : -len(continuation)]
    [(expected, _)] = whole._loglikelihood_tokens([(PAIRS[0], rest, continuation)], disable_tqdm=True)
    assert len(rest) < len(context) and score == pytest.approx(expected, abs=1e-5)


def test_a_batch_size_may_be_found_out(saved: Callable[..., Path]) -> None:
    adapter = str(saved("offsets at answers"))
    found = AdaptedLM(adapter=adapter, batch_size="auto", max_batch_size=2, max_length=24)
    assert choices(found) == pytest.approx(choices(AdaptedLM(adapter=adapter, batch_size=1)), abs=1e-5)


def test_a_compressed_folder_and_a_baked_model(saved: Callable[..., Path], tmp_path: Path) -> None:
    compress_adapter(saved("LoRA"), tmp_path / "small")
    lm = AdaptedLM(adapter=str(tmp_path / "small"), batch_size=4)
    check(lm, loaded(lm.chosen.base, tmp_path / "small"))
    edit = saved("offsets at answers")
    bake(loaded(lm.chosen.base), edit, tmp_path / "baked", tokenizer=lm.chosen.base)
    baked = AdaptedLM(str(tmp_path / "baked"), batch_size=4)
    check(baked, loaded(tmp_path / "baked"))
    everywhere = AdaptedLM(adapter=str(edit), positions="all", batch_size=4)
    assert choices(baked) == pytest.approx(choices(everywhere), abs=1e-4)


def test_results_say_which_adapter_was_on(saved: Callable[..., Path]) -> None:
    info = AdaptedLM(adapter=str(saved("LoRA")), scale=0.5).get_model_info()
    assert (info["adapter"], info["scale"]) == (str(saved("LoRA")), 0.5) and len(info["adapter_sha256"]) == 64


def test_a_cache_of_responses_serves_one_model_only(saved: Callable[..., Path], tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    adapter, cache = str(saved("offsets at answers")), str(tmp_path / "responses.db")
    given = requests("loglikelihood", PAIRS)
    first = CachingLM(AdaptedLM(adapter=adapter), cache).loglikelihood(given)
    assert CachingLM(AdaptedLM(adapter=adapter), cache).loglikelihood(given) == first
    with pytest.raises(ValueError, match=r"^The cache holds responses of another model or strength, .*: name another"):
        CachingLM(AdaptedLM(adapter=adapter, scale=0.5), cache)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"adapter": "a", "peft": "b"}, "adapter=a and peft=b name the same thing: leave one of the two out."),
        ({"adapter": "nowhere"}, "nowhere is not a folder: adapter must be one that an adapter was saved in."),
        (
            {"adapter": "nowhere", "scale": "much"},
            "The scale must be a finite number, 1 as saved and 0 off, got 'much'.",
        ),
        ({"pretrained": "nowhere", "scale": 0.5}, "scale and positions are those of an adapter: .* as well."),
        ({"pretrained": "nowhere"}, "nowhere is neither a folder with a transformers config.json nor a model that"),
        ({"adapter": "nowhere", "positions": "some"}, "positions"),
        ({}, "Name an adapter's folder"),
    ],
)
def test_what_cannot_be_used_ends_in_a_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AdaptedLM(**arguments)


def test_an_adapter_for_another_base_is_refused(saved: Callable[..., Path], tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(AdapterError, match="another base"):
        AdaptedLM(str(tiny_folder("gpt2")), str(saved("LoRA")))
    with pytest.raises(ValueError, match="is a whole model and no adapter"):
        AdaptedLM(adapter=str(tiny_folder("gpt2")))
    with pytest.raises(ValueError, match="is not limited to positions"):
        AdaptedLM(adapter=str(saved("LoRA")), positions="all")
