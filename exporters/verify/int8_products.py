"""The int8 products of an export, each run by itself and compared with the exact one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from gralora_fx.exporters.artifact.staging import require_space
from gralora_fx.exporters.rules.products.quantized_products import QuantizedProduct, quantized_products
from gralora_fx.exporters.translation.translate import OPSET
from gralora_fx.exporters.verify_report import TensorCheck
from gralora_fx.format.export_directory import MODEL_NAME, ROWS_NAME
from gralora_fx.run.sessions.ort_values import as_tensor, run_values
from gralora_fx.run.sessions.session import check_external_data, open_session

# relative: a sum of integers is cast, and three scales are multiplied, each rounded once
PRODUCT_TOLERANCE = 6 * 2.0**-24
_STEP, _LARGEST = 2.0**-6, 127  # values whose rounding by their largest is exact
_ROWS, _COLUMNS = 4, 4096  # of the activations; of a weight at once
_HALVES = 1  # the row between two steps, where there are 16 bits


class _Case(NamedTuple):
    """A product by itself, with the names of its input and output."""

    input: str
    output: str
    weight: ir.TensorProtocol  # int8 [K, N]
    scale: ir.TensorProtocol  # float32 [N]
    has_rest: bool  # whether activations have 16 bits: what rounding leaves is multiplied too


def compare_products(directory: Path) -> TensorCheck:
    """Run every quantized product of an export by itself, on activations that its bits hold exactly.

    One row of them is at the upper end of its range: there sums are largest, and a processor that adds in too few bits
    would saturate. What is left is the rounding of float32 (see `PRODUCT_TOLERANCE`).
    """
    differences = [pair for path in _models(directory) for pair in _differences(path)]
    absolute = max((absolute for absolute, _ in differences), default=0.0)
    relative = max((relative for _, relative in differences), default=0.0)
    return TensorCheck("int8 products", absolute, relative, None)


def _models(directory: Path) -> list[Path]:
    """The models of an export; of those with the same products, one."""
    return [path for path in sorted(directory.glob("*.onnx")) if path.name != ROWS_NAME]


def _differences(path: Path) -> Iterator[tuple[float, float]]:
    """The largest absolute and relative difference of each product of a model."""
    check_external_data(path)
    model, cases = _apart(quantized_products(ir.load(path)))
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
    """A model of products with an input and an output each, their nodes as they are in the export."""
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
        source = ir.val(f"x{index}", ir.DataType.FLOAT, [_ROWS, width])
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
        result.shape = ir.Shape([_ROWS, int(weight.shape.numpy()[1])])
        inputs.append(source)
        outputs.append(result)
        has_rest = any(node.op_type == "Split" for node in product.nodes)
        cases.append(_Case(f"x{index}", f"y{index}", weight, scale, has_rest))
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=list(weights.values()), opset_imports={"": OPSET})
    return ir.Model(graph, ir_version=10), cases


def _activations(width: int, has_rest: bool) -> NDArray[np.float32]:
    """Activations `[4, width]`: random ones, all at the upper end, all at the lower.

    Of 16 bits one row is half a step beside what 8 bits hold, which is the most that is left of it.
    """
    values = np.random.default_rng(width).integers(-_LARGEST, _LARGEST, (_ROWS, width), endpoint=True).astype(float)
    values[:, 0] = _LARGEST
    if has_rest:
        values[_HALVES] += np.where(values[_HALVES] < _LARGEST, 0.5, 0)
    values[-2], values[-1] = _LARGEST, -_LARGEST
    return (values * _STEP).astype(np.float32)


def _difference(case: _Case, activations: NDArray[np.float32], results: NDArray[np.float32]) -> tuple[float, float]:
    """The largest difference from the exact product, in itself and relative to each exact value.

    In a row of two parts it is relative to the sum of what is added, as they may cancel.
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
