"""Insertion of adapters whose tensors are data of the model: added to the outputs of linear layers, fused or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.errors import ExportError, listed, option
from gralora_fx.exporters.rules.adapters.adapter_groups import (
    Grouping,
    Groups,
    adapter_function,
    batched_adapter_function,
    shapes_of_blocks,
)
from gralora_fx.exporters.rules.adapters.scaled_outputs import ids_of_outputs, without_bias
from gralora_fx.exporters.rules.adapters.site_marks import MARKED, mark_whole_products
from gralora_fx.exporters.rules.branches import choice, replace_readers
from gralora_fx.exporters.rules.builder import (
    FUNCTIONS,
    SITES,
    Builder,
    SiteOutput,
    add_initializer,
    add_input,
    sites_in,
    static_dim,
)
from gralora_fx.exporters.rules.onnx_pipeline import FLOAT_MATRICES
from gralora_fx.exporters.rules.rows.row_tokens import RowsError
from gralora_fx.format.adapter_inputs import DATA, STACKED, AdapterInputs, AdapterSite

_NORMS = ("LayerNormalization", "SkipLayerNormalization")


@contract(needs={FLOAT_MATRICES})
@dataclass(frozen=True)
class InsertAdapters:
    """Add the output of an adapter at every marked site; its tensors become inputs of the model.

    Before: `y = MatMul(x, W)`
    After:  `blocks, general = Adapter(x, A, B, A_general, B_general); y = Sum(MatMul(x, W), blocks, general)`

    Before: `y = MatMul(x, [Wq Wk Wv])`, matmuls packed into one
    After:  `y = Sum(MatMul(x, [Wq Wk Wv]), Concat(blocks of q, k and v), Concat(general of q, k and v))`

    A trained bias is one more term of the sum; so is `(y - bias) * scale` where adapters may scale the layer's output
    (see `scaled_outputs`). `_place` puts the sum where ONNX Runtime still fuses whatever it fuses without adapters.

    Stacked adapters read the input in groups that share an adapter each (see `adapter_groups`). If rows have their own
    lengths, the sum runs only in steps in which a row with an adapter reads tokens: by the whole stack where rows read
    few tokens each, else by a copy of each tile's adapter. Layers that read one input share a branch.

    After:  `y = If(is_any, If(is_short, Sum(MatMul(x, W), stack), Sum(MatMul(x, W), copies)), MatMul(x, W))`
    """

    inputs: AdapterInputs
    quantized: bool = False  # whether the layers' weights are to be quantized (see `_place`)

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Insert them, in place; the result counts the sites' calls."""
        insertion = _Insertion(model, self.inputs, self.quantized)
        if insertion.grouping is not None and insertion.grouping.is_any is not None:
            mark_whole_products(model)
        marked = [value for node in model.graph for value in node.outputs if sites_in(value)]
        for value in marked:
            insertion.add_to(value)
        if insertion.problems:
            layers = [f"{path}: {reason}" for path, reason in insertion.problems.items()]
            raise RowsError(f"no adapter can be chosen by row at {listed(layers, 4)}")
        lost = model.meta.get(MARKED, frozenset()) & insertion.sites.keys() - insertion.reached
        if lost:
            raise ExportError(
                f"the outputs of {listed(sorted(lost))} are not in the graph any more, so no adapter can be data "
                f"there; leave these layers out (exclude_modules), or export with {option(adapters='merged')}"
            )
        return PassResult(insertion.count)


