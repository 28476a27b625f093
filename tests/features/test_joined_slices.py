"""Slices of one tensor that lie side by side become one node, and no others do."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from gralora_fx.exporters.rules.builder import Builder
from gralora_fx.exporters.translation.translate import IR_VERSION, OPSET
from gralora_fx.features.states.lowering import join_slices

SIZE = 7


def sliced(axis: int, pieces: list[tuple[int, int, int]]) -> ir.Model:
    """Return a model of `x [2, 7, 7]`, of which each output is a piece: start, end and step along an axis."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([2, SIZE, SIZE]), type=floats)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET}, name="one")
    build = Builder(graph)
    for index, (start, end, step) in enumerate(pieces):
        value = build("Slice", x, *(build.ints(number) for number in (start, end, axis, step)))
        value.name, value.type = f"y{index}", floats
        graph.outputs.append(value)
    graph.extend(build.take())
    return ir.Model(graph, ir_version=IR_VERSION)


def results(model: ir.Model) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    x = np.arange(2 * SIZE * SIZE, dtype=np.float32).reshape(2, SIZE, SIZE)
    return list(session.run(None, {"x": x}))


@pytest.mark.quick
@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("pieces", [[(0, 3, 1), (3, 7, 1)], [(5, 7, 1), (0, 2, 1), (2, 5, 1)], [(0, 4, 1), (4, 99, 1)]])
def test_slices_that_are_a_whole_are_split(axis: int, pieces: list[tuple[int, int, int]]) -> None:
    model = sliced(axis, pieces)
    expected = results(model)
    assert join_slices(model.graph, model.graph.inputs[0])
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == ["Split"]
    for one, other in zip(expected, results(model), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 3, 1)],
        [(0, 3, 1), (4, 7, 1)],
        [(0, 3, 1), (2, 7, 1)],
        [(0, 3, 1), (3, 6, 1)],
        [(0, 3, 1), (3, 7, 2)],
        [(0, 3, 1), (-4, 7, 1)],
    ],
    ids=["one", "gap", "overlap", "rest", "step", "from the end"],
)
def test_other_slices_stay(pieces: list[tuple[int, int, int]]) -> None:
    model = sliced(1, pieces)
    assert not join_slices(model.graph, model.graph.inputs[0])
    assert len([node for node in model.graph if node.op_type == "Slice"]) == len(pieces)
