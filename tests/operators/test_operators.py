"""Checks of every operator: PyTorch's own, its decomposition, its shape rule, its calls and ONNX forms."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gralora_fx.core.operators
from gralora_fx.base.features import parts
from gralora_fx.core.operators.attention import Attention, Documents, DotProductAttention, Mask, MaskOfBlocks
from gralora_fx.core.operators.call import Call, named_arguments, operator_for
from gralora_fx.core.operators.layers import DropPath, Reshape, RmsNorm, Rotary, Rotate, Slice
from gralora_fx.exporters.translation.operators import TRANSLATIONS, translation_of
from gralora_fx.features.experts.operators import Experts
from gralora_fx.features.llm_int8.packed import UnpackEightBits
from gralora_fx.features.long_texts.operators import TextLength
from gralora_fx.features.nf4.packed import UnpackFourBits
from gralora_fx.features.states.operators import CausalConv, GatedRmsNorm, LinearAttention, PromptClamp

for module in pkgutil.iter_modules(gralora_fx.core.operators.__path__):
    importlib.import_module(f"gralora_fx.core.operators.{module.name}")
parts("operators")
FORMS = TRANSLATIONS | {kind.target: translation_of(kind) for kinds in parts("onnx operators") for kind in kinds}


@dataclass(frozen=True)
class Case:
    """Arguments of an operator for a batch and a length.

    Attributes:
        operator: The operator.
        tensors: Its tensors by name, of a batch and a length; three positions come before it.
        options: Its other arguments.
    """

    operator: type[Call]
    tensors: Callable[[int, int], dict[str, Tensor]]
    options: dict[str, Any]

    def reference(self, **arguments: Any) -> Any:
        """Compute the operator by its reference."""
        return self.operator(**arguments).result()

    def arguments(self, batch: int, length: int) -> dict[str, Any]:
        """Every argument by name, drawn anew the same way, in the order of the schema."""
        torch.manual_seed(0)
        given = {**self.tensors(batch, length), **self.options}
        return {field.name: given[field.name] for field in fields(self.operator)}

    def of_tensors(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function of the operator's arguments as one of its tensors alone."""
        names = list(self.tensors(1, 1))
        return lambda *tensors: function(**dict(zip(names, tensors, strict=True)), **self.options)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def padding(batch: int, length: int) -> Tensor:
    """Return a mask over three past positions and the new ones; the last row has two positions of padding."""
    mask = torch.ones(batch, 3 + length, dtype=torch.long)
    mask[-1, :2] = 0
    return mask


def heads(batch: int, length: int) -> dict[str, Tensor]:
    """Four heads of queries over two of keys and values."""
    total = 3 + length
    return {
        "query": random(batch, 4, length, 8),
        "key": random(batch, 2, total, 8),
        "value": random(batch, 2, total, 6),
    }


def masks(batch: int, length: int) -> dict[str, Tensor]:
    shape = (batch, 1, length, 3 + length)
    return {"blocks": padding(batch, length), "plain": random(*shape), "whole": random(*shape)}


def angles(batch: int, length: int, size: int) -> dict[str, Tensor]:
    angle = torch.randn(batch, length, size)
    return {"x": random(batch, 2, length, 8), "cos": angle.cos(), "sin": angle.sin()}


def recurrence(
    batch: int, length: int, *, queries: int = 4, keys: int = 4, decay: int = 1, beta: bool = True, values: int = 5
) -> dict[str, Tensor | None]:
    """Four states of 6 keys and values, whose decay has that many numbers for each head."""
    decays = (6,) if decay == 6 else ()
    return {
        "query": random(batch, length, queries, 6),
        "key": nn.functional.normalize(torch.randn(batch, length, keys, 6), dim=-1).requires_grad_(),
        "value": random(batch, length, 4, values),
        "decay": torch.rand(batch, length, 4, *decays).neg().requires_grad_() if decay else None,
        "beta": torch.rand(batch, length, 4).requires_grad_() if beta else None,
        "state": random(batch, 4, 6, values),
    }


