"""Any model type of transformers in small: its default configuration, shrunk by what its fields mean.

A default configuration describes the model that its authors published: the mixture of its layers, windows, grouped
queries, shared experts, a tower for pictures. All of this stays; sizes become small, and what had to fit together
still does: widths that were equal are equal, lists with one entry a layer are as long as there are layers, and tokens
with a meaning are within the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_peft.testing.shrunk_exceptions import EXCEPTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCABULARY = 160
WORDS = range(3, 100)  # tokens without a meaning of their own, of every shrunk model
LAYERS, HEADS, WIDTH = 4, 4, 128
TOWER_LAYERS, TOWER_WIDTH = 2, 64  # of what reads pictures or sounds
INNER, EXPERTS, PATCH, PICTURE, POSITIONS = 96, 4, 4, 16, 256

_TOWERS = re.compile(r"vision|visual|audio|vq|speech|image|vit|sam|dac|codec|action|depth_decoder|encoder_config")
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "layers",
    "num_blocks",
    "conf_num_hidden_layers",
)
_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "attention_heads",
)
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "emb_dim", "dim", "embedding_dim")
_PAIRED = {"pad": 0, "_pad": 0, "bos": 1, "decoder_start": 1, "eos": 2, "forced_eos": 2, "forced_bos": 1}


@dataclass(frozen=True)
class _Level:
    """The sizes of one configuration among the nested ones, as they were: layers, heads, width, width of a head."""

    layers: int
    heads: int
    width: int
    head: int
    tower: bool

    @classmethod
    def read(cls, values: Mapping[str, Any], around: _Level | None, tower: bool) -> _Level:
        def first(names: Sequence[str], default: int) -> int:
            numbers = (values.get(name) for name in names)
            return next((n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0), default)

        width = first(_WIDTHS, around.width if around else 0)
        heads = first(_HEADS, around.heads if around else 1)
        own = any(name in values for name in (*_WIDTHS, "head_dim"))
        head = first(("head_dim", "d_kv", "kv_channels"), width // heads if own or around is None else around.head)
        return cls(first(_LAYERS, around.layers if around else 0), heads, width, head, tower)

    @property
    def new_layers(self) -> int:
        return TOWER_LAYERS if self.tower else LAYERS

    @property
    def new_width(self) -> int:
        return TOWER_WIDTH if self.tower else WIDTH

    @property
    def new_head(self) -> int:
        """Heads together as wide as the stream, wider or narrower, as they were."""
        whole, even = self.head * self.heads, self.new_width // HEADS
        return even if whole == self.width else 2 * even if whole > self.width else even // 2


class _Shrinking:
    """One configuration's shrinking; `widths` has the widths of all levels, from which others derive."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.widths: dict[int, int] = {}
        self.tokens: dict[str, int] = {}
        self._collect(values, None, tower=False)

    def _collect(self, values: Mapping[str, Any], around: _Level | None, tower: bool) -> None:
        level = _Level.read(values, around, tower)
        if level.width and not (level.width in self.widths and tower):
            self.widths[level.width] = level.new_width
        for name, value in values.items():
            if isinstance(value, dict):
                self._collect(value, level, tower or bool(_TOWERS.search(str(name))))

    def shrink(self, values: Mapping[str, Any], around: _Level | None = None, tower: bool = False) -> dict[str, Any]:
        level = _Level.read(values, around, tower)
        kept = _layers_to_keep(values, level)
        new: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict) and level.layers and _by_layer(value):
                places = {old: new for new, old in enumerate(kept)}
                by_layer = {places[int(k)]: v for k, v in value.items() if int(k) in places}
                new[name] = {k: self.shrink(v, level, tower) for k, v in by_layer.items()}
            elif isinstance(value, dict):
                inner = tower or bool(_TOWERS.search(str(name)))
                new[name] = value if name in ("id2label", "label2id") else self.shrink(value, level, inner)
            elif isinstance(value, list | tuple):
                new[name] = self._list(str(name), value, level, kept, values)
            elif isinstance(value, int) and not isinstance(value, bool):
                new[name] = self._number(str(name), value, level, values, kept)
            elif value is None and name in _UNSET:
                new[name] = _UNSET[name](level)
            else:
                new[name] = value
        return new

    def _token(self, name: str) -> int:
        what = re.sub(r"_(token_)?(id|index)s?$", "", name)
        if what in _PAIRED:
            return _PAIRED[what]
        return self.tokens.setdefault(what, VOCABULARY - 1 - len(self.tokens))

    def _width(self, value: int, level: _Level) -> int:
        """Return the new width for an old one: that of the level it is the width of, or a multiple of it."""
        for old, new in self.widths.items():
            if value == old:
                return new
        for old, new in self.widths.items():
            if value % old == 0 and value // old <= 8:
                return new * (value // old)
            if old % value == 0 and old // value <= 4:
                return new // (old // value)
        return min(value, level.new_width)

    def _number(self, name: str, value: int, level: _Level, values: Mapping[str, Any], kept: Sequence[int]) -> int:
        if value < 0:
            return value
        if re.search(r"(_token_(id|index)|^mask_index|^unk_index|^lang_id|^im_\w+_id|image_patch_id)$", name):
            return self._token(name)
        if name in _LAYERS:
            return len(kept) if kept and value == level.layers else min(value, level.new_layers)
        if name in (
            "head_dim",
            "swa_head_dim",
            "d_kv",
            "kv_channels",
            "attention_head_size",
            "d_head",
            "global_head_dim",
        ):
            rope = values.get("qk_rope_head_dim") or 0
            if value and value == rope:
                return 16
            if value and value == values.get("qk_head_dim"):
                return 32 if rope else 16
            return min(value, level.new_head)
        for pattern, rule in _RULES:
            if pattern.fullmatch(name):
                return min(value, rule) if isinstance(rule, int) else rule(value, level)
        if re.search(
            r"hidden_size|_dim$|^dim|width|n_embd|d_model|hidden_dim|_channels?$|embedding_size|output_dim|embed", name
        ):
            return self._width(value, level) if value > 16 else value
        return value

    def _list(
        self, name: str, value: Sequence[Any], level: _Level, kept: Sequence[int], values: Mapping[str, Any]
    ) -> list[Any]:
        if not value:
            return list(value)
        if re.search(r"_token_ids?$", name):
            return [2] if name.startswith("eos") else [self._token(f"{name}{i}") for i in range(len(value))]
        if kept and list(value) == list(range(level.layers)):
            return list(range(len(kept)))
        if kept and len(value) == level.layers and "factor" not in name:
            return [self._entry(name, value[i], level, values, kept) for i in kept]
        if "mrope_section" in name or "section" in name:
            return _shares([int(v) for v in value], level)
        if name == "image_grid_pinpoints":
            return [[PICTURE, 2 * PICTURE], [2 * PICTURE, PICTURE]]
        if name in ("short_factor", "long_factor"):
            return list(value[: max(len(value) * level.new_head // max(level.head, 1), 1)])
        if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            counts_layers = re.search(r"(indexes|indices|_idxs?|_ids|_layers|_index|layer)$", name)
            if counts_layers and kept and max(value) <= level.layers:
                return sorted({min(v * len(kept) // level.layers, len(kept) - 1) if v >= 0 else v for v in value})
            if re.search(r"suppress", name):
                return []
        return [self._entry(name, v, level, values, kept) for v in value]

    def _entry(self, name: str, value: Any, level: _Level, values: Mapping[str, Any], kept: Sequence[int]) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return self._number(name, value, level, values, kept)
        return value


def _layers_to_keep(values: Mapping[str, Any], level: _Level) -> list[int]:
    """Return the numbers of the layers that stay: of each kind as many as fit, at least one, in their order."""
    count = level.layers
    if not count:
        return []
    columns: list[Any] = [v for v in values.values() if _has_entry_for_each(v, count)]
    special = [v for v in values.values() if isinstance(v, dict) and _by_layer(v)]
    columns += [[by_layer.get(i, by_layer.get(str(i))) for i in range(count)] for by_layer in special]
    kinds: dict[str, list[int]] = {}
    for i in range(count):
        kinds.setdefault(str([column[i] for column in columns]), []).append(i)
    want = min(count, max(level.new_layers, len(kinds)))
    rounds = [i for place in range(count) for numbers in kinds.values() for i in numbers[place : place + 1]]
    return sorted(rounds[:want])


def _has_entry_for_each(value: Any, layers: int) -> bool:
    """Return whether a value is a list with an entry for each layer, and not the numbers of all layers themselves."""
    return isinstance(value, list | tuple) and len(value) == layers and list(value) != list(range(layers))


def _shares(sections: Sequence[int], level: _Level) -> list[int]:
    """Return sections of a rotation in the old proportion, whose sum is the old one's share of a narrower head."""
    total = max(sum(sections) * level.new_head // max(level.head, 1), len(sections))
    new = [max(section * total // sum(sections), 1) for section in sections]
    new[0] += total - sum(new)
    return new


def _heads(value: int, level: _Level) -> int:
    return min(value, HEADS)


def _kv_heads(value: int, level: _Level) -> int:
    return value if value <= 1 else HEADS if value >= level.heads else HEADS // 2


def _square(value: int, level: _Level) -> int:
    return min(value, (PICTURE // PATCH) ** 2)


def _by_layer(values: Mapping[Any, Any]) -> bool:
    """Return whether the keys are numbers of layers, each with a configuration of its own."""
    return bool(values) and all(str(key).isdigit() and isinstance(value, dict) for key, value in values.items())


# which some models do not derive themselves where they are None
_UNSET: dict[str, Callable[[_Level], int]] = {
    "head_dim": lambda level: level.new_head,
    "num_key_value_heads": lambda level: HEADS,
    "num_experts_per_tok": lambda level: 2,
}
_Rule = int | Callable[[int, _Level], int]
_RULES: list[tuple[re.Pattern[str], _Rule]] = [
    (re.compile(pattern), rule)
    for pattern, rule in (
        # heads
        (r".*(key_value_heads|kv_heads|kv_n_heads|num_query_groups|num_key_heads).*", _kv_heads),
        (r"mamba_n(um)?_?heads|n_mamba_heads|mamba_num_heads", 8),
        (r".*(attention_heads|num_heads|n_heads?|value_heads|resampler_heads)(_per_layer)?", _heads),
        # widths of heads
        (r"qk_nope_head_dim|qk_rope_head_dim|index_head_dim_rope", 16),
        (r"qk_head_dim|v_head_dim|index_head_dim", 32),
        (r"linear_(key|value)_head_dim|linear_head_dim", 16),
        (r"mamba_(d_head|head_?dim)", 32),
        (r"rotary_dim", lambda value, level: max(value * level.new_head // max(level.head, 1), 2)),
        (r"query_pre_attn_scalar", lambda value, level: level.new_head),
        # widths inside
        (r".*moe.*intermediate_size|.*shared_expert.*_(size|dim)|expert_ffn_hidden_size|moe_hidden_size", 32),
        (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|mlp_dim|d_inner|feed_forward_size).*", INNER),
        (r".*(lora_rank|_rank|lowrank)", 16),
        (r"(mamba_)?(d_)?(ssm_)?state(_size)?", 16),
        (r"(mamba_)?n_?groups|n_groups", lambda value, level: min(value, 2)),
        (r".*chunk_size.*|.*chunk_length", lambda value, level: min(value, 8)),
        (r".*(sliding_window|window_size|attention_window|local_attention|window_len|window_size)", 8),
        # layers
        (
            r"attn_layer_period|.*sliding_window_pattern|global_attn_every_n_layers|no_rope_layer_interval|layer_group_size",
            2,
        ),
        (r"attn_layer_offset|first_k_dense_replace|num_dense_layers|num_kv_shared_layers|moe_layer_start_index", 1),
        (
            r"max_window_layers|moe_layer_end_index",
            lambda value, level: LAYERS // 2 if value < level.layers else LAYERS - 1,
        ),
        (r"num_nextn_predict_layers", 0),
        # experts
        (r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num|moe_num_experts", EXPERTS),
        (r"(moe_)?(num_experts_per_tok(en)?|top_?k|moe_k|moe_top_?k)", 2),
        (r"n_group|num_expert_group", 2),
        (r"topk_group", 1),
        # words and places
        (r".*vocab_size.*|vocab_offset|.*hash_byte_group_vocab|num_embeddings", VOCABULARY),
        (r"codebook_size", 128),
        (r"original_max_position_embeddings", POSITIONS // 2),
        (r".*max_(\w+_)?(position\w*|positions|seq_len|length)|n_positions|n_ctx|seq_len|context_length", POSITIONS),
        # pictures
        (r"(vision_)?out_hidden_size|text_hidden_size", WIDTH),
        (r"(vision_|video_)?(image|crop|max_image|min_image|max_img)_size|resolution", PICTURE),
        (r"patch_sizes?", PATCH),
        (r"num_position_embeddings|num_patches|image_seq_length|num_image_tokens|video_seq_length", _square),
        (
            r"mm_tokens_per_image|num_query_tokens|.*soft_tokens_per_image|\w*n_latents|\w*num_latents|latent_query_num",
            4,
        ),
        (r"posemb_grid_size|pos_emb_height|pos_emb_width", PICTURE // PATCH),
    )
]


def shrunk_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a model type of transformers, in small.

    Args:
        model_type: as transformers names it, e.g. `"gemma3_text"`.

    Raises:
        KeyError: an unknown model type.

    Example:
        >>> config = shrunk_config("mistral")
        >>> config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, config.sliding_window
        (4, 128, 2, 8)
    """
    from transformers import CONFIG_MAPPING

    made: Any = CONFIG_MAPPING[model_type]
    values = made().to_dict()
    new = _Shrinking(values).shrink(values)
    for path, value in EXCEPTIONS.get(model_type, {}).items():
        *outer, name = path.split(".")
        inner = new
        for key in outer:
            inner = inner[key]
        inner[name] = value
    for name in ("transformers_version", "architectures", "model_type"):
        new.pop(name, None)
    config: PreTrainedConfig = made(**new)
    return config


def shrunk_model(model_class: type[nn.Module], model_type: str, seed: int = 0, **settings: Any) -> nn.Module:
    """Return a model of random weights with the shrunk configuration of its type, in evaluation mode.

    Matrices are larger than models are initialised with, so that what is done to a layer shows in the logits.

    Args:
        model_class: the class of transformers, e.g. `LlamaForCausalLM`.
        model_type: see `shrunk_config`.
        seed: of the weights.
        **settings: values of the configuration that differ, e.g. `is_decoder=True`.
    """
    maker: Any = model_class
    config = shrunk_config(model_type)
    if not isinstance(config, maker.config_class):  # the language model alone of what sees pictures too
        text = config.get_text_config()
        config = text if isinstance(text, maker.config_class) else config
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = maker(config).eval()
    roughen(model, seed)
    generation = getattr(model, "generation_config", None)
    if generation is not None:  # so that texts are as long as was asked
        generation.eos_token_id, generation.pad_token_id = None, 0
        generation.forced_eos_token_id = None
    return model


@torch.no_grad()
def roughen(model: nn.Module, seed: int = 0, spread: float = 0.05) -> None:
    """Add normal noise to the matrices of a model that multiply hidden states, in place."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and re.search(r"weight$|experts|proj", name) and "embed" not in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
