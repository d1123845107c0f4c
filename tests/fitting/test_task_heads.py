"""A task head inside the backbone is trained and saved with the adapter, and comes back where it was built anew."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tuning import QUIET, one_sentence, trainer
from vision import libraries

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.backbone.task_heads import task_heads
from lightning_peft.callbacks import PEFT, BitFit, FullFineTuning, LoRA, Pfeiffer, Quantize
from lightning_peft.fitting.checkpoints import load_from_checkpoint
from lightning_peft.stack.adapter_files.merging import merge_pretrained

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 40, "max_position_embeddings": 32, **SIZES}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
WAV = {**SIZES, "vocab_size": 8, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
WAV |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAV |= {"classifier_proj_size": 8, "mask_time_prob": 0.0}
VIT = {**SIZES, "image_size": 8, "patch_size": 4}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}

# transformers' class -> the sizes of its configuration, the heads that are to be told
TASKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "BertForSequenceClassification": (TEXT, ["classifier"]),
    "BertForTokenClassification": (TEXT, ["classifier"]),
    "BertForQuestionAnswering": (TEXT, ["qa_outputs"]),
    "BertForMultipleChoice": (TEXT, ["classifier"]),
    "RobertaForSequenceClassification": ({**TEXT, "pad_token_id": 1}, ["classifier"]),
    "DistilBertForSequenceClassification": (DISTIL, ["pre_classifier", "classifier"]),
    "DebertaV2ForSequenceClassification": (TEXT, ["pooler", "classifier"]),
    "LlamaForSequenceClassification": ({**TEXT, "pad_token_id": 0}, ["score"]),
    "GPT2ForTokenClassification": ({"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}, ["classifier"]),
    "T5ForSequenceClassification": ({**T5, "eos_token_id": 1}, ["classification_head"]),
    "ViTForImageClassification": (VIT, ["classifier"]),
    "Wav2Vec2ForSequenceClassification": (WAV, ["projector", "classifier"]),
}
NO_TASKS: dict[str, dict[str, Any]] = {
    "BertModel": TEXT,
    "BertForMaskedLM": TEXT,
    "BertForPreTraining": TEXT,
    "LlamaForCausalLM": TEXT,
    "GPT2LMHeadModel": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "T5ForConditionalGeneration": T5,
    "T5EncoderModel": T5,
    "ViTModel": VIT,
    "Wav2Vec2ForCTC": WAV,
}
NETWORKS = {
    "torchvision resnet18": ["fc"],
    "torchvision vit_b_16": ["heads"],
    "torchvision convnext_tiny": ["classifier"],
    "torchvision mobilenet_v3_small": ["classifier"],
    "torchvision efficientnet_b0": ["classifier"],
    "timm resnet18": ["fc"],
    "timm vit_tiny_patch16_224": ["head"],
    "timm convnext_atto": ["head.fc"],
    "timm mobilenetv3_small_100": ["classifier"],
    "timm efficientnet_b0": ["classifier"],
}
METHODS: dict[str, Callable[[], PEFT]] = {
    "LoRA": lambda: LoRA(r=2),
    "BitFit": lambda: BitFit(add_missing=True),
    "Pfeiffer": lambda: Pfeiffer(size=2),
    "FullFineTuning": FullFineTuning,
}


def pretrained(kind: str) -> nn.Module:
    """The same "downloaded" weights each time, in a process that draws its own heads."""
    return copy.deepcopy(_pretrained(kind))


@functools.lru_cache(maxsize=1)
def _pretrained(kind: str) -> nn.Module:
    before = torch.get_rng_state()
    torch.manual_seed(0)
    library, _, name = kind.rpartition(" ")
    if library == "torchvision":
        model = libraries()[1].models.get_model(name, weights=None, **({"image_size": 64} if "vit" in name else {}))
    elif library == "timm":
        model = libraries()[0].create_model(name, **({"img_size": 64} if "vit" in name else {}))
    else:
        cls = getattr(transformers, name)
        model = cls(cls.config_class(**(TASKS[name][0] if name in TASKS else NO_TASKS[name])))
    torch.set_rng_state(before)
    return model


class Task(L.LightningModule):
    """A pretrained model whose heads are drawn anew each time it is built, as those of a new task are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kind = kind
        self.net: Any = pretrained(kind)
        for head in task_heads(self.net):
            for module in self.net.get_submodule(head).modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()

    def forward(self, batch: Tensor) -> Tensor:
        output = self.net(batch)
        if isinstance(output, Tensor):
            return output
        return output.logits if "logits" in output else output.start_logits + output.end_logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def inputs(kind: str) -> DataLoader[Any]:
    torch.manual_seed(1)
    if " " in kind:
        rows = torch.randn(2, 3, 64, 64)
    elif kind.startswith("ViT"):
        rows = torch.randn(4, 3, 8, 8)
    elif kind.startswith("Wav2Vec2"):
        rows = torch.randn(4, 400)
    else:
        shape = (4, 3, 6) if kind.endswith("MultipleChoice") else (4, 6)
        rows = torch.randint(2, 40, shape)
        rows[..., -1] = 1
    return DataLoader(rows, batch_size=2)


