"""Tracing of a model whose parameters have no values: tensors without memory stand in for those on the meta device.

A trace needs shapes, dtypes and a device only. A stand-in has those and a single zero as its storage, so that a model
traces as with its weights. (Fake tensors would do as well, but parameters that are fake make `torch.export` corrupt
memory, seen with torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import fx, nn

_MARK = "_gralora_stand_in"


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[dict[int, nn.Parameter]]:
    """Put parameters without memory in the place of those on the meta device while the block lasts.

    Args:
        model: The model; a parameter with several names gets one stand-in.

    Yields:
        The model's own parameters by the identity of what stands in for them; empty where there are none.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    made: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:
        if id(parameter) not in made:
            zero = torch.zeros((), dtype=parameter.dtype)
            stand_in = nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)
            setattr(stand_in, _MARK, True)
            made[id(parameter)] = stand_in
    own = {id(made[id(parameter)]): parameter for _, _, parameter in places}
    try:
        for module, name, parameter in places:
            module._parameters[name] = made[id(parameter)]
        yield own
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def take_own(graph_module: fx.GraphModule, own: Mapping[int, nn.Parameter]) -> None:
    """Put a model's own parameters where a trace holds what stood in for them.

    Args:
        graph_module: A trace that was made within `stand_ins`.
        own: What it yielded.
    """
    for module in graph_module.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in own:
                module._parameters[name] = own[id(parameter)]


def is_without_values(model: nn.Module) -> bool:
    """Whether parameters of a model have no values, so that it can be traced, but what it computes means nothing."""
    return any(parameter.is_meta or hasattr(parameter, _MARK) for parameter in model.parameters())
