"""Optional inputs that images add to an ONNX decoder beside its ids."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.builder import Builder
from gralora_fx.exporters.rules.rows.graph_ends import give_default
from gralora_fx.format.input_names import beside_ids


def optional_image_inputs(model: ir.Model) -> PassResult[ir.Model]:
    """Give each of `STEP_INPUTS` the values of text as an initializer, which a caller may override.

    Before: `x = Where(input_ids < 0, inputs_embeds, embeddings)`, `inputs_embeds [batch, length, hidden]`
    After:  `x = Where(input_ids < 0, Expand(inputs_embeds, ...), embeddings)`, `inputs_embeds = zeros [1, 1, hidden]`
            where it is not given

    So programs that know no images, such as onnxruntime-genai, run texts as before.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    optional = beside_ids(inputs)
    build = Builder(graph)
    for name, spec in optional.items():
        value = inputs[name]
        assert value.shape is not None
        assert value.dtype is not None
        own, place = [dim if isinstance(dim, int) else 1 for dim in value.shape], spec.axis
        give_default(graph, value, np.full(own, spec.absent, value.dtype.numpy()))
        if place is None:
            continue
        sizes = [build("Shape", inputs[spec.follows], start=0, end=2)]
        sizes = [*([build.ints(*own[:place])] if place else []), *sizes]
        sizes += [build.ints(*own[place + 2 :])] if own[place + 2 :] else []
        expanded = build("Expand", value, sizes[0] if len(sizes) == 1 else build("Concat", *sizes, axis=0))
        expanded.shape, expanded.type = value.shape, value.type
        for usage in [use for use in value.uses() if use.node is not expanded.producer()]:
            usage.node.replace_input_with(usage.idx, expanded)
    if optional:
        build.insert_before(graph[0])
    return PassResult(len(optional))
