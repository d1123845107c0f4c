"""Many texts are read as each would be alone, whatever is shared, split over processes or kept in a file."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from edits import add_offsets
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft.editing import (
    Capture,
    HeadSite,
    capture_texts,
    capture_tokens,
    head_sites,
    layer_sites,
)
from lightning_peft.editing.forward import run_trunk
from lightning_peft.packing.prefix_tree import pack
from lightning_peft.packing.reading import Reading, Way

ROOT = Path(__file__).parents[2]


def statements() -> list[list[int]]:
    """Questions of several answers, in mixed order; one answer is the beginning of another, one text stands twice."""
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 64, (n,), generator=generator).tolist()

    texts = []
    for length in (6, 3, 9):
        question = draw(length)
        texts += [question + draw(n) for n in (1, 5, 3)]
        texts.append(texts[-1][:-1])
    texts.append(list(texts[2]))
    return [texts[i] for i in torch.randperm(len(texts), generator=generator).tolist()]


TEXTS = statements()


def alone(model: nn.Module, texts: list[list[int]]) -> list[Tensor]:
    """Every head at every token of each text, `[T, layers, heads, head_dim]`, one text a forward, the plain way."""
    sites, found = head_sites(model), []
    for text in texts:
        read: list[Tensor] = []
        modules = [model.get_submodule(site.name) for site in sites]
        handles = [m.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0])) for m in modules]
        with torch.no_grad():
            model(input_ids=torch.tensor([text]))
        for handle in handles:
            handle.remove()
        found.append(torch.stack([x.reshape(len(text), 4, -1) for x in read], dim=1))
    return found


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("row_tokens", [1, 20, 1000])
def test_packed_texts_are_read_as_each_alone(kind: str, row_tokens: int) -> None:
    model = tiny(kind)
    read = capture_texts(model, head_sites(model), TEXTS, share=True, row_tokens=row_tokens)
    expected = torch.stack([x[-1] for x in alone(model, TEXTS)])
    torch.testing.assert_close(read.values, expected, atol=1e-5, rtol=1e-5)
    assert read.text.tolist() == list(range(len(TEXTS))) and read.place.tolist() == [len(t) - 1 for t in TEXTS]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("primer", [0, 40])
@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        ("all", lambda n, p: range(n)),
        ("last", lambda n, p: [n - 1]),
        ("last_prompt", lambda n, p: [p - 1]),
        ("answer", lambda n, p: range(p - 1, n)),
        ("prompt[:2]", lambda n, p: [0, 1]),
        ("answer[0:2]", lambda n, p: [p - 1, p]),
    ],
)
def test_positions_choose_tokens_with_a_common_beginning_or_without(
    share: bool, primer: int, positions: str, chosen: object
) -> None:
    model = tiny("llama")
    beginning = torch.randint(3, 64, (primer,), generator=torch.Generator().manual_seed(4)).tolist()
    texts = [beginning + text for text in TEXTS]
    prompts = [len(text) - 1 for text in texts]
    read = capture_texts(model, head_sites(model), texts, positions, prompts, share=share, row_tokens=30)
    places = [list(chosen(len(text), prompt)) for text, prompt in zip(texts, prompts, strict=True)]  # type: ignore[operator]
    whole = alone(model, texts)
    expected = torch.cat([x[rows] for x, rows in zip(whole, places, strict=True)])
    torch.testing.assert_close(read.values, expected, atol=1e-5, rtol=1e-5)
    assert read.place.tolist() == [place for rows in places for place in rows]
    assert read.text.tolist() == [i for i, rows in enumerate(places) for _ in rows]


@pytest.mark.parametrize("primer", [0, 40])
def test_what_texts_share_is_computed_once(primer: int) -> None:
    model, seen = tiny("llama"), []
    texts = [[5] * primer + [9, 8, 7, i, 3] for i in range(10, 30)]
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    with Capture(model, head_sites(model)) as reader:
        reading = Reading(model, reader, partial(run_trunk, model), torch.device("cpu"), Way())
        assert reading.objection_to_packing(texts) == ""
    tried = sum(seen)
    seen.clear()
    capture_texts(model, head_sites(model), texts, row_tokens=10_000)
    assert sum(seen) - tried == primer + 3 + 20 * 2


def test_a_model_that_cannot_be_packed_is_read_text_by_text_or_says_so() -> None:
    model = tiny("bert")  # it sees what comes after, too
    read = capture_tokens(model, head_sites(model), TEXTS)
    torch.testing.assert_close(read, torch.stack([x[-1] for x in alone(model, TEXTS)]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^BertForMaskedLM cannot read packed texts: packed, it differs by"):
        capture_texts(model, head_sites(model), TEXTS, share=True)


def test_an_edit_of_some_positions_is_on_while_texts_are_read() -> None:
    model = tiny("llama")
    bare = capture_tokens(model, head_sites(model), TEXTS)
    add_offsets(model, "answer")
    edited = capture_tokens(model, head_sites(model), TEXTS)
    torch.testing.assert_close(edited, torch.stack([x[-1] for x in alone(model, TEXTS)]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(edited[:, 2], bare[:, 2], atol=1e-2)


def test_values_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    model = tiny("gpt2")
    expected = capture_texts(model, head_sites(model), TEXTS, "all").values
    read = capture_texts(model, head_sites(model), TEXTS, "all", file=tmp_path / "new" / "values.bin").values
    assert torch.equal(read, expected)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["values.bin"]
    again = torch.from_file(str(tmp_path / "new" / "values.bin"), size=expected.numel(), dtype=torch.float32)
    assert torch.equal(again.reshape(expected.shape), expected)


def test_bfloat16_is_near_and_takes_half_the_room() -> None:
    model = tiny("llama")
    expected = capture_tokens(model, head_sites(model), TEXTS)
    read = capture_texts(model, head_sites(model), TEXTS, dtype=torch.bfloat16, autocast=True).values
    assert read.dtype == torch.bfloat16
    assert 0 < float((read.float() - expected).abs().max() / expected.abs().max()) < 0.05


PROCESS = """
import sys
import torch
from test_collect import TEXTS
from tiny_models import tiny
from lightning_peft.editing import capture_texts, head_sites
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model = tiny("llama")
sites = head_sites(model)
found = {
    "shared": capture_texts(model, sites, TEXTS, row_tokens=20).values,
    "plain": capture_texts(model, sites, TEXTS, share=False, batch_size=2).values,
    "file": capture_texts(model, sites, TEXTS, row_tokens=20, file=f"{folder}/values.bin").values.clone(),
}
torch.save(found, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_read_what_one_does_bit_for_bit(tmp_path: Path) -> None:
    path = ":".join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "editing")])
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROCESS, str(rank), str(tmp_path)],
            env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    model = tiny("llama")
    sites = head_sites(model)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    shared = capture_texts(model, sites, TEXTS, row_tokens=20).values
    plain = capture_texts(model, sites, TEXTS, share=False, batch_size=2).values
    torch.set_num_threads(before)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["shared"], shared) and torch.equal(found["plain"], plain)
        assert torch.equal(found["file"], shared)


