"""Products with a constant matrix: how they are recognised and replaced, and why others are left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.core.graph.pipeline import Skip
from gralora_fx.exporters.rules.builder import attributes_of, replace_value
from gralora_fx.exporters.translation.weights import parts_of

_COLUMNS = 4096  # in a group
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_KEPT = {  # operators that multiply by weights or by activations, and keep their precision
    "Attention": "attention multiplies activations by activations",
    "MultiHeadAttention": "attention multiplies activations by activations",
    "GroupQueryAttention": "attention multiplies activations by activations",
    "Conv": "a convolution is not a product with a matrix",
    "ConvTranspose": "a convolution is not a product with a matrix",
    "Einsum": "an Einsum is not a product with a matrix",
    "LSTM": "a recurrent layer is not a product with a matrix",
    "GRU": "a recurrent layer is not a product with a matrix",
    "RNN": "a recurrent layer is not a product with a matrix",
}


class ConstantMatrix(NamedTuple):
    """The constant matrix by which a node multiplies."""

    value: ir.Value  # the initializer
    is_transposed: bool  # whether it is stored `[N, K]` instead of `[K, N]`

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The values, as they are stored."""
        tensor = self.value.const_value
        assert tensor is not None
        return tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """K and N."""
        rows, columns = (int(size) for size in self.tensor.shape.numpy())
        return (columns, rows) if self.is_transposed else (rows, columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that it holds side by side."""
        return tuple(str(part.name) for part in parts_of(self.tensor))

    def free_name(self, graph: ir.Graph, suffix: str) -> str:
        """Return the prefix for names of its quantized parts; another one if its transpose has taken the plain name."""
        is_taken = f"{self.value.name}{suffix}" in graph.initializers
        return f"{self.value.name}_transposed" if is_taken else str(self.value.name)

    def column_groups(self) -> Iterator[NDArray[Any]]:
        """Yield groups of columns of the matrix `[K, N]`, in order, since a copy of it all would be large."""
        for part in (self.tensor,) if self.is_transposed else parts_of(self.tensor):
            values = part.numpy().T if self.is_transposed else part.numpy()
            for start in range(0, values.shape[1], _COLUMNS):
                yield values[:, start : start + _COLUMNS]


def matrix_of(node: ir.Node) -> ConstantMatrix | None:
    """Return the constant matrix by which a node multiplies; None for other nodes."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx") or node.inputs[1] is None:
        return None
    value, is_transposed = node.inputs[1], False
    if node.op_type == "Gemm":
        if _is_scaled(node):
            return None
        attribute = node.attributes.get("transB")
        is_transposed = attribute is not None and bool(attribute.value)
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        value, is_transposed = producer.inputs[0], not is_transposed
    tensor = value.const_value
    if not value.is_initializer() or tensor is None or len(tensor.shape) != 2 or tensor.dtype not in _FLOATS:
        return None
    return ConstantMatrix(value, is_transposed)


def replace_product(node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Replace a `MatMul` or `Gemm` by nodes; the last one's output takes the name of the old product.

    Before: `y = Gemm(x, w, b)`
    After:  `...; y = Add(<output of the last of the nodes>, b)`; without a bias, `y` is the last of the nodes' output
    """
    graph = node.graph  # the model's, or a branch
    assert isinstance(graph, ir.Graph)
    nodes = list(nodes)
    old = node.outputs[0]
    nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = old.type, old.shape
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        product = nodes[-1].outputs[0]
        product.name = product.name or f"{old.name}_product"  # another branch may generate the same name
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias]))
    replace_value(nodes[-1].outputs[0], old)
    graph.insert_before(node, nodes)
    operand = node.inputs[1]
    assert operand is not None
    graph.remove(node, safe=True)
    producer = operand.producer()
    if producer is not None and not operand.uses():
        graph.remove(producer, safe=True)


def drop_unread(graph: ir.Graph, names: Iterable[str]) -> None:
    """Remove those initializers of a graph that nothing reads."""
    for name in names:
        value = graph.initializers.get(name)
        if value is not None and not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def unquantized(model: ir.Model) -> tuple[Skip, ...]:
    """Return the weights and products that stay float in a quantized model, each with the reason."""
    skips = dict(skip for node in model.graph.all_nodes() for skip in _skips(node))
    return tuple(Skip(place, reason) for place, reason in skips.items())


def _skips(node: ir.Node) -> Iterator[tuple[str, str]]:
    from gralora_fx.exporters.rules.products.quantized_products import MARK

    place = node.name or str(node.outputs[0].name)
    if MARK in node.metadata_props:
        return
    if node.op_type in ("MatMul", "Gemm"):
        yield place, _why_not(node)
    elif node.op_type == "Gather":
        table = node.inputs[0]
        if table is not None and table.is_initializer() and table.dtype in _FLOATS and len(table.shape or ()) == 2:
            yield str(table.name), "an embedding is looked up, not multiplied by"
    elif node.op_type in _KEPT:
        yield place, _KEPT[node.op_type]


def _why_not(node: ir.Node) -> str:
    first, second = (value if value is None else _constant(value) for value in node.inputs[:2])
    if second is None:
        return "its constant operand is the first" if first is not None else "a product of two activations"
    if len(second.shape) != 2:
        return f"its constant operand has {len(second.shape)} axes, a matrix has two"
    if second.dtype not in _FLOATS:
        return f"its constant operand is {second.dtype.name.lower()}"
    return "a Gemm with transA, alpha or beta" if node.op_type == "Gemm" else "its weight is left as it is"


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the constant behind a value, directly or through a transpose."""
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value
    return None if source is None else ir.convenience.get_const_tensor(source)


def _is_scaled(node: ir.Node) -> bool:
    """Return whether a `Gemm` does more than multiply and add."""
    numbers = attributes_of(node)
    return bool(numbers.get("transA")) or numbers.get("alpha", 1.0) != 1.0 or numbers.get("beta", 1.0) != 1.0


@dataclass
class ComputedTogether:
    """Arrays that are computed together and dropped once written; threads may write them at once."""

    compute: Callable[[], Iterable[NDArray[Any]]]  # computes them
    _arrays: dict[int, NDArray[Any]] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def tensor(self, index: int) -> ir.TensorProtocol:
        """Return one array by its index, as a lazy tensor."""
        with self._lock:
            if index not in self._arrays:
                self._arrays = dict(enumerate(self.compute()))
            return ir.tensor(self._arrays.pop(index))
