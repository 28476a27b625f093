"""Rebuilds a base's trace over the module tree after its tensors or its graph were replaced.

PyTorch replaces parameters in a module tree: `load_state_dict(assign=True)`, `.to()`, `setattr`, sharding. A trace gets
another graph when it is converted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from gralora_fx.core.adapters.base import Base
from gralora_fx.core.graph.surgery import container_at, copy_graph
from gralora_fx.errors import RewriteError


def follow(base: Base) -> None:
    """Take over the graph of a converted trace, and rebuild the trace if the tree has other tensors."""
    if not base.has_graph:
        base.seen_graph = base.traced.graph_module
        _take_constants(base)
        base.slots = base.find_slots(base.traced)
        for slot in base.slots:
            if slot.now is not None and slot.now.dtype != slot.parameter.dtype:
                slot.module._parameters[slot.key] = slot.parameter
        if base.is_current:
            return
    now = _parameters_now(base)
    moved = {id(slot.parameter): now[slot.name] for slot in reversed(base.slots)}  # under the first name
    names = base.traced.tree.parameters.items()
    parameters = {name: now.get(name, moved.get(id(old), old)) for name, old in names}
    traced, training = base.traced, base.traced.training
    graph_module = base.graph_module(copy_graph(traced.graph_module), training, "TracedGraph")
    base.traced = traced.with_graph(graph_module, dataclasses.replace(traced.tree, parameters=parameters))
    base.seen_graph = graph_module
    base.slots = base.find_slots(base.traced)


def _take_constants(base: Base) -> None:
    """Take from the trace everything but parameters that its graph reads: constants, branches, converted buffers."""
    graph_module = base.seen_graph
    for path in dict.fromkeys(str(n.target) for n in graph_module.graph.nodes if n.op in ("get_attr", "call_module")):
        owner, _, name = path.rpartition(".")
        theirs, own = graph_module.get_submodule(owner), container_at(base.tree, owner)
        if name in theirs._buffers:
            own._buffers[name] = theirs._buffers[name]
        elif name in theirs._modules:
            own._modules[name] = theirs._modules[name]
        elif name not in theirs._parameters:
            setattr(own, name, getattr(theirs, name))


def _parameters_now(base: Base) -> Mapping[str, nn.Parameter]:
    """Return the tree's current parameters by name; tied ones stay tied if they share all of their memory."""
    first: dict[int, nn.Parameter] = {}
    now: dict[str, nn.Parameter] = {}
    for slot in base.slots:
        parameter = slot.now
        if not isinstance(parameter, nn.Parameter):
            raise RewriteError(
                f"{slot.name} of the base model is not a parameter any more (it was parametrized or removed after "
                "the trace), so adapters cannot be changed or merged; undo that, or trace the model as it is now"
            )
        if slot.parameter.shape != parameter.shape:
            raise RewriteError(
                f"{slot.name} of the base model has the shape {list(parameter.shape)} instead of "
                f"{list(slot.parameter.shape)} since it was replaced; gather it, or trace the model as it is now"
            )
        same = first.setdefault(id(slot.parameter), parameter)
        if same is not parameter and _is_same_memory(same, parameter):
            slot.module._parameters[slot.key] = parameter = same
        now[slot.name] = parameter
    return now


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same view of the same memory, as tied weights are after `assign=True`."""
    return (
        not one.is_meta
        and one.device == other.device
        and one.dtype == other.dtype
        and (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())
    )
