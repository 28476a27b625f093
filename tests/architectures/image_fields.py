"""Fields of configurations of tiny models that read images, beside the rules on names of fields, by class."""

from __future__ import annotations

from typing import Any, NamedTuple


class Fields(NamedTuple):
    """Fields of a text model, of a vision model, and beside both."""

    text: dict[str, Any] = {}  # noqa: RUF012
    vision: dict[str, Any] = {}  # noqa: RUF012
    both: dict[str, Any] = {}  # noqa: RUF012


_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
_SMALL = {"patch_size": 8, "image_size": 32}
_WINDOWS = {"window_size": 112, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
_TABLE = {"num_position_embeddings": 16, "out_hidden_size": 32}
_DEEP = {"deepstack_visual_indexes": [0, 1], **_TABLE}
_GLM = Fields(_MROPE)
_OMNI = {"vision_start_token_id": 87, "vision_end_token_id": 88, "audio_start_token_id": 86, "audio_token_id": 85}
_PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
_GEMMA4 = Fields(
    {"use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0},
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    },
)

IMAGE_FIELDS = {
    "AriaForConditionalGeneration": Fields({}, _SMALL, {"projector_patch_to_query_dict": {16: 4}}),
    "BlipForConditionalGeneration": Fields({"bos_token_id": 1, "sep_token_id": 2}, _SMALL),
    "CohereCompassForConditionalGeneration": Fields(
        {
            "rope_parameters": {
                "full_attention": _MROPE["rope_parameters"],
                "sliding_attention": _MROPE["rope_parameters"],
            }
        },
        _DEEP,
    ),
    "Cosmos3EdgeForConditionalGeneration": Fields(_MROPE, {"num_patches": 16}, {"projector_hidden_size": 32}),
    "Cosmos3OmniForConditionalGeneration": Fields(_MROPE, _DEEP),
    "Exaone4_5_ForConditionalGeneration": Fields({}, _WINDOWS),
    "Florence2ForConditionalGeneration": Fields(
        {},
        {
            "depths": [1, 1],
            "patch_size": [16, 16],
            "patch_stride": [16, 16],
            "patch_padding": [0, 0],
            "patch_prenorm": [False, True],
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 4,
            "projection_dim": 32,
        },
    ),
    "Gemma3ForConditionalGeneration": Fields({}, _SMALL, {"mm_tokens_per_image": 4}),
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": _GEMMA4,
    "Glm46VForConditionalGeneration": _GLM,
    "Glm4vForConditionalGeneration": _GLM,
    "Glm4vMoeForConditionalGeneration": Fields(
        {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
    ),
    "GlmOcrForConditionalGeneration": _GLM,
    "HunYuanVLForConditionalGeneration": Fields(_MROPE, {"text_hidden_size": 32}),
    "HyperCLOVAXVisionV2ForConditionalGeneration": Fields({}, _WINDOWS),
    "Idefics2ForConditionalGeneration": Fields({}, _SMALL),
    "Idefics3ForConditionalGeneration": Fields({}, _SMALL),
    "InternVLForConditionalGeneration": Fields({}, {"patch_size": [8, 8], "image_size": [32, 32]}),
    "JanusForConditionalGeneration": Fields(
        {},
        {**_SMALL, "projection_dim": 32},
        {"vq_config": {"base_channels": 32, "num_embeddings": 64, "channel_multiplier": [1], "latent_channels": 32}},
    ),
    "Llama4ForConditionalGeneration": Fields(
        {},
        {
            **_SMALL,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    ),
    "LlavaNextForConditionalGeneration": Fields({}, _SMALL, _PINPOINTS),
    "LlavaNextVideoForConditionalGeneration": Fields({}, _SMALL, _PINPOINTS),
    "LlavaOnevisionForConditionalGeneration": Fields({}, _SMALL, _PINPOINTS),
    "MllamaForConditionalGeneration": Fields(
        {"num_hidden_layers": 3, "cross_attention_layers": [1], "num_key_value_heads": 2},
        {
            **_SMALL,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 64,
            "max_num_tiles": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
    ),
    "MuseGlimmerForConditionalGeneration": Fields({}, {}, {"out_hidden_size": 128}),
    "MuseSparkForConditionalGeneration": Fields({}, {}, {"out_hidden_size": 128}),
    "PaddleOCRVLForConditionalGeneration": Fields(_MROPE),
    "PaliGemmaForConditionalGeneration": Fields(
        {"num_key_value_heads": 2}, {**_SMALL, "projection_dim": 32}, {"projection_dim": 32}
    ),
    "QianfanOCRForConditionalGeneration": Fields({}, {"patch_size": [8, 8], "image_size": [32, 32]}),
    "Qwen2VLForConditionalGeneration": Fields(_MROPE, {"hidden_size": 32}),
    "Qwen2_5OmniThinkerForConditionalGeneration": Fields(_MROPE, _WINDOWS, _OMNI),
    "Qwen2_5_VLForConditionalGeneration": Fields(_MROPE, {"window_size": 112, "out_hidden_size": 32}),
    "Qwen3OmniMoeThinkerForConditionalGeneration": Fields(_MROPE, _DEEP, _OMNI),
    "Qwen3VLForConditionalGeneration": Fields(_MROPE, _DEEP),
    "Qwen3VLMoeForConditionalGeneration": Fields(_MROPE, _DEEP),
    "Qwen3_5ForConditionalGeneration": Fields(_MROPE, _TABLE),
    "Qwen3_5MoeForConditionalGeneration": Fields(_MROPE, _TABLE),
    "SmolVLMForConditionalGeneration": Fields({}, _SMALL),
    "Step3p7ForConditionalGeneration": Fields({"sliding_window": 4}),
    "VipLlavaForConditionalGeneration": Fields({}, _SMALL, {"vision_feature_layers": [-1, -2]}),
    "VisionEncoderDecoderModel": Fields(
        {},
        {},
        {
            "encoder": {
                "model_type": "vit",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                **_SMALL,
            },
            "decoder": {"model_type": "trocr", "vocab_size": 99, "d_model": 32, "decoder_layers": 2}
            | {"decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
            | {"is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
        },
    ),
}
