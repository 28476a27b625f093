"""Operators that carry a state, in ONNX Runtime: the same numbers as their references, from any state."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from gralora_fx.exporters.onnx_passes.state_operators import lower_state_operators
from gralora_fx.exporters.onnx_pipeline import import_domains
from gralora_fx.exporters.translation.operators import (
    CausalConvNode,
    DomainNode,
    GatedRmsNormNode,
    LinearAttentionNode,
)
from gralora_fx.exporters.translation.translate import IR_VERSION, OPSET
from gralora_fx.operators.linear_attention import LinearAttention
from gralora_fx.operators.state_spaces import CausalConv, GatedRmsNorm
from tests.operators.test_linear_attention import RULES, arguments


def model_of(kind: type[DomainNode], given: dict[str, Any]) -> ir.Model:
    """A model of one operator, whose inputs are its tensors; batch and length may be any.

    Args:
        kind: The operator.
        given: Its arguments by name.
    """
    inputs = {
        name: ir.Value(
            name=name,
            shape=ir.Shape(
                [f"{name}_{axis}" if axis < 2 and value.ndim > 2 else size for axis, size in enumerate(value.shape)]
            ),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        for name, value in given.items()
        if isinstance(value, Tensor)
    }
    node = kind(**(given | inputs)).node()
    for output in node.outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(list(inputs.values()), node.outputs, nodes=[node], opset_imports={"": OPSET}, name="one")
    return ir.Model(graph, ir_version=IR_VERSION)


def session_of(kind: type[DomainNode], given: dict[str, Any], operator: str) -> onnxruntime.InferenceSession:
    """A session of a model of one operator, which becomes one of the runtime's."""
    model = model_of(kind, given)
    assert lower_state_operators(model).changed == 1
    assert [node.op_type for node in model.graph if node.domain] == [operator]
    import_domains(model)
    return onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 2), (8, 4)])
def test_linear_attention_is_one_operator_whatever_its_heads(rule: str, queries: int, keys: int) -> None:
    given = arguments(rule, 7, queries=queries, keys=keys)
    given = {name: value.float() if isinstance(value, Tensor) else value for name, value in given.items()}
    session = session_of(LinearAttentionNode, given, "LinearAttention")
    for length in (7, 1):
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        cut = {name: value if name == "state" else value[:, :length].contiguous() for name, value in tensors.items()}
        expected = LinearAttention(**(given | cut)).result()
        assert_results(session, cut, expected)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_causal_convolution_is_one_operator(silu: bool, has_bias: bool) -> None:
    tensors = {"x": torch.randn(2, 6, 5), "weight": torch.randn(6, 1, 4), "state": torch.randn(2, 6, 3)}
    given = {"bias": None, "silu": silu, **tensors}
    if has_bias:
        given["bias"] = tensors["bias"] = torch.randn(6)
    session = session_of(CausalConvNode, given, "CausalConvWithState")
    assert_results(session, tensors, CausalConv(**given).result())


@pytest.mark.parametrize("silu", [True, False])
def test_a_gated_norm_is_one_operator(silu: bool) -> None:
    tensors = {"x": torch.randn(2, 5, 6), "weight": torch.randn(6), "gate": torch.randn(2, 5, 6)}
    given = {**tensors, "eps": 1e-5, "silu": silu}
    session = session_of(GatedRmsNormNode, given, "GatedRMSNorm")
    assert_results(session, tensors, (GatedRmsNorm(**given).result(),))


def assert_results(
    session: onnxruntime.InferenceSession, tensors: dict[str, Tensor], expected: tuple[Tensor, ...]
) -> None:
    actual = session.run(None, {name: value.numpy() for name, value in tensors.items()})
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(torch.from_numpy(other), one, atol=1e-5, rtol=1e-5)
