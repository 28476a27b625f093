"""Experts as a loop over those with tokens: instead of ONNX Runtime's operator, and as its function for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.branches import add_function, loop
from gralora_fx.exporters.rules.builder import FUNCTIONS, Builder, fixed_dim
from gralora_fx.exporters.translation.operators import DomainNode
from gralora_fx.features.experts.gate import HALVES, NO_GATE, ExpertGate, activated, gated
from gralora_fx.features.experts.operators import Experts
from gralora_fx.features.experts.rows import MOE, gate_noted_at, is_read_twice
from gralora_fx.format.export_directory import CPU_FUNCTION


class ExpertsNode(DomainNode, Experts[ir.Value]):
    """`Experts`: as `gralora::experts`; `is_transposed` is 0 or 1."""

    op_type = "Experts"


@dataclass(frozen=True)
class GateNodes:
    """ONNX nodes that compute gates (see `Arithmetic`)."""

    build: Builder  # makes them
    dtype: ir.DataType

    def number(self, value: float) -> ir.Value:
        """Return a constant."""
        return self.build.tensor(value, self.dtype)

    def minimum(self, x: ir.Value, high: ir.Value) -> ir.Value:
        """Return `Min`."""
        return self.build("Min", x, high)

    def clip(self, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
        """Return `Clip`."""
        return self.build("Clip", x, low, high)

    def add(self, x: ir.Value, number: ir.Value) -> ir.Value:
        """Return `Add`."""
        return self.build("Add", x, number)

    def multiply(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return `Mul`."""
        return self.build("Mul", x, y)

    def relu(self, x: ir.Value) -> ir.Value:
        """Return `Relu`."""
        return self.build("Relu", x)

    def silu(self, x: ir.Value, alpha: float) -> ir.Value:
        """Return `Mul` with a `Sigmoid`."""
        return self.multiply(x, self.build("Sigmoid", x if alpha == 1 else self.multiply(x, self.number(alpha))))

    def gelu(self, x: ir.Value, approximate: str) -> ir.Value:
        """Return `Gelu`."""
        return self.build("Gelu", x, approximate=approximate)


NODES = (ExpertsNode,)


def loop_over_experts(build: Builder, experts: ExpertsNode, name: str) -> ir.Value:
    """Return a layer's output, computed by two products per expert that some token has.

    Before: `y = gralora.Experts(x, index, weights, up, down)`
    After:  `order = <rows of tokens by expert>; parts = Loop { Gemm(act(Gemm(x[rows], up[expert])), down[expert]) }`
            `y = weights @ Gather(Concat(parts), <order, inverted>)`, for each token
    """
    hidden, dtype = experts.hidden, experts.hidden.dtype or ir.DataType.FLOAT
    size, k = width_of(experts), fixed_dim(experts.index, 1)
    chosen = build("Reshape", experts.index, [-1])
    order = order_of(build, chosen)
    unique = build.node("Unique", [chosen], num_outputs=4, axis=0)
    found, counts = unique.outputs[0], unique.outputs[3]
    ends = build("CumSum", counts, 0)
    begins = build("Sub", ends, counts)

    def part(inner: Builder, index: ir.Value) -> ir.Value:
        """Return one expert's outputs for its rows."""
        at = inner("Unsqueeze", index, [0])
        expert, begin, end = (inner("Gather", of, at) for of in (found, begins, ends))
        rows = inner("Div", inner("Slice", order, begin, end), k)
        x = inner("Gather", hidden, rows, axis=0)
        x = _between(inner, experts.gate, _product(inner, x, experts, expert, is_up=True), dtype)
        return _product(inner, x, experts, expert, is_up=False)

    parts = loop(build, build("Squeeze", build("Shape", found), [0]), part, dtype, name)
    outputs = build("Gather", build("ConcatFromSequence", parts, axis=0), order_of(build, order), axis=0)
    return weighted(build, outputs, experts, k, size)


def width_of(experts: ExpertsNode) -> int:
    """Return a token's width, by the output size of the second product."""
    return fixed_dim(experts.down, 2 if experts.is_transposed else 1)


