"""Tracing of models on the meta device, with placeholder parameters that take no memory.

A trace needs only shapes, dtypes and a device. A placeholder has those and a single zero as its storage, so that a
model is traced as with its weights. (Fake tensors would do as well, but fake parameters make `torch.export` corrupt
memory, as seen with torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from gralora_fx.graph.overlay import map_parameters


@contextmanager
def placeholder_parameters(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Replace parameters on the meta device by placeholders without memory, within the block.

    Args:
        model: The model; a parameter with several names gets one placeholder.

    Yields:
        The model's own parameters by what stands in for them; empty where there are none.
    """
    originals: dict[nn.Parameter, nn.Parameter] = {}

    def placeholder(parameter: nn.Parameter, _: str) -> nn.Parameter:
        if not parameter.is_meta:
            return parameter
        zero = torch.zeros((), dtype=parameter.dtype)
        placeholders = nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)
        originals[placeholders] = parameter
        return placeholders

    if not any(parameter.is_meta for parameter in model.parameters()):
        yield {}
        return
    map_parameters(model, placeholder)
    try:
        yield originals
    finally:
        restore_parameters(model, originals)


def restore_parameters(module: nn.Module, originals: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put a model's own parameters where a module, such as a trace, holds what stood in for them.

    Args:
        module: The model itself, or a trace of it that was made within `placeholder_parameters`.
        originals: What that yielded.
    """
    map_parameters(module, lambda parameter, _: originals.get(parameter, parameter))
