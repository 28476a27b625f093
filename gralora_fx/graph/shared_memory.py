"""Which tensors share memory: the same storage, slices of one buffer that overlap, views through `.data` or numpy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor


def overlapping(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The names of the tensors that share any element with another, each with the names of those others.

    A tensor that is there under two names does not count as another one.

    Args:
        tensors: Tensors by name.
    """
    spans = sorted(
        (span for name, tensor in tensors.items() if (span := _span(name, tensor))), key=lambda span: span[:3]
    )
    clusters: list[list[str]] = [[spans[0][3]]] if spans else []
    end = spans[0][2] if spans else 0
    for before, span in pairwise(spans):
        if span[0] != before[0] or span[1] >= end:
            clusters.append([])
            end = span[2]
        clusters[-1].append(span[3])
        end = max(end, span[2])
    found: dict[str, tuple[str, ...]] = {}
    for cluster in clusters:
        for name in cluster:
            mine = tensors[name]
            others = [other for other in cluster if tensors[other] is not mine and _share(mine, tensors[other])]
            if others:
                found[name] = tuple(others)
    return found


def is_writable(tensor: Tensor) -> bool:
    """Whether values can be written into a tensor's memory, each element into one of its own.

    Args:
        tensor: A parameter. Expanded ones, those of other layouts and those of other classes are not writable.
    """
    if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        return False
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return False
            extent += (size - 1) * stride
    return True


def _span(name: str, tensor: Tensor) -> tuple[str, int, int, str] | None:
    """Device, first byte and the one after the last of a tensor in memory; None where it has none of its own."""
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor.data) is not Tensor or not tensor.numel():
        return None
    start = tensor.data_ptr()
    return str(tensor.device), start, start + _extent(tensor) * tensor.element_size(), name


def _extent(tensor: Tensor) -> int:
    """Number of elements from a tensor's first to its last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether any element of two tensors is the same: slices of columns lie between each other and share none."""
    first, second = sorted((one, other), key=lambda tensor: tensor.data_ptr())
    size = first.element_size()
    distance = second.data_ptr() - first.data_ptr()
    if distance >= _extent(first) * size:
        return False
    if second.element_size() != size or distance % size:
        return True
    offset = distance // size
    taken = torch.zeros(max(_extent(first), offset + _extent(second)), dtype=torch.bool)
    taken.as_strided(first.shape, first.stride()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), offset).any())
