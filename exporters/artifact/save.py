"""ONNX models written to an export directory, each with its weights in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from gralora_fx.exporters.artifact.staging import require_space

_WRITERS, _IN_FLIGHT = 2, 2**28  # threads that write weights, and the most bytes they hold at once


def save_models(onnx_models: Mapping[str, ir.Model], stage: Path, output_dir: str | Path) -> None:
    """Write models, if there is room for them.

    Args:
        onnx_models: The models by the names of their files, without a suffix.
        stage: Where to write them.
        output_dir: Where they will be, for messages.

    Raises:
        ExportError: The disk has no room for their weights.
    """
    weights = [v.const_value for m in onnx_models.values() for v in m.graph.initializers.values()]
    require_space(output_dir, sum(tensor.nbytes for tensor in weights if tensor is not None))
    for name, onnx_model in onnx_models.items():
        ir.save(
            onnx_model,
            stage / f"{name}.onnx",
            external_data=f"{name}.onnx_data",
            size_threshold_bytes=1024,
            max_workers=_WRITERS,
            max_in_flight_bytes=_IN_FLIGHT,
        )
