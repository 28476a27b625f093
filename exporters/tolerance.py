"""How far an export may be from the model with the same weights, by the arithmetic that it runs in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Largest difference, relative to the largest value or to 1 where that is smaller. Exports in float16 run in it: largest
# seen 0.004 on tiny random models of 13 architectures, 0.003 on SmolLM2-135M. Those in bfloat16 run in float32 with
# their own weights and constants (see `twin`), of which the constants round differently: largest seen 0.0004.
_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}


def tolerance_of(manifest: Mapping[str, Any]) -> float:
    """The tolerance of a comparison with the model that has the same weights, quantized ones included.

    Args:
        manifest: What `gralora_export.json` holds.
    """
    return _TOLERANCE.get(str(manifest.get("precision")), _TOLERANCE["fp32"])


def describe_weights(manifest: Mapping[str, Any]) -> str:
    """Precision of an export's weights, quantized ones first, such as `fp16` or `int4, else fp32`.

    Args:
        manifest: What `gralora_export.json` holds.
    """
    quantization = manifest.get("quantization") or {}
    kinds = [str(quantization["kind"])] if "kind" in quantization else []
    return ", else ".join([*kinds, str(manifest.get("precision", "fp32"))])