class _Insertion:
    """Insertion into one model."""

    def __init__(self, model: ir.Model, inputs: AdapterInputs, quantized: bool) -> None:
        self.model, self.inputs, self.quantized = model, inputs, quantized
        self.sites = {site.path: site for site in inputs.sites}
        self.tensors: dict[str, ir.Value] = {}
        self.shapes: dict[tuple[int, ...], ir.Value] = {}  # those that blocks take
        self.count = 0
        self.reached: set[str] = set()  # layers with an adapter
        # no branches in half precision: the CPU computes it in float32 and would round values that pass through one
        self.grouping = Grouping(model, inputs.dtype == "float32") if inputs.mode == STACKED else None
        self.problems: dict[str, str] = {}  # the reasons why rows cannot be told apart, by layer

    def add_to(self, value: ir.Value) -> None:
        """Add adapters to a value; a part of it that no adapter has stays as it is."""
        marks = [mark for mark in sites_in(value) if mark.path in self.sites]
        if not marks:
            return
        x, width = _input_of(value), static_dim(value, -1)
        value.meta.pop(SITES)
        value, factors = _place(value, self.quantized)
        spans = list(_spans(marks, width))
        grouping = self.grouping
        if grouping is None or grouping.is_any is None:
            nodes, result = self._adapted(value, x, spans, factors)
        else:
            grouping.count(self._tensors(self.sites[marks[0].path])[0])
            assert grouping.is_short is not None
            build, name = Builder(self.model.graph), f"{value.name}.adapted"
            stack = self._adapted(value, x, spans, factors, by_adapter=True)
            tiles = self._adapted(value, x, spans, factors)
            inner = choice(grouping.is_short, (f"{name}.stack", *stack), (f"{name}.tiles", *tiles), value)
            base = build("Identity", value)
            without = (f"{value.name}.base", build.take(), base)
            outer = choice(grouping.is_any, (name, [inner], inner.outputs[0]), without, value)
            nodes, result = [outer], outer.outputs[0]
        self.count += len(marks)
        self.reached |= {mark.path for mark in marks}
        replace_readers(value, result, nodes)

    def _adapted(
        self,
        value: ir.Value,
        x: ir.Value,
        spans: Sequence[tuple[int, int, SiteOutput | None]],
        factors: Sequence[ir.Node],
        *,
        by_adapter: bool = False,
    ) -> tuple[list[ir.Node], ir.Value]:
        """Return the nodes that add adapters to a value, and the sum; no nodes and the value if that is impossible."""
        build = Builder(self.model.graph)
        marks = [mark for _, _, mark in spans if mark is not None]
        groups = self._groups_of(build, x, by_adapter=by_adapter)
        if isinstance(groups, str):
            self.problems |= {mark.path: groups for mark in marks}
            return [], value

        def added(part: ir.Value, product: ir.Value | None, marks: Sequence[SiteOutput]) -> ir.Value:
            outputs = _scaled(build, self._outputs(build, x, marks, groups), factors)
            if product is not None and self.sites[marks[0].path].has_scale:
                outputs.append(build("Mul", product, self._scale_of(build, x, marks)))
            return build("Sum", part, *outputs)

        is_scaled = any(self.sites[mark.path].has_scale for mark in marks)
        product = without_bias(build, value) if is_scaled else None
        if len(marks) == len(spans) and len({self._tensor_kinds(mark) for mark in marks}) == 1:
            result = added(value, product, marks)
        else:
            sizes = build.ints(*(stop - start for start, stop, _ in spans))
            whole = build.node("Split", [value, sizes], num_outputs=len(spans), axis=-1).outputs
            products: Sequence[ir.Value | None] = whole if product is value else [None] * len(spans)
            if product is not None and product is not value:
                products = build.node("Split", [product, sizes], num_outputs=len(spans), axis=-1).outputs
            triples = zip(whole, products, spans, strict=True)
            parts = [part if mark is None else added(part, own, [mark]) for part, own, (_, _, mark) in triples]
            result = build("Concat", *parts, axis=-1)
        return build.take(), result

    def _scale_of(self, build: Builder, x: ir.Value, marks: Sequence[SiteOutput]) -> ir.Value:
        """Return the factors of the outputs of some layers with one input, to multiply by; less 1."""
        scale = _concat(build, [_rows_of(build, self._tensors(self.sites[mark.path])[-1], mark) for mark in marks])
        return scale if self.grouping is None else build("Gather", scale, ids_of_outputs(self.grouping, x), axis=0)

    def _tensor_kinds(self, mark: SiteOutput) -> tuple[str, bool, bool]:
        site = self.sites[mark.path]
        return site.form, site.has_bias, site.has_scale

    def _groups_of(self, build: Builder, x: ir.Value, *, by_adapter: bool) -> Groups | str | None:
        """Return an input in groups, built in the branch or once for all readers; None if adapters are not stacked."""
        if self.grouping is None:
            return None
        if self.grouping.is_any is None:
            return self.grouping.of(x)
        return self.grouping.within(build, x, by_adapter=by_adapter)

    def _outputs(
        self, build: Builder, x: ir.Value, marks: Sequence[SiteOutput], groups: Groups | None
    ) -> list[ir.Value]:
        """Return the outputs of adapters at sites with one input, concatenated by kind (blocks, general, bias)."""
        by_site = [self._outputs_at(build, x, mark, groups) for mark in marks]
        outputs = [_concat(build, parts) for parts in zip(*by_site, strict=True)]
        return outputs if groups is None else [groups.restored(build, output) for output in outputs]

    def _outputs_at(self, build: Builder, x: ir.Value, mark: SiteOutput, groups: Groups | None) -> Sequence[ir.Value]:
        """Return an adapter's outputs at a site (blocks, LoRA, bias, if present); for grouped rows, their sum alone."""
        site = self.sites[mark.path].without_scale
        tensors = self._tensors(self.sites[mark.path])[: len(site.names(self.inputs.k))]
        outputs: Sequence[ir.Value]
        if groups is not None:
            chosen = [] if groups.ids is None else [groups.ids]
            name = batched_adapter_function(self.model, site, self.inputs.k, chooses=bool(chosen))
            outputs = [build(name, groups.x, *chosen, *tensors, domain=FUNCTIONS)]
        else:
            outputs = self._outputs_of_all(build, x, site, tensors)
        return [_rows_of(build, output, mark) for output in outputs]

    def _outputs_of_all(
        self, build: Builder, x: ir.Value, site: AdapterSite, tensors: Sequence[ir.Value]
    ) -> list[ir.Value]:
        factors, bias = (tensors[:-1], tensors[-1:]) if site.has_bias else (tensors, ())
        if not factors:
            return [*bias]
        assert x.shape is not None
        k, num_axes = site.blocks(self.inputs.k), max(len(x.shape), 2)
        is_vector = k > 0 and len(x.shape) == 1
        name = adapter_function(self.model, k, num_axes)
        shapes = self._shapes(k, num_axes) if k else []
        x = build("Unsqueeze", x, [0]) if is_vector else x
        node = build.node(name, [x, *factors, *shapes], domain=FUNCTIONS, num_outputs=2 if k else 1)
        return [*(build("Squeeze", output, [0]) if is_vector else output for output in node.outputs), *bias]

    def _shapes(self, k: int, num_axes: int) -> list[ir.Value]:
        """Return the shapes of blocks as values of the graph, each created once."""
        for shape in map(tuple, shapes_of_blocks(k, num_axes)):
            if shape not in self.shapes:
                tensor = ir.tensor(np.array(shape), name=f"gralora_shape_{len(self.shapes)}")
                self.shapes[shape] = add_initializer(self.model.graph, tensor)
        return [self.shapes[tuple(shape)] for shape in shapes_of_blocks(k, num_axes)]

    def _tensors(self, site: AdapterSite) -> list[ir.Value]:
        """Return the graph inputs with a site's tensors, created at its first call."""
        ranks = self.inputs.ranks(site)
        shapes = {name: self.inputs.stacked(shape) for name, shape in site.shapes(self.inputs.k, *ranks).items()}
        for name, shape in shapes.items():
            if name not in self.tensors:
                self.tensors[name] = self._input(name, shape)
        return [self.tensors[name] for name in shapes]

    def _input(self, name: str, shape: Sequence[int | str]) -> ir.Value:
        dtype = ir.DataType[{"float32": "FLOAT"}.get(self.inputs.dtype, self.inputs.dtype.upper())]
        value = add_input(self.model.graph, name, dtype, shape)
        if self.inputs.mode == DATA:
            sizes = [0 if isinstance(size, str) else size for size in shape]
            value.const_value = ir.tensor(np.zeros(sizes, dtype.numpy()), dtype=dtype, name=name)
            self.model.graph.initializers[name] = value
        return value


