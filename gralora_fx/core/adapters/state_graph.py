"""The state of a rewritten graph, the graph built for it, and the graphs of recent states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.adapters.base import Base
from gralora_fx.core.adapters.insert_adapter import INSERTED, protect_outputs
from gralora_fx.core.adapters.other_parameters import OWN_WEIGHTS, SetWeights, UntieWeights
from gralora_fx.core.graph.pipeline import GraphPass, Pass, Pipeline
from gralora_fx.core.graph.surgery import (
    CountedGraph,
    FlatGraph,
    copy_graph,
    overlay,
    set_mode_of_modules,
    share_adapters,
)
from gralora_fx.core.methods import first_tensor
from gralora_fx.core.methods.low_rank import accumulate
from gralora_fx.core.operators import COMPUTING
from gralora_fx.core.tracing.normalize.modes import AnnotateModes, set_mode
from gralora_fx.errors import MergeError, RewriteError

if TYPE_CHECKING:
    from gralora_fx.core.adapters.merged_sources import Source
    from gralora_fx.core.adapters.run_forms import RunForm
    from gralora_fx.core.graph.checkpointing import Checkpointing

_MOST = 32  # cached graphs; each has its own nodes and code, over shared tensors


@dataclass(frozen=True)
class GraphState:
    """The state of a rewritten graph."""

    active: tuple[str, ...] = ()  # names of the adapters whose outputs are added, merged ones included
    merged: tuple[str, ...] = ()  # names of the adapters folded into `weights`
    weights: Mapping[str, nn.Parameter] = field(default_factory=dict)  # the folded weights by site path
    unties: bool = False  # whether tied weights were untied for folding
    passes: tuple[GraphPass, ...] = ()  # the user's passes, which run over every graph
    training: bool = False  # whether the graph is in training mode
    drops: bool = True  # whether training has the dropout of the model and of its adapters
    # which blocks are recomputed in the backward pass of training; None for none
    checkpointing: Checkpointing | None = None
    by_row: tuple[str, ...] = ()  # names of adapters that act only on the rows that a call gives them

    @property
    def identity(self) -> Hashable:
        """A key that identifies the state, apart from the mode: names, and ids of weights and passes."""
        weights_and_passes = (*map(id, self.weights.values()), *map(id, self.passes))
        return (self.active, self.merged, self.by_row, self.drops, self.checkpointing, *weights_and_passes)

    @property
    def is_repeatable(self) -> bool:
        """True if rebuilding its graph gives the same: nothing is merged, and no user pass runs."""
        return not self.merged and not self.passes


class StateGraph:
    """A state and its flat graph, and the module that runs; a later switch does not change it for a running thread."""

    def __init__(
        self,
        state: GraphState,
        flat: FlatGraph,
        base: Base,
        casts: tuple[tuple[torch.dtype, torch.dtype], ...],
        sources: Iterable[Source],
    ) -> None:
        self.state = state  # the state
        self.flat = flat  # the flat graph, over tensors of the parameter tree and the merged weights
        self.casts = casts  # the dtypes of adapters and layers that it was built for
        # whether something else may hold the merged weights (a caller that was given the graph, autograd, a compiled
        # program), so that their memory must not be written again
        self.is_lent = False
        self._base = base
        self._was_edited = False  # by hand, in another mode
        self._shown: dict[str, tuple[Any, ...]] | None = None  # its nodes when it was first shown to a caller
        self._sources = tuple(sources)
        self._running_edits = flat.edits
        self._running = self._new_running(flat.module)
        self._forms: dict[RunForm, tuple[int, fx.GraphModule]] = {}

    @property
    def running(self) -> fx.GraphModule:
        """The graph module that runs, which calls its blocks as submodules; rebuilt after an edit of the flat graph."""
        edits = self.flat.edits
        if edits != self._running_edits:
            if torch.compiler.is_compiling():
                return self.flat.module
            self._running, self._running_edits = self._new_running(self.flat.module), edits
        return self._running

    def running_as(self, form: RunForm) -> fx.GraphModule:
        """Return the graph module of a variant; it is built once, and rebuilt after an edit."""
        self._make_form(*form)
        edits, made = self._forms[form]
        assert edits == self.flat.edits  # a compiled program is compiled again after an edit
        return made

    # torch.compile calls this while tracing, as a constant
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _make_form(self, *fields: Any) -> None:
        from gralora_fx.core.adapters.run_forms import RunForm, in_form

        form = RunForm(*fields)
        edits, _ = self._forms.get(form, (-1, None))
        if edits != self.flat.edits:
            made = self._new_running(in_form(self.flat.module, form, self._base.traced))
            self._forms[form] = (self.flat.edits, made)

    def _new_running(self, flat: CountedGraph) -> fx.GraphModule:
        traced, passes = self._base.traced, self._training_passes()
        if not traced.blocks:
            if flat is self.flat.module:
                if not passes:
                    return self.flat.compiled()
                flat = overlay(flat, copy_graph(flat), self.state.training)
            for graph_pass in passes:
                graph_pass(flat.graph)
            flat.recompile()
            return flat
        from gralora_fx.core.graph.block_calls import NoBlock
        from gralora_fx.core.graph.block_modules import running_module

        checkpointing = self.state.checkpointing if self.state.training else None
        try:
            return running_module(flat, self._base.tree, traced.blocks, checkpointing, passes)
        except NoBlock as error:
            others = [path for path in traced.blocks if path != error.path]
            raise RewriteError(
                f"the graph's block {error.path} cannot run as a module: {error.reason}. Change the pass that put it "
                f"there, or trace the model without this block (blocks={others})"
            ) from error

    def _training_passes(self) -> tuple[Pass[fx.Graph], ...]:
        """Return the passes for training graphs, which replace subgraphs by nodes with gradients of their own."""
        adapted = self._base.computed or self.flat.module.graph.find_nodes(op="call_function", target=accumulate)
        if not (self.state.training and adapted):
            return ()
        from gralora_fx.core.adapters.fuse_linears import fuse_adapted_linears

        return (fuse_adapted_linears,)

    def show_adapters(self) -> None:
        """Point the graph's adapter tensors to those of the tree."""
        share_adapters(self.flat.module, self._base.tree)
        share_adapters(self._running, self._base.tree)
        self._forms = {}

    def with_state(self, state: GraphState, flat: CountedGraph | None = None) -> StateGraph:
        """Return the same adapters in another mode, over the same tensors, or with other checkpointing."""
        shared = self.flat if flat in (None, self.flat.module) else FlatGraph(flat)
        other = StateGraph(state, shared, self._base, self.casts, self._sources)
        other._was_edited = self.is_edited
        other._shown = self._shown if shared is self.flat else None
        self.is_lent = other.is_lent = True
        return other

    def show(self) -> fx.GraphModule:
        """Return the flat graph to a caller, who may keep it and edit it."""
        self.is_lent = True
        if self._shown is None:
            from gralora_fx.core.graph.user_pass import snapshot

            self._shown = snapshot(self.flat.module.graph)
        return self.flat.compiled()

    @property
    def is_edited(self) -> bool:
        """True if the graph was edited by hand since it was built, recompiled or not."""
        if self._shown is None or self._was_edited:
            return self._was_edited
        from gralora_fx.core.graph.user_pass import is_edited

        return is_edited(self.flat.module.graph, self._shown)

    @property
    def is_compiled(self) -> bool:
        """True if the code is the graph's."""
        module = self.flat.compiled()
        return bool(module.graph.python_code("self").src == module.code)

    @property
    def is_fresh(self) -> bool:
        """True if the tensors that the merged weights were computed from are unchanged."""
        return all(source.is_unchanged for source in self._sources)

    def check_fresh(self) -> None:
        """Raise if tensors that the merged weights were computed from have changed."""
        if not self.is_fresh:
            changed = next(source.key for source in self._sources if not source.is_unchanged)
            raise MergeError(
                f"a tensor ({changed}) changed after {', '.join(self.state.merged)} was merged, so the merged weights "
                "are not those of the model any more; call unmerge_adapter(), and merge again"
            )


