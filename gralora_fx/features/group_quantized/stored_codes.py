"""The integers, and the floats of eight bits, in a layer's tensors, by quantizer (see `stored_groups`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.stored_integers import StoredIntegers, dequantized, equal_groups
from gralora_fx.errors import CheckpointError
from gralora_fx.features.group_quantized.layer_parts import Parts, array_of, has_order

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the outputs 0 to 7 in a word


def codes_of(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Return the first codes `[rows, count]` of rows of 32-bit words, packed from the lowest bit on."""
    words = np.ascontiguousarray(words).view(np.uint32)
    words = np.pad(words, ((0, 0), (0, -words.shape[1] % bits)))
    groups = words.reshape(len(words), -1, bits)  # of 32 codes each
    codes = np.empty((*groups.shape[:2], 32), np.uint8)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        code = groups[:, :, word] >> np.uint32(shift)
        if shift + bits > 32:
            code = code | groups[:, :, word + 1] << np.uint32(32 - shift)
        codes[:, :, place] = code & np.uint32((1 << bits) - 1)
    return codes.reshape(len(words), -1)[:, :count]


@dataclass(frozen=True)
class GptqCodes:
    """Reads weights of GPTQ.

    Attributes:
        is_shifted: Whether zero points are stored less one.
        bits: Bits of a code.
    """

    is_shifted: bool
    bits: int

    def __call__(self, parts: Parts) -> StoredIntegers:
        """Return a layer's integers."""
        words, scales = parts["qweight"], parts["scales"].array()
        count, outputs = scales.shape
        inputs = words.shape[0] * 32 // self.bits
        zeros = codes_of(array_of(parts["qzeros"]), self.bits, outputs).astype(np.int16) + self.is_shifted
        groups = array_of(parts["g_idx"]) if "g_idx" in parts else equal_groups(inputs, count)

        def codes() -> NDArray[np.uint8]:
            return codes_of(array_of(words).T, self.bits, inputs)

        return StoredIntegers(self.bits, codes, scales.T, zeros.T, groups)


def awq_codes(parts: Parts) -> StoredIntegers:
    """Return the integers of a layer of AWQ."""
    scales = parts["scales"].array()
    count, outputs = scales.shape
    places = ((np.arange(outputs) // 8 * 8).reshape(-1, 8) + np.array(_AWQ_PLACES)).reshape(-1)

    def codes(name: str) -> NDArray[np.uint8]:
        return codes_of(array_of(parts[name]), 4, outputs)[:, places].T

    groups = equal_groups(parts["qweight"].shape[0], count)
    return StoredIntegers(4, functools.partial(codes, "qweight"), scales.T, codes("qzeros").astype(np.int16), groups)


def compressed_codes(parts: Parts) -> StoredIntegers | NDArray[np.float32]:
    """Return the integers of a layer of compressed-tensors; of FP8 the floats."""
    scales: NDArray[Any] = _as_matrix(parts["weight_scale"].array())
    zeros: NDArray[Any]
    zero_points, packed = parts.get("weight_zero_point"), parts.get("weight_packed")
    sizes = parts["weight"].shape if packed is None else array_of(parts["weight_shape"]).reshape(-1).tolist()
    outputs, inputs = int(sizes[0]), int(sizes[1])
    groups = array_of(parts["weight_g_idx"]) if has_order(parts) else equal_groups(inputs, scales.shape[1])
    rows = np.arange(outputs) // (outputs // scales.shape[0])
    if packed is None and parts["weight"].dtype != "I8":
        return dequantized(floats_of(parts).astype(np.float32), scales[rows], 0, groups)
    bits = 8 if packed is None else packed.shape[1] * 32 // inputs
    if zero_points is not None and packed is not None and zero_points.dtype == "I32":
        zeros = codes_of(array_of(zero_points).T, bits, outputs).T.astype(np.int16)
    else:  # signed, and codes are stored, or read, from 0 on
        stored = np.zeros((1, 1), np.int16) if zero_points is None else array_of(zero_points).astype(np.int16)
        stored = _as_matrix(stored) if stored.size == 1 else stored.reshape(scales.shape)
        zeros = (stored + (1 << (bits - 1))).astype(np.int16)
    if zeros.shape[0] != outputs:
        zeros = zeros[rows] if zeros.shape[0] == scales.shape[0] else np.broadcast_to(zeros, (outputs, zeros.shape[1]))

    def codes() -> NDArray[np.uint8]:
        if packed is not None:
            return codes_of(array_of(packed), bits, inputs)
        return array_of(parts["weight"]).view(np.uint8) ^ np.uint8(128)

    each = np.broadcast_to(zeros, (outputs, scales.shape[1]))
    return StoredIntegers(bits, codes, scales[rows], each, groups)


@dataclass(frozen=True)
class Fp8Values:
    """Reads weights of FP8.

    Attributes:
        block: Rows and columns with one scale.
    """

    block: tuple[int, int]

    def __call__(self, parts: Parts) -> NDArray[np.float32]:
        """Return a layer's weight."""
        scales, values = parts["weight_scale_inv"].array(), floats_of(parts)
        rows, columns = (np.arange(size) // one for size, one in zip(values.shape, self.block, strict=True))
        return dequantized(values, _as_matrix(scales)[rows], 0, columns)


def _as_matrix(values: NDArray[Any]) -> NDArray[Any]:
    """Return a single value as `[1, 1]`, and others as they are."""
    return values.reshape(1, 1) if values.size == 1 else values


def floats_of(parts: Parts) -> NDArray[Any]:
    """Return an FP8 weight; raise a `CheckpointError` for NaN."""
    stored = parts["weight"]
    values = array_of(stored)
    if count := int(np.isnan(values).sum()):
        raise CheckpointError(
            f"{stored.file}: {count:,} of the values of {stored.key} are NaN; copy the model again, or quantize it anew"
        )
    return values
