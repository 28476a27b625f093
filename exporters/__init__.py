"""Export of rewritten models to ONNX, verification of the exports, and conversions of adapters and checkpoints."""

from typing import TYPE_CHECKING

from gralora_fx import first_use

if TYPE_CHECKING:
    from gralora_fx.exporters.adapter_export import export_adapter
    from gralora_fx.exporters.checkpoint_merge import MergeReport, merge_checkpoint
    from gralora_fx.exporters.fold.fold_report import FoldReport
    from gralora_fx.exporters.lora_form import LoraReport, to_lora
    from gralora_fx.exporters.onnx import export_onnx
    from gralora_fx.exporters.onnx_fold import fold_onnx
    from gralora_fx.exporters.onnx_verify import verify_onnx
    from gralora_fx.exporters.reports import ExportReport
    from gralora_fx.exporters.verify_report import VerifyReport

__all__ = [
    "ExportReport",
    "FoldReport",
    "LoraReport",
    "MergeReport",
    "VerifyReport",
    "export_adapter",
    "export_onnx",
    "fold_onnx",
    "merge_checkpoint",
    "to_lora",
    "verify_onnx",
]

# Where each name lives; imported on first use, so that an export's files can be checked without torch. No file has the
# name of a function in it: as a submodule it would take the function's place in this package.
_HOMES = {
    "ExportReport": "exporters.reports",
    "FoldReport": "exporters.fold.fold_report",
    "LoraReport": "exporters.lora_form",
    "MergeReport": "exporters.checkpoint_merge",
    "VerifyReport": "exporters.verify_report",
    "export_adapter": "exporters.adapter_export",
    "export_onnx": "exporters.onnx",
    "fold_onnx": "exporters.onnx_fold",
    "merge_checkpoint": "exporters.checkpoint_merge",
    "to_lora": "exporters.lora_form",
    "verify_onnx": "exporters.onnx_verify",
}

__getattr__ = first_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
