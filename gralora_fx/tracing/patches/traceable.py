"""What a trace cannot record of a model, in a form that it can: checkpoints, inference mode, loops, skipped layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils import checkpoint
from transformers import PreTrainedModel

from gralora_fx.errors import warn_caller

_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
_LOOP = "eager"
_PRODUCTS = "grouped_mm"  # transformers' own default for most models


@contextmanager
def traceable_modes() -> Iterator[list[str]]:
    """Within the block, checkpoints call their function directly, and inference mode only turns gradients off.

    A trace would record a reentrant checkpoint as a forward without gradients, and inference mode not at all.

    Yields:
        A list to which each use of a checkpoint adds the name of its function.
    """
    used: list[str] = []
    around = checkpoint._checkpoint_without_reentrant_generator

    def note(function: Any) -> None:
        used.append(getattr(function, "__qualname__", type(function).__qualname__))

    class Direct:
        """Calls a function directly, in place of `CheckpointFunction`."""

        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            note(function)
            return function(*args)

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        note(function)
        return around(function, *args, **kwargs)

    def enter(mode: Any) -> None:
        mode._inference_mode_context = torch.is_grad_enabled()
        torch.set_grad_enabled(not mode.mode)

    def leave(mode: Any, *_: object) -> None:
        torch.set_grad_enabled(mode._inference_mode_context)

    inference = patch.multiple(torch.inference_mode, __enter__=enter, __exit__=leave)
    direct = patch.multiple(checkpoint, CheckpointFunction=Direct, _checkpoint_without_reentrant_generator=noted)
    with direct, inference:
        yield used


@contextmanager
def experts_as_products(model: nn.Module) -> Iterator[None]:
    """Let a model whose experts run in a loop compute them by grouped products, within the block.

    The loop runs over the experts that some token uses, which a graph cannot know. transformers has both forms of every
    mixture of experts that it calls through its interface, and some models choose the loop.

    Args:
        model: The model; its form of experts is restored when the block ends.
    """
    with ExitStack() as changed:
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and _loops(part):
                part.set_experts_implementation(_PRODUCTS)
                changed.callback(part.set_experts_implementation, _LOOP)
        yield


def _loops(model: PreTrainedModel) -> bool:
    """Whether a model's experts run in a loop, and may be computed otherwise."""
    return bool(model._can_set_experts_implementation()) and model.get_experts_implementation()[""] == _LOOP


@contextmanager
def without_layerdrop(model: nn.Module) -> Iterator[None]:
    """Set layerdrop to zero within the block, and warn that training runs every layer in every step.

    It skips whole layers, which is decided in Python and not part of a graph.
    """
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
