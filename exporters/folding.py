"""The adapter-free graph that an export is made from."""

from __future__ import annotations

from torch import fx, nn

from gralora_fx.deferred import values_of
from gralora_fx.errors import ExportError
from gralora_fx.merging import merge_deferred
from gralora_fx.model import GraloraModel
from gralora_fx.tracing.traced import TracedModel


def as_traced(model: TracedModel | GraloraModel) -> TracedModel:
    """The adapter-free model: a traced model itself, or a rewritten one whose active adapters fold as it is written.

    Raises:
        ExportError: It is neither.
        MergeError: An adapter cannot be folded.
    """
    if isinstance(model, TracedModel):
        return model
    if not isinstance(model, GraloraModel):
        raise ExportError(
            f"cannot export a {type(model).__name__}; trace it first, or give a TracedModel or GraloraModel"
        )
    return merge_deferred(model) if model.active_adapters else model.traced


def base_of(model: TracedModel | GraloraModel) -> TracedModel:
    """The trace of the base, without adapters: a traced model itself, or what a rewritten one was made of."""
    return model.traced if isinstance(model, GraloraModel) else model


def with_values(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Give every parameter that is made when it is read its values, for a converter that runs the graph.

    Args:
        graph_module: A copy of a graph; its attributes are changed, the parameters are not.

    Raises:
        ExportError: A parameter stands on the meta device and has no source.
        MergeError: A folded weight is not finite.
    """
    made: dict[int, nn.Parameter] = {}
    for path, module in graph_module.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    values = values_of(parameter, f"{path}.{name}")
                    made[id(parameter)] = nn.Parameter(values, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
    return graph_module
