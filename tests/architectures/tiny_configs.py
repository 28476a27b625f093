"""Tiny configurations of transformers' models, by rules on the names of their fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96

_LAYERS = 2
_LAYER_COUNTS = r".*layers(_per_stack)?|n_layer|depth|num_blocks|num_hidden_layers"

# name of a field: the most it may be; the first rule that matches counts, a smaller default stays
_CAPS: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|.*ngram_vocab.*", VOCABULARY),
    (r"max_position_embeddings|max_(seq_len|target_positions|source_positions)|n_positions|n_ctx|model_max_length", 64),
    (r"original_max_position_embeddings", 64),
    (r".*sliding_window|sliding_window_size|window_size|local_attention|attention_window_size|.*window_len", 4),
    (r".*chunk_size(?<!feed_forward)(?<!lm_head)|attention_chunk_size|.*chunk_length", 4),
    (r"index_topk", 64),  # no fewer than a text has: few heads give equal scores, of which any may be chosen
    (r".*(num_)?experts_per_tok(en)?|.*top_?k|moe_k", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"n_shared_experts|(moe_)?num_shared_experts|zero_expert_num", 1),
    (r".*experts|.*num_experts", 4),
    (r".*(num_)?(kv|key_value)_heads|kv_n_heads|num_query_groups", 2),
    (r".*(num_|n_)?(attention_)?heads|n_head|linear_num_\w+_heads", 4),
    (r"num_feat_extract_layers", 99),  # as many as its lists have
    (_LAYER_COUNTS, _LAYERS),
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
# likewise for each number of a list, one a stage of a vision model
_STAGES = (
    (r".*depths?|layers|num_blocks|num_layers|blocks_per_stage|.*layers_per_stage", 1),
    (r".*heads.*", 2),
    (r"conv_dim", 16),
    (r".*hidden_sizes|.*embed_dims?|.*channels|.*dims?|neck_.*", 32),
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


def small_fields(config: PreTrainedConfig, *, is_decoder: bool, layers: int = _LAYERS) -> dict[str, Any]:
    """Return the fields of a configuration that are sizes, set small; the parts it has likewise.

    Args:
        config: The default configuration.
        is_decoder: Whether a field that says so is set.
        layers: How many layers there are at most, or one of each kind where there are more kinds.
    """
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            part = small_fields(value, is_decoder=is_decoder, layers=layers)
            small[name] = {"model_type": value.model_type, **part}
        elif value is None and name in _LEFT_OUT:
            small[name] = _LEFT_OUT[name]
        elif name == "is_decoder":
            small[name] = is_decoder
        elif name in _SPECIAL:
            small[name] = None if value is None else _SPECIAL[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            cap = _cap(_CAPS, name, layers)
            if name.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
                small[name] = VOCABULARY - 1
            elif cap is not None and value > cap:
                small[name] = cap
        elif isinstance(value, (list, tuple)) and value and all(type(size) is int for size in value):
            cap = _cap(_STAGES, name, layers)
            if cap is not None:
                small[name] = [min(size, cap) for size in value]
    return {**small, **dict(_even(config, small)), **_layers(config, layers)}


def tiny_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a randomly initialised model in float32 and evaluation mode.

    Args:
        model_class: Its class.
        config: Its configuration.
        seed: Seed of its weights.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights of 0.02 would leave attention next to nothing to do
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.mul_(4)
    return model.eval().float()


def _cap(rules: tuple[tuple[str, int], ...], name: str, layers: int) -> int | None:
    """Return the most that a field may be by the first rule that matches its name, or None."""
    cap = next((cap for pattern, cap in rules if re.fullmatch(pattern, name)), None)
    return layers if cap == _LAYERS and rules is _CAPS and re.fullmatch(_LAYER_COUNTS, name) else cap


def _even(config: PreTrainedConfig, small: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """As many key heads as heads where the default has as many."""
    for keys, heads in (("num_key_value_heads", "num_attention_heads"),):
        if keys in small and heads in small and vars(config)[keys] == vars(config)[heads]:
            yield keys, small[heads]


def _layers(config: PreTrainedConfig, least: int) -> dict[str, Any]:
    """One layer of every kind and `least` at least, where lists tell what kind a layer is."""
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
    if len(chosen) > 2 * least:
        chosen = chosen[: 2 * least]
    while len(chosen) < least:
        chosen.append(chosen[-1])
    return {"num_hidden_layers": len(chosen), **{name: [values[i] for i in chosen] for name, values in lists.items()}}
