"""Weighted sums of adapters in the form that an export takes, exactly: the ranks add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.runtime.adapter_arrays import Arrays
from gralora_fx.runtime.adapter_inputs import AdapterInputs, AdapterSite


def mixed(parts: Sequence[tuple[Arrays, float]], inputs: AdapterInputs) -> dict[str, NDArray[Any]]:
    """The adapter whose update is the weighted sum of others'.

    The weights become part of the `B` tensors, in float32, rounded once. Each block pair (j, n) of GraLoRA has its own
    s columns of `A[n]` and rows of `B[j]`, so those are joined pair by pair; plain LoRA's are joined as they are.
    Changes of biases are added.

    Args:
        parts: The tensors of each adapter by name, and its weight; at least one.
        inputs: The adapter tensors of the export.

    Returns:
        Tensors by name at every layer that one of them adapts.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for site in inputs.sites:
        names = site.names(inputs.k)
        found = [(arrays, weight) for arrays, weight in parts if names[0] in arrays]
        if found:
            tensors |= dict(zip(names, _sum_at(site, found, inputs.k), strict=True))
    return tensors


def _sum_at(site: AdapterSite, found: Sequence[tuple[Arrays, float]], k: int) -> Iterator[NDArray[Any]]:
    """The sum's tensors at a layer, in the order of their names."""
    parts = [(site.parts(arrays), weight) for arrays, weight in found]
    blocks = [(A, _scaled(B, weight)) for (A, B, *_), weight in parts if A is not None and B is not None]
    if blocks:
        yield from _blocks(site, blocks, k)
    general = [(A, _scaled(B, weight)) for (_, _, A, B, _), weight in parts if A is not None and B is not None]
    if general:
        yield np.concatenate([A for A, _ in general], 1)
        yield np.concatenate([B for _, B in general], 0)
    biases = [bias.astype(np.float32) * weight for (*_, bias), weight in parts if bias is not None]
    if biases:
        dtype = next(bias.dtype for (*_, bias), _ in parts if bias is not None)
        yield sum(biases[1:], biases[0]).astype(dtype)


def _blocks(site: AdapterSite, parts: Sequence[tuple[NDArray[Any], NDArray[Any]]], k: int) -> Iterator[NDArray[Any]]:
    ins, outs = site.in_features // k, site.out_features // k
    ranks = [A.shape[2] // k for A, _ in parts]  # of a block pair
    pairs = list(zip(parts, ranks, strict=True))
    r = k * sum(ranks)
    A = np.concatenate([A.reshape(k, ins, k, s) for (A, _), s in pairs], 3)  # [n, in/k, j, s]
    yield A.reshape(k, ins, r)
    B = np.concatenate([B.reshape(k, k, s, outs) for (_, B), s in pairs], 2)  # [j, n, s, out/k]
    yield B.reshape(k, r, outs)


def _scaled(array: NDArray[Any], weight: float) -> NDArray[Any]:
    """An array times a weight, in its own dtype."""
    found: NDArray[Any] = array if weight == 1.0 else (array.astype(np.float32) * weight).astype(array.dtype)
    return found
