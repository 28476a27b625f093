"""Stochastic depth in a trace: residual branches dropped by sample (drop path), and layerdrop.

Drop path is one operator of the graph, which `train()` and `eval()` switch like any dropout. Layerdrop, which skips
whole layers, is decided in Python and is not part of a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from gralora_fx.errors import warn_caller
from gralora_fx.operators.layers import DropPath
from gralora_fx.tracing.patches.llama_functions import same_code

_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@contextmanager
def drop_paths_as_operators(model: nn.Module) -> Iterator[None]:
    """Let a model's drop-path modules with transformers' code call the operator, within the block.

    Args:
        model: The model; its modules are restored when the block ends.
    """
    with ExitStack() as changed:
        for module in model.modules():
            if is_drop_path(type(module)) and "forward" not in vars(module) and isinstance(module.drop_prob, float):
                changed.enter_context(patch.object(module, "forward", functools.partial(_drop, module)))
        yield


def is_drop_path(kind: type[nn.Module]) -> bool:
    """Whether a class of modules drops paths by the code that transformers' have."""
    if not kind.__name__.endswith("DropPath"):
        return False
    from transformers.models.swin.modeling_swin import SwinDropPath  # which few models need

    return same_code(kind.forward, SwinDropPath.forward)


def _drop(module: Any, hidden_states: Tensor) -> Tensor:
    return DropPath.compute(x=hidden_states, p=module.drop_prob, train=module.training)


@contextmanager
def without_layerdrop(model: nn.Module) -> Iterator[None]:
    """Set layerdrop to zero within the block, and warn that training runs every layer in every step."""
    holders: list[tuple[str, Any]] = [("config", getattr(model, "config", None)), *model.named_modules()]
    changed: list[tuple[Any, str, float]] = []
    names: list[str] = []
    for path, holder in holders:
        for name in _LAYERDROP:
            value = getattr(holder, name, None)
            if isinstance(value, float) and value > 0:
                changed.append((holder, name, value))
                names.append(f"{path}.{name}={value:g}".removeprefix("."))
                setattr(holder, name, 0.0)
    if changed:
        warn_caller(f"layerdrop is not part of a trace ({', '.join(names)}); training runs every layer in every step")
    try:
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)
