"""The formats in which an export can store a matrix: plain records, without arithmetic."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from gralora_fx.errors import ExportError, option

DYNAMIC = "int8-dynamic"
KEPT: Literal["kept"] = "kept"  # the checkpoint's own integers
FLOAT: Literal["float"] = "float"
BLOCK_BITS = {"int4": 4, "int8": 8}
LEAST_BLOCK = 16
MEAN_BITS = 4.5  # default mean bits of an int4 export's integers


@dataclass(frozen=True)
class InputOrder:
    """Another order of a matrix's inputs, in which the values of a block are neighbours."""

    places: bytes = field(repr=False)  # the input at each place of the new order, as int64

    def __str__(self) -> str:
        """Return a short name, the same for equal orders only."""
        return hashlib.sha256(self.places).hexdigest()[:12]


@dataclass(frozen=True)
class Blocks:
    """Small integers, with a scale for each block of a matrix's input axis; activations stay float."""

    bits: int  # bits of an integer, 4 or 8
    block_size: int = 32  # values that share a scale; a power of two, at least 16
    accuracy_level: int = 4  # how ONNX Runtime multiplies: 0 its own choice, 1 float32, 2 float16, 3 bfloat16, 4 int8
    zero_points: bool = True  # whether a block has a zero point too; without one, zero is half of the integers' range
    # `"nearest"`, ONNX Runtime's own by a block's smallest and largest value; `"searched"`, the scale and the zero
    # point of those tried for which the squared error is least; or `"kept"`, none: the integers of the checkpoint
    rounding: Literal["nearest", "searched", "kept"] = "nearest"
    # Bits of a stored scale of a float32 matrix: 32, or 16, which are widened when an export is opened. A matrix in
    # half precision has scales of its own dtype.
    scale_bits: Literal[16, 32] = 32
    scale_dtype: Literal["bfloat16", "float16"] = "bfloat16"  # of scales of 16 bits
    order: InputOrder | None = None  # the order of the inputs of which blocks are made; None for their own

    def __post_init__(self) -> None:
        """Check every field."""
        if self.bits not in BLOCK_BITS.values():
            raise ExportError(f"{option(bits=self.bits)} is not a width of blocks; take 4 or 8")
        problem = block_size_problem(self.block_size) or accuracy_level_problem(self.accuracy_level)
        if problem is not None:
            raise ExportError(problem)

    def stored_bits(self, inputs: int, outputs: int, float_bits: int = 32) -> int:
        """Return the bits of a matrix `[inputs, outputs]` including scales, zero points and padding of last blocks."""
        blocks, scale_bits = -(-inputs // self.block_size), min(self.scale_bits, float_bits)
        zero_points = -(-blocks * self.bits // 8) * 8 if self.zero_points else 0
        return outputs * (blocks * (self.block_size * self.bits + scale_bits) + zero_points)

    def __str__(self) -> str:
        """Describe the integers and their blocks."""
        text = f"{'kept ' if self.rounding == KEPT else ''}int{self.bits} in blocks of {self.block_size}"
        return text if self.order is None else f"{text}, inputs in another order"


@dataclass(frozen=True)
class Columns:
    """int8 integers with a scale for each column of a matrix; activations are rounded at run time, row by row."""

    activation_bits: int = 8  # bits that activations are rounded to: 8, or 16 as two products of 8
    bits: int = field(default=8, init=False)

    def __post_init__(self) -> None:
        """Check the bits."""
        if self.activation_bits not in (8, 16):
            raise ExportError(f"activations of {self.activation_bits!r} bits are not multiplied; take 8 or 16")

    def stored_bits(self, inputs: int, outputs: int, float_bits: int = 32) -> int:
        """Return the bits of a matrix `[inputs, outputs]` including scales, each as wide as an unquantized value."""
        return outputs * (inputs * self.bits + float_bits)

    def __str__(self) -> str:
        """Describe the integers and the activations."""
        return f"int8 in columns, activations rounded to {self.activation_bits} bits"


Format = Blocks | Columns


def block_size_problem(value: object) -> str | None:
    """Return the problem with a number of values that share a scale, or None."""
    if _is_int(value) and value >= LEAST_BLOCK and not value & (value - 1):  # type: ignore[operator]
        return None
    return f"{option(block_size=value)} is not a block size; take a power of two, {LEAST_BLOCK} or more, such as 32"


def bits_problem(value: object) -> str | None:
    """Return the problem with a mean number of bits, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 4 <= value <= 8:  # type: ignore[operator]
        return None
    return f"{option(bits=value)} cannot be the mean of layers of 4 and of 8 bits; take 4 to 8, such as {MEAN_BITS}"


def accuracy_level_problem(value: object) -> str | None:
    """Return the problem with an accuracy level, or None."""
    if _is_int(value) and 0 <= value <= 4:  # type: ignore[operator]
        return None
    return (
        f"{option(accuracy_level=value)} is not an accuracy level; take 0 (the runtime's choice), 1 (float32), 2 "
        "(float16), 3 (bfloat16) or 4 (int8)"
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
