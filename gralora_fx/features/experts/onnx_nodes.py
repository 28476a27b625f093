"""Experts as they are translated to ONNX, before they are lowered, and the nodes of what is between their products."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gralora_fx.exporters.rules.builder import Builder
from gralora_fx.exporters.translation.operators import DomainNode
from gralora_fx.features.experts.operators import Experts


class ExpertsNode(DomainNode, Experts[ir.Value]):
    """`Experts`: as `gralora::experts`; `is_transposed` is 0 or 1."""

    op_type = "Experts"


@dataclass(frozen=True)
class GateNodes:
    """Nodes of ONNX that compute gates (see `Arithmetic`).

    Attributes:
        build: Makes them.
        dtype: Their dtype.
    """

    build: Builder
    dtype: ir.DataType

    def number(self, value: float) -> ir.Value:
        """Return a constant."""
        return self.build.tensor(value, self.dtype)

    def minimum(self, x: ir.Value, high: ir.Value) -> ir.Value:
        """Return `Min`."""
        return self.build("Min", x, high)

    def clip(self, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
        """Return `Clip`."""
        return self.build("Clip", x, low, high)

    def add(self, x: ir.Value, number: ir.Value) -> ir.Value:
        """Return `Add`."""
        return self.build("Add", x, number)

    def multiply(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return `Mul`."""
        return self.build("Mul", x, y)

    def relu(self, x: ir.Value) -> ir.Value:
        """Return `Relu`."""
        return self.build("Relu", x)

    def silu(self, x: ir.Value, alpha: float) -> ir.Value:
        """Return `Mul` with a `Sigmoid`."""
        return self.multiply(x, self.build("Sigmoid", x if alpha == 1 else self.multiply(x, self.number(alpha))))

    def gelu(self, x: ir.Value, approximate: str) -> ir.Value:
        """Return `Gelu`."""
        return self.build("Gelu", x, approximate=approximate)


NODES = (ExpertsNode,)
