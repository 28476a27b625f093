"""Tiny random models of real architectures, as transformers builds them from a small config."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
_VISION = {"image_size": 16, "patch_size": 8, "num_channels": 3}

# name: (config class, its sizes, model class)
TINY: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", _ENCODER, "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", _ENCODER, "RobertaForSequenceClassification"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 101, "max_position_embeddings": 64},
        "DistilBertForSequenceClassification",
    ),
    "albert": ("AlbertConfig", {**_ENCODER, "embedding_size": 16}, "AlbertForSequenceClassification"),
    "mpnet": ("MPNetConfig", _ENCODER, "MPNetForSequenceClassification"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 64},
        "GPT2LMHeadModel",
    ),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "vocab_size": 101,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
        "OPTForCausalLM",
    ),
    "llama": ("LlamaConfig", _DECODER, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", _DECODER, "MistralForCausalLM"),
    "qwen3": ("Qwen3Config", _DECODER, "Qwen3ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", _DECODER, "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", _DECODER, "Phi3ForCausalLM"),
    "mixtral": ("MixtralConfig", {**_DECODER, "num_local_experts": 4}, "MixtralForCausalLM"),
    "falcon": (
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101},
        "FalconForCausalLM",
    ),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 101},
        "T5ForConditionalGeneration",
    ),
    "bart": ("BartConfig", _SEQ2SEQ, "BartForConditionalGeneration"),
    "whisper": (
        "WhisperConfig",
        {
            **_SEQ2SEQ,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "num_mel_bins": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "WhisperForConditionalGeneration",
    ),
    "vit": ("ViTConfig", {**_ENCODER, **_VISION}, "ViTForImageClassification"),
    "clip_text": (
        "CLIPTextConfig",
        {**_ENCODER, "projection_dim": 16, "eos_token_id": 100},
        "CLIPTextModelWithProjection",
    ),
}

# encoder-decoders beside T5, BART and Whisper, in the same form, with one layer
_SHALLOW = {**_SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1}
MORE_ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "marian": ("MarianConfig", {**_SHALLOW, "decoder_vocab_size": 101}, "MarianMTModel"),
    "pegasus": ("PegasusConfig", _SHALLOW, "PegasusForConditionalGeneration"),
    "m2m_100": ("M2M100Config", _SHALLOW, "M2M100ForConditionalGeneration"),
    "blenderbot": ("BlenderbotConfig", _SHALLOW, "BlenderbotForConditionalGeneration"),
}

# initial values wide enough that a random encoder-decoder does not repeat one token
WIDE: dict[str, dict[str, float]] = {
    "t5": {"initializer_factor": 1.5},
    **{name: {"init_std": 0.6} for name in ("bart", "whisper", "marian", "pegasus", "m2m_100", "blenderbot")},
}


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a randomly initialised tiny model of the architecture `name`, in evaluation mode."""
    config_class, sizes, model_class = {**TINY, **MORE_ENCODER_DECODERS}[name]
    config = getattr(transformers, config_class)(**{**sizes, **overrides})
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    return model.eval()


def text_batch(batch: int = 3, length: int = 9, padding: str = "right", vocab: int = 100) -> dict[str, torch.Tensor]:
    """Token ids and a mask whose rows have unequal lengths, padded on the given side."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ids = torch.randint(3, vocab, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        pad = min(row, length - 1)
        if pad:
            mask[row, slice(length - pad, None) if padding == "right" else slice(0, pad)] = 0
    return {"input_ids": ids, "attention_mask": mask}
