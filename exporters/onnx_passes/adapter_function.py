"""The output of an adapter as an ONNX function: one node at a site, which ONNX Runtime inlines at load."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import Builder
from gralora_fx.runtime.adapter_inputs import BIAS, AdapterSite

FUNCTIONS = "gralora"  # the functions' domain
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
    identifier = (FUNCTIONS, name, "")
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
    return ir.Function(FUNCTIONS, name, graph=graph, attributes=[])


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
    return ir.Function(FUNCTIONS, name, graph=graph, attributes=[])


def batched_adapter_function(
    model: ir.Model, site: AdapterSite, k: int, opset: int, *, chooses: bool
) -> ir.OperatorIdentifier:
    """The function that gives the outputs of several adapters, each for a group of tokens, added if it is missing.

    `output = BatchedAdapter(x, ids, A, B, A_general, B_general, bias)` with

        x [groups, length, in], ids [groups], A [adapters, k, in/k, r], B [adapters, k, r, out/k],
        A_general [adapters, in, hybrid_r], B_general [adapters, hybrid_r, out], bias [adapters, out]
        output [groups, length, out]

    Of the tensors it takes those that the layer has. Where groups do not choose, there are as many as adapters, in
    their order, and `ids` is left out.

    The tensors of each group's adapter are copied where it chooses: a product with those of all adapters, masked, took
    1.6 to 2.2 times as long for eight rows with an adapter each (SmolLM2-135M's layers, r = 8 and 32).

    Args:
        model: The model.
        site: The layer.
        k: Blocks in each direction in this export.
        opset: Version of ONNX's operators.
        chooses: Whether each group chooses its adapter.

    Returns:
        What nodes call the function by.
    """
    k = site.blocks(k)
    form = f"k{k}" if k else "lora" if site.form != BIAS else "no_factors"
    name = f"Batched{NAME}_{form}{'_bias' if site.has_bias else ''}{'' if chooses else '_in_order'}"
    identifier = (FUNCTIONS, name, "")
    if identifier not in model.functions:
        model.functions[identifier] = _batched_function(name, site, k, opset, chooses)
    return identifier


def _batched_function(name: str, site: AdapterSite, k: int, opset: int, chooses: bool) -> ir.Function:
    tensors = [tensor.rpartition(".gralora_")[2] for tensor in site.names(k)]
    x, *others = inputs = [ir.Value(name=n) for n in ("x", *(["ids"] if chooses else []), *tensors)]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name=name)
    build = Builder(graph)
    own = dict(zip(tensors, others[-len(tensors) :], strict=True))
    if chooses:
        own = {tensor: build("Gather", value, others[0], axis=0) for tensor, value in own.items()}
    parts = []
    if k:
        parts.append(_blocks_of_groups(build, x, own["A"], own["B"], k))
    if site.form != BIAS:
        parts.append(build("MatMul", build("MatMul", x, own["A_general"]), own["B_general"]))
    if site.has_bias:
        parts.append(_bias_of_groups(build, x, own["bias"]))
    result = _total(build, parts)
    result.name = "output"
    graph.extend(build.take())
    graph.outputs.append(result)
    return ir.Function(FUNCTIONS, name, graph=graph, attributes=[])


def _blocks_of_groups(build: Builder, x: ir.Value, A: ir.Value, B: ir.Value, k: int) -> ir.Value:
    blocks = build("Reshape", x, build.ints(0, 0, k, -1))  # [groups, length, input block, in/k]
    hidden = build("MatMul", build("Transpose", blocks, perm=[0, 2, 1, 3]), A)  # [groups, input block, length, r]
    hidden = build("Reshape", hidden, build.ints(0, 0, 0, k, -1))  # [groups, input block, length, output block, s]
    hidden = build("Transpose", hidden, perm=[0, 3, 2, 1, 4])
    hidden = build("Reshape", hidden, build.ints(0, 0, 0, -1))  # [groups, output block, length, r]
    output = build("MatMul", hidden, B)  # [groups, output block, length, out/k]
    return build("Reshape", build("Transpose", output, perm=[0, 2, 1, 3]), build.ints(0, 0, -1))


def _bias_of_groups(build: Builder, x: ir.Value, bias: ir.Value) -> ir.Value:
    """`[groups, length, out]` of `[groups, out]`."""
    shape = build("Concat", build("Shape", x, end=2), build.ints(1), axis=0)
    return build("Expand", build("Unsqueeze", bias, build.ints(1)), shape)


def _total(build: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    if len(parts) == 1:
        return parts[0]
    return build("Add", *parts) if len(parts) == 2 else build("Sum", *parts)
