"""Weights of GPTQ, AWQ, compressed-tensors and FP8, read as the floats that their layers multiply by.

A weight is `scale * (code - zero)`, rounded to the dtype of its scales, with a scale and a zero point for each group of
inputs of each output. By quantizer, of a layer of `in` inputs and `out` outputs:

| | codes | scales | zero points | group of an input |
|---|---|---|---|---|
| GPTQ | `qweight [in * bits / 32, out]` | `scales [groups, out]` | `qzeros [groups, out * bits / 32]` | `g_idx [in]` |
| AWQ | `qweight [in, out / 8]` | `scales [groups, out]` | `qzeros [groups, out / 8]` | one after the other |
| compressed-tensors | `weight_packed [out, in * bits / 32]`, or `weight`, int8 or FP8 | `weight_scale [out, groups]` |
  `weight_zero_point`, packed along outputs or int8 | one after the other, or `weight_g_idx [in]` |
| FP8 | `weight` | `weight_scale_inv [out / block, in / block]`, a block of both | | |

GPTQ (Frantar et al. 2022) and compressed-tensors fill the 32 bits of a word from the lowest on, and a code may go on in
the next word; AWQ (Lin et al. 2023) puts the outputs 0, 2, 4, 6, 1, 3, 5, 7 into a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.errors import CheckpointError, bulleted
from gralora_fx.features.group_quantized.layer_parts import (
    CODES,
    DamagedError,
    Parts,
    array_of,
    check,
    check_matrix,
    check_order,
    check_scales,
    part_of,
)
from gralora_fx.features.group_quantized.quantizers import METHODS, GroupQuantized

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the outputs 0 to 7 in a word
_BESIDE = {  # tensors that a quantizer stores beside a layer's weight and bias
    "gptq": {"qweight", "qzeros", "scales", "g_idx"},
    "awq": {"qweight", "qzeros", "scales"},
    "compressed-tensors": {
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale"),
    },
    "fp8": {"weight_scale_inv", "activation_scale", "input_scale"},
}


@dataclass(frozen=True)
class GroupTensor(PackedTensor):
    """A quantized weight with a scale for each group.

    Attributes:
        layer: The tensors of its layer.
        values: Returns the weight `[out, in]` in float32, given the layer's tensors.
    """

    layer: Parts
    values: Callable[[Parts], NDArray[np.float32]]

    @property
    def is_whole(self) -> bool:
        """Whether reading a part of the values reads all."""
        return True

    def floats(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return some values in float32, in the order of the weight `[out, in]`."""
        return self.values(self.layer).reshape(-1)[start:stop]


def unpacked(
    tensors: Mapping[str, StoredTensor], origin: Path, told: BaseQuantization | None
) -> Mapping[str, StoredTensor]:
    """Return a model's tensors with quantized weights as floats, and without the tensors stored beside them.

    Without a configuration they are returned unchanged, since only it says what the integers mean.
    """
    if not isinstance(told, GroupQuantized):  # as of another form with tensors of these names
        return tensors
    beside = _BESIDE[told.method]
    layers: dict[str, dict[str, StoredTensor]] = {}
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if part in beside or (part == "weight" and tensor.dtype not in FLOATS):
            layers.setdefault(layer, {})[part] = tensor
        else:
            found[key] = tensor
    problems: list[str] = []
    for layer, parts in layers.items():
        name = f"{layer}.weight"
        if name in found or not parts.keys() & {"qweight", "weight_packed", "weight"}:
            continue  # a float layer with scales of its activations, or scales of a cache
        try:
            shape, scales, values = _layouts(told, parts)
        except DamagedError as error:
            problems.append(f"{next(iter(parts.values())).file.name}, {name}: {error}")
            continue
        size = FLOATS[scales.dtype].itemsize * int(np.prod(shape))
        found[name] = GroupTensor(scales.file, 0, size, name, scales.dtype, shape, told, parts, values)
    if problems:
        raise CheckpointError(
            f"{origin} does not hold weights as {METHODS[told.method]} stores them; copy the model again, or give the "
            f"float one that it was made from:\n{bulleted(problems[:20])}"
        )
    return found


