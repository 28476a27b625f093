"""Weights in bitsandbytes' four bits, read as the floats that its layers multiply by; and its rounding.

A weight `[out, in]` is stored as `<key>` (two values a byte, the first in the upper half), `<key>.quant_map` (the 16
values), `<key>.absmax` (the scale of each block) and `<key>.quant_state.bitsandbytes__nf4`, which is JSON: block size,
shape and dtype. Double quantization adds `<key>.nested_absmax`, `<key>.nested_quant_map` and an offset. The arithmetic
is bitsandbytes' own, in float32, so that every value is equal; reading needs no bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.compat.packages import installation
from gralora_fx.base.progress.stages import quiet
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.errors import CheckpointError, ConfigError, bulleted, listed, option, shown
from gralora_fx.features.nf4.four_bits import BLOCK_SIZES, KINDS, FourBits

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class _DamagedError(Exception):
    """A description of what is wrong with a stored weight."""


@dataclass(frozen=True)
class BlockScales:
    """The scales of a weight's blocks."""

    stored: StoredTensor  # the scales, or with double quantization their 8-bit codes
    table: NDArray[np.float32] | None = None  # the values of the codes; None if the scales are floats
    outer: NDArray[np.float32] | None = None  # the scale of each block of codes
    outer_size: int = 256  # codes in such a block
    offset: float = 0.0  # added to each scale

    def between(self, first: int, last: int) -> NDArray[np.float32]:
        """Return the scales of some blocks in float32, `[last - first]`."""
        kind = np.dtype(np.uint8) if self.table is not None else FLOATS[self.stored.dtype]
        values = np.empty(last - first, kind)
        self.stored.read_into(values, first * kind.itemsize)
        if self.table is None or self.outer is None:
            scales = values.astype(np.float32, copy=False)
        else:
            scales = scales_of(values, first, self.table, self.outer, self.outer_size, self.offset)
        if not np.isfinite(scales).all():
            weight = self.stored.key.removesuffix(".absmax")
            raise CheckpointError(
                f"{self.stored.file}: the scales of {weight} are not finite; copy or save the model again"
            )
        return scales


