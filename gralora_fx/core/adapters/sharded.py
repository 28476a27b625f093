"""Tensors that FSDP2 has distributed over processes: gathered to be saved, and distributed when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gralora_fx.core.adapters.base import is_sharded


def reshard(model: nn.Module) -> None:
    """Let FSDP2 take back whole tensors that it has left in place after a forward pass without a backward one."""
    if (shards := getattr(model, "reshard", None)) is not None:
        shards()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors by name; every process must call it if one is sharded, in the same order."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def is_writer() -> bool:
    """Return whether this process writes what all of them hold: the first one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def as_sharded(values: Tensor, like: Tensor) -> Tensor:
    """Return whole values as another tensor is distributed; themselves if it is not."""
    if not is_sharded([like]):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(values.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)
