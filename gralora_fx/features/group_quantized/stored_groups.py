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

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.rewriting import bytes_of
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.errors import CheckpointError, bulleted
from gralora_fx.features.group_quantized.quantizers import METHODS, GroupQuantized

Parts = Mapping[str, StoredTensor]  # a layer's tensors, by the last part of their keys

_CODES = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
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


class _DamagedError(Exception):
    """The problem with a stored weight, in words."""


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

    def read_into(self, values: NDArray[Any], first: int = 0) -> None:
        """Fill a contiguous array with the bytes of the floats, starting at value `first`."""
        whole = self.values(self.layer)
        stored = np.ascontiguousarray(whole.T if self.is_turned else whole).astype(FLOATS[self.dtype], copy=False)
        target = bytes_of(values)
        target[:] = bytes_of(stored)[first : first + len(target)]


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
        except _DamagedError as error:
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
        codes, scales, zeros = (_part(parts, name) for name in ("qweight", "scales", "qzeros"))
        bits = told.bits or 4
        outputs = scales.shape[-1]
        inputs = codes.shape[0] * 32 // bits if told.method == "gptq" else codes.shape[0]
        width = outputs if told.method == "gptq" else outputs * bits // 32
        _check(codes, "I32", (codes.shape[0], width))
        _check(zeros, "I32", (scales.shape[0], -(-outputs * bits // 32)))
        _check_scales(scales, (scales.shape[0], outputs))
        if (order := parts.get("g_idx")) is not None:
            _check(order, "I32", (inputs,))
            _check_order(order, scales.shape[0])
        elif inputs % scales.shape[0]:
            raise _DamagedError(f"its {inputs} inputs are no {scales.shape[0]} groups of one size")
        if told.method == "awq":
            return (outputs, inputs), scales, _of_awq
        return (outputs, inputs), scales, _GPTQ_READERS[told.layout == "gptq_v2", bits]
    if told.method == "fp8":
        weight, scales = _part(parts, "weight"), _part(parts, "weight_scale_inv")
        _check(weight, "F8_E4M3", weight.shape)
        return (weight.shape[0], weight.shape[1]), scales, _OfFp8(_blocks(weight, scales, told.block))
    return _of_compressed_layer(parts)


def _of_compressed_layer(
    parts: Parts,
) -> tuple[tuple[int, int], StoredTensor, Callable[[Parts], NDArray[np.float32]]]:
    scales = _part(parts, "weight_scale")
    if "weight_packed" in parts:
        told, packed = _array(_part(parts, "weight_shape")).reshape(-1), parts["weight_packed"]
        if told.size != 2 or packed.dtype != "I32" or len(packed.shape) != 2:
            raise _DamagedError(f"its integers are {packed.dtype} of shape {list(packed.shape)} for {told.tolist()}")
        shape = int(told[0]), int(told[1])
        if packed.shape[0] != shape[0] or packed.shape[1] * 32 // max(shape[1], 1) not in (2, 4, 8):
            raise _DamagedError(f"its integers have shape {list(packed.shape)} for {list(shape)} values")
    else:
        weight = _part(parts, "weight")
        if weight.dtype not in ("I8", "F8_E4M3") or len(weight.shape) != 2:
            raise _DamagedError(f"it is {weight.dtype} of shape {list(weight.shape)}, not a matrix of int8 or FP8")
        shape = weight.shape[0], weight.shape[1]
    if scales.numel != 1:
        rows = scales.shape[0] if scales.shape else 1
        if len(scales.shape) != 2 or shape[0] % rows or shape[1] % scales.shape[1]:
            raise _DamagedError(f"its scales have shape {list(scales.shape)} for {list(shape)} values")
    _check_scales(scales, scales.shape)
    if (order := parts.get("weight_g_idx")) is not None:
        _check(order, "I32", shape[1:])
        _check_order(order, scales.shape[1])
    return shape, scales, _of_compressed


def _part(parts: Parts, name: str) -> StoredTensor:
    if name not in parts:
        raise _DamagedError(f"{name} is missing")
    return parts[name]


def _check(tensor: StoredTensor, dtype: str, shape: tuple[int, ...]) -> None:
    part = tensor.key.rpartition(".")[2]
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise _DamagedError(
            f"{part} is {tensor.dtype} of shape {list(tensor.shape)}, and has to be {dtype} of shape {list(shape)}"
        )


def _check_order(order: StoredTensor, count: int) -> None:
    groups = _array(order)
    if groups.min() < 0 or groups.max() >= count:
        part = order.key.rpartition(".")[2]
        raise _DamagedError(f"{part} names groups {groups.min()} to {groups.max()}, of {count}")


def _check_scales(scales: StoredTensor, shape: tuple[int, ...]) -> None:
    part = scales.key.rpartition(".")[2]
    if scales.dtype not in FLOATS or scales.shape != shape:
        raise _DamagedError(
            f"{part} is {scales.dtype} of shape {list(scales.shape)}, and has to be floats {list(shape)}"
        )
    if not np.isfinite(scales.array().astype(np.float32)).all():
        raise _DamagedError(f"{part} is not finite")


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
            _check_scales(scales, scales.shape)
            return sizes[0], sizes[1]
    raise _DamagedError(f"its scales have shape {list(scales.shape)} for {list(weight.shape)} values")


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
        words, scales = _array(parts["qweight"]), parts["scales"]
        count, outputs = scales.shape
        inputs = words.shape[0] * 32 // self.bits
        codes = codes_of(words.T, self.bits, inputs)
        zeros = codes_of(_array(parts["qzeros"]), self.bits, outputs).astype(np.int16) + self.is_shifted
        groups = _array(parts["g_idx"]) if "g_idx" in parts else _groups(inputs, count)
        return _dequantized(codes, scales, zeros.T, scales.array().T, groups)


_GPTQ_READERS = {(v2, bits): _OfGptq(not v2, bits) for v2 in (False, True) for bits in (2, 3, 4, 8)}


def _of_awq(parts: Parts) -> NDArray[np.float32]:
    scales = parts["scales"]
    count, outputs = scales.shape
    places = (np.arange(outputs) // 8 * 8).reshape(-1, 8) + np.array(_AWQ_PLACES)
    codes, zeros = (codes_of(_array(parts[name]), 4, outputs)[:, places.reshape(-1)] for name in ("qweight", "qzeros"))
    groups = _groups(codes.shape[0], count)
    return _dequantized(codes.T, scales, zeros.T.astype(np.int16), scales.array().T, groups)


def _of_compressed(parts: Parts) -> NDArray[np.float32]:
    scales = parts["weight_scale"]
    zeros: NDArray[Any] | int = 0
    zero_points = parts.get("weight_zero_point")
    if (packed := parts.get("weight_packed")) is not None:
        outputs, inputs = (int(size) for size in _array(parts["weight_shape"]).reshape(-1))
        bits = packed.shape[1] * 32 // inputs
        codes: NDArray[Any] = codes_of(_array(packed), bits, inputs)
        zeros = 1 << (bits - 1)  # codes are stored from 0 on
        if zero_points is not None:
            zeros = codes_of(_array(zero_points).T, bits, outputs).T.astype(np.int16)
    else:
        codes = _array(parts["weight"]).astype(np.float32)
        outputs, inputs = codes.shape
        if zero_points is not None:
            zeros = _array(zero_points).astype(np.int16).reshape(scales.shape)
    by_output = scales.array().reshape(1, 1) if scales.numel == 1 else scales.array()
    rows = np.arange(outputs) // (outputs // by_output.shape[0])
    if isinstance(zeros, np.ndarray):
        zeros = zeros[rows] if zeros.shape[0] != outputs else zeros
    order = parts.get("weight_g_idx")
    groups = _groups(inputs, by_output.shape[1]) if order is None else _array(order)
    return _dequantized(codes, scales, zeros, by_output[rows], groups)


@dataclass(frozen=True)
class _OfFp8:
    """Reads weights of FP8.

    Attributes:
        block: Rows and columns with one scale.
    """

    block: tuple[int, int]

    def __call__(self, parts: Parts) -> NDArray[np.float32]:
        scales, values = parts["weight_scale_inv"], _array(parts["weight"])
        rows, columns = (np.arange(size) // one for size, one in zip(values.shape, self.block, strict=True))
        by_block = scales.array().reshape((1, 1) if scales.numel == 1 else scales.shape)
        return _dequantized(values, scales, 0, by_block[rows], columns)


def _array(tensor: StoredTensor) -> NDArray[Any]:
    """Return a stored tensor of integers or FP8 as an array."""
    values = np.empty(tensor.shape, _CODES[tensor.dtype])
    tensor.read_into(values)
    return values
