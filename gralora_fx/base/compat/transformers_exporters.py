"""`transformers.exporters`, experimental API of transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from gralora_fx.base.compat.packages import fenced
from gralora_fx.base.patches import patched_here

with fenced("transformers"):
    from transformers.exporters import DynamoConfig, DynamoExporter
    from transformers.exporters import utils as exporter_utils
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes, register_pytree_node
    from transformers.exporters.exporter_onnx import _IR_FIXES, _ONNX_TRANSLATION_TABLE
    from transformers.exporters.utils import apply_fx_node_fixes, get_leaf_tensors


def export_program(
    model: PreTrainedModel, inputs: dict[str, Any], shapes: Mapping[str, Any] | None, *, dynamic: bool
) -> torch.export.ExportedProgram:
    """Export a transformers model."""
    with _chosen_patches(), _recording_grad_modes():
        exported = DynamoExporter().export(model, inputs, DynamoConfig(dynamic=dynamic, dynamic_shapes=shapes))
    program: torch.export.ExportedProgram = exported.program
    return program


def auto_dynamic_shapes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `dynamic_shapes` for `torch.export` in which every axis of every tensor may vary."""
    shapes: dict[str, Any] = get_auto_dynamic_shapes(dict(inputs))
    return shapes


def register_cache(kind: type) -> None:
    """Register a cache class with pytree as an export does, for a graph from another process."""
    register_pytree_node(kind)


def onnx_translations() -> dict[Any, Any]:
    """Return transformers' translations of its operators, such as grouped matrix products, as onnxscript functions."""
    return dict(_ONNX_TRANSLATION_TABLE)


def fix_for_onnx(graph_module: fx.GraphModule) -> None:
    """Rewrite calls that torch's translation gets wrong, as transformers' exporter does; in place."""
    apply_fx_node_fixes("onnx", graph_module)


def fix_model(model: ir.Model) -> None:
    """Rewrite nodes that an execution provider refuses, as transformers' exporter does; in place."""
    for fix in _IR_FIXES:
        fix(model.graph)


def leaf_names(values: Any) -> dict[str, Tensor]:
    """Return the tensors of nested inputs or outputs by the names that transformers' exporter gives them."""
    return dict(get_leaf_tensors(values))


@contextmanager
def _recording_grad_modes() -> Iterator[None]:
    """Let this thread's exports record `torch.no_grad` blocks of a model, so that their layers do not train."""
    export = torch.export.export

    def recorded(*args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
        with torch.enable_grad():
            return export(*args, **kwargs)

    with patched_here(torch.export, "export", recorded):
        yield


# patches that transformers applies for ONNX only, although the trace itself needs them
_OF_ONNX = {("transformers.masking_utils", "_vmap_expansion_sdpa")}


@contextmanager
def _chosen_patches() -> Iterator[None]:
    """Skip patches for model modules that are not imported, since applying them would import dozens of models.

    The exported model's own module is imported. Masks are built by broadcasting instead of `torch.vmap`, whose batched
    tensors would be part of the trace; so reading tensors at batched indices needs no patch.
    """
    patches = list(exporter_utils._PATCHES["dynamo"])
    chosen = [patch for patch in patches if _is_imported(patch[0])]
    chosen += [patch for patch in exporter_utils._PATCHES["onnx"] if patch[:2] in _OF_ONNX]
    chosen.append(("transformers.masking_utils", "TransformGetItemToIndex", lambda original: nullcontext))
    exporter_utils._PATCHES["dynamo"] = chosen
    try:
        with patch.object(exporter_utils, "patch_attribute", _patch_here):
            yield
    finally:
        exporter_utils._PATCHES["dynamo"] = patches


def _patch_here(owner: Any, name: str, factory: Any) -> AbstractContextManager[None]:
    """Patch an attribute as transformers' exporter does, for this thread alone."""
    return patched_here(owner, name, factory(getattr(owner, name)))


def _is_imported(path: str) -> bool:
    """Return whether the model module of a dotted path is imported; other paths count as imported."""
    parts = path.split(".")
    return parts[:2] != ["transformers", "models"] or ".".join(parts[:4]) in sys.modules
