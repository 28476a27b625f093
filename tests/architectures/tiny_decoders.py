"""Tiny random models of every causal language model of transformers, by rules on the names of configuration fields."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.tiny_configs import small_fields, tiny_model

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_WITHOUT_VISION = ("Gemma3nForConditionalGeneration",)
# what no rule on names tells: class, fields, and why
_EXCEPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "BambaForCausalLM": (
        {**_MAMBA, "attn_layer_indices": [1]},
        "the widths of its state space are products, and one of its layers is of attention",
    ),
    "CohereCompassForCausalLM": (
        {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [1, 1, 2]}}},
        "its default has no angles",
    ),
    "DbrxForCausalLM": (
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
        },
        "its parts say nothing of what kind they are",
    ),
    "DoryForCausalLM": (
        {
            "num_hidden_layers": 3,
            "n_input_layers": 1,
            "n_recurrent_layers": 1,
            "n_output_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "its layers are three groups",
    ),
    "Dots3NoteForCausalLM": (
        {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 8,
            "swa_kv_lora_rank": 8,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
            "shared_experts_intermediate_size": 64,
        },
        "its layers with a window have sizes of their own",
    ),
    "Gemma4AssistantForCausalLM": (
        {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "vocab_size": 96,
            }
        },
        "it has no inputs of layers",
    ),
    "GPTNeoForCausalLM": (
        {"attention_types": [[["global", "local"], 1]]},
        "its kinds of layers are written as a product",
    ),
    "GraniteMoeHybridForCausalLM": (
        {**_MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0},
        "the widths of its state space are products, and it has no experts in the smaller models",
    ),
    "HrmTextForCausalLM": (
        {"num_hidden_layers": 4, "num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 3, "L_bp_cycles": [2]},
        "its layers are those of a stack times its cycles",
    ),
    "HunYuanMoEV1ForCausalLM": ({"num_experts": 4, "moe_topk": 2}, "its default has one expert"),
    "JambaForCausalLM": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        "its kinds of layers are periods",
    ),
    "Lfm2ForCausalLM": (
        {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        "its default is of attention alone",
    ),
    "Lfm2MoeForCausalLM": ({"layer_types": ["conv", "full_attention"]}, "its default has no kinds of layers"),
    "Mamba2ForCausalLM": (
        {"head_dim": 16, "num_heads": 4, "n_groups": 2},
        "the widths of its state space are products",
    ),
    "MoshiForCausalLM": (
        {"sliding_window": 64},
        "its cache forgets what is before a window, and its mask does not: texts are within the window",
    ),
    "NemotronHForCausalLM": (
        {"n_groups": 1},
        "groups have to divide its heads",
    ),
    "Qwen4ExpForCausalLM": (
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
        },
        "its default has no indexer",
    ),
    "RecurrentGemmaForCausalLM": ({"num_hidden_layers": 3}, "its kinds of layers are a pattern of three"),
    "ReformerModelWithLMHead": (
        {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
        "the widths of its positions are of one sum",
    ),
    "Zamba2ForCausalLM": (
        {
            "mamba_expand": 2,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
        "its widths are products",
    ),
    "ZambaForCausalLM": (
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
        "its layers of attention share their weights, and there have to be several",
    ),
    "XmodForCausalLM": ({"default_language": "en_XX"}, "it runs in a chosen language only"),
}


def decoder_classes() -> tuple[str, ...]:
    """Return the class of every causal language model of transformers."""
    classes: set[str] = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        classes |= {name} if isinstance(name, str) else set(name)
    return tuple(sorted(classes & set(dir(transformers))))  # which imports none of them


def own_fields(name: str) -> dict[str, Any]:
    """Return the fields of a class's tiny configuration beside the rules, for whatever head the architecture has.

    Args:
        name: The class, such as `"JambaForCausalLM"` or `"JambaForSequenceClassification"`.
    """
    causal = f"{name.partition('For')[0]}ForCausalLM"
    fields, _ = _EXCEPTIONS.get(name, _EXCEPTIONS.get(causal, ({}, "")))
    return copy.deepcopy(fields)  # a configuration writes into what it is given


def tiny_decoder(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a randomly initialised tiny model, in evaluation mode.

    Args:
        name: Its class, such as `"LlamaForCausalLM"`.
        seed: Seed of its weights.
        **fields: Configuration fields to set besides.
    """
    model_class = getattr(transformers, name)
    config = tiny_config(model_class, **fields)
    with _without_vision() if name in _WITHOUT_VISION else nullcontext():
        return tiny_model(model_class, config, seed)


@contextmanager
def _without_vision() -> Iterator[None]:
    """Leave out the part of a model that reads images, whose package (timm) may not be installed: texts need none."""
    make = transformers.AutoModel.from_config

    def made(config: PreTrainedConfig, **options: Any) -> nn.Module:
        return nn.Identity() if config.model_type.endswith("_vision") else make(config, **options)

    with patch.object(transformers.AutoModel, "from_config", made):
        yield


def tiny_config(model_class: type[PreTrainedModel], **fields: Any) -> PreTrainedConfig:
    """Return the default configuration of a model with every size set small.

    Args:
        model_class: The model.
        **fields: Fields to set besides.
    """
    own = own_fields(model_class.__name__)
    config_class = model_class.config_class
    assert config_class is not None
    try:
        default = config_class()
    except StrictDataclassError:  # one that no model may have
        default = config_class(**own)
    config: PreTrainedConfig = config_class(**{**small_fields(default, is_decoder=True), **own, **fields})
    return config
