"""Export of rewritten models to ONNX, and verification of the exports."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gralora_fx.exporters.fold import fold_onnx
    from gralora_fx.exporters.folding.report import FoldReport
    from gralora_fx.exporters.onnx import export_onnx
    from gralora_fx.exporters.reports import ExportReport, VerifyReport
    from gralora_fx.exporters.verify import verify_onnx

__all__ = ["ExportReport", "FoldReport", "VerifyReport", "export_onnx", "fold_onnx", "verify_onnx"]

# Where each name lives; imported on first use, so that an export's files can be checked without torch.
_HOMES = {
    "ExportReport": "reports",
    "FoldReport": "folding.report",
    "VerifyReport": "reports",
    "export_onnx": "onnx",
    "fold_onnx": "fold",
    "verify_onnx": "verify",
}


def __getattr__(name: str) -> Any:
    """A public name, imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gralora_fx.exporters' has no attribute {name!r}")
    value = getattr(import_module(f"gralora_fx.exporters.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
