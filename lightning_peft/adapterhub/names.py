"""Where AdapterHub keeps its parameters in each architecture, beside the names of transformers' own matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """A place of a bottleneck adapter, at an attention or a feed-forward part; names are relative to the block.

    Args:
        theirs: the module of AdapterHub's that holds the adapter.
        last: our matrix that gives the part's output.
        before: our module whose input is the residual stream that the part is given.
        behind: our module that gives the stream behind the part, `""` for the block; None where no module does.
        norm: whether `behind` is a norm of the sum of the part's output and the stream.
    """

    theirs: str
    last: str
    before: str
    behind: str | None = None
    norm: bool = False


@dataclass(frozen=True)
class Block:
    """The names in one kind of block; all but the first two are relative to a block.

    Args:
        theirs: a block's name in AdapterHub's model, with `{}` for its number, from inside the base model.
        ours: the same in transformers' model.
        adapters: the places of bottleneck adapters, by AdapterHub's option that asks for one.
        matrices: what LoRA and IA3 may adapt: `q`, `k`, `v`, or `qkv` where they are one; `intermediate` and `output`
            as AdapterHub has them. Each theirs and ours; those that a model does not have are passed over.
        prefixes: for each place of prefixes the attention that sees them, and our matrix that gives its queries.
    """

    theirs: str
    ours: str
    adapters: Mapping[str, Site]
    matrices: Mapping[str, tuple[tuple[str, str], ...]]
    prefixes: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Architecture:
    """The blocks of a model, kind by kind in the order of AdapterHub's numbers of layers; encoders come first.

    Args:
        blocks: the kinds.
        prefix: the base model's name in AdapterHub's models with a head.
        fused: queries, keys and values are one matrix of theirs, in this order.
        relative: its attention has biases of relative positions.
    """

    blocks: tuple[Block, ...]
    prefix: str
    fused: bool = False
    relative: bool = False


def _same(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


_BERT = Block(
    "encoder.layer.{}",
    "encoder.layer.{}",
    {
        "mh_adapter": Site(
            "attention.output", "attention.output.dense", "attention.self.query", "attention.output.LayerNorm", True
        ),
        "output_adapter": Site("output", "output.dense", "intermediate.dense", "output.LayerNorm", True),
    },
    {
        "q": _same("attention.self.query"),
        "k": _same("attention.self.key"),
        "v": _same("attention.self.value"),
        "intermediate": _same("intermediate.dense"),
        "output": _same("output.dense"),
    },
    {"self_prefix": ("attention.self", "attention.self.query")},
)
_GPT2 = Block(
    "h.{}",
    "h.{}",
    {
        "mh_adapter": Site("attention_adapters", "attn.c_proj", "ln_1"),
        "output_adapter": Site("output_adapters", "mlp.c_proj", "ln_2", ""),
    },
    {"qkv": _same("attn.c_attn"), "intermediate": _same("mlp.c_fc"), "output": _same("mlp.c_proj")},
    {"self_prefix": ("attn", "attn.c_attn")},
)
_LLAMA = Block(
    "layers.{}",
    "layers.{}",
    {
        "mh_adapter": Site("attention_adapters", "self_attn.o_proj", "input_layernorm"),
        "output_adapter": Site("output_adapters", "mlp.down_proj", "post_attention_layernorm", ""),
    },
    {
        "q": _same("self_attn.q_proj"),
        "k": _same("self_attn.k_proj"),
        "v": _same("self_attn.v_proj"),
        # so in AdapterHub: its intermediate matrix is the one that gives the part's output
        "intermediate": _same("mlp.down_proj"),
        "output": _same("mlp.up_proj"),
    },
    {"self_prefix": ("self_attn", "self_attn.q_proj")},
)
_T5_ENCODER = Block(
    "encoder.block.{}",
    "encoder.block.{}",
    {
        "mh_adapter": Site("layer.0", "layer.0.SelfAttention.o", "layer.0.layer_norm", "layer.0"),
        "output_adapter": Site("layer.1", "layer.1.DenseReluDense.wo", "layer.1.layer_norm", "layer.1"),
    },
    {
        "q": _same("layer.0.SelfAttention.q"),
        "k": _same("layer.0.SelfAttention.k"),
        "v": _same("layer.0.SelfAttention.v"),
        "intermediate": _same("layer.1.DenseReluDense.wi_1", "layer.1.DenseReluDense.wi"),
        "output": _same("layer.1.DenseReluDense.wo"),
    },
    {"encoder_prefix": ("layer.0.SelfAttention", "layer.0.SelfAttention.q")},
)
_T5_DECODER = Block(
    "decoder.block.{}",
    "decoder.block.{}",
    {
        "mh_adapter": Site("layer.0", "layer.0.SelfAttention.o", "layer.0.layer_norm", "layer.0"),
        "cross_adapter": Site("layer.1", "layer.1.EncDecAttention.o", "layer.1.layer_norm", "layer.1"),
        "output_adapter": Site("layer.2", "layer.2.DenseReluDense.wo", "layer.2.layer_norm", "layer.2"),
    },
    {
        "q": _same("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"),
        "k": _same("layer.0.SelfAttention.k", "layer.1.EncDecAttention.k"),
        "v": _same("layer.0.SelfAttention.v", "layer.1.EncDecAttention.v"),
        "intermediate": _same("layer.2.DenseReluDense.wi_1", "layer.2.DenseReluDense.wi"),
        "output": _same("layer.2.DenseReluDense.wo"),
    },
    {
        "self_prefix": ("layer.0.SelfAttention", "layer.0.SelfAttention.q"),
        "cross_prefix": ("layer.1.EncDecAttention", "layer.1.EncDecAttention.q"),
    },
)
_VIT = Block(
    "encoder.layer.{}",
    "layers.{}",
    {
        "mh_adapter": Site("attention_adapters", "attention.o_proj", "layernorm_before"),
        "output_adapter": Site("output.output_adapters", "mlp.fc2", "layernorm_after", ""),
    },
    {
        "q": (("attention.attention.query", "attention.q_proj"),),
        "k": (("attention.attention.key", "attention.k_proj"),),
        "v": (("attention.attention.value", "attention.v_proj"),),
        "intermediate": (("intermediate.dense", "mlp.fc1"),),
        "output": (("output.dense", "mlp.fc2"),),
    },
    {"self_prefix": ("attention.attention", "attention.q_proj")},
)

# by transformers' model type
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture((_BERT,), "bert"),
    "gpt2": Architecture((_GPT2,), "transformer", fused=True),
    "llama": Architecture((_LLAMA,), "model"),
    "mistral": Architecture((_LLAMA,), "model"),
    "roberta": Architecture((_BERT,), "roberta"),
    "t5": Architecture((_T5_ENCODER, _T5_DECODER), "transformer", relative=True),
    "vit": Architecture((_VIT,), "vit"),
    "xlm-roberta": Architecture((_BERT,), "roberta"),
}