def experts(batch: int, length: int, *, transposed: bool = False) -> dict[str, Tensor]:
    """Two of five experts for each token; nobody chooses the last."""
    up, down = random(5, 12, 8), random(5, 8, 6)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(batch * length)])
    return {
        "hidden": random(batch * length, 8),
        "index": chosen,
        "weights": random(batch * length, 2),
        "up": up.detach().transpose(1, 2).contiguous().requires_grad_() if transposed else up,
        "down": down.detach().transpose(1, 2).contiguous().requires_grad_() if transposed else down,
    }


EXPERTS = {"activation": "silu", "layout": "halves", "alpha": 1.0, "offset": 0.0, "limit": 0.0, "is_transposed": False}


def four_bits(count: int, block_size: int) -> dict[str, Tensor]:
    """Return a weight of `count` values in four bits."""
    scales = torch.rand(-(-count // block_size)).view(torch.int32)
    codes = torch.randint(256, (-(-count // 2),), dtype=torch.uint8)
    return {"codes": codes, "scales": scales, "table": torch.linspace(-1, 1, 16).view(torch.int32)}


FOUR_BITS = {"block_size": 8, "stored": torch.float32, "dtype": torch.float32, "is_turned": False}
SCALED = {"scale": 0.3, "window": 0, "softcap": 0.0, "dropout": 0.0}
CASES = {
    "attention": Case(Attention, lambda b, n: {**heads(b, n), "mask": padding(b, n)}, {**SCALED, "sinks": None}),
    "attention without a mask": Case(Attention, heads, {**SCALED, "mask": None, "sinks": None}),
    "attention over a mask of its own": Case(
        Attention,
        lambda b, n: {**heads(b, n), "mask": random(b, 1, n, 3 + n)},
        {**SCALED, "sinks": None},
    ),
    "attention with a window, a soft cap and sinks": Case(
        Attention,
        lambda b, n: {**heads(b, n), "mask": padding(b, n), "sinks": random(4)},
        {**SCALED, "window": 2, "softcap": 5.0},
    ),
    "dot_product_attention": Case(
        DotProductAttention,
        lambda b, n: {**heads(b, n), "mask": random(b, 1, n, 3 + n), "padding": padding(b, n)},
        {"scale": 0.3, "is_causal": False},
    ),
    "mask": Case(Mask, lambda b, n: {"padding": padding(b, n)}, {"length": 2, "window": 2, "dtype": torch.float32}),
    "documents": Case(
        Documents, lambda b, n: {"numbers": 1 + padding(b, n).cumsum(-1) // 3}, {"length": 2, "window": 0}
    ),
    "documents with a window": Case(Documents, lambda b, n: {"numbers": padding(b, n)}, {"length": 2, "window": 2}),
    "unpack_four_bits": Case(UnpackFourBits, lambda b, n: four_bits(24, 8), {**FOUR_BITS, "shape": [4, 6]}),
    "unpack_four_bits with a block that is not full, transposed": Case(
        UnpackFourBits, lambda b, n: four_bits(15, 8), {**FOUR_BITS, "shape": [3, 5], "is_turned": True}
    ),
    "unpack_eight_bits": Case(
        UnpackEightBits,
        lambda b, n: {
            "codes": torch.randint(-127, 128, (4, 6), dtype=torch.int8),
            "steps": torch.rand(4).view(torch.int32),
        },
        {"is_turned": True},
    ),
    "mask_of_blocks": Case(MaskOfBlocks, masks, {}),
    "rms_norm": Case(RmsNorm, lambda b, n: {"x": random(b, n, 8), "weight": random(8)}, {"eps": 1e-6}),
    "rms_norm without a weight": Case(RmsNorm, lambda b, n: {"x": random(b, n, 8)}, {"weight": None, "eps": 1e-6}),
    "rms_norm of half precision under a float32 weight": Case(
        RmsNorm,
        lambda b, n: {"x": random(b, n, 8, dtype=torch.float16), "weight": random(8)},
        {"eps": 1e-6},
    ),
    "experts": Case(Experts, experts, {**EXPERTS, "up_bias": None, "down_bias": None}),
    "experts with biases, limits and neighbouring gates": Case(
        Experts,
        lambda b, n: {**experts(b, n, transposed=True), "up_bias": random(5, 12), "down_bias": random(5, 8)},
        {**EXPERTS, "is_transposed": True, "layout": "interleaved", "alpha": 1.702, "offset": 1.0, "limit": 0.7},
    ),
    "experts without gates": Case(
        Experts,
        lambda b, n: {**experts(b, n), "down": random(5, 8, 12)},
        {**EXPERTS, "activation": "relu2", "layout": "none", "up_bias": None, "down_bias": None},
    ),
    "rotate": Case(Rotate, lambda b, n: angles(b, n, 8), {"axis": 1}),
    "rotary": Case(Rotary, lambda b, n: angles(b, n, 4), {"interleaved": False}),
    "rotary of neighbours, in part": Case(Rotary, lambda b, n: angles(b, n, 3), {"interleaved": True}),
    "linear_attention": Case(LinearAttention, recurrence, {"scale": 0.5}),
    "linear_attention with fewer queries and a decay for each key": Case(
        LinearAttention, lambda b, n: recurrence(b, n, queries=2, keys=2, decay=6), {"scale": 0.5}
    ),
    "linear_attention of numbers with a decay for each key": Case(
        LinearAttention,
        lambda b, n: recurrence(b, n, queries=2, keys=2, decay=6, beta=False, values=1),
        {"scale": 0.5},
    ),
    "linear_attention with more queries": Case(
        LinearAttention,
        lambda b, n: {k: v for k, v in recurrence(b, n, queries=8).items() if k in {"query", "key", "value", "decay"}},
        {"beta": None, "state": None, "scale": 0.5},
    ),
    "causal_conv": Case(
        CausalConv,
        lambda b, n: {"x": random(b, 6, n), "weight": random(6, 1, 4), "bias": random(6), "state": random(b, 6, 3)},
        {"silu": True},
    ),
    "causal_conv without a state, a bias and an activation": Case(
        CausalConv,
        lambda b, n: {"x": random(b, 6, n), "weight": random(6, 1, 4)},
        {"bias": None, "state": None, "silu": False},
    ),
    "gated_rms_norm": Case(
        GatedRmsNorm,
        lambda b, n: {"x": random(b, n, 8), "weight": random(8), "gate": random(b, n, 8)},
        {"eps": 1e-6, "silu": True},
    ),
    "gated_rms_norm by a sigmoid": Case(
        GatedRmsNorm,
        lambda b, n: {"x": random(b, n, 8), "weight": random(8), "gate": random(b, n, 8)},
        {"eps": 1e-6, "silu": False},
    ),
    "prompt_clamp": Case(
        PromptClamp,
        lambda b, n: {"x": random(b, n, 8), "state": random(b, 4, 6)},
        {"least": -0.5, "largest": 0.5},
    ),
    "text_length": Case(
        TextLength,
        lambda b, n: {"positions": torch.arange(b * n).reshape(b, n)},
        {"switch": 4, "rereads": True},
    ),
    "drop_path": Case(DropPath, lambda b, n: {"x": random(b, n, 8)}, {"p": 0.5, "train": True}),
    "reshape": Case(Reshape, lambda b, n: {"x": random(b, n, 8)}, {"shape": [0, -1, 4]}),
    "slice": Case(Slice, lambda b, n: {"x": random(b, n, 8)}, {"axis": 2, "start": 1, "stop": 6, "step": 2}),
}
OPERATORS = sorted({case.operator for case in CASES.values()}, key=lambda operator: operator.__name__)
each_case = pytest.mark.parametrize("name", CASES)
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)


def schema_names(target: Any) -> list[str]:
    return [argument.name for argument in target._schema.arguments]


@pytest.mark.quick
def test_every_operator_has_a_case() -> None:
    defined = {operator for operator in subclasses(Call) if "target" in vars(operator)}
    assert set(OPERATORS) == defined
    assert {operator.target for operator in OPERATORS} >= set(FORMS)


def subclasses(kind: type) -> Iterator[type]:
    for other in kind.__subclasses__():
        yield other
        yield from subclasses(other)


@each_case
def test_pytorchs_checks_of_schema_fake_tensors_and_gradients_pass(name: str) -> None:
    case = CASES[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if " " not in name:  # gradients under symbolic sizes, once an operator, since it takes seconds
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(case.operator.target, (), case.arguments(2, 5), test_utils=checks)


@each_case
def test_the_decomposition_computes_what_the_reference_does_on_every_size(name: str) -> None:
    case = CASES[name]
    inputs = case.tensors(2, 5).values()
    operator, reference = case.of_tensors(case.operator.target), case.of_tensors(case.reference)
    graph_module = make_fx(operator, tracing_mode="symbolic")(*inputs)
    assert not any("gralora" in str(node.target) for node in graph_module.graph.nodes)
    for sizes in ((2, 5), (3, 4), (4, 7)):
        tensors = list(case.tensors(*sizes).values())
        torch.manual_seed(1)
        expected = reference(*tensors)
        torch.manual_seed(1)
        torch.testing.assert_close(graph_module(*tensors), expected)


@each_case
@pytest.mark.parametrize("sizes", [(1, 1), (2, 5), (3, 2)])
def test_a_tensor_without_values_gets_the_shape_of_the_result(name: str, sizes: tuple[int, int]) -> None:
    case = CASES[name]
    arguments = case.arguments(*sizes)
    if case.operator is Mask:
        arguments["length"] = sizes[1]
    expected = results(case.operator, arguments)
    with FakeTensorMode() as mode:
        fakes = {
            key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in arguments.items()
        }
        actual = results(case.operator, fakes)
    assert [(x.shape, x.dtype, x.device) for x in actual] == [(x.shape, x.dtype, x.device) for x in expected]
    assert case.operator.target._schema.name.startswith("gralora::")


def results(operator: type[Call], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Every tensor that an operator gives."""
    return (operator.compute(**arguments),) if operator.results == 1 else operator.compute_with_state(**arguments)


def test_what_a_traced_model_calls_often_has_a_rule_for_its_shape() -> None:
    with FakeTensorMode():
        fake = torch.empty(1)
    ruled = {operator for operator in OPERATORS if operator_for(operator.target, fake) is not operator.target}
    of_states = {CausalConv, GatedRmsNorm, LinearAttention, PromptClamp}
    assert ruled == {Attention, Experts, Mask, RmsNorm, Rotate, TextLength, *of_states}
    for operator in ruled:
        assert schema_names(operator_for(operator.target, fake)) == schema_names(operator.target)


@each_operator
def test_a_call_names_the_arguments_of_the_schema_in_their_order(operator: type[Call]) -> None:
    assert [field.name for field in fields(operator)] == schema_names(operator.target)
    assert [operator.position(name) for name in schema_names(operator.target)] == list(range(len(fields(operator))))


@pytest.mark.parametrize("target", FORMS, ids=str)
def test_an_onnx_form_takes_the_arguments_of_the_schema_in_their_order(target: Any) -> None:
    assert list(inspect.signature(FORMS[target]).parameters) == schema_names(target)


def test_a_call_is_read_and_written_whether_arguments_have_positions_or_names() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    node = graph.call_function(RmsNorm.target, (x,), {"eps": 1e-5, "weight": weight})
    norm = RmsNorm.of(node)
    assert norm == RmsNorm(x, weight, 1e-5)
    assert Rotate.of(node) is None
    assert RmsNorm.of(x) is None
    assert list(RmsNorm.all_in(graph)) == [(node, norm)]
    RmsNorm(x, None, 1e-6).write(node)
    assert (node.args, node.kwargs) == ((x, None, 1e-6), {})
    copy = RmsNorm(node, weight, 1e-6).insert(graph)
    assert RmsNorm.of(copy) == RmsNorm(node, weight, 1e-6)
    graph.lint()


def test_arguments_of_pytorchs_operators_have_names_too() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.rms_norm.default, (x, [8]), {"eps": 1e-5})
    assert named_arguments(node) == {"input": x, "normalized_shape": [8], "weight": None, "eps": 1e-5}
    with pytest.raises(TypeError, match=r"relu calls <.*>, which is not an operator; read its arguments by hand"):
        named_arguments(graph.call_function(torch.relu, (x,)))
