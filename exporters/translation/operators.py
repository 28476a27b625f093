"""The ONNX form of this project's operators: nodes of the domain `gralora`, or ONNX's own.

Those of the domain are larger than PyTorch's operators and named as the runtime's; a later pass replaces them by what
ONNX Runtime has. What a node of the domain takes is written and read here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import onnx_ir as ir

from gralora_fx.compat.torch_onnx import current_builder
from gralora_fx.operators.attention import Attention
from gralora_fx.operators.constant_sizes import Reshape, Slice
from gralora_fx.operators.dot_product_attention import DotProductAttention
from gralora_fx.operators.mask import Mask
from gralora_fx.operators.rms_norm import RmsNorm
from gralora_fx.operators.rotary import Rotary

DOMAIN = "gralora"


@dataclass(frozen=True)
class DomainNode:
    """What a node of the domain takes, by name: its inputs in their order, then its attributes.

    Attributes:
        op_type: The operator.
        attributes: Which fields are attributes.
    """

    op_type: ClassVar[str]
    attributes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, node: ir.Node | None) -> Self | None:
        """What a node takes; None where it is another operator."""
        if node is None or (node.domain, node.op_type) != (DOMAIN, cls.op_type):
            return None
        return cls.read(node)

    @classmethod
    def read(cls, node: ir.Node) -> Self:
        """What a node that is known to be the operator takes."""
        count = len(fields(cls)) - len(cls.attributes)
        inputs = [*node.inputs, *[None] * (count - len(node.inputs))]  # trailing ones may be left out
        return cls(*inputs, *(node.attributes[name].value for name in cls.attributes))

    @classmethod
    def all_in(cls, nodes: Iterable[ir.Node]) -> Iterator[tuple[ir.Node, Self]]:
        """Every node of the operator among some, with what it takes.

        The nodes are listed first, and each is read when its turn comes, so a pass may change the graph meanwhile.
        """
        for node in list(nodes):
            taken = cls.of(node)
            if taken is not None:
                yield node, taken

    @classmethod
    def position(cls, name: str) -> int:
        """Which input of a node a name is."""
        return [field.name for field in fields(cls)].index(name)

    def node(self) -> ir.Node:
        """A new node, for a pass to insert."""
        inputs = [getattr(self, field.name) for field in fields(self) if field.name not in self.attributes]
        attributes = {name: getattr(self, name) for name in self.attributes}
        return ir.node(self.op_type, inputs, attributes, domain=DOMAIN, version=1)

    def add(self) -> ir.Value:
        """A new node in the graph that is being translated; its output."""
        return _append(self.node())


@dataclass(frozen=True)
class AttentionNode(DomainNode):
    """`Attention`: as `gralora::attention`, without dropout."""

    op_type = "Attention"
    attributes = ("scale", "window", "softcap")

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    sinks: ir.Value | None
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class DotProductAttentionNode(DomainNode):
    """`DotProductAttention`: as `gralora::dot_product_attention`; `is_causal` is 0 or 1."""

    op_type = "DotProductAttention"
    attributes = ("scale", "is_causal")

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    padding: ir.Value | None
    scale: float
    is_causal: int


@dataclass(frozen=True)
class MaskNode(DomainNode):
    """`Mask`: as `gralora::mask`; `length` is a tensor of no axes, `dtype` an `ir.DataType`."""

    op_type = "Mask"
    attributes = ("window", "dtype")

    padding: ir.Value
    length: ir.Value
    window: int
    dtype: int


@dataclass(frozen=True)
class RmsNormNode(DomainNode):
    """`RMSNormalization`: as `gralora::rms_norm`."""

    op_type = "RMSNormalization"
    attributes = ("epsilon",)

    x: ir.Value
    weight: ir.Value | None
    epsilon: float


@dataclass(frozen=True)
class RotaryNode(DomainNode):
    """`RotaryEmbedding`: as `gralora::rotary`; `interleaved` is 0 or 1."""

    op_type = "RotaryEmbedding"
    attributes = ("interleaved",)

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: int


def _attention(
    query: Any, key: Any, value: Any, mask: Any, sinks: Any, scale: float, window: int, softcap: float, dropout: float
) -> Any:
    return AttentionNode(query, key, value, mask, sinks, scale=scale, window=window, softcap=softcap).add()


def _dot_product_attention(
    query: Any, key: Any, value: Any, mask: Any, padding: Any, scale: float, is_causal: bool
) -> Any:
    return DotProductAttentionNode(query, key, value, mask, padding, scale=scale, is_causal=int(is_causal)).add()


def _mask(padding: Any, length: Any, window: int, dtype: int) -> Any:
    if isinstance(length, int):
        length = _add("Constant", [], {"value_int": length})
    return MaskNode(padding, length, window=window, dtype=dtype).add()


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return RmsNormNode(x, weight, epsilon=eps).add()


def _rotary(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    return RotaryNode(x, cos, sin, interleaved=int(interleaved)).add()


def _reshape(x: Any, shape: list[int]) -> Any:
    """ONNX `Reshape` to a constant shape, 0 for a size that stays as it is."""
    sizes = _add("Constant", [], {"value_ints": list(shape)})
    return _add("Reshape", [x, sizes], {})


def _slice(x: Any, axis: int, start: int, stop: int, step: int) -> Any:
    """ONNX `Slice` with constant limits."""
    limits = [_add("Constant", [], {"value_ints": [number]}) for number in (start, stop, axis, step)]
    return _add("Slice", [x, *limits], {})


def _add(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> ir.Value:
    """A new node of ONNX's own in the graph that is being translated; its output."""
    return _append(ir.node(op_type, inputs, attributes))


def _append(node: ir.Node) -> ir.Value:
    tracer: Any = current_builder()
    tracer.nodes.append(node)
    return node.outputs[0]


# each takes the arguments of the operator's schema
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    RmsNorm.target: _rms_norm,
    Rotary.target: _rotary,
    Reshape.target: _reshape,
    Slice.target: _slice,
    Attention.target: _attention,
    DotProductAttention.target: _dot_product_attention,
    Mask.target: _mask,
}
