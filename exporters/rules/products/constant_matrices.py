"""Products with a constant matrix: which nodes are some, what takes their place, and vectors as wide as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.core.graph.pipeline import PassResult, Skip, contract
from gralora_fx.exporters.rules.attention.pack_qkv import concat_initializers
from gralora_fx.exporters.rules.builder import Builder, attributes_of, const_ints, replace_value, static_dim
from gralora_fx.exporters.rules.onnx_pipeline import FLOAT_MATRICES, FOLDED_TRANSPOSES, OWN_WEIGHTS
from gralora_fx.exporters.translation.weights import parts_of, transposed_tensor

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
    """The constant matrix by which a node multiplies.

    Attributes:
        value: The initializer.
        is_transposed: Whether it is stored `[N, K]` instead of `[K, N]`.
    """

    value: ir.Value
    is_transposed: bool

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
        """What names of its quantized parts begin with: its own, unless the same matrix the other way round has it."""
        is_taken = f"{self.value.name}{suffix}" in graph.initializers
        return f"{self.value.name}_transposed" if is_taken else str(self.value.name)

    def column_groups(self) -> Iterator[NDArray[Any]]:
        """The matrix `[K, N]` as groups of columns, one after the other; of a concatenated one, part by part.

        A copy of the whole matrix would be the largest thing in memory.
        """
        for part in (self.tensor,) if self.is_transposed else parts_of(self.tensor):
            values = part.numpy().T if self.is_transposed else part.numpy()
            for start in range(0, values.shape[1], _COLUMNS):
                yield values[:, start : start + _COLUMNS]


def matrix_of(node: ir.Node) -> ConstantMatrix | None:
    """The constant matrix by which a node multiplies; None for other nodes."""
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
    """Put nodes in the place of a `MatMul` or `Gemm`; the last one's output takes the name of the old product.

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
        product.name = product.name or f"{old.name}_product"  # names that branches draw may be those of another
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
    """Weights and products that a quantized model holds in its own precision, each with the reason."""
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
    """The constant that a value is, or is the transpose of."""
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value
    return None if source is None else ir.convenience.get_const_tensor(source)


def _is_scaled(node: ir.Node) -> bool:
    """Return whether a `Gemm` does more than to multiply and add."""
    numbers = attributes_of(node)
    return bool(numbers.get("transA")) or numbers.get("alpha", 1.0) != 1.0 or numbers.get("beta", 1.0) != 1.0


@contract(needs={FLOAT_MATRICES}, leaves={FOLDED_TRANSPOSES})
def fold_transposes(model: ir.Model) -> PassResult[ir.Model]:
    """Fold the transposes of weights that are only read transposed into their initializers.

    Before: `y = MatMul(x, Transpose(w))`
    After:  `y = MatMul(x, w)`, with `w` stored `[in, out]`

    A weight with other readers, such as a tied embedding, stays as it is, so that it is stored once.
    """
    count = 0
    for value in list(model.graph.initializers.values()):
        users = [usage.node for usage in value.uses()]
        tensor = value.const_value
        is_matrix = tensor is not None and len(tensor.shape) == 2
        if not is_matrix or len(users) != 1 or not _transposes(users[0]) or value.is_graph_output():
            continue
        (node,) = users
        assert tensor is not None
        value.const_value = transposed_tensor(value.name, tensor)
        value.shape = value.const_value.shape
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        model.graph.remove(node, safe=True)
        count += 1
    return PassResult(count)


def _transposes(node: ir.Node) -> bool:
    """Return whether a node swaps the two axes of a matrix."""
    order = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return node.op_type == "Transpose" and (order is None or list(order.as_ints()) == [1, 0])


