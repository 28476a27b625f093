"""Export of rewritten models to ONNX, and what is done with the exports."""

from gralora_fx.exporters.onnx import export_onnx
from gralora_fx.exporters.reports import ExportReport, VerifyReport
from gralora_fx.exporters.verify import verify_onnx

__all__ = ["ExportReport", "VerifyReport", "export_onnx", "verify_onnx"]
