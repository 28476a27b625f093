"""The positions of earlier tokens, for a decoder whose indexer of keys rotates them anew in every step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn

from gralora_fx.core.tracing.inputs.cache import positions
from gralora_fx.format.input_names import PAST


@contextmanager
def known_positions(model: nn.Module) -> Iterator[None]:
    """Let indexers that keep the positions of all tokens take those of earlier ones from the mask, within the block.

    They are counted from it, so that they need no place in the cache.
    """
    forward = model.forward

    @functools.wraps(forward)
    def told(*args: Any, **inputs: Any) -> Any:
        cache = inputs.get(PAST, inputs.get("cache"))
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        kept = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "indexer_position_ids")]
        if kept and mask is not None and ids is not None:
            before = positions(mask)[:, : mask.shape[1] - ids.shape[1]]
            kept[0].indexer_position_ids = before.expand(3, *before.shape)
        try:
            return forward(*args, **inputs)
        finally:
            for layer in kept:
                layer.indexer_position_ids = None

    with patch.object(model, "forward", told):
        yield
