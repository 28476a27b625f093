"""The functions that transformers builds attention masks from."""

from gralora_fx.compat.versions import fenced

with fenced("transformers"):
    from transformers.masking_utils import (
        AttentionMaskInterface,
        blockwise_overlay,
        causal_mask_function,
        eager_mask,
        or_masks,
        sliding_window_causal_mask_function,
    )

__all__ = [
    "AttentionMaskInterface",
    "blockwise_overlay",
    "causal_mask_function",
    "eager_mask",
    "or_masks",
    "sliding_window_causal_mask_function",
]
