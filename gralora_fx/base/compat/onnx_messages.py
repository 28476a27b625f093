"""ONNX's protobuf messages without the rest of onnx, whose import takes longer than parsing a model."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from typing import Any

from gralora_fx.base.compat.packages import TESTED, fenced

_NAME = "onnx.onnx_ml_pb2"


def _messages() -> Any:
    """Import the messages' module under its own name, so that a later import of onnx finds it."""
    package = find_spec("onnx")
    spec = PathFinder.find_spec(_NAME, None if package is None else package.submodule_search_locations)
    if spec is None or spec.loader is None:
        raise ImportError(f"onnx lacks {_NAME}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return sys.modules.setdefault(_NAME, module)


with fenced("onnx", TESTED["onnx"][0]):  # only this version counts: the messages' format is stable
    _found: Any = sys.modules.get(_NAME) or _messages()
    ModelProto, TensorProto = _found.ModelProto, _found.TensorProto

__all__ = ["ModelProto", "TensorProto"]
