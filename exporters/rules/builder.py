"""A builder of nodes and constants for an ONNX graph, and functions that insert them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir

from gralora_fx.errors import ExportError

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
FUNCTIONS = "gralora"  # the domain of a model's functions
ATTENTION = frozenset({"Attention", "MultiHeadAttention"})  # operators without a cache
PADDING = "gralora.padding"  # key in their metadata: the padding mask that hides keys
SITES = "gralora_sites"  # key in a value's metadata: the outputs of linear layers that it is made of

Operand: TypeAlias = ir.Value | int | Sequence[Any] | None  # of a node; whole numbers become constants


class Builder:
    """Creates nodes to be inserted into a graph later; calling it creates one and returns its first output.

    An input that is a whole number, or a list of them, becomes a constant: `build("Squeeze", value, [0])`.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes: list[ir.Node] = []  # the nodes created so far, in order
        self.graph = graph  # the graph that the nodes are for

    def __call__(self, op_type: str, *inputs: Operand, domain: str = "", **attributes: Any) -> ir.Value:
        """Make a node with one output."""
        return self.node(op_type, inputs, domain=domain, **attributes).outputs[0]

    def node(
        self, op_type: str, inputs: Iterable[Operand], *, domain: str = "", num_outputs: int = 1, **attributes: Any
    ) -> ir.Node:
        """Make a node; trailing inputs that are None are left out."""
        operands = [self._value(operand) for operand in inputs]
        while operands and operands[-1] is None:
            operands.pop()
        version = None if domain == "" else 1
        node = ir.node(
            op_type, operands, attributes=attributes or None, domain=domain, num_outputs=num_outputs, version=version
        )
        self.nodes.append(node)
        return node

    def _value(self, operand: Operand) -> ir.Value | None:
        if isinstance(operand, int):
            return self.scalar(operand)
        return operand if operand is None or isinstance(operand, ir.Value) else self.ints(*operand)

    def split(self, value: ir.Value, count: int, axis: int) -> Sequence[ir.Value]:
        """Split a value into equal parts along an axis."""
        node = self.node("Split", [value], num_outputs=count, axis=axis)
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", count)  # the operator's, not `node`'s own
        return node.outputs

    def ints(self, *values: Any) -> ir.Value:
        """Create a constant vector of integers."""
        return self("Constant", value_ints=[int(value) for value in values])

    def scalar(self, value: int) -> ir.Value:
        """Create a constant integer."""
        return self("Constant", value_int=value)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the size of a value's axis, as a scalar."""
        return self("Squeeze", self("Shape", value, start=axis, end=axis + 1), [0])

    def tensor(self, values: Any, dtype: ir.DataType) -> ir.Value:
        """Create a constant of a dtype."""
        return self("Constant", value=ir.tensor(np.asarray(values).astype(dtype.numpy()), dtype=dtype))

    def take(self) -> list[ir.Node]:
        """Return the created nodes for the caller to insert, and forget them."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def insert_before(self, node: ir.Node) -> None:
        """Insert the created nodes before a node of the graph."""
        self.graph.insert_before(node, self.nodes)
        self.nodes = []

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Replace a node by the created nodes, and its first output by one of their values."""
        replace_value(value, node.outputs[0])
        self.insert_before(node)
        self.graph.remove(node, safe=True)

    def insert_after(self, value: ir.Value) -> None:
        """Insert the created nodes after the producer of a value, or at the beginning if it has none."""
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, self.nodes)
        else:
            self.graph.insert_before(self.graph[0], self.nodes)
        self.nodes = []


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a tensor to a graph under its own name."""
    assert tensor.name is not None
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=kind, const_value=tensor)
    graph.initializers[tensor.name] = value
    return value


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
    """Add an input to a graph, as its last one."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def smallest_number(dtype: ir.DataType) -> float:
    """Return the smallest finite number of a float dtype: added to a score, it hides the key."""
    return float(ml_dtypes.finfo(dtype.numpy()).min)  # type: ignore[no-untyped-call]  # it knows bfloat16


def replace_value(new: ir.Value, old: ir.Value) -> None:
    """Replace all uses of a value, graph outputs included; the new value takes its shape, dtype, name and metadata."""
    new.shape, new.type, new.name = old.shape, old.type, old.name
    new.meta.update(old.meta)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Return the values of a node's attributes, by name."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input of a node; None if it is left out."""
    return node.inputs[index] if len(node.inputs) > index else None


def takes_row_count(node: ir.Node) -> bool:
    """Return whether a node reads the size of a value's first axis, and nothing else of it."""
    limits = attributes_of(node)
    return node.op_type == "Shape" and (limits.get("start", 0), limits.get("end")) == (0, 1)


def const_ints(value: ir.Value | None) -> list[int] | None:
    """Return the integers of a small constant vector, or None for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor.numpy().tolist() if tensor is not None and len(tensor.shape) == 1 and tensor.size < 16 else None


def is_same_dim(one: ir.Value, other: ir.Value, axis: int) -> bool:
    """Return whether two values have the same size at an axis, fixed or symbolic."""
    sizes = [None if value.shape is None else value.shape[axis] for value in (one, other)]
    return sizes[0] == sizes[1] and str(sizes[0]) != "None"


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """Return the size of a value's axis, or None if it is symbolic or unknown."""
    if value is None or value.shape is None:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def fixed_dim(value: ir.Value, axis: int) -> int:
    """Return the size of an axis that must be fixed; raise an `ExportError` if it is not."""
    size = static_dim(value, axis)
    if size is None:
        raise ExportError(
            f"axis {axis} of {value.name} has shape {value.shape}, but its operator needs a fixed size there"
        )
    return size


@dataclass(frozen=True)
class SiteOutput:
    """A part of a value's last axis that is the output of a linear layer."""

    path: str  # the layer's module path
    start: int  # first column in the value
    stop: int  # the column after the last
    # the layer's output features that these columns are, where they are not all of them
    rows: tuple[int, int] | None = None

    def moved(self, offset: int) -> SiteOutput:
        """Return the same part, shifted to the right by an offset."""
        return SiteOutput(self.path, self.start + offset, self.stop + offset, self.rows)


def sites_in(value: ir.Value | None) -> tuple[SiteOutput, ...]:
    """Return the outputs of linear layers that a value contains."""
    marks: tuple[SiteOutput, ...] = () if value is None else value.meta.get(SITES, ())
    return marks


def mark_concat(whole: ir.Value, parts: Sequence[ir.Value]) -> None:
    """Mark a value as the concatenation of others along the last axis."""
    marks: list[SiteOutput] = []
    offset = 0
    for part in parts:
        marks += [mark.moved(offset) for mark in sites_in(part)]
        offset += static_dim(part, -1) or 0
    if marks:
        whole.meta[SITES] = tuple(marks)