@dataclass(frozen=True)
class FourBitTensor(PackedTensor):
    """A weight in four bits."""

    codes: StoredTensor  # the stored bytes
    scales: BlockScales
    table: NDArray[np.float32]  # the 16 values
    block_size: int  # values with one scale

    def floats(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return some values in float32, in stored order."""
        packed = np.empty((stop + 1) // 2 - start // 2, np.uint8)
        self.codes.read_into(packed, start // 2)
        scales = self.scales.between(start // self.block_size, -(-stop // self.block_size))
        return values_of(packed, scales, self.table, self.block_size, start, stop)


def scales_of(
    codes: NDArray[np.uint8],
    first: int,
    table: NDArray[np.float32],
    outer: NDArray[np.float32],
    outer_size: int,
    offset: float,
) -> NDArray[np.float32]:
    """Return scales from their codes."""
    scales: NDArray[np.float32] = table[codes] * outer[np.arange(first, first + len(codes)) // outer_size]
    return scales + np.float32(offset)


def values_of(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    table: NDArray[np.float32],
    block_size: int,
    start: int,
    stop: int,
) -> NDArray[np.float32]:
    """Return the values `start` to `stop` of a weight in float32, from the bytes and the scales that cover them."""
    pairs = np.stack((packed >> 4, packed & 15), axis=-1).reshape(-1)[start % 2 :][: stop - start]
    each = np.repeat(scales, block_size)[start % block_size :][: stop - start]
    values: NDArray[np.float32] = table[pairs] * each
    return values


def unpacked(tensors: Mapping[str, StoredTensor], origin: Path, told: FourBits | None) -> Mapping[str, StoredTensor]:
    """Return a model's tensors, four-bit weights as floats and their auxiliary tensors dropped."""
    states = {key.partition(_STATE)[0]: key for key in tensors if _STATE in key}
    if not states and told is None:
        return tensors
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        if key in states:
            try:
                found[key] = _four_bits(key, states[key], tensors, told or FourBits())
            except _DamagedError as error:
                problems.append(f"{tensor.file.name}, {key}: {error}")
        elif not _belongs(key, states):
            if tensor.dtype in ("U8", "I8") and key.endswith(".weight"):
                problems.append(
                    f"{tensor.file.name}, {key} is stored as integers without {key}{_STATE}nf4, which says what they "
                    "are"
                )
            found[key] = tensor
    lacking = (name for name in states if name not in tensors)
    problems += [f"{tensors[states[name]].file.name}, {name}: its integers are missing" for name in lacking]
    if problems:
        raise CheckpointError(
            f"{origin} does not hold weights of four bits as bitsandbytes stores them; save the model again with "
            f"transformers and bitsandbytes, or give the float one:\n{bulleted(problems[:20])}"
        )
    return found


def _belongs(key: str, weights: Mapping[str, str]) -> bool:
    """Return whether a tensor is part of a four-bit weight."""
    return key.partition(_STATE)[0] in weights if _STATE in key else key.rpartition(".")[0] in weights


def _four_bits(key: str, state_key: str, tensors: Mapping[str, StoredTensor], told: FourBits) -> FourBitTensor:
    """Build the four-bit weight of a key."""
    lacking = [part for part in _PARTS[:2] if f"{key}.{part}" not in tensors]
    nested = [part for part in _PARTS[2:] if f"{key}.{part}" in tensors]
    if lacking or len(nested) == 1:
        lacking += [part for part in _PARTS[2:] if nested and part not in nested]
        raise _DamagedError(f"{listed(lacking)} is missing")
    state = _state(tensors[state_key])
    kind, block_size, sizes = state_key.partition(_STATE)[2], state.get("blocksize"), state.get("shape")
    shape = tuple(sizes) if isinstance(sizes, list) else ()
    if kind not in KINDS:
        raise _DamagedError(f"its 16 values are {shown(kind)}; known are {listed(KINDS)}")
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise _DamagedError(f"its block size is {shown(block_size)}; known are {listed(BLOCK_SIZES)}")
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise _DamagedError(f"its shape is {shown(sizes)}, not that of a matrix")
    count, codes, stored = math.prod(shape), tensors[key], tensors[f"{key}.absmax"]
    blocks = -(-count // int(block_size))
    scales = BlockScales(stored)
    if nested:
        table, outer = (_floats_of(tensors[f"{key}.{part}"]) for part in ("nested_quant_map", "nested_absmax"))
        outer_size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        fits = type(outer_size) is int and outer_size > 0 and len(outer) == -(-blocks // outer_size)
        if not fits or len(table) != 256 or not isinstance(offset, float):
            raise _DamagedError(f"its scales are quantized in blocks of {shown(outer_size)}, which does not fit")
        scales = BlockScales(stored, table, outer, int(outer_size or 0), offset)
    values = _floats_of(tensors[f"{key}.quant_map"])
    if codes.nbytes != (count + 1) // 2 or len(values) != 16 or stored.numel != blocks:
        raise _DamagedError(
            f"{codes.nbytes} bytes and {stored.numel} scales are not those of {list(shape)} in blocks of {block_size}"
        )
    if not (np.abs(values).max() == 1):
        raise _DamagedError(f"its 16 values (quant_map) do not reach from -1 to 1, as those of {kind} do")
    if (stored.dtype == "U8") != bool(nested) or (not nested and stored.dtype not in FLOATS):
        raise _DamagedError(f"its scales are {stored.dtype}{'' if nested else ', and nested_absmax is missing'}")
    how = replace(told, kind=kind, block_size=int(block_size), double=bool(nested))
    size = count * FLOATS[how.stored_dtype].itemsize
    return FourBitTensor(codes.file, 0, size, key, how.stored_dtype, shape, how, codes, scales, values, how.block_size)


def _state(tensor: StoredTensor) -> dict[str, Any]:
    """Read the JSON stored beside a weight."""
    text = np.empty(tensor.nbytes, np.uint8)
    tensor.read_into(text)
    try:
        fields = json.loads(text.tobytes())
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _DamagedError("its quant_state is not JSON")
    return fields


def _floats_of(tensor: StoredTensor) -> NDArray[np.float32]:
    """Read a short float tensor as float32."""
    if tensor.dtype not in FLOATS:
        raise _DamagedError(f"{tensor.key} is {tensor.dtype}, not floats")
    return tensor.array().reshape(-1).astype(np.float32)


def rounded(weight: NDArray[Any], quantization: FourBits, name: str) -> NDArray[np.float32]:
    """Quantize and dequantize a float weight `[out, in]` as bitsandbytes' layer does, to float32.

    bitsandbytes quantizes it; the codes are dequantized here, since its kernel for processors with AVX-512 misreads
    rows that are not a whole number of blocks (0.50; those for GPUs do not).
    """
    packed, scales, table = quantized(weight, quantization, name)
    floats = values_of(packed, scales, table, quantization.block_size, 0, weight.size).reshape(weight.shape)
    return floats.astype(FLOATS[quantization.stored_dtype], copy=False).astype(np.float32, copy=False)


def quantized(
    weight: NDArray[Any], quantization: FourBits, name: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Quantize a float weight; return codes, two a byte, the scales of its blocks, and the values of the codes."""
    import torch

    try:
        with quiet():
            from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise ConfigError(
            f"{option(base_quantization=str(quantization))} needs bitsandbytes, which rounds the base as it did for "
            f"the adapter ({error}): {installation(quantization.extra)}. A base that it saved in four bits is read "
            "without it"
        ) from error
    if not np.isfinite(weight).all():
        raise CheckpointError(
            f"{name} has values that are not finite, which {quantization} cannot express; mend the weight, or leave "
            "the layer float (skip_modules)"
        )
    codes, state = quantize_4bit(
        torch.from_numpy(np.array(weight, np.float32, order="C")),
        blocksize=quantization.block_size,
        compress_statistics=quantization.double,
        quant_type=quantization.kind,
    )
    scales = state.absmax.numpy()
    if quantization.double:
        outer = state.state2
        scales = scales_of(scales, 0, outer.code.numpy(), outer.absmax.numpy(), outer.blocksize, float(state.offset))
    return codes.reshape(-1).numpy(), scales, state.code.numpy()
