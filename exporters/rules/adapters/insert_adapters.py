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
)
from gralora_fx.exporters.rules.adapters.site_marks import MARKED
from gralora_fx.exporters.rules.branches import choice, replace_readers
from gralora_fx.exporters.rules.builder import FUNCTIONS, SITES, Builder, SiteOutput, add_input, sites_in, static_dim
from gralora_fx.exporters.rules.onnx_pipeline import FLOAT_MATRICES
from gralora_fx.exporters.rules.rows.row_tokens import RowsError
from gralora_fx.format.adapter_inputs import DATA, STACKED, AdapterInputs, AdapterSite

_NORMS = ("LayerNormalization", "SkipLayerNormalization")


@contract(needs={FLOAT_MATRICES})
@dataclass(frozen=True)
class InsertAdapters:
    """Add the output of an adapter at every marked site; its tensors become inputs of the model.

    Before: `y = MatMul(x, W)`
    After:  `blocks, general = Adapter(x, A, B, A_general, B_general)`
            `y = Sum(MatMul(x, W), blocks, general)`

    Of matmuls that were packed into one, each part of the output is concatenated first.

    Before: `y = MatMul(x, [Wq Wk Wv])`
    After:  `y = Sum(MatMul(x, [Wq Wk Wv]), Concat(blocks of q, k and v), Concat(general of q, k and v))`

    A bias that trains is one more term of the sum. `_place` says on which side of the layer's own bias, and of a factor
    after it, the sum is: what ONNX Runtime fuses stays what it fuses without adapters.

    Stacked ones get the input in groups that share an adapter each (see `adapter_groups`). Where rows have lengths of
    their own, all of it is in a branch, which is taken in a step in which a row with an adapter reads; in that, one
    branch multiplies by the whole stack, where rows read few tokens each, and one by copies of the adapters of tiles:

    After:  `y = If(is_any, If(is_short, Sum(MatMul(x, W), stack), Sum(MatMul(x, W), copies)), MatMul(x, W))`

    Attributes:
        inputs: The adapter tensors.
        quantized: Whether the layers' weights are to be quantized.
    """

    inputs: AdapterInputs
    quantized: bool = False

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Insert them, in place; the result counts the sites' calls."""
        insertion = _Insertion(model, self.inputs, self.quantized)
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
        self.count = 0
        self.reached: set[str] = set()  # layers with an adapter
        # of half precision no branches: the CPU computes it in float32 and would round what goes through one
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
        """The nodes that add adapters to a value, and what they give; the value itself where that is not possible."""
        build = Builder(self.model.graph)
        marks = [mark for _, _, mark in spans if mark is not None]
        groups = self._groups_of(build, x, by_adapter=by_adapter)
        if isinstance(groups, str):
            self.problems |= {mark.path: groups for mark in marks}
            return [], value

        def added(part: ir.Value, marks: Sequence[SiteOutput]) -> ir.Value:
            return build("Sum", part, *_scaled(build, self._outputs(build, x, marks, groups), factors))

        if len(marks) == len(spans) and len({self._tensor_kinds(mark) for mark in marks}) == 1:
            result = added(value, marks)
        else:
            sizes = build.ints(*(stop - start for start, stop, _ in spans))
            split = build.node("Split", [value, sizes], num_outputs=len(spans), axis=-1)
            pairs = zip(split.outputs, spans, strict=True)
            parts = [part if mark is None else added(part, [mark]) for part, (_, _, mark) in pairs]
            result = build("Concat", *parts, axis=-1)
        return build.take(), result

    def _tensor_kinds(self, mark: SiteOutput) -> tuple[str, bool]:
        site = self.sites[mark.path]
        return site.form, site.has_bias

    def _groups_of(self, build: Builder, x: ir.Value, *, by_adapter: bool) -> Groups | str | None:
        """An input in groups: within a branch, or made once for all that read it; None where it has none."""
        if self.grouping is None:
            return None
        if self.grouping.is_any is None:
            return self.grouping.of(x)
        return self.grouping.within(build, x, by_adapter=by_adapter)

    def _outputs(
        self, build: Builder, x: ir.Value, marks: Sequence[SiteOutput], groups: Groups | None
    ) -> list[ir.Value]:
        """The adapters' outputs at sites with one input, one after the other, each kind by itself."""
        by_site = [self._outputs_at(build, x, mark, groups) for mark in marks]
        outputs = [_concat(build, parts) for parts in zip(*by_site, strict=True)]
        return outputs if groups is None else [groups.restored(build, output) for output in outputs]

    def _outputs_at(self, build: Builder, x: ir.Value, mark: SiteOutput, groups: Groups | None) -> Sequence[ir.Value]:
        """The adapter's outputs at a site: of blocks, of LoRA, and its bias, those it has; of groups, the sum."""
        site = self.sites[mark.path]
        tensors = self._tensors(site)
        outputs: Sequence[ir.Value]
        if groups is not None:
            chosen = [] if groups.ids is None else [groups.ids]
            name = batched_adapter_function(self.model, site, self.inputs.k, chooses=bool(chosen))
            outputs = [build(name, groups.x, *chosen, *tensors, domain=FUNCTIONS)]
        else:
            outputs = self._outputs_of_all(build, x, site, tensors)
        if mark.rows is None:
            return outputs
        start, stop = build.ints(mark.rows[0]), build.ints(mark.rows[1])
        return [build("Slice", output, start, stop, [-1]) for output in outputs]

    def _outputs_of_all(
        self, build: Builder, x: ir.Value, site: AdapterSite, tensors: Sequence[ir.Value]
    ) -> list[ir.Value]:
        factors, bias = (tensors[:-1], tensors[-1:]) if site.has_bias else (tensors, ())
        if not factors:
            return [*bias]
        assert x.shape is not None
        k = site.blocks(self.inputs.k)
        name = adapter_function(self.model, k, len(x.shape))
        node = build.node(name, [x, *factors], domain=FUNCTIONS, num_outputs=2 if k else 1)
        return [*node.outputs, *bias]

    def _tensors(self, site: AdapterSite) -> list[ir.Value]:
        """The inputs that are a site's tensors; made for its first call."""
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
    """Return where adapters are added so that ONNX Runtime fuses what is around a layer as it does without them.

    What it fuses with the product has to stay on the product's side of the sum, the rest on the other:

    - A bias goes with the product (`Gemm`) where a matrix is multiplied, or a tensor of fixed sizes: the sum comes
      after it. With more axes it goes with what follows, an activation or a normalization: the sum comes before it.
      With a quantized product it goes (`MatMulNBits`), unless a GELU follows, which has it then.
    - A scalar factor goes with the product (`FusedMatMul`): the sum comes after it, and the adapters' outputs are
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
    """The outputs with the factors of nodes."""
    results = list(outputs)
    for node in factors:
        number = next(v for v in node.inputs if v is not None and ir.convenience.get_const_tensor(v) is not None)
        results = [build(node.op_type, output, number) for output in results]
    return results


def _concat(build: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    return parts[0] if len(parts) == 1 else build("Concat", *parts, axis=-1)


def _spans(marks: Sequence[SiteOutput], width: int | None) -> Iterator[tuple[int, int, SiteOutput | None]]:
    """The columns of a value one after the other: those of each site, and those of none between them."""
    position = 0
    for mark in sorted(marks, key=lambda mark: mark.start):
        if mark.start > position:
            yield position, mark.start, None
        yield mark.start, mark.stop, mark
        position = mark.stop
    if width is not None and position < width:
        yield position, width, None


def _input_of(value: ir.Value) -> ir.Value:
    """The input of the linear layers, or of the layer normalization, that a value is the output of."""
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
