"""The formats in which an export can store a matrix: records of what is chosen, without arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from gralora_fx.errors import ExportError

DYNAMIC = "int8-dynamic"
BLOCK_BITS = {"int4": 4, "int8": 8}
LEAST_BLOCK = 16


@dataclass(frozen=True)
class Blocks:
    """Small integers, with a scale for each block of a matrix's input axis; activations stay float.

    Attributes:
        bits: Bits of an integer, 4 or 8.
        block_size: Values that share a scale; a power of two, at least 16.
        accuracy_level: How ONNX Runtime multiplies: 0 its own choice, 1 float32, 2 float16, 3 bfloat16, 4 int8.
        zero_points: Whether a block has a zero point too; without one, zero is half of the integers' range.
    """

    bits: int
    block_size: int = 32
    accuracy_level: int = 4
    zero_points: bool = True

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ExportError: The quantized operators do not take a value; the message says which there are.
        """
        if self.bits not in BLOCK_BITS.values():
            raise ExportError(f"bits={self.bits!r} is not a width of blocks; take 4 or 8")
        problem = block_size_problem(self.block_size) or accuracy_level_problem(self.accuracy_level)
        if problem is not None:
            raise ExportError(problem)


@dataclass(frozen=True)
class Columns:
    """int8 integers with a scale for each column of a matrix; activations are rounded as they come, row by row.

    Attributes:
        activation_bits: Bits that activations are rounded to: 8, or 16, which are two products of 8.
    """

    activation_bits: int = 8

    def __post_init__(self) -> None:
        """Check the bits.

        Raises:
            ExportError: There are no products of so many; the message says of how many.
        """
        if self.activation_bits not in (8, 16):
            raise ExportError(f"activation_bits={self.activation_bits!r} is not a width of activations; take 8 or 16")


Format = Blocks | Columns


def block_size_problem(value: object) -> str | None:
    """What is wrong with a number of values that share a scale, or None."""
    if _is_int(value) and value >= LEAST_BLOCK and not value & (value - 1):  # type: ignore[operator]
        return None
    return f"block_size={value!r} is not a block size; take a power of two, {LEAST_BLOCK} or more, such as 32"


def accuracy_level_problem(value: object) -> str | None:
    """What is wrong with an accuracy level, or None."""
    if _is_int(value) and 0 <= value <= 4:  # type: ignore[operator]
        return None
    return (
        f"accuracy_level={value!r} is not an accuracy level; take 0 (the runtime's choice), 1 (float32), 2 (float16), "
        "3 (bfloat16) or 4 (int8)"
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
