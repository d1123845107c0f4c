"""What shrinking by the meaning of fields gets wrong, by model type: paths in the configuration, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HYBRID = ["linear_attention", "full_attention"] * 2
_SECTIONS_8, _SECTIONS_16 = [4, 2, 2], [8, 4, 4]  # which sum to half of a head
_ROTARY = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}

# defaults that describe no working model, or only one half of a hybrid; and sections that are no field by default
EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 256},
    "blenderbot": {"encoder_layers": 4},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [64, 64]},
    "step3p7": {"text_config.sliding_window": 8},
    "glm4v": {"text_config.rope_parameters.mrope_section": _SECTIONS_16},
    "glm46v": {"text_config.rope_parameters.mrope_section": _SECTIONS_16},
    "glmga": {"text_config.rope_parameters.mrope_section": _SECTIONS_16},
    "glm_ocr": {"text_config.rope_parameters.mrope_section": _SECTIONS_16},
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": _SECTIONS_8},
    "qwen2_vl": {"text_config.rope_parameters.mrope_section": _SECTIONS_16, "vision_config.hidden_size": 128},
    "qwen2_5_vl": {"text_config.rope_parameters.mrope_section": _SECTIONS_16},
    "paddleocr_vl": {"text_config.rope_parameters.mrope_section": [16, 8, 8]},
    "cohere_compass": {"text_config.rope_parameters": _ROTARY},
    "cohere_compass_text": {"rope_parameters": _ROTARY},
    "dots3_note": {"text_config.head_dim": 32, "vision_config.adapter_input_size": 64},
    "dots3_note_text": {"head_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 120,
        "vision_end_token_id": 121,
        "text_config.rope_parameters.mrope_section": _SECTIONS_16,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120, "vision_end_token_id": 121},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"] * 2},
}
