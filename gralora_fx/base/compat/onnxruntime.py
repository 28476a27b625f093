"""ONNX Runtime's exceptions, which have no public names."""

import onnxruntime

from gralora_fx.base.compat.packages import fenced

with fenced("onnxruntime", onnxruntime.__version__):
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

__all__ = ["NoKernel"]
