"""Token tensors as matrices of one row a token, without the rows of padding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult, Skip, contract
from gralora_fx.exporters.rules.builder import ATTENTION, PADDING, Builder, const_ints
from gralora_fx.exporters.rules.onnx_pipeline import FUSED_ATTENTION
from gralora_fx.exporters.rules.rows.token_regions import ALONG_FEATURES, NORMS, TokenRegion, token_regions


@dataclass
class FlatTokens:
    """Token tensors flattened to matrices by `FlattenTokens`, as later passes find them in a model's metadata."""

    META: ClassVar[str] = "gralora_flat_tokens"  # key in a model's metadata, of these by the name of the matrices' axis

    is_batch: bool  # whether their rows are those of the model's inputs
    tokens: ir.Value | None  # `[tokens]`, the index of each among all positions; None where none was left out
    row_at: ir.Value | None  # `[batch, length]`, the row of the matrix at each position; None where none was left out
    sizes: ir.Value  # `[2]`, batch and length


def copied(model: ir.Model) -> ir.Model:
    """Copy a model, sharing its tensors and including the metadata that passes have recorded by value."""
    copy = model.clone()
    copy.meta.update(model.meta)
    flat: dict[str, FlatTokens] = model.meta.get(FlatTokens.META, {})
    if flat:
        values = {value.name: value for node in copy.graph for value in node.outputs}
        values |= {value.name: value for value in (*copy.graph.inputs, *copy.graph.initializers.values())}

        def of_copy(value: ir.Value) -> ir.Value:
            return values.get(value.name, value)  # values that passes have removed since are in neither graph

        copy.meta[FlatTokens.META] = {
            axis: dataclasses.replace(
                noted,
                tokens=None if noted.tokens is None else of_copy(noted.tokens),
                row_at=None if noted.row_at is None else of_copy(noted.row_at),
                sizes=of_copy(noted.sizes),
            )
            for axis, noted in flat.items()
        }
    return copy


@contract(needs={FUSED_ATTENTION})
@dataclass(frozen=True)
class FlattenTokens:
    """Run the nodes between attention on matrices `[tokens, features]`, without padding.

    Before: `y = Attention(x @ Wq, x @ Wk, x @ Wv, bias); z = LayerNormalization(Add(y @ Wo, x))`
    After:  `t = Gather(Reshape(x), tokens); y = Attention(back(t @ Wq), back(t @ Wk), back(t @ Wv), bias)`
            `z = back(LayerNormalization(Add(Gather(Reshape(y), tokens) @ Wo, t)))`

    `tokens` are all positions that the padding mask keeps, and the first of each row, which classifiers read; `back`
    scatters rows to their positions. Outputs are zero at padding.

    Matrices help even without padding: ONNX Runtime fuses an addition and the normalization of a tensor of three axes
    to `SkipLayerNormalization`, whose kernel takes five times as long on a CPU.
    """

    removes_padding: bool = True  # whether to leave padding out

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Change every region of token tensors, in place; regions whose padding stays are reported as skipped."""
        changed, skipped = 0, []
        batch = _first_axis(model.graph)
        flat: dict[str, FlatTokens] = model.meta.setdefault(FlatTokens.META, {})
        for region in token_regions(model.graph):
            if not any(node.op_type == "MatMul" for node in region.nodes):
                continue
            padding = _padding(region) if self.removes_padding else None
            if isinstance(padding, str):
                skipped.append(Skip(f"padding of {region.dims[1]}", padding))
                padding = None
            flattening = _Flattening(model.graph, region, padding)
            changed += flattening.run()
            if flattening.sizes is not None:
                flat[str(flattening.num_rows.value)] = FlatTokens(
                    region.dims[0] == batch, flattening.tokens, flattening.row_at, flattening.sizes
                )
        return PassResult(changed, tuple(skipped))


def _first_axis(graph: ir.Graph) -> str | None:
    """Return the name or size of the batch axis: the first axis of the first input."""
    shape = next((value.shape for value in graph.inputs if value.shape), None)
    return None if shape is None else str(shape[0] if isinstance(shape[0], int) else shape[0].value)


def _padding(region: TokenRegion) -> ir.Value | str | None:
    """Return the padding mask by which tokens can be left out; None if there is none, or why they cannot be."""
    inside = {*region.nodes, *region.attention}
    masks: set[ir.Value | None] = set()
    for node in region.attention:
        keys = node.inputs[1]
        if keys is not None and (keys in region.values or keys.producer() in inside):
            masks.add(node.meta.get(PADDING))
    if masks <= {None}:
        return None
    if len(masks) > 1:
        return "its layers mask padding in different ways"
    (padding,) = masks
    assert padding is not None
    for value in region.values:
        for usage in value.uses():
            if usage.node not in inside and not _ignores_padding(usage.node, value, padding):
                return f"{usage.node.op_type} reads all positions of {value.name}"
    return padding


def _ignores_padding(node: ir.Node, value: ir.Value, padding: ir.Value) -> bool:
    """Return whether a node's result does not depend on tokens of padding, or is a token tensor again."""
    if _is_first(node) and node.inputs[0] is value:
        return True
    if node.op_type in ATTENTION:  # as keys and values of another sequence's queries
        return node.meta.get(PADDING) is padding
    if node.op_type == "Squeeze" and node.outputs[0].is_graph_output() and not node.outputs[0].uses():
        axes = const_ints(node.inputs[1]) if len(node.inputs) > 1 else None
        return axes in ([-1], [2])  # one number a token
    return any(_is_zero_at_padding(other, padding) for other in (value, *node.outputs))


