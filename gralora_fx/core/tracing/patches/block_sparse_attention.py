"""Sparse attention that chooses blocks of keys while a decoder is traced: Qwen4's, whose own code asks for values.

Its indexer loops over rows and queries. Here one computation serves all of them: a row's tokens that are not padding
are in blocks by their order, which is the same for every query, and each query chooses among the blocks before it.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from gralora_fx.core.tracing.patches.sparse_attention import smaller


def chosen(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor, cache: Any
) -> Tensor:
    """Which keys each query attends to, `[batch, 1, length, total]`: those of the best whole blocks, and the rest's.

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
    rotate = _rotation(module)
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


def _rotation(module: Any) -> Any:
    """The rotary embedding of a module's Python module."""
    return importlib.import_module(type(module).__module__).apply_rotary_pos_emb