def _layouts(
    told: GroupQuantized, parts: Parts
) -> tuple[tuple[int, int], StoredTensor, Callable[[Parts], NDArray[np.float32]]]:
    """Return a weight's shape, its scales and its reader, after checking that its tensors fit each other."""
    if told.method in ("gptq", "awq"):
        codes, scales, zeros = (part_of(parts, name) for name in ("qweight", "scales", "qzeros"))
        bits = told.bits or 4
        for tensor in (codes, scales, zeros):
            check_matrix(tensor)
        outputs = scales.shape[-1]
        inputs = codes.shape[0] * 32 // bits if told.method == "gptq" else codes.shape[0]
        width = outputs if told.method == "gptq" else outputs * bits // 32
        check(codes, "I32", (codes.shape[0], width))
        check(zeros, "I32", (scales.shape[0], -(-outputs * bits // 32)))
        check_scales(scales, (scales.shape[0], outputs))
        if (order := parts.get("g_idx")) is not None:
            check(order, "I32", (inputs,))
            check_order(order, scales.shape[0])
        elif inputs % scales.shape[0]:
            raise DamagedError(f"its {inputs} inputs are no {scales.shape[0]} groups of one size")
        if told.method == "awq":
            return (outputs, inputs), scales, _of_awq
        return (outputs, inputs), scales, _OfGptq(told.layout != "gptq_v2", bits)
    if told.method == "fp8":
        weight, scales = part_of(parts, "weight"), part_of(parts, "weight_scale_inv")
        check(weight, "F8_E4M3", weight.shape)
        check_matrix(weight)
        return (weight.shape[0], weight.shape[1]), scales, _OfFp8(_blocks(weight, scales, told.block))
    return _of_compressed_layer(parts)


def _of_compressed_layer(
    parts: Parts,
) -> tuple[tuple[int, int], StoredTensor, Callable[[Parts], NDArray[np.float32]]]:
    scales, packed = part_of(parts, "weight_scale"), parts.get("weight_packed")
    if packed is not None:
        sizes = part_of(parts, "weight_shape")
        check(sizes, "I32" if sizes.dtype == "I32" else "I64", (2,))
        check(packed, "I32", packed.shape)
        check_matrix(packed)
        shape = tuple(array_of(sizes).tolist())
        if packed.shape[0] != shape[0] or packed.shape[1] * 32 // max(shape[1], 1) not in (2, 4, 8):
            raise DamagedError(f"its integers have shape {list(packed.shape)} for {list(shape)} values")
    else:
        weight = part_of(parts, "weight")
        if weight.dtype not in ("I8", "F8_E4M3"):
            raise DamagedError(f"it is {weight.dtype}, not int8 or FP8")
        check_matrix(weight)
        shape = weight.shape[0], weight.shape[1]
    if scales.numel != 1:
        check_matrix(scales)
        if shape[0] % scales.shape[0] or shape[1] % scales.shape[1]:
            raise DamagedError(f"its scales have shape {list(scales.shape)} for {list(shape)} values")
    check_scales(scales, scales.shape)
    if (zeros := parts.get("weight_zero_point")) is not None:
        if zeros.dtype == "I32" and packed is not None:
            bits = packed.shape[1] * 32 // shape[1]
            check(zeros, "I32", (-(-shape[0] * bits // 32), scales.shape[-1] if scales.shape else 1))
        elif zeros.dtype not in CODES or (zeros.shape != scales.shape and zeros.numel * scales.numel != 1):
            told = f"{zeros.dtype} of shape {list(zeros.shape)}"
            raise DamagedError(f"weight_zero_point is {told} for scales of shape {list(scales.shape)}")
    if (order := parts.get("weight_g_idx")) is not None:
        check(order, "I32", shape[1:])
        check_order(order, scales.shape[-1] if scales.shape else 1)
    return shape, scales, _of_compressed


def _blocks(weight: StoredTensor, scales: StoredTensor, told: tuple[int, int] | None) -> tuple[int, int]:
    """Return the rows and columns that share a scale; the last block may have fewer."""
    if len(weight.shape) == 2 and (scales.numel == 1 or len(scales.shape) == 2):
        counts = (1, 1) if scales.numel == 1 else scales.shape
        sizes = (
            weight.shape
            if scales.numel == 1
            else told or tuple(size // max(count, 1) for size, count in zip(weight.shape, counts, strict=True))
        )
        if all(-(-size // max(one, 1)) == count for size, one, count in zip(weight.shape, sizes, counts, strict=True)):
            check_scales(scales, scales.shape)
            return sizes[0], sizes[1]
    raise DamagedError(f"its scales have shape {list(scales.shape)} for {list(weight.shape)} values")


# -- reading --------------------------------------------------------------------------------------------------------


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


def _dequantized(
    codes: NDArray[Any], scales: StoredTensor, zeros: NDArray[Any] | int, by_output: NDArray[Any], groups: NDArray[Any]
) -> NDArray[np.float32]:
    """Return `scale * (code - zero)` in float32, rounded to the dtype of the scales.

    Args:
        codes: The codes, `[out, in]`.
        scales: The stored scales, for their dtype.
        zeros: The zero points, `[out, groups]`, or one for all.
        by_output: The scales, `[out, groups]`.
        groups: The group of each input, `[in]`.
    """
    values = codes.astype(np.float32)
    values -= zeros[:, groups] if isinstance(zeros, np.ndarray) else np.float32(zeros)
    values *= by_output.astype(np.float32)[:, groups]
    return values.astype(FLOATS[scales.dtype]).astype(np.float32)


def _groups(inputs: int, count: int) -> NDArray[np.int64]:
    """Return the group of each input, `[inputs]`, for groups of equal size."""
    return np.arange(inputs) // -(-inputs // count)


@dataclass(frozen=True)
class _OfGptq:
    """Reads weights of GPTQ.

    Attributes:
        is_shifted: Whether zero points are stored less one.
        bits: Bits of a code.
    """

    is_shifted: bool
    bits: int

    def __call__(self, parts: Parts) -> NDArray[np.float32]:
        words, scales = array_of(parts["qweight"]), parts["scales"]
        count, outputs = scales.shape
        inputs = words.shape[0] * 32 // self.bits
        codes = codes_of(words.T, self.bits, inputs)
        zeros = codes_of(array_of(parts["qzeros"]), self.bits, outputs).astype(np.int16) + self.is_shifted
        groups = array_of(parts["g_idx"]) if "g_idx" in parts else _groups(inputs, count)
        return _dequantized(codes, scales, zeros.T, scales.array().T, groups)


def _of_awq(parts: Parts) -> NDArray[np.float32]:
    scales = parts["scales"]
    count, outputs = scales.shape
    places = (np.arange(outputs) // 8 * 8).reshape(-1, 8) + np.array(_AWQ_PLACES)
    codes, zeros = (
        codes_of(array_of(parts[name]), 4, outputs)[:, places.reshape(-1)] for name in ("qweight", "qzeros")
    )
    groups = _groups(codes.shape[0], count)
    return _dequantized(codes.T, scales, zeros.T.astype(np.int16), scales.array().T, groups)


def _of_compressed(parts: Parts) -> NDArray[np.float32]:
    scales = parts["weight_scale"]
    by_output = scales.array().reshape((1, 1) if scales.numel == 1 else scales.shape)
    zeros: NDArray[Any] | int = 0
    zero_points = parts.get("weight_zero_point")
    are_packed = zero_points is not None and "weight_packed" in parts and zero_points.dtype == "I32"
    if zero_points is not None and not are_packed:
        zeros = array_of(zero_points).astype(np.int16).reshape(by_output.shape)
    if (packed := parts.get("weight_packed")) is not None:
        outputs, inputs = (int(size) for size in array_of(parts["weight_shape"]).reshape(-1))
        bits = packed.shape[1] * 32 // inputs
        codes: NDArray[Any] = codes_of(array_of(packed), bits, inputs)
        zeros = zeros + (1 << (bits - 1))  # codes are stored from 0 on
        if zero_points is not None and are_packed:
            zeros = codes_of(array_of(zero_points).T, bits, outputs).T.astype(np.int16)
    else:
        codes = array_of(parts["weight"]).astype(np.float32)
        outputs, inputs = codes.shape
    rows = np.arange(outputs) // (outputs // by_output.shape[0])
    if isinstance(zeros, np.ndarray):
        zeros = zeros[rows] if zeros.shape[0] != outputs else zeros
    order = parts.get("weight_g_idx")
    groups = _groups(inputs, by_output.shape[1]) if order is None else array_of(order)
    return _dequantized(codes, scales, zeros, by_output[rows], groups)


@dataclass(frozen=True)
class _OfFp8:
    """Reads weights of FP8.

    Attributes:
        block: Rows and columns with one scale.
    """

    block: tuple[int, int]

    def __call__(self, parts: Parts) -> NDArray[np.float32]:
        scales, values = parts["weight_scale_inv"], array_of(parts["weight"])
        rows, columns = (np.arange(size) // one for size, one in zip(values.shape, self.block, strict=True))
        by_block = scales.array().reshape((1, 1) if scales.numel == 1 else scales.shape)
        return _dequantized(values, scales, 0, by_block[rows], columns)
