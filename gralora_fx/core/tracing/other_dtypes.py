"""Converts a trace to another dtype or device by tracing the source model again, since the graph names both.

A float32 graph does not distinguish a dtype that the model names (`softmax(x, dtype=torch.float32)`) from one that
follows its tensors (`x.to(query.dtype)`). A trace of the converted model does, however the model uses its dtype.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import tree_map
from gralora_fx.base.progress.stages import gc_pause
from gralora_fx.base.sources.lazy_tensors import is_lazy
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.graph.surgery import copy_graph, map_parameters, restore_parameters
from gralora_fx.core.tracing.capture import capture_in_mode, features_as_nodes
from gralora_fx.core.tracing.draft import Captured, Draft, called_as
from gralora_fx.core.tracing.normalize.modes import set_mode
from gralora_fx.errors import TraceError, marked

Convert = Callable[[Tensor], Tensor]


class Convertible(Protocol):
    """The parts of a trace that are read here, as described in `TracedModel`."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph."""

    @property
    def tree(self) -> ModuleTree:
        """Module paths and parameters."""

    @property
    def example_inputs(self) -> Mapping[str, Any]:
        """The arguments that it was traced with."""

    @property
    def source(self) -> Draft | str:
        """The draft to trace again, or why there is none."""

    @property
    def merged_adapters(self) -> Mapping[str, Any]:
        """The adapters that were merged into its weights."""

    @property
    def training(self) -> bool:
        """True if the graph is in training mode."""

    def with_graph(self, graph_module: fx.GraphModule, tree: ModuleTree) -> Self:
        """Return the same trace with another graph."""

    def train(self, mode: bool) -> Self:
        """Switch the mode."""