@contract(needs={FLOAT_MATRICES, FOLDED_TRANSPOSES}, ends={OWN_WEIGHTS})
def merge_matmuls(model: ir.Model) -> PassResult[ir.Model]:
    """Merge matmuls of one tensor with weights of equal width into one over their concatenation.

    Before: `gate = MatMul(x, Wg); up = MatMul(x, Wu)`
    After:  `gate, up = Split(MatMul(x, [Wg Wu]))`
    """
    groups: dict[tuple[ir.Value, int, ir.DataType | None], list[ir.Node]] = {}
    for node in model.graph:
        x, weight = (*node.inputs, None, None)[:2]
        if node.op_type != "MatMul" or node.domain or x is None or weight is None or not weight.is_initializer():
            continue
        width = static_dim(weight, -1)
        if width is not None and weight.shape is not None and len(weight.shape) == 2 and len(weight.uses()) == 1:
            groups.setdefault((x, width, weight.dtype), []).append(node)
    joint = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in joint:
        _join(model.graph, nodes)
    return PassResult(sum(len(nodes) - 1 for nodes in joint))


def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    build = Builder(graph)
    weights = [node.inputs[1] for node in nodes]
    product = build("MatMul", nodes[0].inputs[0], concat_initializers(graph, [w for w in weights if w is not None]))
    for part, node in zip(build.split(product, len(nodes), axis=-1), nodes, strict=True):
        replace_value(part, node.outputs[0])
    build.insert_before(nodes[0])
    graph.remove(nodes, safe=True)


VECTOR = 4  # values: the width of Eigen's vectors in the builds of ONNX Runtime
OPERATORS = {"Cos", "Sin", "Log", "Softplus", "Mish"}  # whose last digits depend on a value's place in a vector or none
SUMS = {"ReduceSum", "ReduceMean"}  # of rows, whose last digits depend on the place where a row begins


def fill_vectors(model: ir.Model) -> PassResult[ir.Model]:
    """Pad the last axis of what Eigen computes, so that a row's bits do not depend on the rows beside it.

    Before: `y = Cos(x)`, `z = ReduceSum(x, axes=[-1])`, `x [..., 6]`
    After:  `y = Cos(Pad(x))[..., :6]`, `z = ReduceSum(Pad(x), axes=[-1])`, `Pad(x) [..., 8]`

    The values after a tensor's last whole vector are computed one by one, by a function with other last digits. A row
    is added one by one up to the first address of a whole vector, then vector by vector: in another order than a row
    that begins there, such as the weights of six routes of a token. Where a row is a multiple of a vector, there are
    none of either.
    """
    count = 0
    padded: dict[tuple[ir.Graph | ir.Function, ir.Value], ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        width = None if node.domain else _width(node) if node.op_type in OPERATORS else _summed_width(node)
        if width is None or width % VECTOR == 0:
            continue
        graph, x = node.graph, node.inputs[0]
        assert isinstance(graph, ir.Graph)
        assert x is not None
        build = Builder(graph)
        if (graph, x) not in padded:
            padded[graph, x] = build("Pad", x, build.ints(0, -width % VECTOR), None, build.ints(-1))
        whole = build(node.op_type, padded[graph, x], *node.inputs[1:], **attributes_of(node))
        if node.op_type in OPERATORS:
            whole = build("Slice", whole, build.ints(0), build.ints(width), build.ints(-1))
        elif node.op_type == "ReduceMean":
            assert x.dtype is not None
            whole = build("Mul", whole, build.tensor((width + -width % VECTOR) / width, x.dtype))
        build.replace(node, whole)
        count += 1
    return PassResult(count)


def _width(node: ir.Node) -> int | None:
    """The size of the last axis of what an operator of one input takes and gives, if it is known."""
    ends = [value for value in (*node.inputs, *node.outputs) if value is not None and value.shape]
    return next((size for value in ends if (size := static_dim(value, -1)) is not None), None)


def _summed_width(node: ir.Node) -> int | None:
    """The size of the rows that a reduction adds, if it is known; None of two values, which have one order."""
    x, axes = node.inputs[0] if node.inputs else None, const_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type not in SUMS or x is None or x.shape is None or x.dtype is None or not x.dtype.is_floating_point():
        return None
    width = static_dim(x, -1) if axes in ([-1], [len(x.shape) - 1]) else None
    return width if width is not None and width > 2 else None
