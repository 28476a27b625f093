"""Experts as an export has them for the CPU: a function with a product for each of a layer's experts.

ONNX Runtime's `MoE` packs the matrices of an expert in every call, which takes a third of a prompt's time where experts
are wide, and multiplies an expert's only token in another order than several, so that in float32 the last digits of an
answer depend on what is read next to it. Its `Gemm` packs a constant matrix when the session is made, and computes a
row in one way. The graph keeps the operator, which is one node for all experts and what other providers compute fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.builder import FUNCTIONS, Builder, add_function, fixed_dim
from gralora_fx.features.experts.gate import NO_GATE, ExpertGate, activated, gated
from gralora_fx.features.experts.loop import GateNodes, order_of
from gralora_fx.features.experts.rows import MOE, gate_noted_at, is_read_twice
from gralora_fx.format.export_directory import CPU_FUNCTION

MOST_BYTES = 8 << 30  # of experts in a model; larger ones stay in the file, of which ONNX Runtime maps what is read
_WEIGHTS = ("up", "up_bias", "down", "down_bias")  # inputs of the operator from the third on


def write_expert_functions(model: ir.Model) -> PassResult[ir.Model]:
    """Write a function for the CPU into a model for its experts in float32, and name it at each operator, in place.

    Before: `y = MoE(x, scores, up, up_bias, down, down_bias)`
    After:  the same, with the function's name in its metadata (see `call_cpu_functions`), and the function
            `y = Experts(x, scores, up.0, ..., up_bias.0, ..., down.0, ..., down_bias.0, ...)`:
            `order = NonZero(scores^T)[1]; parts = Split(x[order], <tokens of each expert>)`
            `h = act(Concat(Gemm(parts[i], up.i[::2])...), Concat(Gemm(parts[i], up.i[1::2])...))`
            `y = Concat(Gemm(Split(h)[i], down.i)...)[<order, inverted>]`

    Layers of the same form share a function. Where a model's experts take more than `MOST_BYTES` there is none, since
    packed matrices are copies in memory.
    """
    layers = [(node, stacks) for node in model.graph if node.op_type == MOE and (stacks := _float_stacks(node))]
    tensors = {stack: stack.const_value for _, stacks in layers for stack in stacks.values()}
    if sum(tensor.nbytes for tensor in tensors.values() if tensor is not None) > MOST_BYTES:
        return PassResult(0)
    names: dict[tuple[ExpertGate, int, tuple[str, ...]], str] = {}
    for node, stacks in layers:
        gate, count = gate_noted_at(node), fixed_dim(stacks["up"], 0)
        assert gate is not None
        form = (gate, count, tuple(stacks))
        if form not in names:
            names[form] = f"Experts_{len(names)}"
            _add_function(model, names[form], *form)
        node.metadata_props[CPU_FUNCTION] = f"{FUNCTIONS}.{names[form]}"
    return PassResult(len(layers))


def _float_stacks(node: ir.Node) -> dict[str, ir.Value]:
    """Return an operator's weights and biases by name; none where they are not float32."""
    stacks = {name: stack for name, stack in zip(_WEIGHTS, node.inputs[2:], strict=False) if stack is not None}
    return stacks if all(stack.dtype == ir.DataType.FLOAT for stack in stacks.values()) else {}


def _add_function(model: ir.Model, name: str, gate: ExpertGate, count: int, stacks: Sequence[str]) -> None:
    def body(build: Builder, x: ir.Value, scores: ir.Value, *entries: ir.Value) -> dict[str, ir.Value]:
        weights = {stack: entries[at * count : (at + 1) * count] for at, stack in enumerate(stacks)}
        # tokens by expert, those of one as they come
        order = build("Gather", build("NonZero", build("Transpose", scores, perm=[1, 0])), build.scalar(1), axis=0)
        begins, every_second = [build.ints(0), build.ints(1)], [build.ints(limit) for limit in (2**31, 0, 2)]
        counts = build("Cast", build("ReduceSum", scores, begins[0], keepdims=0), to=ir.DataType.INT64)

        def products(rows: ir.Value, of: str, half: int | None = None) -> ir.Value:
            """Products of each expert's rows, one below the other; of a half, with every second row of its matrix."""
            parts = build.node("Split", [rows, counts], num_outputs=count).outputs
            outputs = []
            for index, part in enumerate(parts):
                operands = [weights[stack][index] for stack in (of, f"{of}_bias") if stack in weights]
                if half is not None:
                    operands = [build("Slice", operand, begins[half], *every_second) for operand in operands]
                outputs.append(build("Gemm", part, *operands, transB=1))
            return build("Concat", *outputs, axis=0)

        rows, at = build("Gather", x, order), GateNodes(build, ir.DataType.FLOAT)
        if gate.layout != NO_GATE:
            inner = gated(at, gate, products(rows, "up", 0), products(rows, "up", 1))
        else:
            inner = activated(at, gate, products(rows, "up", 0 if is_read_twice(gate) else None))
        return {"y": build("Gather", products(inner, "down"), order_of(build, order))}

    names = [f"{stack}.{index}" for stack in stacks for index in range(count)]
    add_function(model, name, ["x", "scores", *names], body)