def _is_zero_at_padding(value: ir.Value, padding: ir.Value) -> bool:
    """Return whether a value is a padding mask, or the product of something with one."""
    node = value.producer()
    is_product = node is not None and node.op_type == "Mul"
    return _is_made_of(value, padding) or (
        node is not None and is_product and any(_is_made_of(factor, padding) for factor in node.inputs)
    )


def _is_made_of(value: ir.Value | None, padding: ir.Value) -> bool:
    """Return whether a value is a padding mask with other axes or another dtype."""
    while value is not None and value is not padding:
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "Expand", "Reshape", "Unsqueeze"):
            return False
        value = node.inputs[0]
    return value is padding


class _Flattening:
    """The rewriting of one region."""

    def __init__(self, graph: ir.Graph, region: TokenRegion, padding: ir.Value | None) -> None:
        self.graph = graph
        self.region = region
        self.padding = padding
        self.build = Builder(graph)
        self.entries: dict[ir.Value, ir.Value] = {}  # the matrices of token tensors that the region reads
        self.matrices: set[ir.Value] = set()  # outputs of its nodes now
        self.restored: dict[tuple[ir.Value, bool], ir.Value] = {}  # token tensors, and whether padding is zero in them
        self.kept: ir.Value | None = None  # [batch, length, 1], false for padding
        self.tokens: ir.Value | None = None  # [tokens], their positions
        self.row_at: ir.Value | None = None  # [batch, length], the row of the token at each position
        self.sizes: ir.Value | None = None  # [2], batch and length
        self.num_rows = ir.SymbolicDim(f"tokens of {' x '.join(region.dims)}")

    def run(self) -> int:
        """Rewrite the region; return the number of nodes that now compute on matrices."""
        inside = set(self.region.nodes)
        for node in list(self.graph):
            if node in inside:
                self._flatten(node)
            elif self.padding is not None and _is_first(node) and node.inputs[0] in self.matrices:
                self._take_first(node)
            else:
                self._read_restored(node)
        for index, value in enumerate(self.graph.outputs):
            if value in self.matrices:
                tokens = self._back(value, is_zero=True)
                self.graph.extend(self.build.take())
                self.graph.outputs[index] = tokens
        return len(inside)

    def _flatten(self, node: ir.Node) -> None:
        """Let a node that computes token by token read and return matrices."""
        for index, value in enumerate(node.inputs):
            is_tokens = value is not None and value.shape is not None and len(value.shape) == 3
            if value is not None and is_tokens:
                node.replace_input_with(index, self._matrix(value, node))
        if node.op_type == "Slice":
            node.replace_input_with(3, self.build.ints(-1))
            self.build.insert_before(node)
        elif node.op_type in NORMS | ALONG_FEATURES:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        for output in node.outputs:
            if output.shape is None:
                continue  # statistics of a normalisation, which nothing reads
            output.shape = ir.Shape([self.num_rows, output.shape[2]])
            self.matrices.add(output)

    def _matrix(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """Return the matrix of a token tensor that the region reads, created before its first reader."""
        if value not in self.entries:
            assert value.shape is not None
            self._prepare(value)
            flat = self.build("Reshape", value, [-1, value.shape[2]])
            matrix = flat if self.tokens is None else self.build("Gather", flat, self.tokens, axis=0)
            matrix.type, matrix.shape = value.type, ir.Shape([self.num_rows, value.shape[2]])
            self.entries[value] = matrix
            self.build.insert_before(node)
        return self.entries[value]

    def _prepare(self, entry: ir.Value) -> None:
        """Compute the tokens and their positions, once, from the padding mask or the first token tensor."""
        if self.sizes is not None:
            return
        build = self.build
        self.sizes = build("Shape", entry if self.padding is None else self.padding, start=0, end=2)
        if self.padding is None:
            return
        length = build.size(self.padding, 1)
        position = build("Range", 0, length, 1)
        shown = build("Cast", self.padding, to=ir.DataType.BOOL)
        kept = build("Or", shown, build("Equal", position, 0))
        flat = build("Reshape", kept, [-1])
        self.tokens = build("Reshape", build("NonZero", flat), [-1])
        count = build("CumSum", build("Cast", flat, to=ir.DataType.INT64), 0)
        self.row_at = build("Reshape", build("Sub", count, 1), self.sizes)
        self.kept = build("Unsqueeze", kept, [2])

    def _read_restored(self, node: ir.Node) -> None:
        """Redirect a node outside the region to token tensors restored from matrices."""
        is_zero = node.op_type not in ATTENTION  # which hides padding
        for index, value in enumerate(node.inputs):
            if value is None or value not in self.matrices:
                continue
            if (value, is_zero) not in self.restored:
                self.restored[value, is_zero] = self._back(value, is_zero=is_zero)
                self.build.insert_before(node)
            node.replace_input_with(index, self.restored[value, is_zero])

    def _back(self, matrix: ir.Value, *, is_zero: bool) -> ir.Value:
        """Restore a token tensor from its matrix; positions of padding are zero, or repeat the token before them."""
        assert matrix.shape is not None
        build, width = self.build, matrix.shape[1]
        if self.row_at is not None:
            tokens = build("Gather", matrix, self.row_at, axis=0)
        else:
            tokens = build("Reshape", matrix, self._shape(width))
        if is_zero and self.kept is not None:
            tokens = build("Where", self.kept, tokens, build.tensor(0, matrix.dtype or ir.DataType.FLOAT))
        sizes = [int(size) if size.isdigit() else ir.SymbolicDim(size) for size in self.region.dims]
        tokens.type, tokens.shape = matrix.type, ir.Shape([*sizes, width])
        return tokens

    def _shape(self, width: int | ir.SymbolicDim) -> ir.Value:
        """Return the shape of a token tensor, a constant if batch or length is fixed."""
        sizes = [int(size) if size.isdigit() else -1 for size in self.region.dims]
        if min(sizes) < 0 < max(sizes) or min(sizes) > 0:
            return self.build.ints(*sizes, width)
        return self.build("Concat", self.sizes, [width], axis=0)

    def _take_first(self, node: ir.Node) -> None:
        """Let a node that takes the first token of each row take its row of the matrix.

        Before: `y = Gather(x, 0, axis=1)`
        After:  `y = Gather(matrix, Gather(row_at, 0, axis=1), axis=0)`
        """
        rows = self.build("Gather", self.row_at, node.inputs[1], axis=1)
        node.replace_input_with(1, rows)
        node.attributes["axis"] = ir.AttrInt64("axis", 0)
        self.build.insert_before(node)


def _is_first(node: ir.Node) -> bool:
    """Return whether a node takes the first position of a token tensor."""
    if node.op_type != "Gather" or node.attributes["axis"].as_int() != 1:
        return False
    index = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
    return index is not None and not index.numpy().any()
