"""A session runs on tensors by name, and a name that it lacks is an error."""

from __future__ import annotations

import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime import InferenceSession

from gralora_fx.errors import ExportError
from gralora_fx.run.sessions.ort_values import as_tensor, run_values


@pytest.fixture
def session() -> InferenceSession:
    """Return a session over `y = x + x`."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_tensors_are_cast(session: InferenceSession) -> None:
    outputs = run_values(session, {"x": torch.tensor([1, 2])}, "two numbers")
    assert as_tensor(outputs["y"]).tolist() == [2.0, 4.0]


def test_a_name_that_the_session_lacks_is_an_error(session: InferenceSession) -> None:
    with pytest.raises(ExportError, match="two numbers: the session takes no stray"):
        run_values(session, {"x": torch.ones(2), "stray": torch.ones(2)}, "two numbers")
