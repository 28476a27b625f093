"""Eigen's vectors of four values, on rows of other widths: elementwise, and sums."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from gralora_fx.exporters.rules.builder import Builder, add_input
from gralora_fx.exporters.rules.products.float_matrices import OPERATORS, SUMS, VECTOR, fill_vectors

ROWS = 5


def model_of(operators: list[str], width: int) -> ir.Model:
    """Return a model of operators that all read `x [rows, width]`."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="graph")
    build, x = Builder(graph), add_input(graph, "x", ir.DataType.FLOAT, ["rows", width])
    for operator in operators:
        is_sum = operator in SUMS
        value = build(operator, x, build.ints(-1)) if is_sum else build(operator, x)
        value.name, value.shape, value.type = operator, ir.Shape(["rows", 1]) if is_sum else x.shape, x.type
        graph.outputs.append(value)
    graph.extend(build.take())
    return ir.Model(graph, ir_version=10)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("operators", "width"),
    [*((OPERATORS, width) for width in (1, 2, 3, 6, 4, 8)), *((SUMS, width) for width in (2, 3, 5, 6, 7, 8, 10))],
)
def test_a_row_has_the_bits_it_has_alone(operators: set[str], width: int) -> None:
    names = sorted(operators)
    model = model_of(names, width)
    before = session(model)
    padded = fill_vectors(model)
    after = session(model)
    is_whole = width % VECTOR == 0 or (operators == SUMS and width == 2)  # two values are added in one order
    assert padded.changed == (0 if is_whole else len(names))
    numbers = np.random.default_rng(width)
    for _ in range(40):
        x = numbers.uniform(0.1, 90, (ROWS, width)).astype(np.float32)
        whole = after.run(names, {"x": x})
        for row in range(ROWS):
            for part, value in zip(after.run(names, {"x": x[row : row + 1].copy()}), whole, strict=True):
                assert np.array_equal(part, value[row : row + 1])
        for value, plain in zip(whole, before.run(names, {"x": x}), strict=True):
            assert value.shape == plain.shape
            np.testing.assert_allclose(value, plain, rtol=1e-6, atol=1e-6)


def test_operators_of_one_input_share_what_is_padded() -> None:
    model = model_of(["Cos", "Sin"], 2)
    fill_vectors(model)
    assert sum(node.op_type == "Pad" for node in model.graph) == 1
    assert fill_vectors(model).changed == 0  # what it has padded is whole
