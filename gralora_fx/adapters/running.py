"""The running graph: built anew for every state, then swapped in by one reference."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import fx, nn

from gralora_fx.adapters.adapter import ModelAdapter
from gralora_fx.adapters.base import Base
from gralora_fx.adapters.graph_cache import GraphCache
from gralora_fx.adapters.readers import Readers
from gralora_fx.adapters.state import GraphState, Running, Source
from gralora_fx.errors import RewriteError, first_line
from gralora_fx.graph.overlay import overlay, share_adapters
from gralora_fx.graph.pipeline import GraphPass, Pass, Pipeline, run_pass
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.methods import first_tensor
from gralora_fx.operators.call import COMPUTING
from gralora_fx.passes.insert_adapter import INSERTED, protect_outputs
from gralora_fx.passes.set_weights import OWN_WEIGHTS, SetWeights, UntieWeights
from gralora_fx.tracing.normalize.modes import AnnotateModes, set_mode
from gralora_fx.tracing.traced_model import TracedModel


class RunningGraph:
    """A base model, its adapters, and the graph of the current state.

    A thread that runs the model takes one reference and sees one state from beginning to end. Changes are serialized.

    Attributes:
        base: The base model; its module tree owns every tensor.
        adapters: Adapters by name.
    """

    def __init__(self, traced: TracedModel) -> None:
        """Start with a traced model and no adapter."""
        self._begin(Base(traced))
        self._state = GraphState(training=traced.training)

    def _begin(self, base: Base) -> None:
        self.base = base
        self.adapters: dict[str, ModelAdapter] = {}
        self._lock = threading.RLock()
        self._readers = Readers()
        self._running: Running | None = None  # built on first access, possibly after adapters were added
        self._cache = GraphCache()
        self._suspended: GraphState | None = None  # to which the end of a `disabled()` block returns

    def __getitem__(self, name: str) -> ModelAdapter:
        """An adapter by name; raises `RewriteError` if there is none."""
        if not isinstance(name, str) or name not in self.adapters:
            raise RewriteError(f"no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    @property
    def state(self) -> GraphState:
        """The current state."""
        return self._state if self._running is None else self._running.state

    @property
    def running(self) -> Running:
        """The state and its graph."""
        if self._running is None:
            with self._lock:
                self._running = self._running or self._build(self._state)
        return self._running

    @running.setter
    def running(self, running: Running) -> None:
        self._running = running

    @property
    def traced(self) -> TracedModel:
        """The base's trace, over the model's current tensors."""
        if not self.base.is_current:
            with self._lock:
                self.base.follow()
                sites = {site.path: site for site in self.base.traced.sites}
                self.adapters = {name: adapter.over(sites, self.base.tree) for name, adapter in self.adapters.items()}
                self._cache.clear()
        return self.base.traced

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle: the base, the adapters' plans and the state, from which the graph is rebuilt.

        Raises:
            RewriteError: One of the user's passes cannot be found by its name.
            MergeError: Tensors have changed since they were merged.
        """
        with self._lock:
            for graph_pass in self.state.passes:
                _check_picklable(graph_pass)
            return self._parts()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the graph."""
        self._begin(state["base"])
        sites = {site.path: site for site in self.base.traced.sites}
        adapters = [adapter.over(sites, self.base.tree) for adapter in state["adapters"]]
        self.adapters = {adapter.name: adapter for adapter in adapters}
        self.running = self._build(state["state"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with tensors of its own."""
        other = object.__new__(type(self))
        memo[id(self)] = other
        with self._lock:
            other.__setstate__(copy.deepcopy(self._parts(), memo))
        return other

    def _parts(self) -> dict[str, Any]:
        self.traced  # noqa: B018  # it follows the tree
        self.running.check_fresh()
        return {"base": self.base, "adapters": list(self.adapters.values()), "state": self.state}

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Run the graph of one state, even if another thread switches adapters meanwhile.

        Raises:
            MergeError: Tensors have changed since they were merged.
        """
        if torch.compiler.is_compiling():
            self.running.is_lent = True
            return self.running.graph_module(**inputs)
        with self._readers:
            running = self.running
            running.check_fresh()
            running.is_lent |= torch.is_grad_enabled()
            return running.graph_module(**inputs)

    def lend(self) -> fx.GraphModule:
        """The running graph, for a caller that may keep it."""
        running = self.running
        running.is_lent = True
        return running.graph_module

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let the caller write tensors within the block: no other thread runs the model then."""
        with self._readers.writing(), self._lock:
            yield

    def set_mode(self, training: bool) -> None:
        """Switch the graph to training or evaluation mode; the graph of the other mode is kept."""
        with self._lock:
            before = self.running
            if training == before.state.training:
                return
            other = self._cached(dataclasses.replace(before.state, training=training))
            if other is not None and not (other.is_edited or before.is_edited):
                self.running = other
                self._remember()
                return
            graph = copy_graph(before.graph_module)
            graph_module = before.graph_module
            if set_mode(graph, training) or graph.find_nodes(op="call_module"):
                graph_module = overlay(graph_module, graph, training)
                graph_module.recompile()
            self.running = before.with_mode(training, graph_module)
            self._remember()

    def _show_adapters(self) -> None:
        """Update the running graph module's adapter tensors to the current adapters."""
        share_adapters(self.running.graph_module, self.base.tree)
        self._cache.clear()
        self._remember()

    # -- within -----------------------------------------------------------------------------------------------------

    def _make(self, **changes: Any) -> None:
        """Switch to the current state with some fields changed; an error changes nothing.

        The graphs of the most recent states are cached, so that a switch back builds none.
        """
        state = dataclasses.replace(self.state, **changes)
        cached = self._cached(state) if state.is_repeatable else None
        self.running = cached if cached is not None and not cached.is_edited else self._build(state)
        self._remember()

    def _cached(self, state: GraphState) -> Running | None:
        """The cached graph of a state, if it is still valid."""
        running = self._cache.get(state)
        return running if running is not None and self.base.is_current and self._is_valid(running) else None

    def _remember(self) -> None:
        """Cache the running graph."""
        self._cache.put(self.running, self._suspended)

    def _build(self, state: GraphState) -> Running:
        """Build the graph of a state: a copy of the base's with its weights, adapters and passes applied."""
        traced = self.traced
        graph_module = overlay(self.base.tree, copy_graph(traced.graph_module), state.training)
        graph, modes = graph_module.graph, AnnotateModes(known={node.name for node in traced.graph_module.graph.nodes})
        holding = frozenset({OWN_WEIGHTS, COMPUTING})
        Pipeline[fx.Graph]("adapters", (*self._passes(state), modes), given=holding).run(graph)
        set_mode(graph, state.training)
        for graph_pass in state.passes:
            run_pass(graph_module, graph_pass)
        if state.passes:
            Pipeline("after user passes", (protect_outputs, modes), given=frozenset({INSERTED, COMPUTING})).run(graph)
            set_mode(graph, state.training)
            self._adopt(graph_module)
        graph_module.recompile()
        return Running(state, graph_module, self._casts(state), self._sources(state, graph_module))

    def _passes(self, state: GraphState) -> Iterator[Pass[fx.Graph]]:
        """The passes that make the graph of a state from the base's, in order."""
        replaced = tuple(site for site in self.traced.sites if site.path in state.weights)
        yield UntieWeights(replaced)  # else others that read a tied weight would get the folded one
        yield SetWeights(replaced, state.weights)
        for name in state.active:
            if name not in state.merged:
                yield self.adapters[name].insertion()
            yield from self.adapters[name].redirections(self.traced.tree)  # copies are not folded into anything

    def _adopt(self, graph_module: fx.GraphModule) -> None:
        """Adopt what a pass registered in the graph module, so that it trains and is saved with the model."""
        for table in ("_parameters", "_buffers", "_modules"):
            owned: dict[str, Any] = self.base.tree.__dict__[table]
            targets = {str(node.target).partition(".")[0] for node in graph_module.graph.nodes}
            owned |= {k: v for k, v in graph_module.__dict__[table].items() if k not in owned and k in targets}

    def _casts(self, state: GraphState) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
        """The dtypes of adapters and layers, for which a graph is built."""
        adapters = [self.adapters[name] for name in state.active if name not in state.merged]
        sites = [(adapter.factors[p.site.path], p.site) for adapter in adapters for p in adapter.plan.selected]
        return tuple((first_tensor(factors).dtype, site.weight.dtype) for factors, site in sites)

    def _is_valid(self, running: Running) -> bool:
        """Whether a graph, merged weights included, is still what building its state would give."""
        return running.is_fresh and running.casts == self._casts(running.state)

    def _sources(self, state: GraphState, graph_module: fx.GraphModule) -> list[Source]:
        """The tensors that merged weights were computed from, and those of the modules copied to hold them."""
        if not state.merged:
            return []
        sources = []
        modules = self.base.modules
        for site in self.traced.sites:
            if site.path in state.weights and id(site.weight) in modules:
                sources.append(Source.of(*modules[id(site.weight)]))
                for name in state.merged:
                    adapter = self.adapters[name]
                    owners = adapter.factors.owners(site.path) if site.path in adapter.factors else ()
                    sources += [source for owner, key in owners for source in _tensor_sources(owner, key)]
        folded = {id(weight) for weight in state.weights.values()}
        for path, parameter in graph_module.named_parameters(remove_duplicate=False):
            if id(parameter) not in folded:
                continue
            owner, _, key = path.rpartition(".")
            sources.append(Source.of(graph_module.get_submodule(owner), key))
            if (module := _module_at(self.base.tree, owner)) is not None:
                sources += [Source.of(module, other, with_values=False) for other in module._parameters]
        return sources


def _check_picklable(graph_pass: GraphPass) -> None:
    try:
        pickle.dumps(graph_pass)
    except Exception as error:  # pickle and what it writes raise errors of many types
        name = getattr(graph_pass, "__qualname__", type(graph_pass).__qualname__)
        raise RewriteError(
            f"the graph pass {name} cannot be pickled ({first_line(error)}); define it at the top of a module, or "
            "remove "
            "it with remove_pass() first"
        ) from error


def _tensor_sources(module: nn.Module, key: str) -> list[Source]:
    """The parameters behind an attribute of a module: the parameter itself, or its parametrization's."""
    if key in module._parameters:
        return [Source.of(module, key)]
    behind = module.get_submodule(f"parametrizations.{key}")
    return [Source.of(inner, name) for inner in behind.modules() for name in inner._parameters]


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
