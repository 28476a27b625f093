"""Rows of tables in files, read without the others."""

from __future__ import annotations

import torch
from torch import Tensor

from gralora_fx.base.paged_memory import PagedBytes


def looked_up(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a memory-mapped table in a dtype with the rows of some ids set; the pages of all others take no memory."""
    memory = PagedBytes(table.numel() * dtype.itemsize)
    result, rows = torch.from_numpy(memory.array).view(dtype).view(table.shape), torch.unique(ids)
    result[rows] = table.detach()[rows].to(dtype)
    return result
