"""References for quantized exports: models with the stored weights, and int8 products run one by one."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gralora_fx.base.features import marks, parts
from gralora_fx.base.sources.lazy_tensors import computed_like
from gralora_fx.base.sources.reused_memory import READ
from gralora_fx.core.graph.sites import LinearSite, other_readers
from gralora_fx.core.graph.surgery import copied, map_parameters
from gralora_fx.core.model.merging import replace_weights
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, option
from gralora_fx.exporters.artifact.manifest import save_models, weight_entries
from gralora_fx.exporters.artifact.staging import require_space
from gralora_fx.exporters.fold.requantize import stored_values
from gralora_fx.exporters.quantize.block_search import in_threads
from gralora_fx.exporters.rules.builder import add_initializer, replace_value
from gralora_fx.exporters.rules.products.constant_matrices import drop_unread
from gralora_fx.exporters.rules.products.initializers import ProductWeight, product_weights
from gralora_fx.exporters.rules.products.quantized_products import QuantizedProduct, quantized_products
from gralora_fx.exporters.translation.translate import OPSET
from gralora_fx.exporters.translation.weights import LazyTensor, derived
from gralora_fx.exporters.verify_report import TensorCheck
from gralora_fx.format.export_directory import MODEL_NAME, ROWS_NAME
from gralora_fx.format.quantized_weights import QuantizedWeights
from gralora_fx.run.sessions.ort_values import as_tensor, run_values
from gralora_fx.run.sessions.session import check_external_data, open_session

_ROWS = 256  # dequantized at once


def with_stored_weights(
    reference: TracedModel, traced: TracedModel, quantized: QuantizedWeights, directory: Path
) -> TracedModel:
    """Return a float32 model with an export's stored values as weights (see `reference_model`)."""
    stored = _stored_weights(directory, traced)
    found = {id(site.weight): site.weight.numel() for site in traced.sites if site.calls and site.path in stored}
    others = [rounded(directory, reference) for rounded in parts("rounded weights", reference.operators)]
    count = sum(found.values()) + sum(values for _, values in others)
    if quantized.values != count:
        raise ExportError(
            f"the export holds {quantized.values:,} quantized values and the model's layers {count:,} of them, so it "
            f"cannot be compared with a model of the same rounded weights; export with {option(verify=False)} and "
            "judge the export by its results"
        )
    called = [site for site in reference.sites if site.calls and site.path in stored]  # others are of other graphs
    weights = {site.path: computed_like(site.weight, partial(_rounded, site, stored[site.path])) for site in called}
    readers = other_readers(reference.graph_module, reference.sites) if quantized.lookups else {}
    shared = [
        site for site in called if quantized.lookups and _is_shared(site, readers[site.path], stored[site.path].weight)
    ]
    tables = {id(site.weight): weights.pop(site.path) for site in shared}
    for rounded, _ in others:
        tables |= rounded
    return with_parameters(replace_weights(reference, weights), tables)


class _StoredWeight(NamedTuple):
    """The quantized weight of a layer: output features of an initializer."""

    weight: ProductWeight
    start: int
    stop: int


def _stored_weights(directory: Path, traced: TracedModel) -> dict[str, _StoredWeight]:
    """Return an export's quantized weights by the paths of the layers."""
    paths = [path for path in sorted(directory.glob("*.onnx")) if path.name != ROWS_NAME]
    graphs = {path.stem: ir.load(path).graph for path in paths}
    weights = {
        (f"{file}.onnx", weight.name): weight
        for file, graph in graphs.items()
        for weight in product_weights(graph)
        if weight.storage != "float"
    }
    return {
        path: _StoredWeight(weights[entry.file, entry.initializer], entry.start, entry.stop)
        for path, entries in weight_entries(traced, graphs).items()
        for entry in entries[:1]
        if (entry.file, entry.initializer) in weights
    }


def _is_shared(site: LinearSite, others: Sequence[str], weight: ProductWeight) -> bool:
    """Return whether a weight is quantized for other readers too."""
    return bool(site.tied_with or others) and (weight.storage == "columns" or site.in_features % weight.block_size == 0)


def _rounded(site: LinearSite, stored: _StoredWeight) -> Tensor:
    """Return the export's values of a site's weight."""
    weight, start, stop = stored
    held, values = stored_values(weight), READ.empty((site.out_features, site.in_features))

    def fill(first: int) -> None:
        rows, outputs = slice(first, first + _ROWS), slice(start + first, min(start + first + _ROWS, stop))
        values[rows] = torch.from_numpy(held.values(outputs))

    in_threads(fill, range(0, len(values), _ROWS))
    return values.t().contiguous() if site.kind == "conv1d" else values


