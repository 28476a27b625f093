"""Weights in bitsandbytes' eight bits, read as the floats that its layers multiply by; and its rounding.

A weight `[out, in]` is stored as `<layer>.weight`, int8, and `<layer>.SCB`, float32, the largest absolute value of
each row; `<layer>.weight_format` is 0, for rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.base.sources.stored_integers import StoredIntegers
from gralora_fx.errors import CheckpointError, bulleted
from gralora_fx.features.llm_int8.eight_bits import EightBits

_STEP = np.float32(1 / 127)


@dataclass(frozen=True)
class EightBitTensor(PackedTensor):
    """A weight in eight bits."""

    codes: StoredTensor  # the stored integers
    scales: NDArray[np.float32]  # the step size of each row, `[out]`

    def floats(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return some values in float32, in stored order."""
        codes = np.empty(stop - start, np.int8)
        self.codes.read_into(codes, start)
        values: NDArray[np.float32] = codes * self.scales[np.arange(start, stop) // self.codes.shape[1]]
        return values

    def integers(self) -> StoredIntegers:
        """Return the stored integers, from 0 on, with a group for each row."""
        outputs, inputs = self.codes.shape

        def codes() -> NDArray[np.uint8]:
            stored = np.empty((outputs, inputs), np.int8)
            self.codes.read_into(stored)
            return stored.view(np.uint8) ^ np.uint8(128)

        zeros = np.full((outputs, 1), 128, np.int16)
        return StoredIntegers(8, codes, self.scales[:, None], zeros, np.zeros(inputs, np.int64))


def unpacked(tensors: Mapping[str, StoredTensor], origin: Path, told: EightBits | None) -> Mapping[str, StoredTensor]:
    """Return a model's tensors, eight-bit weights as floats and their auxiliary tensors dropped."""
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if part in ("SCB", "weight_format"):
            if f"{layer}.weight" not in tensors:
                problems.append(f"{tensor.file.name}, {layer}.weight: its integers are missing")
        elif tensor.dtype != "I8" and f"{layer}.SCB" not in tensors:
            found[key] = tensor
        elif part == "weight":
            scales, form = tensors.get(f"{layer}.SCB"), tensors.get(f"{layer}.weight_format")
            if (problem := _problem(tensor, scales, form)) is not None:
                problems.append(f"{tensor.file.name}, {key}: {problem}")
            elif scales is not None:
                how, size, steps = told or EightBits(), 4 * tensor.numel, _floats(scales) * _STEP
                found[key] = EightBitTensor(tensor.file, 0, size, key, "F32", tensor.shape, how, tensor, steps)
        else:
            found[key] = tensor  # a bias
    if problems:
        raise CheckpointError(
            f"{origin} does not hold weights of eight bits as bitsandbytes stores them; save the model again with "
            f"transformers and bitsandbytes, or give the float one:\n{bulleted(problems[:20])}"
        )
    return found


def _problem(codes: StoredTensor, scales: StoredTensor | None, form: StoredTensor | None) -> str | None:
    """Describe what is wrong with a stored weight; None if nothing is."""
    if scales is None:
        return "it is stored as integers, and the scales of its rows, SCB, are missing"
    if codes.dtype != "I8" or len(codes.shape) != 2:
        return f"it is {codes.dtype} of shape {list(codes.shape)}, not a matrix of int8"
    if scales.dtype not in FLOATS or scales.numel != codes.shape[0]:
        return f"SCB has {scales.numel} scales in {scales.dtype} for {codes.shape[0]} rows"
    if not np.isfinite(_floats(scales)).all():
        return "its scales, SCB, are not finite"
    if form is not None and (form.nbytes != 1 or _byte(form) != 0):
        return "its weight_format is not 0, and only rows are read"
    return None


def _byte(tensor: StoredTensor) -> int:
    value = np.empty(1, np.uint8)
    tensor.read_into(value)
    return int(value[0])


def _floats(tensor: StoredTensor) -> NDArray[np.float32]:
    return tensor.array().reshape(-1).astype(np.float32)


def quantized(weight: NDArray[Any], name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize a float weight `[out, in]` as bitsandbytes does; return codes and step sizes per row."""
    with np.errstate(over="ignore"):
        halves = np.asarray(weight, np.float32).astype(np.float16).astype(np.float32)
    largest = np.abs(halves).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise CheckpointError(
            f"{name} has values that are not finite in float16, from which bitsandbytes rounds to int8; mend the "
            "weight, or leave the layer float (skip_modules)"
        )
    inverse = np.divide(np.float32(1), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(halves * (inverse * np.float32(127))).astype(np.int8), largest[:, 0] * _STEP


def rounded(weight: NDArray[Any], _: EightBits, name: str) -> NDArray[np.float32]:
    """Quantize and dequantize a float weight `[out, in]` as bitsandbytes' layer does, to float32."""
    codes, steps = quantized(weight, name)
    values: NDArray[np.float32] = codes * steps[:, None]
    return values
