"""The layers that a cache of transformers is made of."""

from gralora_fx.base.compat.versions import fenced

with fenced("transformers"):
    from transformers.cache_utils import (
        DummyLayer,
        DynamicIndexedLayer,
        DynamicLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionLayer,
    )

__all__ = [
    "DummyLayer",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionLayer",
]