_IN_FLOAT32 = 1  # the accuracy level


def write_float32_copy(directory: Path, target: Path) -> None:
    """Write a copy of an export that computes in float32; its weights keep their values rounded to bfloat16 or int8.

    It shows whether the graph and the weights are right: the CPU provider lacks most bfloat16 kernels, and rounded
    activations would hide errors of the weights.
    """
    target.mkdir(parents=True, exist_ok=True)
    models: dict[str, ir.Model] = {}
    stored: dict[Hashable, ir.ExternalTensor] = {}  # tensors shared by several models
    for path in sorted(directory.glob("*.onnx")):
        check_external_data(path)
        model = models[path.stem] = ir.load(path)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = stored.setdefault((tensor.path, tensor.offset, tensor.nbytes), tensor)
        _in_float32(model)
    save_models(models, target, target, shared=True)


def _in_float32(model: ir.Model) -> None:
    for value in _values(model):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            value.const_value = _as_float32(tensor)
    for product in quantized_products(model):
        _multiply_in_float32(model.graph, product)
    signs = marks({key for node in model.graph.all_nodes() for key in node.metadata_props})
    for in_floats in parts("float weights", signs) if signs else ():
        in_floats(model)
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _IN_FLOAT32)
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _as_float32(attribute.as_tensor()))


def _multiply_in_float32(graph: ir.Graph, product: QuantizedProduct) -> None:
    """Multiply by dequantized int8 weights.

    Before: `y = MatMul(q, DequantizeLinear(w, w_scale)) * s`, with `q` the rounded `x / s` (see `ColumnProducts`)
    After:  `y = MatMul(x, w * w_scale)`
    """
    last = product.nodes[-1]
    weight, scale = product.weight.const_value, product.scale.const_value
    assert weight is not None
    assert scale is not None
    name = f"{product.weight.name}_float32"
    if name not in graph.initializers:
        shape = ir.Shape(weight.shape.numpy())

        def values() -> LazyTensor:
            return LazyTensor(name, ir.DataType.FLOAT, shape, lambda: ir.tensor(weight.numpy() * scale.numpy()))

        add_initializer(graph, derived([weight, scale], name, values))
    branch = last.graph
    assert isinstance(branch, ir.Graph)
    product_node = ir.node("MatMul", [product.input, graph.initializers[name]])
    branch.insert_before(last, product_node)
    replace_value(product_node.outputs[0], product.output)
    for node in reversed(product.nodes):
        if not any(value.uses() for value in node.outputs):  # other products may read the rounded input too
            branch.remove(node, safe=True)
    drop_unread(graph, [str(product.weight.name), str(product.scale.name)])


def _values(model: ir.Model) -> list[ir.Value]:
    outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
    return [*model.graph.inputs, *model.graph.initializers.values(), *outputs]


def _as_float32(tensor: ir.TensorProtocol) -> LazyTensor:
    def cast() -> LazyTensor:
        shape, name = ir.Shape(tensor.shape.numpy()), tensor.name or ""
        return LazyTensor(name, ir.DataType.FLOAT, shape, lambda: ir.tensor(tensor.numpy().astype("float32")))

    return derived([tensor], "float32", cast)


# relative: a sum of integers is cast, and three scales are multiplied, each rounded once
PRODUCT_TOLERANCE = 6 * 2.0**-24
_STEP, _LARGEST = 2.0**-6, 127  # values whose rounding by their largest is exact
_DRAWN_ROWS, _COLUMNS = 4, 4096  # rows of activations; columns of a weight at once
_HALVES = 1  # the row halfway between two steps, with 16 bits


class _Case(NamedTuple):
    """A single product, with the names of its input and output."""

    input: str
    output: str
    weight: ir.TensorProtocol  # int8 [K, N]
    scale: ir.TensorProtocol  # float32 [N]
    has_rest: bool  # whether activations have 16 bits: the remainder is multiplied too


def compare_products(directory: Path) -> TensorCheck:
    """Run every quantized product of an export by itself, on activations that its bits represent exactly.

    One row is at the upper end of its range, where accumulation in too few bits would saturate. The remaining
    difference is float32 rounding (see `PRODUCT_TOLERANCE`).
    """
    differences = [pair for path in _models(directory) for pair in _differences(path)]
    absolute = max((absolute for absolute, _ in differences), default=0.0)
    relative = max((relative for _, relative in differences), default=0.0)
    return TensorCheck("int8 products", absolute, relative, None)


def _models(directory: Path) -> list[Path]:
    """Return the models of an export; one of those with the same products."""
    return [path for path in sorted(directory.glob("*.onnx")) if path.name != ROWS_NAME]


