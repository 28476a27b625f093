"""Mixtures of experts in a trace: all experts by products of whole tensors, without a loop over those that are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers import PreTrainedModel

_LOOP = "eager"
_PRODUCTS = "grouped_mm"  # transformers' own default for most models


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
