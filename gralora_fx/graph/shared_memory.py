"""Tensors that share memory: by the same storage, overlapping slices, or views through `.data` or numpy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor


def overlapping(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The names of tensors that share an element with others, each with the names of the others.

    The same tensor under two names does not count as two.

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
    overlaps: dict[str, tuple[str, ...]] = {}
    for cluster in clusters:
        for name in cluster:
            mine = tensors[name]
            others = [other for other in cluster if tensors[other] is not mine and _share(mine, tensors[other])]
            if others:
                overlaps[name] = tuple(others)
    return overlaps


def is_writable(tensor: Tensor) -> bool:
    """Whether a tensor can be written to in place, each element having memory of its own.

    Args:
        tensor: A parameter. Expanded ones and those with other layouts or classes are not writable.
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
    """Device, first byte and end of a tensor in memory, and its name; None if it has no plain memory."""
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor.data) is not Tensor or not tensor.numel():
        return None
    start = tensor.data_ptr()
    return str(tensor.device), start, start + _extent(tensor) * tensor.element_size(), name


def _extent(tensor: Tensor) -> int:
    """Number of elements from a tensor's first to its last, inclusive."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share an element; interleaved column slices, for example, do not."""
    first, second = sorted((one, other), key=lambda tensor: tensor.data_ptr())
    size = first.element_size()
    distance = second.data_ptr() - first.data_ptr()
    if distance >= _extent(first) * size:
        return False
    if second.element_size() != size or distance % size:
        return True
    offset = distance // size
    occupied = torch.zeros(max(_extent(first), offset + _extent(second)), dtype=torch.bool)
    occupied.as_strided(first.shape, first.stride()).fill_(True)
    return bool(occupied.as_strided(second.shape, second.stride(), offset).any())
