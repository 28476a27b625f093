"""Sparse attention in a decoder's trace: an indexer scores the keys, and a query attends to the best of them.

The graph multiplies with all keys and masks those that were not chosen, as the models' own code does on a CPU: the
result is the same, at full cost.

Qwen4's indexer chooses blocks of keys. Its own code loops over rows and queries, and reads values. Here one computation
serves all of them: a row's tokens other than padding form blocks in their order, the same for every query, and each
query chooses among the blocks before it.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gralora_fx.core.tracing.inputs.cache import positions
from gralora_fx.core.tracing.known_code import INDEXER
from gralora_fx.format.input_names import PAST


def only_chosen(mask: Tensor, chosen: Tensor) -> Tensor:
    """Hide the keys that are not among `chosen [batch, length, count]` in a mask `[batch, 1, length, total]`."""
    hidden = torch.ones_like(mask, dtype=torch.bool).scatter(-1, chosen.unsqueeze(1).long(), False)
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


@contextmanager
def symbolic_counts(model: nn.Module) -> Iterator[None]:
    """Let indexers choose at most as many keys as there are without comparing sizes, within the block."""
    owners = {type(part).__module__ for part in model.modules() if type(part).__name__.endswith(INDEXER)}
    with ExitStack() as changed:
        for owner in sorted(owners):
            changed.enter_context(patch.object(sys.modules[owner], "min", smaller, create=True))
        yield


def smaller(*values: Any, **options: Any) -> Any:
    """Return the smaller value like Python's `min`; for symbolic sizes it is an operation instead of a comparison."""
    if len(values) == 2 and any(isinstance(value, torch.SymInt) for value in values):
        return torch.sym_min(*values)  # type: ignore[no-untyped-call]
    return builtins.min(*values, **options)


def chosen(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor, cache: Any
) -> Tensor:
    """Choose each query's keys, `[batch, 1, length, total]`: those of the best whole blocks, and the remaining ones.

    A block is `compress_ratio` tokens, and its key the mean of theirs.
    """
    batch, length, _ = hidden_states.shape
    width, size = module.compress_ratio, module.index_head_dim
    heads = [count * size for count in (module.index_n_heads, module.index_kv_heads)]
    query, keys = torch.split(module.index_qk_proj(hidden_states), heads, dim=-1)
    if cache is not None:
        keys = cache.update_indexer(keys, module.layer_idx)
    total = keys.shape[1]
    seen = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
    is_token = seen[:, -1]  # the last query sees all but padding
    places = torch.arange(total, device=keys.device)
    order = torch.argsort(torch.where(is_token, places, places + total), dim=-1)  # padding last
    count = (total + width - 1) // width
    starts = order[:, torch.arange(count, device=keys.device) * width]
    keys = keys.gather(1, order.unsqueeze(-1).expand(batch, total, size))
    keys = nn.functional.pad(keys, (0, 0, 0, count * width - total)).view(batch, count, width, size)
    blocks = module.k_layernorm(keys.float().mean(2).to(query.dtype)).unsqueeze(2)
    rotate = importlib.import_module(type(module).__module__).apply_rotary_pos_emb
    cos, sin = position_embeddings
    at = starts.unsqueeze(-1).expand(batch, count, cos.shape[-1])
    blocks = rotate(blocks, cos=cos.gather(1, at), sin=sin.gather(1, at), unsqueeze_dim=2).squeeze(2)
    query = module.q_layernorm(query.view(batch, length, -1, size))
    query = rotate(query, cos=cos[:, -length:], sin=sin[:, -length:], unsqueeze_dim=2)
    scores = torch.relu(query.float() @ blocks.float().transpose(1, 2).unsqueeze(1)).sum(2) / math.sqrt(size)
    whole = (seen.sum(-1) // width).unsqueeze(-1)  # blocks, `[batch, length, 1]`
    is_whole = torch.arange(count, device=keys.device) < whole
    best = scores.masked_fill(~is_whole, -math.inf).topk(smaller(module.block_topk, count), dim=-1).indices
    is_best = torch.zeros_like(is_whole).scatter(-1, best, True) & is_whole
    block = ((is_token.cumsum(-1) - 1).clamp(min=0) // width).unsqueeze(1)
    is_chosen: Tensor = is_best.gather(-1, block.expand(batch, length, total)) | (block >= whole)
    return (is_chosen & seen).unsqueeze(1)


@contextmanager
def known_positions(model: nn.Module) -> Iterator[None]:
    """Let indexers compute the positions of earlier tokens from the mask instead of the cache, within the block."""
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