def weighted(build: Builder, outputs: ir.Value, experts: ExpertsNode, k: int, size: int) -> ir.Value:
    """Return the weighted sums `[tokens, size]` of the outputs `[tokens * k, size]` of each token's k experts."""
    weights = experts.weights
    if weights.dtype != experts.hidden.dtype and experts.hidden.dtype is not None:
        weights = build("Cast", weights, to=experts.hidden.dtype)
    if k == 1:
        return build("Mul", outputs, weights)
    each = build("Reshape", outputs, [-1, k, size])
    # a MatMul sums each token in the same order; `ReduceSum` of one token in another order than of several
    return build("Squeeze", build("MatMul", build("Unsqueeze", weights, [1]), each), [1])


def order_of(build: Builder, keys: ir.Value) -> ir.Value:
    """Return the indices that sort integers stably."""
    return build.node("TopK", [keys, build("Shape", keys)], num_outputs=2, largest=0).outputs[1]


def _product(build: Builder, x: ir.Value, experts: ExpertsNode, expert: ir.Value, *, is_up: bool) -> ir.Value:
    """Return `x @ weight + bias` of one expert."""
    weight, bias = (experts.up, experts.up_bias) if is_up else (experts.down, experts.down_bias)
    matrix, *rest = (
        build("Squeeze", build("Gather", of, expert, axis=0), [0]) for of in (weight, bias) if of is not None
    )
    return build("Gemm", x, matrix, *rest, transB=0 if experts.is_transposed else 1)


def _between(build: Builder, gate: ExpertGate, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return the second product's input from the first product's output."""
    if gate.layout == NO_GATE:
        return activated(GateNodes(build, dtype), gate, x)
    if gate.layout == HALVES:
        part, linear = build.split(x, 2, axis=-1)
    else:
        part, linear = (build("Slice", x, [start], [2**31], [-1], [2]) for start in (0, 1))
    return gated(GateNodes(build, dtype), gate, part, linear)


MOST_BYTES = 8 << 30  # maximum size of experts; larger ones stay in the file, memory-mapped by ONNX Runtime
_WEIGHTS = ("up", "up_bias", "down", "down_bias")  # inputs of the operator from the third on


def write_expert_functions(model: ir.Model) -> PassResult[ir.Model]:
    """Write a function for the CPU into a model for its experts in float32, and name it at each operator, in place.

    Before: `y = MoE(x, scores, up, up_bias, down, down_bias)`
    After:  the same, with the function's name in its metadata (see `call_cpu_functions`), and the function
            `y = Experts(x, scores, up.0, ..., up_bias.0, ..., down.0, ..., down_bias.0, ...)`:
            `order = NonZero(scores^T)[1]; parts = Split(x[order], <tokens of each expert>)`
            `h = act(Concat(Gemm(parts[i], up.i[::2])...), Concat(Gemm(parts[i], up.i[1::2])...))`
            `y = Concat(Gemm(Split(h)[i], down.i)...)[<order, inverted>]`

    Layers of the same form share a function. There is none if the experts take more than `MOST_BYTES`, since packed
    matrices are copies in memory.
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
    """Return an operator's weights and biases by name; empty unless they are float32."""
    stacks = {name: stack for name, stack in zip(_WEIGHTS, node.inputs[2:], strict=False) if stack is not None}
    return stacks if all(stack.dtype == ir.DataType.FLOAT for stack in stacks.values()) else {}


def _add_function(model: ir.Model, name: str, gate: ExpertGate, count: int, stacks: Sequence[str]) -> None:
    def body(build: Builder, x: ir.Value, scores: ir.Value, *entries: ir.Value) -> dict[str, ir.Value]:
        weights = {stack: entries[at * count : (at + 1) * count] for at, stack in enumerate(stacks)}
        # tokens sorted stably by expert
        order = build("Gather", build("NonZero", build("Transpose", scores, perm=[1, 0])), 1, axis=0)
        begins, every_second = [build.ints(0), build.ints(1)], [build.ints(limit) for limit in (2**31, 0, 2)]
        counts = build("Cast", build("ReduceSum", scores, begins[0], keepdims=0), to=ir.DataType.INT64)

        def products(rows: ir.Value, of: str, half: int | None = None) -> ir.Value:
            """Return products of each expert's rows, concatenated; `half` selects every second row of its matrix."""
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
