"""Translation of this project's operators to ONNX; for PyTorch's see torchlib and `torch_operators`.

They become nodes of the domain `gralora`, larger than PyTorch's operators and named like the runtime's; a later pass
replaces them by ONNX Runtime's. They take the arguments of `gralora_fx.core.operators`, tensors as inputs and the rest
as attributes, and are written and read here only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self

import onnx_ir as ir

from gralora_fx.base.compat.torch_onnx import current_builder
from gralora_fx.core.operators.attention import Attention, DotProductAttention, Mask
from gralora_fx.core.operators.call import Call
from gralora_fx.core.operators.layers import Reshape, RmsNorm, Rotary, Slice

DOMAIN = "gralora"


class DomainNode(Call[ir.Value]):
    """A node of the domain, with the operator's arguments as attributes; `op_type` is the operator."""

    op_type: ClassVar[str]

    @classmethod
    def of(cls, node: object) -> Self | None:
        """Return a node's arguments; None for another operator."""
        if not isinstance(node, ir.Node) or (node.domain, node.op_type) != (DOMAIN, cls.op_type):
            return None
        return cls.read(node)

    @classmethod
    def read(cls, node: ir.Node) -> Self:
        """Return the arguments of a node known to be the operator."""
        inputs = [*node.inputs, *[None] * (len(cls.tensors) - len(node.inputs))]  # trailing inputs may be missing
        attributes = {name: node.attributes[name].value for name in cls.names() if name not in cls.tensors}
        return cls(**dict(zip(cls.tensors, inputs, strict=True)), **attributes)

    @classmethod
    def all_in(cls, graph: Iterable[ir.Node]) -> Iterator[tuple[ir.Node, Self]]:
        """Yield every node of the operator with its arguments, read in its turn; a pass may change the graph."""
        for node in list(graph):
            taken = cls.of(node)
            if taken is not None:
                yield node, taken

    def node(self) -> ir.Node:
        """Return a new node, for a pass to insert."""
        values = {name: getattr(self, name) for name in self.names()}
        inputs = [values.pop(name) for name in self.tensors]
        return ir.node(self.op_type, inputs, values, domain=DOMAIN, version=1, num_outputs=self.results)


class AttentionNode(DomainNode, Attention[ir.Value]):
    """`Attention`: as `gralora::attention`."""

    op_type = "Attention"


class DotProductAttentionNode(DomainNode, DotProductAttention[ir.Value]):
    """`DotProductAttention`: as `gralora::dot_product_attention`; `is_causal` is 0 or 1."""

    op_type = "DotProductAttention"


class MaskNode(DomainNode, Mask[ir.Value]):
    """`Mask`: as `gralora::mask`; `length` is a tensor of no axes, `dtype` an `ir.DataType`."""

    op_type = "Mask"


class RmsNormNode(DomainNode, RmsNorm[ir.Value]):
    """`RMSNormalization`: as `gralora::rms_norm`."""

    op_type = "RMSNormalization"


class RotaryNode(DomainNode, Rotary[ir.Value]):
    """`RotaryEmbedding`: as `gralora::rotary`; `interleaved` is 0 or 1."""

    op_type = "RotaryEmbedding"


def translation_of(kind: type[DomainNode]) -> Callable[..., Any]:
    """Return an operator's translation to its node of the domain; it takes the operator's arguments in order."""

    def translation(*values: Any) -> Any:
        arguments = dict(zip(kind.names(), values, strict=True))
        for name, value in arguments.items():
            if name in kind.tensors and isinstance(value, int):
                arguments[name] = _add("Constant", [], {"value_int": value})
            elif isinstance(value, bool):
                arguments[name] = int(value)
        node = kind(**arguments).node()
        return _append(node) if len(node.outputs) == 1 else (_append(node), *node.outputs[1:])

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in kind.names()]
    translation.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # torch.onnx reads it
    return translation


def _reshape(x: Any, shape: list[int]) -> Any:
    """Return ONNX `Reshape` to a constant shape, 0 for an unchanged size."""
    sizes = _add("Constant", [], {"value_ints": list(shape)})
    return _add("Reshape", [x, sizes], {})


def _slice(x: Any, axis: int, start: int, stop: int, step: int) -> Any:
    """Return ONNX `Slice` with constant limits."""
    limits = [_add("Constant", [], {"value_ints": [number]}) for number in (start, stop, axis, step)]
    return _add("Slice", [x, *limits], {})


def _add(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> ir.Value:
    """Append a node of ONNX's domain to the graph being translated; return its output."""
    return _append(ir.node(op_type, inputs, attributes))


def _append(node: ir.Node) -> ir.Value:
    tracer: Any = current_builder()
    tracer.nodes.append(node)
    return node.outputs[0]


# each takes the arguments of the operator's schema; features add their own to a translation that uses them
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    Reshape.target: _reshape,
    Slice.target: _slice,
    **{kind.target: translation_of(kind) for kind in DomainNode.__subclasses__()},
}


_MODES = {"bilinear": "linear", "bicubic": "cubic"}


def update_forms(model: ir.Model) -> None:
    """Rewrite nodes whose form changed in opset 20, in place.

    Before: `DFT(x, length, axis=1)`, `GridSample(x, grid, mode="bilinear")`
    After:  `DFT(x, length, 1)`, `GridSample(x, grid, mode="linear")`
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "DFT" and "axis" in node.attributes:
            _axis_as_input(node)
        elif node.domain == "" and node.op_type == "GridSample" and "mode" in node.attributes:
            mode = node.attributes["mode"].as_string()
            if mode in _MODES:
                node.attributes["mode"] = ir.AttrString("mode", _MODES[mode])


def _axis_as_input(node: ir.Node) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    axis = ir.node("Constant", [], {"value_int": node.attributes["axis"].as_int()})
    graph.insert_before(node, axis)
    node.resize_inputs(3)
    node.replace_input_with(2, axis.outputs[0])
    del node.attributes["axis"]
