"""Marks on the outputs of linear layers, which stay on them while other passes pack, split and rename values."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from gralora_fx.core.graph.module_tree import recorded_path
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.exporters.rules.builder import SITES, SiteOutput, const_ints, sites_in, static_dim
from gralora_fx.exporters.rules.onnx_pipeline import OWN_WEIGHTS

MARKED = "gralora_marked"  # key of the paths of all layers with marks, in a model's
_SCOPES = "pkg.torch.onnx.name_scopes"
_END = 2**31  # a limit at or beyond it is the end of an axis


@dataclass(frozen=True)
class MarkedSites:
    """Paths of the layers whose outputs were found in a model."""

    paths: frozenset[str]


@contract(needs={OWN_WEIGHTS})
@dataclass(frozen=True)
class MarkSites:
    """Mark the outputs of linear layers, bias included, so that adapters can be inserted once all is fused."""

    # by the name of a weight's initializer: the layer that multiplies by it in a module, by the module's path; None for
    # one without adapters
    weights: Mapping[str, Mapping[str, str | None]]
    # layer normalizations whose outputs are marked too, by the bias's name
    norm_biases: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Mark them in a translated model whose weights still have their own names; the summary is `MarkedSites`."""
        paths_marked: set[str] = set()
        count = 0
        for name, layers in self.weights.items():
            weight = model.graph.initializers.get(name)
            for product, rows in () if weight is None else _products(weight, None):
                path = _owner(product, layers)
                output = _with_bias(product.outputs[0])
                width = static_dim(output, -1)
                if path is None or width is None:
                    continue
                output.meta[SITES] = (SiteOutput(path, 0, width, rows),)
                paths_marked.add(path)
                count += 1
        for name, path in self.norm_biases.items():
            for output in _norms(model.graph.initializers.get(name)):
                output.meta[SITES] = (SiteOutput(path, 0, static_dim(output, -1) or 0),)
                paths_marked.add(path)
                count += 1
        model.meta[MARKED] = frozenset(paths_marked)
        return PassResult(count, summary=MarkedSites(frozenset(paths_marked)))


def mark_whole_products(model: ir.Model) -> None:
    """Move the marks of layers from the parts of a product to the product, if all of it has marks."""
    for node in model.graph:
        product = node.inputs[0] if node.op_type == "Split" and node.inputs else None
        if product is None or not _multiplies(product.producer()) or sites_in(product) or len(product.uses()) > 1:
            continue
        marks, start = list[SiteOutput](), 0
        for part in node.outputs:
            width, own = static_dim(part, -1), sites_in(part)
            if width is None or [(mark.start, mark.stop) for mark in own] != [(0, width)]:
                break
            marks.append(own[0].moved(start))
            start += width
        else:
            like = node.outputs[0]
            assert like.shape is not None
            product.shape, product.type = ir.Shape([*like.shape[:-1], start]), like.type
            product.meta[SITES] = tuple(marks)
            for part in node.outputs:
                part.meta.pop(SITES)


def _multiplies(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "MatMul"


def _norms(bias: ir.Value | None) -> Iterator[ir.Value]:
    """Yield the outputs of the layer normalizations that add a bias, or its cast."""
    for usage in () if bias is None else list(bias.uses()):
        if usage.node.op_type == "LayerNormalization" and usage.idx == 2:
            yield usage.node.outputs[0]
        elif usage.node.op_type in ("Identity", "Cast"):
            yield from _norms(usage.node.outputs[0])


def _products(weight: ir.Value, rows: tuple[int, int] | None) -> Iterator[tuple[ir.Node, tuple[int, int] | None]]:
    """Yield the nodes that multiply by a weight, its transpose or some of its rows, with those rows."""
    for usage in list(weight.uses()):
        node = usage.node
        if node.op_type in ("MatMul", "Gemm") and usage.idx == 1:
            yield node, rows
        elif node.op_type in ("Transpose", "Identity", "Cast"):
            yield from _products(node.outputs[0], rows)
        elif node.op_type == "Slice" and usage.idx == 0 and rows is None and (limits := _limits(node)) is not None:
            yield from _products(node.outputs[0], limits)


def _limits(node: ir.Node) -> tuple[int, int] | None:
    """Return the rows that a slice of a matrix takes, or None for a slice of something else."""
    starts, stops, axes, *steps = (const_ints(value) for value in node.inputs[1:])
    count = static_dim(node.inputs[0], 0)
    if starts is None or stops is None or axes != [0] or steps not in ([], [[1]]) or count is None:
        return None
    return starts[0], min(stops[0], count) if stops[0] < _END else count


def _owner(product: ir.Node, layers: Mapping[str, str | None]) -> str | None:
    """Return which of the layers that share a weight a product belongs to; None for one without adapters."""
    if len(owners := set(layers.values())) == 1:
        return owners.pop()
    *scopes, _ = ast.literal_eval(product.metadata_props.get(_SCOPES, "['']"))  # the last is the operator's own name
    return layers.get(next((path for scope in reversed(scopes) if (path := recorded_path(scope))), ""))


def _with_bias(product: ir.Value) -> ir.Value:
    """Return the output of a layer: the product, or the sum with a bias if that is its only reader."""
    readers = [usage.node for usage in product.uses()]
    if len(readers) != 1 or readers[0].op_type != "Add" or product.is_graph_output():
        return product
    other = next((value for value in readers[0].inputs if value is not product), None)
    is_bias = other is not None and _is_parameter(other) and other.shape is not None and len(other.shape) == 1
    return readers[0].outputs[0] if is_bias else product


def _is_parameter(value: ir.Value) -> bool:
    """Return whether a value is an initializer or a part of one."""
    node = value.producer()
    if node is not None and node.op_type == "Slice" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value.const_value is not None
