"""The layers that a cache of transformers is made of."""

from gralora_fx.compat.versions import fenced

with fenced("transformers"):
    from transformers.cache_utils import (
        DummyLayer,
        DynamicLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionLayer,
    )

__all__ = ["DummyLayer", "DynamicLayer", "LinearAttentionAndFullAttentionLayer", "LinearAttentionLayer"]