def _place(value: ir.Value, quantized: bool) -> tuple[ir.Value, list[ir.Node]]:
    """Return the value that adapters are added to, and the scalar factors before it, as ONNX Runtime's fusions need it.

    The sum stays clear of the fusions on either side of it:

    - A bias of a matrix, or of a tensor of fixed sizes, is fused with the product (`Gemm`): the sum comes after it.
      With more axes it is fused with the activation or normalization after it: the sum comes before it. A quantized
      product (`MatMulNBits`) takes it too, unless a GELU follows, which takes it then.
    - A scalar factor is fused with the product (`FusedMatMul`): the sum comes after it, and the adapters' outputs are
      multiplied on their own.
    """
    node = value.producer()
    if node is not None and node.op_type == "Add":
        product = next((v for v in node.inputs if v is not None and _is_product(v.producer())), None)
        if quantized:
            goes_on = any(usage.node.op_type == "Gelu" for usage in value.uses())
        else:
            goes_on = len(value.shape or ()) > 2 and not _is_static(value)
        if goes_on and product is not None and len(product.uses()) == 1 and not product.is_graph_output():
            return product, []
    factors: list[ir.Node] = []
    while node is not None and node.op_type in ("MatMul", "Mul", "Div") and not value.is_graph_output():
        readers = [usage.node for usage in value.uses()]
        if len(readers) != 1 or not _is_factor(readers[0], value):
            break
        (node,) = readers
        factors.append(node)
        value = node.outputs[0]
    return value, factors


