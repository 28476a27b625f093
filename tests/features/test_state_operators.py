"""Operators that carry a state, in ONNX Runtime: the same numbers as their references, from any state."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gralora_fx.exporters.rules.builder import Builder
from gralora_fx.exporters.rules.clean_up import remove_unused_nodes
from gralora_fx.exporters.rules.onnx_pipeline import import_domains
from gralora_fx.exporters.translation.operators import DomainNode
from gralora_fx.exporters.translation.translate import IR_VERSION, OPSET
from gralora_fx.features.states.lowering import (
    CausalConvNode,
    GatedRmsNormNode,
    LinearAttentionNode,
    lower_state_operators,
)
from gralora_fx.features.states.operators import CausalConv, GatedRmsNorm, LinearAttention
from tests.features.test_linear_attention import RULES, arguments


def model_of(kind: type[DomainNode], given: dict[str, Any]) -> ir.Model:
    """Return a model of one operator, whose inputs are its tensors; batch and length may be any.

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
    """Return a session of a model of one operator, which becomes one of the runtime's."""
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


def test_a_gated_norm_of_heads_needs_no_other_shape() -> None:
    torch.manual_seed(0)
    heads, size = 4, 6
    weight = torch.randn(size)
    floats = ir.TensorType(ir.DataType.FLOAT)
    x, gate = (ir.Value(name=n, shape=ir.Shape(["batch", "length", heads * size]), type=floats) for n in ("x", "gate"))
    graph = ir.Graph([x, gate], [], nodes=[], opset_imports={"": OPSET}, name="one")
    graph.register_initializer(initializer("weight", weight))
    build = Builder(graph)

    def viewed(value: ir.Value, sizes: list[int], shape: list[Any]) -> ir.Value:
        view = build("Reshape", value, build.ints(*sizes))
        view.shape, view.type = ir.Shape(shape), floats
        return view

    by_head = [viewed(value, [0, 0, heads, size], ["batch", "length", heads, size]) for value in (x, gate)]
    rows = [viewed(value, [-1, size], ["rows", size]) for value in by_head]
    node = GatedRmsNormNode(rows[0], graph.initializers["weight"], rows[1], 1e-5, True).node()
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(["rows", size]), floats
    build.nodes.append(node)
    back = build("Concat", build("Shape", x, end=2), build.ints(-1), axis=0)
    y = build("Reshape", node.outputs[0], back)
    y.shape, y.type, y.name = x.shape, floats, "y"
    product = build("Mul", y, x)
    product.name, product.type = "product", floats
    graph.extend(build.take())
    graph.outputs.append(product)
    model = ir.Model(graph, ir_version=IR_VERSION)
    lower_state_operators(model)
    remove_unused_nodes(model)
    assert "Reshape" not in {each.op_type for each in model.graph}
    tensors = {"x": torch.randn(2, 3, heads * size), "gate": torch.randn(2, 3, heads * size)}
    parts = {name: value.reshape(-1, size) for name, value in tensors.items()}
    expected = GatedRmsNorm(**parts, weight=weight, eps=1e-5, silu=True).result().reshape(2, 3, -1)
    import_domains(model)
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    assert_results(session, tensors, (expected * tensors["x"],))


@pytest.mark.parametrize("factor", [1.0, 2.0], ids=["beta of the rule", "beta up to 2"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_decay_of_the_gated_delta_rule_is_one_operator_and_a_small_beta_exact(swapped: bool, factor: float) -> None:
    torch.manual_seed(0)
    heads = 3  # no multiple of 4, of which other operators compute the rest in another way
    bias, scale = torch.randn(heads), -torch.rand(heads)
    given = {name: torch.randn(2, 5, heads, 4) for name in ("query", "key", "value")}
    gates = {name: torch.randn(2, 5, heads) for name in ("decay", "beta")}
    state = torch.randn(2, heads, 4, 4)
    model = model_of(LinearAttentionNode, {**given, **gates, "state": state, "scale": 0.5})
    inputs = {str(value.name): value for value in model.graph.inputs}
    build = Builder(model.graph)
    for name, tensor in (("bias", bias), ("factor", scale)):
        model.graph.register_initializer(initializer(name, tensor))
    weights = model.graph.initializers
    total = build("Add", *(inputs["decay"], weights["bias"])[:: -1 if swapped else 1])
    rate = build("Softplus", total)
    decay = build("Mul", *(rate, weights["factor"])[:: -1 if swapped else 1])
    beta = gate = build("Sigmoid", inputs["beta"])
    if factor != 1.0:  # OLMo-Hybrid's
        beta = build("Mul", gate, build.tensor(factor, ir.DataType.FLOAT))
    for value in (total, rate, decay, gate, beta):
        value.shape, value.type = inputs["decay"].shape, inputs["decay"].type
    node = next(node for node in model.graph if node.domain)
    for new, old in ((decay, inputs["decay"]), (beta, inputs["beta"])):
        node.replace_input_with(list(node.inputs).index(old), new)
    build.insert_before(node)
    lower_state_operators(model)
    remove_unused_nodes(model)
    assert {each.op_type for each in model.graph if each.domain} == {"LinearAttention", "LinearAttentionGate"}
    assert not {"Softplus", "Sigmoid"} & {each.op_type for each in model.graph}
    import_domains(model)
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    computed = {"decay": scale * functional.softplus(gates["decay"] + bias), "beta": factor * gates["beta"].sigmoid()}
    expected = LinearAttention(**given, **computed, state=state, scale=0.5).result()
    tensors = {**given, **gates, "state": state}
    assert_results(session, tensors, expected)
    rates = {"beta": gates["beta"] - 16.0}  # ONNX Runtime's Sigmoid gives multiples of 6e-8
    small = {**computed, "beta": factor * rates["beta"].double().sigmoid().float()}
    written = LinearAttention(**given, **small, state=torch.zeros_like(state), scale=0.5).result()
    actual = session.run(None, {name: v.numpy() for name, v in {**tensors, **rates, "state": state * 0}.items()})
    for one, other in zip(written, actual, strict=True):
        torch.testing.assert_close(torch.from_numpy(other) * 1e6, one * 1e6, atol=1e-5, rtol=1e-5)
    together = session.run(None, {name: value.numpy() for name, value in tensors.items()})
    alone = session.run(None, {name: value[1:].numpy() for name, value in tensors.items()})
    assert all((one[1:] == other).all() for one, other in zip(together, alone, strict=True))


def initializer(name: str, value: Tensor) -> ir.Value:
    """Return a weight of a model."""
    tensor = ir.tensor(value.numpy(), name=name)
    return ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
