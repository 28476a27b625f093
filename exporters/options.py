"""The choices of an export's options, checked before anything is loaded."""

from __future__ import annotations

from typing import Any

from gralora_fx.errors import ExportError

PRECISIONS = ("fp32", "fp16", "bf16")
QUANTIZATIONS = ("int4", "int8")
LOGITS = ("last", "all")
LEVELS = ("quick", "full")
ADAPTER_MODES = ("merged",)
_SMALLEST_BLOCK = 16


def check_export_options(
    *,
    precision: str = "fp32",
    quantize: str | None = None,
    block_size: int = 32,
    accuracy_level: int = 4,
    logits: str = "last",
    adapters: str = "merged",
    verify: bool | str = True,
) -> None:
    """Refuse values that an export does not take.

    Raises:
        ExportError: A value is not among the choices; the message lists them.
    """
    check_choice("adapters", adapters, ADAPTER_MODES)
    check_choice("precision", precision, PRECISIONS)
    check_choice("logits", logits, LOGITS)
    if not isinstance(verify, bool):
        check_choice("verify", verify, LEVELS)
    if quantize is not None:
        check_quantization(quantize, block_size, accuracy_level)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        ExportError: It is not; the message lists them.
    """
    if value not in choices:
        raise ExportError(f"{name}={value!r} is not available; take {' or '.join(map(repr, choices))}")


def check_quantization(kind: Any, block_size: Any, accuracy_level: Any) -> None:
    """Refuse what the quantized operators do not take.

    Raises:
        ExportError: A value is not among the choices; the message says which there are.
    """
    if kind not in QUANTIZATIONS:
        choices = " or ".join(map(repr, QUANTIZATIONS))
        raise ExportError(f"quantize={kind!r} is not available; take {choices} or None")
    if not _is_int(block_size) or block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
        raise ExportError(f"block_size={block_size!r} is no block size; take a power of two, 16 or more, such as 32")
    if not _is_int(accuracy_level) or not 0 <= accuracy_level <= 4:
        raise ExportError(
            f"accuracy_level={accuracy_level!r} is no accuracy level; take 0 (the runtime's choice), "
            "1 (float32), 2 (float16), 3 (bfloat16) or 4 (int8)"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
