"""Inputs of a decoder's step that a caller may leave out: those of images, and those with which tokens are verified."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.tracing.inputs.image_inputs import IMAGE_INPUTS
from gralora_fx.exporters.rules.builder import Builder
from gralora_fx.format.export_directory import ATTENTION_SEQLENS, LOGITS_INDICES
from gralora_fx.format.input_names import takes_image_inputs


def optional_image_inputs(model: ir.Model) -> PassResult[ir.Model]:
    """Give each of `IMAGE_INPUTS` the values of text as an initializer, which a caller may override.

    Before: `x = Where(input_ids < 0, inputs_embeds, embeddings)`, `inputs_embeds [batch, length, hidden]`
    After:  `x = Where(input_ids < 0, Expand(inputs_embeds, ...), embeddings)`, `inputs_embeds = zeros [1, 1, hidden]`
            where it is not given

    So programs that know no images, such as onnxruntime-genai, run texts as before.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    optional = [name for name in IMAGE_INPUTS if name in inputs] if takes_image_inputs(inputs) else []
    build = Builder(graph)
    for name in optional:
        value, spec = inputs[name], IMAGE_INPUTS[name]
        assert value.shape is not None
        assert value.dtype is not None
        own, place = [dim if isinstance(dim, int) else 1 for dim in value.shape], spec.axis
        sizes = [build("Shape", inputs[spec.follows], start=0, end=2)]
        sizes = [*([build.ints(*own[:place])] if place else []), *sizes]
        sizes += [build.ints(*own[place + 2 :])] if own[place + 2 :] else []
        expanded = build("Expand", value, sizes[0] if len(sizes) == 1 else build("Concat", *sizes, axis=0))
        expanded.shape, expanded.type = value.shape, value.type
        for usage in [use for use in value.uses() if use.node is not expanded.producer()]:
            usage.node.replace_input_with(usage.idx, expanded)
        _give_default(graph, value, np.full(own, spec.absent, value.dtype.numpy()))
    if optional:
        build.insert_before(graph[0])
    return PassResult(len(optional))


def optional_verifying_inputs(model: ir.Model) -> PassResult[ir.Model]:
    """Give the inputs of a rows' graph with which proposed tokens are verified a value that stands for none.

    Before: `graph(input_ids, query_seqlens, past_seqlens, attention_seqlens, logits_indices, ...)`
    After:  the same with `attention_seqlens = [0]` and `logits_indices = []` where they are not given

    So a program that knows the first three inputs gets the logits after the last token of each row.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    defaults: dict[str, NDArray[Any]] = {
        ATTENTION_SEQLENS: np.zeros(1, np.int32),
        LOGITS_INDICES: np.zeros(0, np.int64),
    }
    given = {name: array for name, array in defaults.items() if name in inputs}
    for name, array in given.items():
        _give_default(model.graph, inputs[name], array)
    return PassResult(len(given))


def _give_default(graph: ir.Graph, value: ir.Value, array: NDArray[Any]) -> None:
    """Make an input an initializer too, which a caller may override."""
    assert value.dtype is not None
    value.const_value = ir.tensor(array, dtype=value.dtype, name=str(value.name))
    graph.initializers[str(value.name)] = value
