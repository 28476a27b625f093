"""Order of the rows of experts' matrices in ONNX Runtime's operator, and in the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.errors import MergeError
from gralora_fx.features.experts.gate import GATE_NOTE, HALVES, NO_GATE, ExpertGate

MOE = "MoE"
_UP = 2  # position of the first product's weights among the operator's inputs


def arranged(matrix: NDArray[Any], gate: ExpertGate, *, is_up: bool, is_transposed: bool = False) -> NDArray[Any]:
    """Return one expert's matrix `[out, in]` or bias `[out]` with its rows in the operator's order.

    `is_up`: it is of the first product; only this has gates. `is_transposed`: the model has `[in, out]`.
    """
    matrix = matrix.T if is_transposed else matrix
    if is_up and gate.layout == HALVES:
        return np.stack(np.split(matrix, 2), axis=1).reshape(matrix.shape)
    return matrix.repeat(2, axis=0) if is_up and is_read_twice(gate) else matrix


def as_modelled(matrix: NDArray[Any], gate: ExpertGate, *, is_up: bool, is_transposed: bool = False) -> NDArray[Any]:
    """Return one expert's matrix with its rows in the model's order; the inverse of `arranged`."""
    if is_up and gate.layout == HALVES:
        matrix = np.concatenate([matrix[::2], matrix[1::2]])
    elif is_up and is_read_twice(gate):
        matrix = matrix[::2]
    return matrix.T if is_transposed else matrix


@dataclass(frozen=True)
class Rows:
    """Row order of a product's matrices (see `Arrangement`)."""

    gate: ExpertGate  # the function between the products
    is_up: bool  # whether it is the first product

    def as_modelled(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return the matrix with the rows in the model's order."""
        return as_modelled(matrix, self.gate, is_up=self.is_up)

    def as_stored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return the matrix with the rows in the operator's order."""
        return arranged(matrix, self.gate, is_up=self.is_up)


def arrangement_at(node: ir.Node, position: int) -> Rows | None:
    """Return the row order of the matrices that a node reads; None for another operator."""
    if node.op_type != MOE:
        return None
    gate = gate_noted_at(node)
    if gate is None:
        raise MergeError(f"{node.name} does not say how its rows are arranged; export it again")
    return Rows(gate, is_up=position == _UP)


def gate_noted_at(node: ir.Node) -> ExpertGate | None:
    """Return the gate noted in a node's metadata, which determines its row order; None without a note."""
    activation, _, layout = node.metadata_props.get(GATE_NOTE, "").partition(" ")
    names = {"alpha": "activation_alpha", "offset": "activation_beta", "limit": "swiglu_limit"}
    numbers = {name: node.attributes[key].as_float() for name, key in names.items() if key in node.attributes}
    return ExpertGate(activation, layout, **numbers) if layout else None


def is_read_twice(gate: ExpertGate) -> bool:
    """Return whether the first product's rows serve as gates and as linear parts."""
    return gate.layout == NO_GATE and gate.activation == "relu2"
