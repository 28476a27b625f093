"""Whether a quantized export gives finite values where the model does."""

from __future__ import annotations

from torch import Tensor

from gralora_fx.errors import ExportError


def check_finite(name: str, where: str, expected: Tensor, actual: Tensor) -> None:
    """Check that an output is finite wherever the model's is.

    Args:
        name: The output.
        where: The inputs, for the message.
        expected: The model's values.
        actual: The export's, of the same shape.

    Raises:
        ExportError: It is not.
    """
    if bool((expected.isfinite() & ~actual.isfinite()).any()):
        raise ExportError(
            f"the quantized export gives values of {name} that are not finite on {where}, and the model's are finite; "
            "export it without quantize"
        )
