"""The operator of rotary embeddings that depend on the length of the whole text."""

from __future__ import annotations

import torch
from torch import Tensor

from gralora_fx.core.operators.call import Call, V, operator

__all__ = ["TextLength"]  # importing this module defines it


@operator("text_length")
class TextLength(Call[V]):
    """`gralora::text_length`: the length of the text that each position belongs to, shaped like `positions`.

    As transformers computes it, all rows of a batch have the length of the longest. In a graph of rows each has its
    own. Both graphs take `text_seqlens`, lengths that are known beforehand.
    """

    positions: V  # `[batch, length]`, of the tokens of a step
    switch: int  # the longest text that the frequencies of short texts are for
    rereads: bool  # whether the model's generation computes its cache anew where a text grows longer than that

    def result(self: TextLength[Tensor]) -> Tensor:
        """Compute the reference with PyTorch operators."""
        return (self.positions.max() + 1).expand_as(self.positions).contiguous()

    def shape_only(self: TextLength[Tensor]) -> Tensor:
        """Return an empty tensor of the shape."""
        return torch.empty_like(self.positions)
