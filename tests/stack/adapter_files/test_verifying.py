"""What is written is compared with what it was made from, and nothing of a wrong folder is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import add_lora, add_offsets, fill
from peft.tuners import lora
from tiny_models import tiny
from torch import nn
from tuning import one_sentence

from lightning_peft import bake, save_adapter
from lightning_peft.cli import main
from lightning_peft.stack.adapter_files import verifying
from lightning_peft.stack.adapter_files.compression import compress_adapter, decompress_adapter
from lightning_peft.stack.adapter_files.example_inputs import find_probe, outputs
from lightning_peft.stack.adapter_files.merging import merge_pretrained
from lightning_peft.stack.adapter_files.verifying import difference, digest
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.head_offsets import HeadOffsetsLayer

pytestmark = pytest.mark.filterwarnings("ignore")

# -- inputs for any model --------------------------------------------------------------------------------------------

TEXT = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
PAIR = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
PAIR |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
MEL = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
MEL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
WAVE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
WAVE |= {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
WAVE |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SPECTRUM = {**VISION, "max_length": 32, "num_mel_bins": 16}
BOTH = {"text_config": TEXT | {"max_position_embeddings": 20}, "vision_config": VISION, "projection_dim": 8}
TOKENS, BOTH_TOKENS = {"input_ids"}, {"input_ids", "decoder_input_ids"}
PROBES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "LlamaForCausalLM": (TEXT, TOKENS),
    "BertForSequenceClassification": (TEXT, TOKENS),
    "T5ForConditionalGeneration": ({"vocab_size": 60, "d_model": 16, "d_kv": 8, "num_layers": 1}, BOTH_TOKENS),
    "BartForSequenceClassification": (PAIR, BOTH_TOKENS),  # looks for the end of the text
    "WhisperForConditionalGeneration": (PAIR | MEL, {"input_features", "decoder_input_ids"}),
    "Wav2Vec2ForCTC": (WAVE, {"input_values"}),
    "ASTForAudioClassification": (SPECTRUM, {"input_values"}),
    "ViTForImageClassification": (VISION, {"pixel_values"}),
    "CLIPModel": (BOTH, {"input_ids", "pixel_values"}),
    "LlavaForConditionalGeneration": (
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}}
        | {"image_token_index": 7},
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", PROBES)
def test_an_input_is_found_that_the_model_takes(name: str) -> None:
    import transformers

    options, keys = PROBES[name]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options))
    probe = find_probe(model)
    assert probe is not None and set(probe) == keys
    first, again = outputs(model, probe), outputs(model, probe)
    assert all(map(torch.equal, first, again))
    assert all(int(value.max()) < 60 for key, value in probe.items() if key.endswith("input_ids"))
    assert model.training


class Stubborn(nn.Module):
    """Takes nothing."""

    main_input_name = "input_ids"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.dummy_inputs, self.dtype = config, {}, torch.float32
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Any = None) -> Any:
        raise RuntimeError("not for this model")


def test_where_no_input_is_known_that_is_said() -> None:
    from transformers import LlamaConfig

    assert find_probe(Stubborn(LlamaConfig())) is None
    assert "weight by weight, since no input is known" in str(verifying.Verification(None, None))


# -- sabotage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_folder: Any) -> Path:
    return tiny_folder("llama")


def saved_lora(base: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    fill(add_lora(model, ["q_proj", "down_proj"]), "lora", size=0.2)
    return save_adapter(model, folder / "adapter")


def wrong_merge(patch: pytest.MonkeyPatch) -> None:
    """Too much is added, in the trial on a copy as well as in the merge."""
    merge: Any = lora.Linear.merge

    def twice(layer: Any, **options: Any) -> None:
        merge(layer, **options)
        layer.get_base_layer().weight.data *= 1.0001

    patch.setattr(lora.Linear, "merge", twice)
    patch.setattr("lightning_peft.stack.injection.writing.check_merges", lambda *_: None)


def wrong_shard(patch: pytest.MonkeyPatch) -> None:
    """One value of one weight is written wrong."""
    from transformers import PreTrainedModel

    save: Any = PreTrainedModel.save_pretrained

    def spoilt(model: Any, *args: Any, **options: Any) -> None:
        with torch.no_grad():
            dict(model.named_parameters())["model.norm.weight"][0] += 2**-6
        save(model, *args, **options)

    patch.setattr(PreTrainedModel, "save_pretrained", spoilt)


def wrong_config(patch: pytest.MonkeyPatch) -> None:
    """The weights are right, and the model around them is another."""
    from transformers import PreTrainedModel

    save: Any = PreTrainedModel.save_pretrained

    def spoilt(model: Any, *args: Any, **options: Any) -> None:
        model.config.rms_norm_eps = 0.1
        save(model, *args, **options)
        model.config.rms_norm_eps = 1e-6

    patch.setattr(PreTrainedModel, "save_pretrained", spoilt)


SABOTAGE: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "merge": (wrong_merge, "outputs of the written LlamaForCausalLM differ"),
    "weight": (wrong_shard, r"The written model\.norm\.weight is not what"),
    "configuration": (wrong_config, "outputs of the written LlamaForCausalLM differ"),
}


# a merge that is wrong by less than half precision rounds, in float32 too, is what that cannot show
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in SABOTAGE for dtype in ("float32", "bfloat16") if (case, dtype) != ("merge", "bfloat16")],
)
def test_a_wrong_merge_leaves_nothing(
    case: str, dtype: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved_lora(base, tmp_path)
    sabotage, said = SABOTAGE[case]
    sabotage(monkeypatch)
    with pytest.raises(ValueError, match=said) as caught:
        merge_pretrained(adapter, tmp_path / "out" / "merged", str(base), dtype)
    assert one_sentence(str(caught.value)) and not list((tmp_path / "out").iterdir())
    merge_pretrained(adapter, tmp_path / "out" / "merged", str(base), dtype, verify=False)
    assert (tmp_path / "out" / "merged" / "config.json").exists()


def test_a_merge_in_half_precision_that_is_not_the_float32_one_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    adapter = saved_lora(tmp_path / "half", tmp_path)
    monkeypatch.setattr("lightning_peft.stack.injection.writing._in_float32", lambda _: nullcontext())
    with pytest.raises(ValueError, match=r"The written model\.layers\.\d\.\w+\.\w+\.weight is not what"):
        merge_pretrained(adapter, tmp_path / "out" / "merged", str(tmp_path / "half"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_bake_leaves_nothing_and_the_model_as_it_was(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny("llama").to(dtype)
    add_offsets(model, "all")
    adapter = save_adapter(model, tmp_path / "adapter")
    stack_of(model).remove("edit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = bake(model, adapter, tmp_path / "right")
    assert made.verification is not None and made.verification.error is not None
    merge: Any = HeadOffsetsLayer.merge

    def wrong(layer: Any, *args: Any, **options: Any) -> None:
        merge(layer, *args, **options)
        layer.get_base_layer().bias.data += 0.3

    monkeypatch.setattr(HeadOffsetsLayer, "merge", wrong)
    with pytest.raises(ValueError, match="outputs of the written LlamaForCausalLM differ"):
        bake(model, adapter, tmp_path / "out" / "baked")
    assert not list((tmp_path / "out").iterdir())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert bake(model, adapter, tmp_path / "out" / "baked", verify=False).verification is None


def test_a_wrong_decompression_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    compress_adapter(saved_lora(base, tmp_path), tmp_path / "small", 0.5)
    save: Any = safetensors.torch.save_file

    def spoilt(tensors: Any, *args: Any, **options: Any) -> None:
        first = min(tensors)
        save(tensors | {first: tensors[first] + 2**-20}, *args, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", spoilt)
    with pytest.raises(ValueError, match="is not what loading") as caught:
        decompress_adapter(tmp_path / "small", tmp_path / "out" / "plain")
    assert one_sentence(str(caught.value)) and not list((tmp_path / "out").iterdir())
    decompress_adapter(tmp_path / "small", tmp_path / "out" / "plain", verify=False)


# -- on the command line ---------------------------------------------------------------------------------------------


def test_the_commands_say_how_they_verified(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved_lora(base, tmp_path)
    main(["merge", str(adapter), str(tmp_path / "merged"), "--base", str(base)])
    assert "Verified: its outputs differ by" in capsys.readouterr().out
    main(["merge", str(adapter), str(tmp_path / "other"), "--base", str(base), "--no-verify"])
    assert "Not verified." in capsys.readouterr().out
    compress_adapter(adapter, tmp_path / "small", 0.5)
    main(["decompress", str(tmp_path / "small"), str(tmp_path / "plain")])
    assert "verified bit for bit." in capsys.readouterr().out


def test_never_are_two_models_in_memory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from transformers import PreTrainedModel

    load: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    alive: list[weakref.ref[Any]] = []

    def counted(cls: Any, *args: Any, **options: Any) -> Any:
        gc.collect()
        assert not any(ref() is not None for ref in alive), "another model is in memory"
        made = load(cls, *args, **options)
        alive.append(weakref.ref(made[0] if isinstance(made, tuple) else made))
        return made

    adapter = saved_lora(base, tmp_path)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    merge_pretrained(adapter, tmp_path / "merged", str(base), "bfloat16")
    assert len(alive) >= 4


# -- comparing -------------------------------------------------------------------------------------------------------


def test_differences_are_shares_of_the_largest_value_and_never_hide_what_is_not_a_number() -> None:
    a = torch.tensor([1.0, 100.0])
    assert difference([a + 0.1], [a]) == pytest.approx(1e-3)
    assert difference([a], [a, a]) == difference([a[:1]], [a]) == float("inf")
    assert difference([a * float("nan"), a], [a, a]) != difference([a], [a])


def test_a_digest_tells_values_and_shapes_apart_and_not_precisions() -> None:
    a = torch.arange(6.0)
    assert digest(a) == digest(a.bfloat16()) == digest(a.clone())
    assert len({digest(a), digest(a.reshape(2, 3)), digest(a + 1), digest(-a)}) == 4