def predictions(module: L.LightningModule, data: DataLoader[Any], *callbacks: PEFT, **options: Any) -> Tensor:
    made: Any = trainer(*callbacks).predict(module, data, **options)
    return torch.cat(made)


@pytest.mark.parametrize("kind", TASKS)
def test_heads_of_transformers_task_models_are_told(kind: str) -> None:
    assert task_heads(pretrained(kind)) == TASKS[kind][1]


@pytest.mark.parametrize("kind", NO_TASKS)
def test_language_model_heads_and_base_models_have_none(kind: str) -> None:
    assert task_heads(pretrained(kind)) == []


@pytest.mark.parametrize("kind", NETWORKS)
def test_last_classifiers_of_vision_networks_are_told(kind: str) -> None:
    assert task_heads(pretrained(kind)) == NETWORKS[kind]


def test_a_head_that_shares_its_weight_is_none() -> None:
    model: Any = pretrained("LlamaForSequenceClassification")
    model.score = nn.Linear(16, 40, bias=False)
    model.score.weight = model.model.embed_tokens.weight
    assert task_heads(model) == []


def test_what_stands_around_one_model_of_a_library_is_a_head() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = pretrained("BertModel")
            self.neck, self.classes = nn.Linear(16, 8), nn.Linear(8, 2)

    assert task_heads(Around()) == ["neck", "classes"]
    assert task_heads(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))) == []  # which cannot be told


