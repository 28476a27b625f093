"""Effects of a graph's nodes, for whatever moves or repeats nodes: all but known operators have some."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import OpOverload, is_mutable

_F = TypeVar("_F", bound=Callable[..., Any])
_NAMES = "getitem add sub mul floordiv truediv mod pow neg eq ne lt le gt ge and_ or_ not_"
_PURE = {getattr(operator, name) for name in _NAMES.split()} | {getattr}  # neither `iadd` nor `setitem`
_UPDATING = ("batch_norm", "instance_norm")  # write running statistics in training, which their schemas do not say
_NO_EFFECT = "gralora_no_effect"


def without_effect(function: _F) -> _F:
    """Mark a function of graphs as one that writes into nothing that other nodes read, and draws no random numbers."""
    setattr(function, _NO_EFFECT, True)
    return function


def may_write(node: fx.Node) -> bool:
    """Return whether a node may write into a tensor that others read; a function, method or module not known may."""
    target: Any = node.target
    if node.op in ("placeholder", "get_attr", "output") or _is_pure(target):
        return False
    if node.op == "call_module" or any(name in str(target) for name in _UPDATING):
        return True
    if isinstance(target, OpOverload):
        return is_mutable(target)
    if target is nn.functional.dropout:
        return len(node.args) > 3 or bool(node.kwargs.get("inplace"))
    name = target if isinstance(target, str) else getattr(target, "__name__", "_")
    if name.endswith("_") or name.startswith(("set_", "__")) or "out" in node.kwargs:
        return True
    if node.op == "call_method":  # a list has a `sort` too
        return name == "sort" or not isinstance(getattr(Tensor, name, None), MethodDescriptorType)
    owners = (torch, nn.functional, torch.linalg)
    return not (isinstance(target, BuiltinFunctionType) and any(getattr(o, name, None) is target for o in owners))


def has_effect(node: fx.Node) -> bool:
    """Return whether a node may write into a tensor or draw random numbers, so that its place matters."""
    if isinstance(node.target, OpOverload):
        return may_write(node) or torch.Tag.nondeterministic_seeded in node.target.tags
    return not _is_pure(node.target)


def _is_pure(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    return target in _PURE or getattr(target, _NO_EFFECT, False) or name.startswith("sym_")