class GraphCache:
    """An LRU cache of graphs by state.

    Graphs with merged weights, which take memory, and with a user's pass, which a rebuild may change, are kept only for
    their other mode, and for the end of a block in which adapters are disabled.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, StateGraph] = OrderedDict()

    def get(self, state: GraphState) -> StateGraph | None:
        """Return the graph of a state, valid or not; None if it is not cached."""
        key = (state.identity, state.training)
        if (graph := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
        return graph

    def put(self, graph: StateGraph, suspended: GraphState | None) -> None:
        """Cache the graph that runs now, and drop those that are no longer of use."""
        state = graph.state
        self._graphs[state.identity, state.training] = graph
        self._graphs.move_to_end((state.identity, state.training))
        current = {kept.identity for kept in (state, suspended) if kept is not None}
        for key, other in list(self._graphs.items()):
            if not (other.state.is_repeatable or other.state.by_row or other.state.identity in current):
                del self._graphs[key]
        if len(self._graphs) > _MOST:
            self._graphs.popitem(last=False)

    def clear(self) -> None:
        """Drop every graph, after a change to something that all were built from."""
        self._graphs.clear()


def build_graph(state: GraphState, base: Base, adapters: Mapping[str, ModelAdapter]) -> StateGraph:
    """Build the graph of a state: the passes for weights, adapters and the user's own run over a copy of the base's."""
    traced = base.traced
    graph_module = overlay(base.tree, copy_graph(traced.graph_module), state.training)
    graph, modes = graph_module.graph, AnnotateModes(known={node.name for node in traced.graph_module.graph.nodes})
    passes: tuple[Pass[fx.Graph], ...] = (*_passes(state, base, adapters), modes)
    Pipeline[fx.Graph]("adapters", passes, given=frozenset({OWN_WEIGHTS, COMPUTING})).run(graph)
    set_mode(graph, state.training, drops=state.drops)
    if state.passes:
        from gralora_fx.core.adapters.history import run_history

        run_history(graph_module, state.passes, base.tree, base.added, elsewhere=(*state.merged, *state.by_row))
        set_mode_of_modules(graph_module, state.training)
        graph = graph_module.graph
        Pipeline("after user passes", (protect_outputs, modes), given=frozenset({INSERTED, COMPUTING})).run(graph)
        set_mode(graph, state.training, drops=state.drops)
    graph.lint()
    sources: list[Source] = []
    if state.merged:
        from gralora_fx.core.adapters.merged_sources import sources_of

        sources = sources_of(state.weights, [adapters[name] for name in state.merged], graph_module, base)
    return StateGraph(state, FlatGraph(graph_module), base, dtypes_of(state, adapters), sources)


def _passes(state: GraphState, base: Base, adapters: Mapping[str, ModelAdapter]) -> Iterator[Pass[fx.Graph]]:
    """Yield the passes that turn the base's graph into a state's, in order."""
    traced = base.traced
    replaced = tuple(site for site in traced.adaptable if site.path in state.weights)
    yield UntieWeights(replaced)  # else others that read a tied weight would get the folded one
    yield SetWeights(replaced, state.weights)
    if base.computed:
        from gralora_fx.core.graph.packed_weights import ComputeWeights

        yield ComputeWeights(base.computed, {name for site in replaced for name in traced.tree.names_of(site.weight)})
    if state.by_row:
        from gralora_fx.core.adapters.insert_by_row import InsertByRow

        yield InsertByRow(tuple(adapters[name] for name in state.by_row), traced.tree, traced.main_input_name)
    for name in state.active:
        if name not in state.merged:
            yield adapters[name].insertion()
        if adapters[name].copies:  # copies are not folded
            from gralora_fx.core.adapters.module_copies import redirection

            yield redirection(adapters[name], traced.tree)


def dtypes_of(state: GraphState, adapters: Mapping[str, ModelAdapter]) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    """Return the dtypes of adapters and layers that a graph is built for."""
    acting = [adapters[name] for name in (*state.active, *state.by_row) if name not in state.merged]
    sites = [(adapter.factors[p.site.path], p.site) for adapter in acting for p in adapter.plan.selected]
    return tuple((first_tensor(factors).dtype, site.weight.dtype) for factors, site in sites)
