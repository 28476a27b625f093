"""The computation between an expert's two products, written once for PyTorch tensors and for ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")  # a tensor, or a value of an ONNX model
NO_GATE, HALVES, INTERLEAVED = "none", "halves", "interleaved"  # how the outputs of a first product hold gates
GATE_NOTE = "gralora_gate"  # key in the metadata of an exported operator: `<activation> <layout>` of its gate


@dataclass(frozen=True)
class ExpertGate:
    """The function between an expert's two products, of a gate `g` and a linear part `l`, or of `g` alone.

    `act(min(g, limit)) * (clamp(l, -limit, limit) + offset)`, where `silu` is `g * sigmoid(alpha * g)`. The fields are
    arguments of the operator `experts`, of the same names.
    """

    activation: str  # one of `ACTIVATIONS`
    # the gates' places among the first product's outputs: the first half (`"halves"`), even places (`"interleaved"`),
    # or all of them, without a linear part (`"none"`)
    layout: str
    alpha: float = 1.0  # factor within `silu`'s sigmoid
    offset: float = 0.0  # added to the linear part
    limit: float = 0.0  # upper bound of the gate, and bound of the linear part on both sides; 0 for none


class Arithmetic(Protocol[T]):
    """The arithmetic that gates are computed with."""

    def number(self, value: float) -> Any:
        """Return a number in the form that `minimum`, `clip` and `add` take."""
        ...

    def minimum(self, x: T, high: Any) -> T: ...  # noqa: D102

    def clip(self, x: T, low: Any, high: Any) -> T: ...  # noqa: D102

    def add(self, x: T, number: Any) -> T: ...  # noqa: D102

    def multiply(self, x: T, y: T) -> T: ...  # noqa: D102

    def relu(self, x: T) -> T: ...  # noqa: D102

    def silu(self, x: T, alpha: float) -> T:
        """Return `x * sigmoid(alpha * x)`."""
        ...

    def gelu(self, x: T, approximate: str) -> T:
        """Return GELU; `approximate` is `"none"` or `"tanh"`."""
        ...


def _squared_relu(at: Arithmetic[T], gate: ExpertGate, x: T) -> T:
    positive = at.relu(x)
    return at.multiply(positive, positive)


ACTIVATIONS: Mapping[str, Callable[[Arithmetic[Any], ExpertGate, Any], Any]] = {
    "silu": lambda at, gate, x: at.silu(x, gate.alpha),
    "gelu": lambda at, gate, x: at.gelu(x, "none"),
    "gelu_tanh": lambda at, gate, x: at.gelu(x, "tanh"),
    "relu": lambda at, gate, x: at.relu(x),
    "relu2": _squared_relu,
    "identity": lambda at, gate, x: x,
}


def activated(at: Arithmetic[T], gate: ExpertGate, x: T) -> T:
    """Return the activation of gates."""
    result: T = ACTIVATIONS[gate.activation](at, gate, x)
    return result


def gated(at: Arithmetic[T], gate: ExpertGate, part: T, linear: T) -> T:
    """Combine gates and linear parts (see `ExpertGate`)."""
    if gate.limit:
        low, high = (at.number(sign * gate.limit) for sign in (-1, 1))
        part, linear = at.minimum(part, high), at.clip(linear, low, high)
    linear = at.add(linear, at.number(gate.offset)) if gate.offset else linear
    return at.multiply(activated(at, gate, part), linear)
