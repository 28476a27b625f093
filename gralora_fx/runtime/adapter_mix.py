"""Weighted sums of adapters in the form that an export takes, exactly: the ranks add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.runtime.adapter_arrays import Arrays
from gralora_fx.runtime.adapter_inputs import AdapterInputs, AdapterSite


def mixed(parts: Sequence[tuple[Arrays, float]], inputs: AdapterInputs) -> dict[str, NDArray[Any]]:
    """The adapter whose update is the weighted sum of others'.

    The weights become part of the `B` tensors, in float32, rounded once. Each block pair (j, n) of GraLoRA has its own
    s columns of `A[n]` and rows of `B[j]`, so those are joined pair by pair; plain LoRA's are joined as they are.

    Args:
        parts: The tensors of each adapter by name, and its weight; at least one.
        inputs: The adapter tensors of the export.

    Returns:
        Tensors by name at every layer that one of them adapts.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for site in inputs.sites:
        names = site.names(inputs.k)
        found = [([arrays[name] for name in names], weight) for arrays, weight in parts if names[0] in arrays]
        if found:
            tensors |= dict(zip(names, _sum_at(site, found, inputs.k), strict=True))
    return tensors


def _sum_at(site: AdapterSite, parts: Sequence[tuple[Sequence[NDArray[Any]], float]], k: int) -> list[NDArray[Any]]:
    scaled = [
        [_scaled(array, weight if index % 2 else 1.0) for index, array in enumerate(arrays)] for arrays, weight in parts
    ]
    general = [
        np.concatenate([arrays[-2] for arrays in scaled], 1),
        np.concatenate([arrays[-1] for arrays in scaled], 0),
    ]
    if not k:
        return general
    ins, outs = site.in_features // k, site.out_features // k
    ranks = [arrays[0].shape[2] // k for arrays in scaled]  # of a block pair
    pairs = list(zip(scaled, ranks, strict=True))
    A = np.concatenate([arrays[0].reshape(k, ins, k, s) for arrays, s in pairs], 3)  # [n, in/k, j, s]
    B = np.concatenate([arrays[1].reshape(k, k, s, outs) for arrays, s in pairs], 2)  # [j, n, s, out/k]
    r = k * sum(ranks)
    return [A.reshape(k, ins, r), B.reshape(k, r, outs), *general]


def _scaled(array: NDArray[Any], weight: float) -> NDArray[Any]:
    """An array times a weight, in its own dtype."""
    found: NDArray[Any] = array if weight == 1.0 else (array.astype(np.float32) * weight).astype(array.dtype)
    return found