def _is_product(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in ("MatMul", "Split")


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(size, int) for size in value.shape)


def _is_factor(node: ir.Node, value: ir.Value) -> bool:
    """Return whether a node multiplies a value by a constant number, or divides it by one."""
    if node.domain or node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and node.inputs[0] is not value):
        return False
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    tensor = None if other is None else ir.convenience.get_const_tensor(other)
    return tensor is not None and tensor.size == 1


def _scaled(build: Builder, outputs: Sequence[ir.Value], factors: Sequence[ir.Node]) -> list[ir.Value]:
    """Multiply or divide outputs by the factors of nodes."""
    results = list(outputs)
    for node in factors:
        number = next(v for v in node.inputs if v is not None and ir.convenience.get_const_tensor(v) is not None)
        results = [build(node.op_type, output, number) for output in results]
    return results


def _rows_of(build: Builder, output: ir.Value, mark: SiteOutput) -> ir.Value:
    """Return those columns of a layer's whole output that a mark is of."""
    if mark.rows is None:
        return output
    return build("Slice", output, build.ints(mark.rows[0]), build.ints(mark.rows[1]), [-1])


def _concat(build: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    return parts[0] if len(parts) == 1 else build("Concat", *parts, axis=-1)


def _spans(marks: Sequence[SiteOutput], width: int | None) -> Iterator[tuple[int, int, SiteOutput | None]]:
    """Yield consecutive column ranges of a value: each site's with its mark, and those between sites with None."""
    position = 0
    for mark in sorted(marks, key=lambda mark: mark.start):
        if mark.start > position:
            yield position, mark.start, None
        yield mark.start, mark.stop, mark
        position = mark.stop
    if width is not None and position < width:
        yield position, width, None


def _input_of(value: ir.Value) -> ir.Value:
    """Return the input of the linear layers, or of the layer normalization, that computed a value."""
    node = value.producer()
    if node is not None and node.op_type in _NORMS and node.inputs[0] is not None:
        return node.inputs[0]
    while node is not None and node.op_type in ("Add", "Split"):
        product = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
        node = None if product is None else product.producer()
    if node is None or node.op_type not in ("MatMul", "Gemm") or node.inputs[0] is None:
        raise ExportError(
            f"{sites_in(value)[0].path}: its output is not computed by a matmul in the ONNX graph, so no adapter can "
            f"be data there; leave the layer out (exclude_modules), or export with {option(adapters='merged')}"
        )
    return node.inputs[0]
