"""The output of an adapter as an ONNX function: one node at a site, which ONNX Runtime inlines at load."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import Builder
from gralora_fx.exporters.translation.operators import DOMAIN

NAME = "Adapter"


def adapter_function(model: ir.Model, k: int, num_axes: int, opset: int) -> ir.OperatorIdentifier:
    """The function that gives the two parts of an adapter's output, added to a model if it has none yet.

    `blocks, general = Adapter(x, A, B, A_general, B_general)` with

        x [..., in], A [k, in/k, r], B [k, r, out/k], A_general [in, hybrid_r], B_general [hybrid_r, out]
        blocks [..., out], general [..., out]

    whose sum is the adapter's output: one node adds both to what the layer gives. Every rank may be 0. The blocks of
    GraLoRA exchange parts of their products between two batched matmuls; nothing is computed from shapes at run time.

    In LoRA's form it is `general = Adapter(x, A_general, B_general)`.

    Args:
        model: The model.
        k: Blocks in each direction; 0 for LoRA's form.
        num_axes: Axes of `x`.
        opset: Version of ONNX's operators.

    Returns:
        What nodes call the function by.
    """
    name = f"{NAME}_k{k}_{num_axes}d" if k else f"{NAME}_lora"
    identifier = (DOMAIN, name, "")
    if identifier not in model.functions:
        model.functions[identifier] = _function(name, k, num_axes, opset) if k else _lora_function(name, opset)
    return identifier


def _lora_function(name: str, opset: int) -> ir.Function:
    x, A_general, B_general = inputs = [ir.Value(name=n) for n in ("x", "A_general", "B_general")]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name=name)
    build = Builder(graph)
    general = build("MatMul", build("MatMul", x, A_general), B_general)
    general.name = "general"
    graph.extend(build.take())
    graph.outputs.append(general)
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])


def _function(name: str, k: int, num_axes: int, opset: int) -> ir.Function:
    x, A, B, A_general, B_general = inputs = [ir.Value(name=n) for n in ("x", "A", "B", "A_general", "B_general")]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name=name)
    build = Builder(graph)
    lead = num_axes - 2  # axes before those of tokens and features
    kept = [0] * lead
    front = list(range(lead))
    swap = [*front, lead + 1, lead]  # of blocks and tokens, before the features
    blocks = build("Reshape", x, build.ints(*kept, 0, k, -1))  # [..., tokens, input block, in/k]
    blocks = build("Transpose", blocks, perm=[*swap, lead + 2])
    hidden = build("MatMul", blocks, A)  # [..., input block, tokens, r]
    hidden = build("Reshape", hidden, build.ints(*kept, 0, 0, k, -1))  # [..., input block, tokens, output block, s]
    hidden = build("Transpose", hidden, perm=[*front, lead + 2, lead + 1, lead, lead + 3])
    hidden = build("Reshape", hidden, build.ints(*kept, 0, 0, -1))  # [..., output block, tokens, r]
    output = build("MatMul", hidden, B)  # [..., output block, tokens, out/k]
    output = build("Reshape", build("Transpose", output, perm=[*swap, lead + 2]), build.ints(*kept, 0, -1))
    general = build("MatMul", build("MatMul", x, A_general), B_general)
    output.name, general.name = "blocks", "general"
    graph.extend(build.take())
    graph.outputs.extend([output, general])
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