@pytest.mark.sampled(5)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TASKS)
def test_a_head_that_is_built_anew_comes_back(kind: str, method: str, tmp_path: Path) -> None:
    check_comes_back(kind, METHODS[method], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_head_of_a_full_size_network_comes_back(kind: str, tmp_path: Path) -> None:
    check_comes_back(kind, METHODS["BitFit" if kind.endswith("vit_b_16") else "LoRA"], tmp_path)


def check_comes_back(kind: str, method: Callable[[], PEFT], folder: Path) -> None:
    """Checkpoint and folder, loaded into a model with other heads, give the same predictions bit for bit."""
    data, path = inputs(kind), folder / "trained.ckpt"
    torch.manual_seed(2)
    module = Task(kind)
    built = copy.deepcopy(module)
    fitting = trainer(method(), max_epochs=1)
    fitting.fit(module, data)
    fitting.save_checkpoint(path)
    expected = predictions(module, data)
    heads = task_heads(built.net)
    for head in heads:
        before = built.net.get_submodule(head).state_dict()
        after = module.net.get_submodule(head).modules_to_save[module.net.get_submodule(head).active_adapters[0]]
        assert any(not torch.equal(before[key], value) for key, value in after.state_dict().items())
    torch.manual_seed(3)
    assert torch.equal(predictions(load_from_checkpoint(Task, path), data), expected)
    assert torch.equal(predictions(Task(kind), data, method(), ckpt_path=path), expected)
    save_adapter(module, folder / "adapter")
    assert any(f".{heads[0]}." in key for key in load_file(folder / "adapter" / "adapter_model.safetensors"))
    fresh = Task(kind)
    assert not torch.equal(predictions(fresh, data), expected)
    load_adapter(fresh.net, folder / "adapter")
    assert torch.equal(predictions(fresh, data), expected)


def test_plain_peft_reads_the_head(tmp_path: Path) -> None:
    kind = "BertForSequenceClassification"
    module = Task(kind)
    trainer(LoRA(r=2), max_epochs=1).fit(module, inputs(kind))
    save_adapter(module, tmp_path)
    other = peft.PeftModel.from_pretrained(Task(kind).net, tmp_path).eval()
    batch = next(iter(inputs(kind)))
    assert torch.equal(other(batch).logits, module.eval()(batch))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_task_type_means_what_it_means_in_peft(task: str) -> None:
    """peft trains modules of these names in any model, as here in one whose head cannot be told."""

    def make() -> Any:
        names = {"SEQ_CLS": "score", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}
        return nn.ModuleDict({"inner": nn.Linear(4, 4), names[task]: nn.Linear(4, 2)})

    config = peft.LoraConfig(r=2, target_modules=["inner"], task_type=task)
    model = make()
    module = L.LightningModule()
    module.net = model
    PEFT(config, backbone="net").apply(module)
    plain = make()
    plain.prepare_inputs_for_generation = None
    theirs = peft.get_peft_model(plain, copy.deepcopy(config))
    ours = {n.replace("net.", "") for n, p in module.named_parameters() if p.requires_grad}
    assert ours == {n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad}


def test_what_the_user_says_of_heads_is_done() -> None:
    def trained(callback: PEFT) -> set[str]:
        module = Task("DistilBertForSequenceClassification")
        callback.apply(module)
        names = [name for name, p in module.net.named_parameters() if p.requires_grad]
        return {name.partition(".modules_to_save")[0] for name in names if ".lora_" not in name}

    assert trained(LoRA(r=2)) == {"pre_classifier", "classifier"}
    assert trained(LoRA(r=2, train_head=False)) == set()
    assert trained(LoRA(r=2, train_head="distilbert.embeddings.LayerNorm")) == {"distilbert.embeddings.LayerNorm"}
    # one that is a target by its own name is adapted instead
    assert trained(LoRA(r=2, target_modules=["q_lin", "classifier"])) == {"pre_classifier"}
    with pytest.raises(ValueError, match="would take it for the head classifier") as error:
        trained(LoRA(r=2, target_modules=["q_lin", "pre_classifier"]))
    assert one_sentence(str(error.value))
    for wrong, words in (("clasifier", "the nearest are classifier"), (["classifier", "dropout"], "has no weights")):
        with pytest.raises(ValueError, match=words) as error:
            trained(LoRA(r=2, train_head=wrong))
        assert one_sentence(str(error.value))


def test_a_head_that_cannot_be_told_is_noticed_where_it_is_loaded(tmp_path: Path) -> None:
    class Own(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            torch.manual_seed(torch.seed())
            self.net[2].reset_parameters()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    data = DataLoader(torch.randn(4, 4), batch_size=2)
    for head in (False, "2"):
        callback, comes_back = LoRA(r=2, target_modules=["0"], train_head=head), bool(head)
        module, path = Own(), tmp_path / f"{comes_back}.ckpt"
        fitting = trainer(callback, max_epochs=1)
        fitting.fit(module, data)
        fitting.save_checkpoint(path)
        if comes_back:
            assert torch.equal(predictions(load_from_checkpoint(Own, path), data), predictions(module, data))
            continue
        with pytest.raises(ValueError, match=r"2 of 4 tensors hold other values: 2\.bias, 2\.weight; a head that is"):
            load_from_checkpoint(Own, path)
        with pytest.warns(UserWarning, match="was made for another base model"):
            load_from_checkpoint(Own, path, strict_base=False)


def test_a_merged_folder_has_the_trained_head(tmp_path: Path) -> None:
    kind = "BertForSequenceClassification"
    module = Task(kind)
    module.net.save_pretrained(tmp_path / "base")
    trainer(LoRA(r=2), max_epochs=1).fit(module, inputs(kind))
    save_adapter(module, tmp_path / "adapter")
    merge_pretrained(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "base"))
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    batch = next(iter(inputs(kind)))
    torch.testing.assert_close(merged(batch).logits, module.eval()(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "timm vit_tiny_patch16_224"])
def test_a_head_is_not_quantised_with_its_backbone(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    module = Task(kind)
    (head,) = task_heads(module.net)
    Quantize(backbone="net").apply(module)
    assert type(module.net.get_submodule(head)) is nn.Linear
    LoRA(r=2, backbone="net", target_modules="all-linear").apply(module)
    assert adapters(module).parts[0].config.modules_to_save == [head]


def test_a_head_that_is_quantised_is_named() -> None:
    pytest.importorskip("bitsandbytes")
    module = Task("LlamaForSequenceClassification")
    weight = module.net.score.weight
    weight.requires_grad_(False)
    weight.data = weight.data.char()  # as int8 layers hold theirs
    with pytest.warns(UserWarning, match="The head score is quantised and stays as it is"):
        LoRA(r=2).apply(module)
