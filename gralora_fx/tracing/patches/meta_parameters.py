"""Tracing of a model whose parameters have no values: tensors without memory stand in for those on the meta device.

A trace needs shapes, dtypes and a device only. A stand-in has those and a single zero as its storage, so that a model
traces as with its weights. (Fake tensors would do as well, but parameters that are fake make `torch.export` corrupt
memory, seen with torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from gralora_fx.graph.parameters import map_parameters

_MARK = "_gralora_stand_in"


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Put parameters without memory in the place of those on the meta device while the block lasts.

    Args:
        model: The model; a parameter with several names gets one stand-in.

    Yields:
        The model's own parameters by what stands in for them; empty where there are none.
    """
    own: dict[nn.Parameter, nn.Parameter] = {}

    def stand_in(parameter: nn.Parameter, _: str) -> nn.Parameter:
        if not parameter.is_meta:
            return parameter
        zero = torch.zeros((), dtype=parameter.dtype)
        made = nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)
        setattr(made, _MARK, True)
        own[made] = parameter
        return made

    map_parameters(model, stand_in)
    try:
        yield own
    finally:
        take_own(model, own)


def take_own(module: nn.Module, own: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put a model's own parameters where a module, such as a trace, holds what stood in for them.

    Args:
        module: The model itself, or a trace of it that was made within `stand_ins`.
        own: What that yielded.
    """
    map_parameters(module, lambda parameter, _: own.get(parameter, parameter))


def is_without_values(model: nn.Module) -> bool:
    """Whether parameters of a model have no values, so that it can be traced, but what it computes means nothing."""
    return any(parameter.is_meta or hasattr(parameter, _MARK) for parameter in model.parameters())
