"""What Eigen computes four values at a time, on rows of other widths."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from gralora_fx.exporters.onnx_passes.builder import Builder, add_input
from gralora_fx.exporters.onnx_passes.whole_vectors import OPERATORS, VECTOR, fill_vectors

ROWS = 5


def elementwise(operators: list[str], width: int) -> ir.Model:
    """A model of operators that all read `x [rows, width]`."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="graph")
    build, x = Builder(graph), add_input(graph, "x", ir.DataType.FLOAT, ["rows", width])
    for operator in operators:
        value = build(operator, x)
        value.name, value.shape, value.type = operator, x.shape, x.type
        graph.outputs.append(value)
    graph.extend(build.take())
    return ir.Model(graph, ir_version=10)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.quick
@pytest.mark.parametrize("width", [1, 2, 3, 6, 4, 8])
def test_a_row_has_the_bits_it_has_alone(width: int) -> None:
    names = sorted(OPERATORS)
    model = elementwise(names, width)
    before = session(model)
    padded = fill_vectors(model)
    after = session(model)
    assert padded.changed == (len(names) if width % VECTOR else 0)
    numbers = np.random.default_rng(width)
    for _ in range(40):
        x = numbers.uniform(0.1, 90, (ROWS, width)).astype(np.float32)
        whole = after.run(names, {"x": x})
        for row in range(ROWS):
            for part, value in zip(after.run(names, {"x": x[row : row + 1]}), whole, strict=True):
                assert np.array_equal(part, value[row : row + 1])
        for value, plain in zip(whole, before.run(names, {"x": x}), strict=True):
            assert value.shape == plain.shape
            np.testing.assert_allclose(value, plain, rtol=1e-6, atol=1e-6)


def test_operators_of_one_input_share_what_is_padded() -> None:
    model = elementwise(["Cos", "Sin"], 2)
    fill_vectors(model)
    assert sum(node.op_type == "Pad" for node in model.graph) == 1
    assert fill_vectors(model).changed == 0  # what it has padded is whole
