"""The output of an adapter as an ONNX function: one node at a site, which ONNX Runtime inlines at load."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx_ir as ir

from gralora_fx.exporters.rules.builder import Builder, add_function
from gralora_fx.format.adapter_inputs import BIAS, AdapterSite

NAME = "Adapter"


def adapter_function(model: ir.Model, k: int, num_axes: int) -> str:
    """The function that gives the two parts of an adapter's output, added to a model if it has none yet.

    `blocks, general = Adapter(x, A, B, A_general, B_general)` with

        x [..., in], A [k, in/k, r], B [k, r, out/k], A_general [in, hybrid_r], B_general [hybrid_r, out]
        blocks [..., out], general [..., out]

    whose sum is the adapter's output: one node adds both to what the layer gives. Every rank may be 0. The blocks of
    GraLoRA exchange parts of their products between two batched matmuls; nothing is computed from shapes at run time.

    In LoRA's form it is `general = Adapter(x, A_general, B_general)`.
    """
    name = f"{NAME}_k{k}_{num_axes}d" if k else f"{NAME}_lora"
    if k:
        add_function(model, name, ["x", "A", "B", "A_general", "B_general"], functools.partial(_gralora, k, num_axes))
    else:
        add_function(model, name, ["x", "A_general", "B_general"], _lora)
    return name


def _lora(build: Builder, x: ir.Value, A_general: ir.Value, B_general: ir.Value) -> dict[str, ir.Value]:
    return {"general": build("MatMul", build("MatMul", x, A_general), B_general)}


def _gralora(
    k: int,
    num_axes: int,
    build: Builder,
    x: ir.Value,
    A: ir.Value,
    B: ir.Value,
    A_general: ir.Value,
    B_general: ir.Value,
) -> dict[str, ir.Value]:
    return {"blocks": _blocks(build, x, A, B, k, num_axes - 2), **_lora(build, x, A_general, B_general)}


def _blocks(build: Builder, x: ir.Value, A: ir.Value, B: ir.Value, k: int, lead: int) -> ir.Value:
    """What blocks give; `lead` axes are before those of tokens and features, with one group of tokens each or not."""
    kept, front = [0] * lead, list(range(lead))
    swap = [*front, lead + 1, lead]  # of blocks and tokens, before the features
    blocks = build("Reshape", x, build.ints(*kept, 0, k, -1))  # [..., tokens, input block, in/k]
    blocks = build("Transpose", blocks, perm=[*swap, lead + 2])
    hidden = build("MatMul", blocks, A)  # [..., input block, tokens, r]
    hidden = build("Reshape", hidden, build.ints(*kept, 0, 0, k, -1))  # [..., input block, tokens, output block, s]
    hidden = build("Transpose", hidden, perm=[*front, lead + 2, lead + 1, lead, lead + 3])
    hidden = build("Reshape", hidden, build.ints(*kept, 0, 0, -1))  # [..., output block, tokens, r]
    output = build("MatMul", hidden, B)  # [..., output block, tokens, out/k]
    return build("Reshape", build("Transpose", output, perm=[*swap, lead + 2]), build.ints(*kept, 0, -1))


def batched_adapter_function(model: ir.Model, site: AdapterSite, k: int, *, chooses: bool) -> str:
    """The function that gives the outputs of several adapters, each for a group of tokens, added if it is missing.

    `output = BatchedAdapter(x, ids, A, B, A_general, B_general, bias)` with

        x [groups, length, in], ids [groups], A [adapters, k, in/k, r], B [adapters, k, r, out/k],
        A_general [adapters, in, hybrid_r], B_general [adapters, hybrid_r, out], bias [adapters, out]
        output [groups, length, out]

    Of the tensors it takes those that the layer has. Where groups do not choose, there are as many as adapters, in
    their order, and `ids` is left out.

    The tensors of each group's adapter are copied where it chooses: a product with those of all adapters, masked, took
    1.6 to 2.2 times as long for eight rows with an adapter each (SmolLM2-135M's layers, r = 8 and 32).
    """
    k = site.blocks(k)
    form = f"k{k}" if k else "lora" if site.form != BIAS else "no_factors"
    name = f"Batched{NAME}_{form}{'_bias' if site.has_bias else ''}{'' if chooses else '_in_order'}"
    tensors = [tensor.rpartition(".gralora_")[2] for tensor in site.names(k)]

    def body(build: Builder, x: ir.Value, *others: ir.Value) -> dict[str, ir.Value]:
        own = dict(zip(tensors, others[-len(tensors) :], strict=True))
        if chooses:
            own = {tensor: build("Gather", value, others[0], axis=0) for tensor, value in own.items()}
        parts = []
        if k:
            parts.append(_blocks(build, x, own["A"], own["B"], k, lead=1))
        if site.form != BIAS:
            parts.append(build("MatMul", build("MatMul", x, own["A_general"]), own["B_general"]))
        if site.has_bias:
            parts.append(_bias_of_groups(build, x, own["bias"]))
        return {"output": _total(build, parts)}

    add_function(model, name, ["x", *(["ids"] if chooses else []), *tensors], body)
    return name


def _bias_of_groups(build: Builder, x: ir.Value, bias: ir.Value) -> ir.Value:
    """`[groups, length, out]` of `[groups, out]`."""
    shape = build("Concat", build("Shape", x, end=2), build.ints(1), axis=0)
    return build("Expand", build("Unsqueeze", bias, build.ints(1)), shape)


def _total(build: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    if len(parts) == 1:
        return parts[0]
    return build("Add", *parts) if len(parts) == 2 else build("Sum", *parts)