def test_packing_loses_nothing_and_keeps_to_its_budget() -> None:
    for budget in (1, 15, 40, 1000):
        rows = list(pack(TEXTS, 0, budget))
        assert sorted(i for row in rows for i in row.texts) == list(range(len(TEXTS)))
        for row in rows:
            assert len(row.tokens) <= budget or len(row.texts) == 1
            for i, path in zip(row.texts, row.nodes, strict=True):
                assert row.tokens[path].tolist() == TEXTS[i]
                assert row.places[path].tolist() == list(range(len(TEXTS[i])))
                assert row.sees[path[-1]].nonzero()[:, 0].tolist() == path


def test_layers_are_read_whether_they_give_tensors_or_tuples() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    config = MixtralConfig(num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, **sizes)
    torch.manual_seed(0)
    for model in (tiny("llama"), tiny("gpt2"), tiny("gpt_neox"), tiny("opt"), MixtralForCausalLM(config).eval()):
        with torch.no_grad():
            states = [
                model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states for text in TEXTS[:3]
            ]
        read = capture_texts(model, layer_sites(model), TEXTS[:3]).values
        assert read.shape == (3, 3, 32)
        for layer in (0, 1):  # the last state of all has been through the final norm
            expected = torch.stack([state[layer + 1][0, -1] for state in states])
            torch.testing.assert_close(read[:, layer], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "t5"])
def test_attention_and_feed_forward_part_add_up_to_what_a_block_adds(kind: str) -> None:
    model = tiny(kind)
    tokens = torch.tensor([TEXTS[0]])
    read = {}
    for what in ("block", "attention", "mlp"):
        with Capture(model, layer_sites(model, what, part="encoder" if kind == "t5" else None), "all") as capture:
            read[what] = capture(tokens)
    added = read["block"][:, 1] - read["block"][:, 0]
    torch.testing.assert_close(added, read["attention"][:, 1] + read["mlp"][:, 1], atol=1e-4, rtol=1e-4)


