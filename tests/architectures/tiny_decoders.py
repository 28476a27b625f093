"""Tiny random models of every causal language model of transformers, by rules on the names of configuration fields."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.tiny_configs import small_fields, tiny_model

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


def own_fields(name: str) -> dict[str, Any]:
    """What a class's tiny configuration has beside the rules, for whatever head the architecture has.

    Args:
        name: The class, such as `"JambaForCausalLM"` or `"JambaForSequenceClassification"`.
    """
    fields, _ = _EXCEPTIONS.get(f"{name.partition('For')[0]}ForCausalLM", ({}, ""))
    return fields


def tiny_decoder(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A randomly initialised tiny model, in evaluation mode.

    Args:
        name: Its class, such as `"LlamaForCausalLM"`.
        seed: Seed of its weights.
        **fields: Configuration fields to set besides.
    """
    model_class = getattr(transformers, name)
    return tiny_model(model_class, tiny_config(model_class, **fields), seed)


def tiny_config(model_class: type[PreTrainedModel], **fields: Any) -> PreTrainedConfig:
    """The default configuration of a model with every size set small.

    Args:
        model_class: The model.
        **fields: Fields to set besides.
    """
    own = own_fields(model_class.__name__)
    config_class = model_class.config_class
    assert config_class is not None
    config: PreTrainedConfig = config_class(**{**small_fields(config_class(), is_decoder=True), **own, **fields})
    return config
