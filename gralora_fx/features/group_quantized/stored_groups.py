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

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.base.sources.stored_integers import StoredIntegers
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
    has_order,
    part_of,
)
from gralora_fx.features.group_quantized.quantizers import BITS, METHODS, GroupQuantized
from gralora_fx.features.group_quantized.stored_codes import Fp8Values, GptqCodes, awq_codes, compressed_codes

Read = Callable[[Parts], StoredIntegers | NDArray[np.float32]]
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
        read: Returns its integers, given the layer's tensors; of FP8 the weight `[out, in]` in float32.
    """

    layer: Parts
    read: Read

    @property
    def is_whole(self) -> bool:
        """True if reading a part of the values reads all."""
        return True

    def floats(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return some values in float32, in the order of the weight `[out, in]`."""
        found = self.read(self.layer)
        return (found.values() if isinstance(found, StoredIntegers) else found).reshape(-1)[start:stop]

    def integers(self) -> StoredIntegers | None:
        """Return the stored integers; None of floats of eight bits."""
        weight = self.layer.get("weight")
        if weight is not None and weight.dtype == "F8_E4M3":
            return None
        found = self.read(self.layer)
        return found if isinstance(found, StoredIntegers) else None


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
            shape, scales, read = _layouts(told, parts)
        except DamagedError as error:
            problems.append(f"{next(iter(parts.values())).file.name}, {name}: {error}")
            continue
        size = FLOATS[scales.dtype].itemsize * int(np.prod(shape))
        found[name] = GroupTensor(scales.file, 0, size, name, scales.dtype, shape, told, parts, read)
    if problems:
        raise CheckpointError(
            f"{origin} does not hold weights as {METHODS[told.method]} stores them; copy the model again, or give the "
            f"float one that it was made from:\n{bulleted(problems[:20])}"
        )
    return found


def _layouts(told: GroupQuantized, parts: Parts) -> tuple[tuple[int, int], StoredTensor, Read]:
    """Return a weight's shape, its scales and its reader, after checking that its tensors fit each other."""
    if told.method in ("gptq", "awq"):
        codes, scales, zeros = (part_of(parts, name) for name in ("qweight", "scales", "qzeros"))
        bits = _bits(told, parts)
        for tensor in (codes, scales, zeros):
            check_matrix(tensor)
        outputs = scales.shape[-1]
        inputs = codes.shape[0] * 32 // bits if told.method == "gptq" else codes.shape[0]
        width = outputs if told.method == "gptq" else outputs * bits // 32
        check(codes, "I32", (codes.shape[0], width))
        check(zeros, "I32", (scales.shape[0], -(-outputs * bits // 32)))
        check_scales(scales, (scales.shape[0], outputs))
        _check_groups(told, inputs, scales.shape[0])
        if (order := parts.get("g_idx")) is not None:
            check(order, "I32", (inputs,))
            check_order(order, scales.shape[0])
        elif inputs % scales.shape[0]:
            raise DamagedError(f"its {inputs} inputs cannot be split into {scales.shape[0]} groups of one size")
        if told.method == "awq":
            return (outputs, inputs), scales, awq_codes
        return (outputs, inputs), scales, GptqCodes(told.layout != "gptq_v2", bits)
    if told.method == "fp8":
        weight, scales = part_of(parts, "weight"), part_of(parts, "weight_scale_inv")
        check(weight, "F8_E4M3", weight.shape)
        check_matrix(weight)
        return (weight.shape[0], weight.shape[1]), scales, Fp8Values(_blocks(weight, scales, told.block))
    return _of_compressed_layer(parts)


def _bits(told: GroupQuantized, parts: Parts) -> int:
    """Return the bits of a layer's codes: its own where a configuration has rules for layers."""
    codes, order = parts["qweight"], parts.get("g_idx")
    if told.has_rules and order is not None and len(codes.shape) == 2 and order.numel:
        bits = codes.shape[0] * 32 / order.numel
        if bits not in BITS["gptq"]:
            raise DamagedError(f"its codes have {bits:g} bits, by the {order.numel} groups of its inputs")
        return int(bits)
    return told.bits or 4


def _check_groups(told: GroupQuantized, inputs: int, count: int) -> None:
    """Check that a layer has as many groups as the configuration says."""
    size = told.group_size
    if size is None or told.has_rules:
        return
    expected = 1 if size < 0 else -(-inputs // size)
    if count != expected:
        raise DamagedError(
            f"its {inputs} inputs have {count} groups, and by group_size {size} in config.json {expected}"
        )


def _of_compressed_layer(parts: Parts) -> tuple[tuple[int, int], StoredTensor, Read]:
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
    if has_order(parts):
        order = parts["weight_g_idx"]
        check(order, "I32", shape[1:])
        check_order(order, scales.shape[-1] if scales.shape else 1)
    return shape, scales, compressed_codes


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
