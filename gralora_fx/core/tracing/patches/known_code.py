"""The code of models that a trace knows: one row for each, by whose copies of it other models are recognised too.

A replacement is loaded once a model has the code, so that a model loads nothing for what it does not have.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gralora_fx.core.tracing.patches.recognised import Recognised


def _rotates_all(module: Any) -> bool:
    return "dynamic" not in module.rope_type and module.rope_type != "longrope"


DROP_PATH = Recognised(
    "swin.modeling_swin:SwinDropPath.forward",
    "other_layers:drop_path",
    ending="DropPath",
    fits=lambda module: isinstance(module.drop_prob, float),
)
SAME_PADDING = (
    Recognised(
        "mobilenet_v1.modeling_mobilenet_v1:apply_tf_padding", "other_layers:same_padding"
    ),  # dilations are all one
    Recognised("mobilenet_v2.modeling_mobilenet_v2:apply_tf_padding", "other_layers:same_padding"),
)
BLOCK_SPARSE_ATTENTION = Recognised(
    "qwen4_exp.modeling_qwen4_exp:Qwen4ExpTextQSAIndexer.forward",
    "block_sparse_attention:chosen",
    ending="QSAIndexer",
    fits=lambda module: module.index_kv_heads == 1,
)
IN_EVERY_MODEL = (
    DROP_PATH,
    *SAME_PADDING,
    BLOCK_SPARSE_ATTENTION,
)

RMS_NORM = Recognised("llama.modeling_llama:LlamaRMSNorm.forward", "decoder_operators:norm")
ROTARY_EMBEDDING = Recognised(
    "llama.modeling_llama:apply_rotary_pos_emb", "decoder_operators:rotate_both", beside=("rotate_half",)
)
ANGLES_OF_GRIDS = Recognised(
    "qwen3_5.modeling_qwen3_5:Qwen3_5TextRotaryEmbedding.forward",
    "decoder_operators:angles_of_grids",
    ending="RotaryEmbedding",
    beside=("recomposition_frequencies",),  # which leaves equal angles as they are
    fits=_rotates_all,
)
IN_DECODERS = (RMS_NORM, ROTARY_EMBEDDING, ANGLES_OF_GRIDS)

# attention that models compute by themselves, not through transformers' interface
ATTENTIONS = (
    Recognised(
        "falcon.modeling_falcon:FalconAttention.forward",
        "decoder_operators:falcon",
        ending="FalconAttention",
        fits=lambda module: not module.config.alibi,  # a bias for each head is more than a mask
    ),
)


def has_key_indexer(model: nn.Module) -> bool:
    """Return whether a decoder's indexer of keys keeps the positions of all tokens."""
    return any(type(part).__name__.endswith("QSAIndexer") for part in model.modules())
