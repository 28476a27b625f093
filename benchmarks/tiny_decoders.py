"""Tiny random models of every causal language model of transformers, by rules on the names of configuration fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
_LAYERS = 2

# name of a field: the most it may be; the first rule that matches counts, a smaller default stays
_CAPS: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|.*ngram_vocab.*", VOCABULARY),
    (r"max_position_embeddings|max_(seq_len|target_positions|source_positions)|n_positions|n_ctx|model_max_length", 64),
    (r"original_max_position_embeddings", 64),
    (r".*sliding_window|sliding_window_size|window_size|local_attention|attention_window_size|.*window_len", 4),
    (r".*chunk_size(?<!feed_forward)(?<!lm_head)|attention_chunk_size|.*chunk_length", 4),
    (r".*(num_)?experts_per_tok(en)?|.*top_?k|moe_k|index_topk", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"n_shared_experts|(moe_)?num_shared_experts|zero_expert_num", 1),
    (r".*experts|.*num_experts", 4),
    (r".*(num_)?(kv|key_value)_heads|kv_n_heads|num_query_groups", 2),
    (r".*(num_|n_)?(attention_)?heads|n_head|linear_num_\w+_heads", 4),
    (r".*layers(_per_stack)?|n_layer|depth|num_blocks|num_hidden_layers", _LAYERS),
    (r"first_k_dense_replace|num_dense_layers|n_\w+_layers", 1),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|.*_rank", 8),
    (r"rotary_dim", 4),
    (r"qk_head_dim", 16),  # of two parts
    (r".*head_dim|d_kv|kv_channels|dim_head|d_head|mamba_headdim|mamba_d_head", 8),
    (
        r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|n_inner|d_ff|dim_ff|dff|feed_forward_size|d_inner|mlp_dim",
        64,
    ),
    (r"hidden_size_per_layer_input|.*state_size|mamba_d_state", 8),
    (r".*hidden_size.*|d_model|n_embd|.*embed_dim|emb_dim|.*embedding_size|word_embed_proj_dim|lru_width|dim", 32),
    (r"image_size", 32),
)
# sizes that some defaults leave out though the model needs them
_LEFT_OUT = {
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_key_value_heads": 2,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "decoder_start_token_id": 1}

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
# what no rule on names tells: class, fields, and why
_EXCEPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "BambaForCausalLM": (_MAMBA, "the widths of its state space are products"),
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
    "GPTNeoForCausalLM": (
        {"attention_types": [[["global", "local"], 1]]},
        "its kinds of layers are written as a product",
    ),
    "GraniteMoeHybridForCausalLM": (
        {**_MAMBA, "layer_types": ["attention", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0},
        "its layers are of attention alone in the smaller models",
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
    "Lfm2MoeForCausalLM": ({"layer_types": ["conv", "full_attention"]}, "its default has no kinds of layers"),
    "Mamba2ForCausalLM": ({"head_dim": 16}, "the widths of its state space are products"),
    "NemotronHForCausalLM": ({"n_groups": 1}, "groups have to divide its heads"),
    "RecurrentGemmaForCausalLM": ({"num_hidden_layers": 3}, "its kinds of layers are a pattern of three"),
    "XmodForCausalLM": ({"default_language": "en_XX"}, "it runs in a chosen language only"),
}


def decoder_classes() -> tuple[str, ...]:
    """The class of every causal language model of transformers."""
    classes: set[str] = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        classes |= {name} if isinstance(name, str) else set(name)
    return tuple(sorted(name for name in classes if hasattr(transformers, name)))


def tiny_decoder(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A randomly initialised tiny model, in evaluation mode.

    Args:
        name: Its class, such as `"LlamaForCausalLM"`.
        seed: Seed of its weights.
        **fields: Configuration fields to set besides.
    """
    model_class = getattr(transformers, name)
    config = tiny_config(model_class, **fields)
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights of 0.02 would leave attention next to nothing to do
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.mul_(4)
    return model.eval().float()


def tiny_config(model_class: type[PreTrainedModel], **fields: Any) -> PreTrainedConfig:
    """The default configuration of a model with every size set small.

    Args:
        model_class: The model.
        **fields: Fields to set besides.
    """
    own, _ = _EXCEPTIONS.get(model_class.__name__, ({}, ""))
    config_class = model_class.config_class
    assert config_class is not None
    config: PreTrainedConfig = config_class(**{**_small(config_class()), **own, **fields})
    return config


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that are sizes, set small; the parts it has likewise."""
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = {"model_type": value.model_type, **_small(value)}
        elif value is None and name in _LEFT_OUT:
            small[name] = _LEFT_OUT[name]
        elif name == "is_decoder":
            small[name] = True
        elif name in _SPECIAL:
            small[name] = None if value is None else _SPECIAL[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            cap = next((cap for pattern, cap in _CAPS if re.fullmatch(pattern, name)), None)
            if name.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
                small[name] = VOCABULARY - 1
            elif cap is not None and value > cap:
                small[name] = cap
    return {**small, **dict(_even(config, small)), **_layers(config)}


def _even(config: PreTrainedConfig, small: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """As many key heads as heads where the default has as many."""
    for keys, heads in (("num_key_value_heads", "num_attention_heads"),):
        if keys in small and heads in small and getattr(config, keys) == getattr(config, heads):
            yield keys, small[heads]


def _layers(config: PreTrainedConfig) -> dict[str, Any]:
    """One layer of every kind and two at least, where lists tell what kind a layer is."""
    count = vars(config).get("num_hidden_layers")
    lists = {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and isinstance(count, int) and len(value) == count > 0
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    chosen = sorted({kinds.index(kind) for kind in kinds if kind})
    if len(chosen) > 2 * _LAYERS:
        chosen = chosen[: 2 * _LAYERS]
    while len(chosen) < _LAYERS:
        chosen.append(chosen[-1])
    return {"num_hidden_layers": len(chosen), **{name: [values[i] for i in chosen] for name, values in lists.items()}}
