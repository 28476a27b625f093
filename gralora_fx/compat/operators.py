"""Kinds of operators in a graph, and fake tensors."""

from __future__ import annotations

from typing import Any

from gralora_fx.compat.versions import fenced

with fenced("torch"):
    from torch._guards import detect_fake_mode
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
    from torch._subclasses import FakeTensor
    from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FakeTensor",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "base_name",
    "detect_fake_mode",
    "is_mutable",
    "returns_alias",
    "schema_of",
]


def schema_of(target: object) -> Any:
    """Arguments and results of an operator, or None for another function."""
    return getattr(target, "_schema", None)


def is_mutable(target: object) -> bool:
    """Whether a target is an operator that writes into one of its arguments."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def base_name(target: OpOverload) -> str:
    """An operator's name without its namespace and overload: `add_` of `aten::add_.Tensor`."""
    return str(target._schema.name.partition("::")[2])


def returns_alias(target: OpOverload) -> bool:
    """Whether an operator's result may alias an argument."""
    return any(returned.alias_info is not None for returned in target._schema.returns)
