"""Faster forms of operators with a state: the operators' results, and a row's the same bits whatever is beside it."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from gralora_fx.exporters.rules.builder import Builder
from gralora_fx.exporters.rules.onnx_pipeline import import_domains
from gralora_fx.exporters.translation.translate import IR_VERSION, OPSET
from gralora_fx.features.states.forms import fast_state_forms
from gralora_fx.features.states.lowering import CausalConvNode, LinearAttentionNode, lower_state_operators
from gralora_fx.features.states.operators import CausalConv, LinearAttention
from tests.features.test_state_operators import model_of

CHANNELS, KERNEL = 32, 4


def opened(model: ir.Model) -> onnxruntime.InferenceSession:
    import_domains(model)
    return onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())


def run(session: onnxruntime.InferenceSession, **tensors: Tensor) -> list[Tensor]:
    results = session.run(None, {name: value.contiguous().numpy() for name, value in tensors.items()})
    return [torch.from_numpy(result) for result in results]


def convolution(channels: int, *, silu: bool = True) -> tuple[ir.Model, dict[str, Tensor]]:
    """Return a model of `x [batch, length, channels]` and `state`, and the weight and bias in it."""
    torch.manual_seed(0)
    weights = {"weight": torch.randn(channels, 1, KERNEL), "bias": torch.randn(channels)}
    floats = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["batch", "length", channels]), type=floats)
    state = ir.Value(name="state", shape=ir.Shape(["batch", channels, KERNEL - 1]), type=floats)
    graph = ir.Graph([x, state], [], nodes=[], opset_imports={"": OPSET}, name="one")
    for name, value in weights.items():
        graph.register_initializer(
            ir.Value(
                name=name, shape=ir.Shape(value.shape), type=floats, const_value=ir.tensor(value.numpy(), name=name)
            )
        )
    build = Builder(graph)
    node = CausalConvNode(
        build("Transpose", x, perm=[0, 2, 1]), *(graph.initializers[name] for name in weights), state, silu
    ).node()
    build.nodes.append(node)
    y = build("Transpose", node.outputs[0], perm=[0, 2, 1])
    graph.extend(build.take())
    for name, output in (("y", y), ("next", node.outputs[1])):
        output.name, output.type = name, floats
        graph.outputs.append(output)
    model = ir.Model(graph, ir_version=IR_VERSION)
    lower_state_operators(model)
    return model, weights


@pytest.mark.quick
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("length", [1, 2, 9, 300])
def test_a_causal_convolution_becomes_a_convolution_of_blocks(silu: bool, length: int) -> None:
    model, weights = convolution(CHANNELS, silu=silu)
    assert fast_state_forms(model).changed == 1
    assert [node.op_type for node in model.graph if node.op_type.endswith(("Conv", "State"))] == ["Conv"]
    x, state = torch.randn(2, length, CHANNELS), torch.randn(2, CHANNELS, KERNEL - 1)
    y, after = run(opened(model), x=x, state=state)
    expected, expected_state = CausalConv(x=x.transpose(1, 2), **weights, state=state, silu=silu).result()
    torch.testing.assert_close(y, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert torch.equal(after, expected_state)


def test_a_row_gives_the_same_bits_alone_and_in_pieces() -> None:
    model, _ = convolution(CHANNELS)
    fast_state_forms(model)
    session = opened(model)
    x, state = torch.randn(3, 70, CHANNELS), torch.randn(3, CHANNELS, KERNEL - 1)
    together, _ = run(session, x=x, state=state)
    pieces, held = [], state[1:2]
    for piece in x[1:2].split([40, 1, 1, 28], dim=1):
        y, held = run(session, x=piece, state=held)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, dim=1), together[1:2])


def test_channels_that_fill_no_block_keep_the_operator() -> None:
    model, _ = convolution(CHANNELS - 8)
    assert fast_state_forms(model).changed == 0


@pytest.mark.parametrize("heads", [1, 2])
def test_linear_attention_of_single_numbers_becomes_a_loop(heads: int) -> None:
    torch.manual_seed(0)
    batch, length, channels, size = 3, 9, 6, 4
    given = {
        "query": torch.randn(batch, length, heads, size),
        "key": torch.randn(batch, length, heads, size),
        "value": torch.randn(batch, length, channels, 1),
        "decay": -torch.rand(batch, length, channels, size),
        "state": torch.randn(batch, channels, size, 1),
    }
    model = model_of(LinearAttentionNode, {**given, "beta": None, "scale": 0.5})
    lower_state_operators(model)
    result = fast_state_forms(model)
    assert (result.changed, len(result.skipped)) == (1, 1)
    session = opened(model)
    together = run(session, **given)
    for actual, expected in zip(together, LinearAttention(**given, beta=None, scale=0.5).result(), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    alone = run(session, **{name: value[1:2] for name, value in given.items()})
    assert all(torch.equal(one, several[1:2]) for one, several in zip(alone, together, strict=True))


def test_linear_attention_of_vectors_stays() -> None:
    given = {name: torch.randn(1, 3, 4, 2) for name in ("query", "key", "value")}
    given |= {"decay": -torch.rand(1, 3, 4), "state": torch.randn(1, 4, 2, 2)}
    model = model_of(LinearAttentionNode, {**given, "beta": None, "scale": 1.0})
    lower_state_operators(model)
    assert fast_state_forms(model).changed == 0