def test_an_encoder_decoders_parts_are_read_at_their_own_tokens() -> None:
    model = tiny("t5")
    source, target = torch.tensor([TEXTS[0]]), torch.tensor([[0, *TEXTS[1][:3]]])
    seen: dict[str, Tensor] = {}
    for site in head_sites(model):
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda _, args, name=site.name: seen.__setitem__(name, args[0].detach())
        )
    with torch.no_grad():
        model(input_ids=source, decoder_input_ids=target)
    expected = {name: x[0, -1].clone() for name, x in seen.items()}
    for part in ("encoder", "self", "cross"):
        sites = head_sites(model, part=part)
        with Capture(model, sites) as capture:
            read = capture(source, decoder_input_ids=target)
        for i, site in enumerate(sites):
            torch.testing.assert_close(read[0, i].flatten(), expected[site.name], atol=1e-5, rtol=1e-5)
    encoder = capture_texts(model, head_sites(model, part="encoder"), [TEXTS[0], TEXTS[4]])
    torch.testing.assert_close(
        encoder.values[0, 2].flatten(), expected[head_sites(model)[2].name], atol=1e-5, rtol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"^T5ForConditionalGeneration has a decoder, whose tokens these texts are not"
    ):
        capture_texts(model, head_sites(model), TEXTS)


def test_a_pictures_patches_are_tokens() -> None:
    model = tiny("vit")
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with Capture(model, layer_sites(model), "all[0:1]") as capture:
        read = capture(pixel_values=pixels)
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(read[:, 0], states[1][:, 0], atol=1e-5, rtol=1e-5)
    with Capture(model, head_sites(model), "all") as capture:
        assert capture(pixel_values=pixels).shape == (2 * 5, 3, 4, 8)


def test_a_mask_names_tokens_outright() -> None:
    model = tiny("llama")
    tokens = torch.tensor([TEXTS[0][:4], TEXTS[1][:4]])
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    whole = alone(model, tokens.tolist())
    with Capture(model, head_sites(model)) as capture:
        read = capture(tokens, mask=mask)
        torch.testing.assert_close(read, torch.stack([whole[0][0], whole[0][2], whole[1][3]]), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match=r"^Row 1 has no token at the mask to read\.$"):
            capture(tokens, mask=mask & torch.tensor([[True], [False]]))
        with pytest.raises(ValueError, match=r"^The mask has shape \(2, 3\), but the tokens have \(2, 4\)\.$"):
            capture(tokens, mask=mask[:, 1:])


@pytest.mark.parametrize("how", ["whole", "in place", "blocks"])
def test_compiled_modules_are_read_through(how: str) -> None:
    model = tiny("llama")
    expected = capture_tokens(model, head_sites(model), TEXTS)
    if how == "whole":
        model = torch.compile(model)  # type: ignore[assignment]
    elif how == "in place":
        model.compile()
    else:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = torch.compile(layer)
    sites = head_sites(model)
    assert [(site.layer, site.num_heads, site.head_dim) for site in sites] == [(i, 4, 8) for i in range(3)]
    torch.testing.assert_close(capture_tokens(model, sites, TEXTS), expected, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_read_is_one_sentence() -> None:
    model = tiny("llama")
    sites = head_sites(model)
    with pytest.raises(ValueError, match=r"^Positions 'answer' need prompt_lengths, to know where each prompt ends\.$"):
        capture_texts(model, sites, TEXTS, "answer")
    with pytest.raises(ValueError, match=r"^Text 1, of 2 tokens, has none at 'generated' to read\.$"):
        capture_texts(model, sites, [[4, 5, 6], [4, 5]], "generated", [1, 2])
    with pytest.raises(ValueError, match=r"^2 texts need as many prompt lengths, but there are 1\.$"):
        capture_texts(model, sites, [[4, 5, 6], [4, 5]], "answer", [1])
    with pytest.raises(ValueError, match=r"^There is no site to read\.$"):
        capture_texts(model, [], [[4, 5]])
    with pytest.raises(
        ValueError, match=r"^Sites of different shapes \(\[\(4, 8\), \(32,\)\]\) cannot be read into one"
    ):
        Capture(model, [*sites, *layer_sites(model)])
    with pytest.raises(ValueError, match=r"^kind must be one of block, attention, mlp, got 'norm'\.$"):
        layer_sites(model, "norm")  # type: ignore[arg-type]
    model.spare = nn.Linear(32, 32)
    with pytest.raises(
        RuntimeError, match=r"^1 head sites were not reached by the forward pass, the first is spare\.$"
    ):
        capture_texts(model, [*sites, HeadSite("spare", 3, 4, 8)], TEXTS, share=False)


def test_an_adapter_around_the_model_is_looked_through() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    expected = capture_tokens(model, head_sites(model), TEXTS)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["o_proj"]))  # which adds nothing yet
    read = capture_texts(wrapped, head_sites(wrapped), TEXTS, share=True).values
    torch.testing.assert_close(read, expected, atol=1e-6, rtol=1e-6)
    assert layer_sites(wrapped)[1].name == "base_model.model.model.layers.1"


def test_a_model_that_lies_in_several_places_is_read(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    expected = capture_tokens(model, head_sites(model), TEXTS)
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off").eval()
    assert split.model.layers[2].self_attn.o_proj.weight.device.type == "meta"
    torch.testing.assert_close(capture_tokens(split, head_sites(split), TEXTS), expected, atol=1e-6, rtol=1e-6)
