"""The one file that touches `transformers.exporters`, which its makers call experimental."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from torch import Tensor, fx
from transformers import DynamicCache, PreTrainedModel
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.exporters import utils as exporter_utils
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes, register_pytree_node
from transformers.exporters.exporter_onnx import _IR_FIXES, _ONNX_TRANSLATION_TABLE
from transformers.exporters.utils import apply_fx_node_fixes, get_leaf_tensors

from gralora_fx.tracing.attention import fused_attention
from gralora_fx.tracing.cached import PAST, copied, equal_sizes, tensors_of
from gralora_fx.tracing.cheap_shapes import cheap_shapes
from gralora_fx.tracing.known_code import known_as_operators
from gralora_fx.tracing.quiet import quiet


def export_transformers_model(
    model: PreTrainedModel, inputs: Mapping[str, Any], *, dynamic: bool
) -> torch.export.ExportedProgram:
    """Export a transformers model in the mode it stands in, with a cache if one is given.

    Attention of a decoder with a cache is one node.

    Args:
        model: The model; its modules and parameters are left as they are.
        inputs: Keyword inputs of its forward; past keys and values among them mean a step with a cache.
        dynamic: Whether every axis of every input that may vary does.

    Returns:
        A program over the model's own parameters.
    """
    shapes = dynamic_axes(inputs) if dynamic else None
    noted = inputs if isinstance(inputs.get(PAST), DynamicCache) else None
    operators = nullcontext() if noted is None else _operators(model)
    calling = _calling(model, use_cache=PAST in inputs, noted=noted)
    with quiet(), _without_needless_imports(), _recording_grad_modes(), calling, operators:
        exported = DynamoExporter().export(model, copied(inputs), DynamoConfig(dynamic=dynamic, dynamic_shapes=shapes))
    program: torch.export.ExportedProgram = exported.program
    return program


@contextmanager
def _recording_grad_modes() -> Iterator[None]:
    """Let this thread's exports record where a model turns gradients off.

    The exporter calls `torch.export.export` without gradients, where turning them off changes nothing and leaves no
    trace, so that a layer within `torch.no_grad` would train.
    """
    export, thread = torch.export.export, threading.get_ident()

    def recorded(*args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
        with torch.enable_grad() if threading.get_ident() == thread else nullcontext():
            return export(*args, **kwargs)

    with patch.object(torch.export, "export", recorded):
        yield


def register_cache(kind: type) -> None:
    """Let torch take a class of caches apart, as an export does: for a graph that another process has made.

    Args:
        kind: The class.
    """
    register_pytree_node(kind)


def dynamic_axes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`dynamic_shapes` for `torch.export`: every axis may vary, of images the batch only, of a cache batch and length.

    Vision models are made for one size of image; with free height and width some cannot be traced.
    """
    shapes: dict[str, Any] = get_auto_dynamic_shapes(dict(inputs))
    if "pixel_values" in shapes:
        shapes["pixel_values"] = {0: torch.export.Dim.AUTO}
    if PAST in shapes:
        shapes[PAST] = [{0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO} for _ in shapes[PAST]]
    return shapes


@contextmanager
def _operators(model: PreTrainedModel) -> Iterator[None]:
    """Let a decoder call one operator for attention, and for what else is known by its code.

    The nodes get no stack trace, which takes a tenth of the time; the module that made each is noted all the same.
    """
    without_stacks = patch.object(fx.config, "do_not_emit_stack_traces", True)
    with fused_attention(model), known_as_operators(model), cheap_shapes(), without_stacks:
        yield


@contextmanager
def _calling(model: PreTrainedModel, *, use_cache: bool, noted: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Call the model with this `use_cache`, whether its config or only its forward knows the flag.

    With `noted`, example inputs of a step, the tracer is told first which sizes are one.
    """
    own = model.__dict__.get("forward")  # an override on the instance; the exporter leaves one behind
    forward = model.forward
    if "use_cache" in inspect.signature(forward).parameters:
        forward = functools.partial(forward, use_cache=use_cache)
    model.forward = forward if noted is None else _with_noted_sizes(forward, noted)
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own


def _with_noted_sizes(forward: Callable[..., Any], example: Mapping[str, Any]) -> Callable[..., Any]:
    """A step's forward that first tells the tracer which sizes are one.

    Otherwise every layer tells it of its own cache, and each time the tracer works out anew what it knew.
    """
    equal = equal_sizes(example)

    @functools.wraps(forward)
    def noted(*args: Any, **inputs: Any) -> Any:
        tensors = [tensor for _, tensor in tensors_of(inputs)]
        for (first, first_axis), (second, second_axis) in equal:
            torch._check(tensors[first].shape[first_axis] == tensors[second].shape[second_axis])  # type: ignore[no-untyped-call]
        return forward(*args, **inputs)

    return noted


@contextmanager
def _without_needless_imports() -> Iterator[None]:
    """Leave out the patches of models that are not imported: to apply them imports dozens, which takes a second.

    The model that is exported stands in memory, so what it is made of is imported.
    """
    patches = list(exporter_utils._PATCHES["dynamo"])
    exporter_utils._PATCHES["dynamo"] = [patch for patch in patches if _is_imported(patch[0])]
    try:
        yield
    finally:
        exporter_utils._PATCHES["dynamo"] = patches


def _is_imported(path: str) -> bool:
    """Whether the file of a model that a dotted path leads into is imported; what lies elsewhere counts as imported."""
    parts = path.split(".")
    return parts[:2] != ["transformers", "models"] or ".".join(parts[:4]) in sys.modules


def onnx_translations() -> dict[Any, Any]:
    """The ONNX forms that transformers itself has for operators, such as those of experts, as onnxscript functions."""
    return dict(_ONNX_TRANSLATION_TABLE)


def fix_for_onnx(graph_module: fx.GraphModule) -> None:
    """Rewrite calls that torch's translation to ONNX misreads, as transformers' exporter does; in place."""
    apply_fx_node_fixes("onnx", graph_module)


def fix_model(model: ir.Model) -> None:
    """Rewrite nodes that a provider of ONNX Runtime refuses, as transformers' exporter does; in place."""
    for fix in _IR_FIXES:
        fix(model.graph)


def leaf_names(values: Any) -> dict[str, Tensor]:
    """The tensors of nested inputs or outputs by the names that transformers' exporter gives them.

    Args:
        values: A tensor, or any nesting of mappings, sequences and objects with attributes.

    Returns:
        Tensors by dotted path, such as `hidden_states.0`; a tensor alone is `output`.
    """
    return dict(get_leaf_tensors(values))