def once_each(convert: Convert) -> Convert:
    """Return a conversion that gives the same result when a tensor is passed again."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def converted(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = (tensor, convert(tensor))
        return done[id(tensor)][1]

    return converted


def trace_converted(traced: Convertible, convert: Convert) -> Captured | None:
    """Return the source's graph in its tensors' new dtype and on their new device, over placeholder parameters.

    None if the old graph stays right; a `TraceError` if the source is not known, or cannot be traced this way.
    """
    kinds = {(p.dtype, p.device) for p in traced.tree.parameters.values() if p.is_floating_point() and not is_lazy(p)}
    named = _devices(traced.graph_module.graph)
    target = None
    for dtype, device in sorted(kinds, key=str):
        to = convert(torch.empty(0, dtype=dtype, device=device))
        if to.dtype != dtype or (to.device != device and not named <= {to.device}):
            target = to
    if target is None:
        return None
    remedy = f"convert the model and trace that, as in trace(model.to({_spelled(target)}))"
    if isinstance(traced.source, str):
        raise TraceError(
            f"the graph computes in its dtype, and cannot be traced again, since {traced.source}; {remedy}"
        )
    if streamed := [name for name, parameter in traced.tree.parameters.items() if is_lazy(parameter)]:
        raise TraceError(
            f"{streamed[0]} is in its file or in few bits, and read when it is needed, so that it cannot be converted; "
            "load the model with its weights in floats"
        )
    floats = {dtype for dtype, _ in kinds}
    try:
        captured = _capture(traced, convert, floats)
        if _is_alike(traced, captured) or _is_alike(traced, _capture(traced, lambda tensor: tensor, floats)):
            return captured
        reason = "its graph was changed, or holds other weights, since it was traced"
    except TraceError as error:
        reason = marked(error)
    raise TraceError(f"cannot convert the trace to {_spelled(target)}: {reason}; {remedy}")


def convert_trace(traced: Convertible, captured: Captured | None, convert: Convert) -> None:
    """Convert a trace's and its source model's tensors in place, and install the graph captured for them, if any."""
    source, training, graph_module = traced.source, traced.training, traced.graph_module
    graph_module._apply(convert)  # type: ignore[no-untyped-call]
    if isinstance(source, Draft):
        source.model._apply(convert)  # type: ignore[no-untyped-call]
    parameters = {**traced.tree.parameters, **dict(graph_module.named_parameters(remove_duplicate=False))}
    fresh: Any = traced
    if captured is not None:
        graph_module = _over_own_tensors(traced, captured, parameters)
        inputs = {**traced.example_inputs, **captured.sample}
        fresh = dataclasses.replace(  # type: ignore[type-var]
            traced,
            example_inputs={name: inputs[name] for name in traced.example_inputs},
            passes=captured.passes,
            source=type(source)(**{**vars(source), "sample": captured.sample}),
        )
    fresh = fresh.with_graph(graph_module, dataclasses.replace(traced.tree, parameters=parameters)).train(training)
    traced.__dict__.clear()  # cached properties of the old graph too
    traced.__dict__.update(vars(fresh))


def _over_own_tensors(
    traced: Convertible, captured: Captured, parameters: Mapping[str, nn.Parameter]
) -> fx.GraphModule:
    """Return a captured graph over a trace's tensors; constants are the graph's own."""
    graph_module = fx.GraphModule(captured.graph_module, copy_graph(captured.graph_module), "TracedGraph")
    known, own = captured.model.named_buffers(remove_duplicate=False), dict(traced.graph_module.named_buffers())
    buffers = {name: own.get(name, buffer) for name, buffer in known}
    for path, module in graph_module.named_modules():
        prefix = f"{path}." if path else ""
        module._parameters.update({name: parameters[prefix + name] for name in module._parameters})
        module._buffers.update({k: buffers[prefix + k] for k in module._buffers if prefix + k in buffers})
    return graph_module


class ToConvert(nn.Module):
    """A module whose conversion methods convert a trace."""

    def __init__(self, traced: Convertible) -> None:
        super().__init__()
        self.traced = traced

    def _apply(self, fn: Convert, recurse: bool = True) -> ToConvert:
        """Convert the trace; its own dtype and device change nothing."""
        captured = trace_converted(self.traced, fn)
        probes = [torch.empty(0, dtype=p.dtype, device=p.device) for p in self.traced.tree.parameters.values()]
        if captured is not None or any(_kind(fn(probe)) != _kind(probe) for probe in probes):
            if self.traced.merged_adapters:  # its other weights are those of the base, which stays as it is
                _take_own_parameters(self.traced)
            convert_trace(self.traced, captured, once_each(fn))
        return self


def _take_own_parameters(traced: Convertible) -> None:
    """Give a trace its own parameter objects, over the same memory."""
    own: dict[nn.Parameter, nn.Parameter] = {}

    def owned(parameter: nn.Parameter) -> nn.Parameter:
        return own.setdefault(parameter, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))

    map_parameters(traced.graph_module, lambda parameter, _: owned(parameter))
    parameters = {name: owned(parameter) for name, parameter in traced.tree.parameters.items()}
    layers = traced.with_graph(traced.graph_module, dataclasses.replace(traced.tree, parameters=parameters))
    traced.__dict__.update(vars(layers))


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _capture(traced: Convertible, convert: Convert, floats: Collection[torch.dtype]) -> Captured:
    """Capture the source model again, with its tensors converted and in the modes of the trace."""
    source = traced.source
    assert isinstance(source, Draft)

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        result = convert(value)
        return result if value.dtype in floats or not value.is_floating_point() else result.to(value.dtype)

    draft = dataclasses.replace(source, sample=tree_map(converted, dict(source.sample)), has_values=False)
    with ExitStack() as changed:
        changed.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the same warnings were shown when the model was traced
        if source.appended is not None:
            changed.enter_context(source.appended.appended_to(source.model))
        changed.enter_context(_converted_tensors(source.model, traced.tree.parameters, convert))
        changed.enter_context(gc_pause())
        changed.enter_context(features_as_nodes(source.model))  # grouped products take no placeholders
        changed.enter_context(called_as(draft))
        captured = capture_in_mode(draft)
    set_mode(captured.graph_module.graph, traced.training)
    return captured


@contextmanager
def _converted_tensors(model: nn.Module, kinds: Mapping[str, Tensor], convert: Convert) -> Iterator[None]:
    """Give a model converted buffers, and empty placeholders for converted parameters, within the block."""
    originals: dict[nn.Parameter, nn.Parameter] = {}

    def placeholder(parameter: nn.Parameter, name: str) -> nn.Parameter:
        kind = kinds.get(name, parameter)
        zero = convert(torch.zeros((), dtype=kind.dtype, device=kind.device))
        made = nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)
        originals[made] = parameter
        return made

    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    convert_buffer = once_each(convert)
    map_parameters(model, placeholder)
    try:
        for module, table in buffers:
            module._buffers.update(
                {k: None if buffer is None else convert_buffer(buffer) for k, buffer in table.items()}
            )
        yield
    finally:
        restore_parameters(model, originals)
        for module, table in buffers:
            module._buffers.update(table)


def _is_alike(traced: Convertible, captured: Captured) -> bool:
    """Return whether two graphs are equal node for node, except for the dtypes and devices that they name."""
    return _structure(traced.graph_module) == _structure(captured.graph_module)


def _structure(graph_module: fx.GraphModule) -> list[Any]:
    graphs = [part.graph for part in graph_module.modules() if isinstance(part, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    places = {node: index for index, node in enumerate(nodes)}

    def masked(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return places[argument]
        return type(argument) if isinstance(argument, (torch.dtype, torch.device)) else argument

    return [(node.op, node.target, repr(fx.node.map_aggregate((node.args, node.kwargs), masked))) for node in nodes]


def _devices(graph: fx.Graph) -> set[torch.device]:
    values = (value for node in graph.nodes for value in (*node.args, *node.kwargs.values()))
    return {value for value in values if isinstance(value, torch.device)}


def _spelled(tensor: Tensor) -> str:
    """Return the Python text of the arguments that convert to a tensor's dtype and device."""
    return str(tensor.dtype) if tensor.device.type == "cpu" else f"{str(tensor.device)!r}, {tensor.dtype}"