def _differences(path: Path) -> Iterator[tuple[float, float]]:
    """Yield the largest absolute and relative difference of each product of a model."""
    check_external_data(path)
    products = quantized_products(ir.load(path))
    if not products:  # a companion model
        return
    model, cases = _apart(products)
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    directory = path.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as copy:
        require_space(copy, sum(tensor.nbytes for tensor in weights))
        ir.save(model, Path(copy) / MODEL_NAME, external_data=f"{MODEL_NAME}_data", size_threshold_bytes=1024)
        session = open_session(copy)
        inputs = {case.input: _activations(int(case.weight.shape.numpy()[0]), case.has_rest) for case in cases}
        tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
        results = run_values(session, tensors, f"the int8 products of {path.name}")
        for case in cases:
            yield _difference(case, inputs[case.input], as_tensor(results[case.output]).numpy())


def _apart(products: Sequence[QuantizedProduct]) -> tuple[ir.Model, list[_Case]]:
    """Return a model of the products, each with its own input and output, their nodes copied from the export."""
    weights: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []
    inputs: list[ir.Value] = []
    outputs: list[ir.Value] = []
    cases: list[_Case] = []
    for index, product in enumerate(products):
        weight, scale = product.weight.const_value, product.scale.const_value
        assert weight is not None
        assert scale is not None
        width = int(weight.shape.numpy()[0])
        source = ir.val(f"x{index}", ir.DataType.FLOAT, [_DRAWN_ROWS, width])
        values: dict[ir.Value, ir.Value] = {product.input: source}
        for value in dict.fromkeys(value for node in product.nodes for value in node.inputs):
            if value is not None and value.is_initializer() and value is not product.input:
                name = str(value.name)
                weights.setdefault(
                    name, ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
                )
                values[value] = weights[name]
        for node in product.nodes:
            copy = ir.node(
                node.op_type,
                [None if value is None else values[value] for value in node.inputs],
                attributes=dict(node.attributes),
                num_outputs=len(node.outputs),
            )
            values |= dict(zip(node.outputs, copy.outputs, strict=True))
            nodes.append(copy)
        result = values[product.output]
        result.name, result.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        result.shape = ir.Shape([_DRAWN_ROWS, int(weight.shape.numpy()[1])])
        inputs.append(source)
        outputs.append(result)
        has_rest = any(node.op_type == "Split" for node in product.nodes)
        cases.append(_Case(f"x{index}", f"y{index}", weight, scale, has_rest))
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=list(weights.values()), opset_imports={"": OPSET})
    return ir.Model(graph, ir_version=10), cases


def _activations(width: int, has_rest: bool) -> NDArray[np.float32]:
    """Return activations `[4, width]`: random, highest, lowest, and with 16 bits a row half a step off."""
    values = (
        np.random.default_rng(width).integers(-_LARGEST, _LARGEST, (_DRAWN_ROWS, width), endpoint=True).astype(float)
    )
    values[:, 0] = _LARGEST
    if has_rest:
        values[_HALVES] += np.where(values[_HALVES] < _LARGEST, 0.5, 0)
    values[-2], values[-1] = _LARGEST, -_LARGEST
    return (values * _STEP).astype(np.float32)


def _difference(case: _Case, activations: NDArray[np.float32], results: NDArray[np.float32]) -> tuple[float, float]:
    """Return the largest difference from the exact product, absolute and relative to each exact value.

    In a row of two parts it is relative to the sum of absolute terms, as these may cancel.
    """
    weight, scale = case.weight.numpy(), case.scale.numpy().astype(np.float64)
    absolute = relative = 0.0
    for start in range(0, weight.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        factors = weight[:, columns].astype(np.float64)
        exact = activations.astype(np.float64) @ factors * scale[columns]
        gap = np.abs(results[:, columns] - exact)
        size = np.abs(exact)
        if case.has_rest:
            size[_HALVES] = np.abs(activations[_HALVES]).astype(np.float64) @ np.abs(factors) * scale[columns]
        absolute = max(absolute, float(gap.max()))
        relative = max(relative, float((gap / np.where(size == 0, np.finfo(np.float32).tiny, size)).max()))
    return absolute, relative


def with_parameters(model: TracedModel, parameters: Mapping[int, nn.Parameter]) -> TracedModel:
    """Copy a model with other parameters."""
    graph_module = copied(model.graph_module, "RoundedGraph")
    map_parameters(graph_module, lambda parameter, _: parameters.get(id(parameter), parameter))
    own = {name: parameters.get(id(parameter), parameter) for name, parameter in model.tree.parameters.items()}
    return model.with_graph(graph_module, dataclasses.replace(model.tree, parameters=own))
