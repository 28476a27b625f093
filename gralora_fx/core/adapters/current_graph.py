"""The graph that runs: built for every state, then swapped in by one reference."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import fx

from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.adapters.base import Base
from gralora_fx.core.adapters.state_graph import GraphCache, GraphState, StateGraph, build_graph, dtypes_of
from gralora_fx.core.graph.pipeline import GraphPass
from gralora_fx.core.graph.surgery import copy_graph, overlay
from gralora_fx.core.tracing.normalize.modes import dropouts, set_mode, trained_probability
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import RewriteError, first_line
from gralora_fx.format.input_names import ROWS

if TYPE_CHECKING:
    from gralora_fx.core.adapters.run_forms import RunForm
    from gralora_fx.core.graph.checkpointing import Checkpointing
    from gralora_fx.core.methods.low_rank import Rows


class CurrentGraph:
    """A base model, its adapters by name, and the graph of the current state.

    A thread that runs the model takes one reference, so it sees one state from beginning to end. Changes are
    serialized.
    """

    def __init__(self, traced: TracedModel) -> None:
        self._begin(Base(traced))
        self._state = GraphState(training=traced.training, checkpointing=traced.checkpointing)

    def _begin(self, base: Base) -> None:
        self.base = base
        self.adapters: dict[str, ModelAdapter] = {}
        self._lock = threading.RLock()
        self._readers = ReadWriteLock()
        self._current: StateGraph | None = None  # built on first access, possibly after adapters were added
        self._cache = GraphCache()
        base.running_block = lambda path: self.current.running.get_submodule(path)  # type: ignore[assignment,return-value]
        self._suspended: GraphState | None = None  # to which the end of a `disabled()` block returns

    def __getitem__(self, name: str) -> ModelAdapter:
        """Return an adapter by name; raise `RewriteError` if there is none."""
        if not isinstance(name, str) or name not in self.adapters:
            raise RewriteError(f"no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    @property
    def state(self) -> GraphState:
        """The current state."""
        return self._state if self._current is None else self._current.state

    @property
    def is_suspended(self) -> bool:
        """True if all adapters are disabled."""
        return self._suspended is not None

    @property
    def current(self) -> StateGraph:
        """The state and its graph."""
        if self._current is None:
            with self._lock:
                self._current = self._current or self._build(self._state)
        return self._current

    @current.setter
    def current(self, graph: StateGraph) -> None:
        self._current = graph

    @property
    def traced(self) -> TracedModel:
        """The base's trace, over the model's current tensors."""
        if not self.base.is_current:
            from gralora_fx.core.adapters.replaced_tensors import follow

            with self._lock:
                follow(self.base)
                sites = {site.path: site for site in self.base.traced.adaptable}
                self.adapters = {name: adapter.over(sites, self.base.tree) for name, adapter in self.adapters.items()}
                self._cache.clear()
        return self.base.traced

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle: the base, the adapters' plans and the state; the graph is rebuilt."""
        with self._lock:
            for graph_pass in self.state.passes:
                _check_picklable(graph_pass)
            return self._parts()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(state["base"])
        sites = {site.path: site for site in self.base.traced.adaptable}
        adapters = [adapter.over(sites, self.base.tree) for adapter in state["adapters"]]
        self.adapters = {adapter.name: adapter for adapter in adapters}
        self.current = self._build(state["state"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = object.__new__(type(self))
        memo[id(self)] = other
        with self._lock:
            other.__setstate__(copy.deepcopy(self._parts(), memo))
        return other

    def _parts(self) -> dict[str, Any]:
        self.traced  # noqa: B018  # it follows the tree
        self.check_adopted()
        self.current.check_fresh()
        return {"base": self.base, "adapters": list(self.adapters.values()), "state": self._state_after_blocks()}

    def _state_after_blocks(self) -> GraphState:
        """Return the state in which no block disables adapters."""
        return self.state

    # -- running ----------------------------------------------------------------------------------------------------

    def run(
        self, inputs: Mapping[str, Any], form: RunForm | None = None, rows: Mapping[str, Rows] | None = None
    ) -> Any:
        """Run one state's graph, even if a thread switches adapters meanwhile; `rows` replace the active ones."""
        if torch.compiler.is_compiling():
            current, inputs = self._for_rows(inputs, rows)
            current.is_lent = True
            return (current.running if form is None else current.running_as(form))(**inputs)
        with self._readers:
            current, inputs = self._for_rows(inputs, rows)
            current.check_fresh()
            current.is_lent |= torch.is_grad_enabled()
            return (current.running if form is None else current.running_as(form))(**inputs)

    def check_precision(self) -> None:
        """Check that tensors have the dtypes that the graph was built for; FSDP2 may change them while it runs."""
        if self.current.casts != dtypes_of(self.state, self.adapters):
            raise RewriteError(
                "FSDP2 casts parameters (MixedPrecisionPolicy(param_dtype=...)), but the graph computes in the dtypes "
                "of its trace; convert the model, as in model.to(torch.bfloat16), and leave param_dtype out"
            )

    def lend(self) -> fx.GraphModule:
        """Return the current graph to a caller that may keep it."""
        return self.current.show()

    def check_adopted(self) -> None:
        """Raise if the graph was edited by hand, and the edit is in no other form of it."""
        if self._current is not None and self._current.is_edited:
            raise RewriteError(
                "the graph was edited by hand, and would lose that where it is built again, copied, merged or "
                "exported; call adopt_edits(), which makes the edit a pass of the model (remove_pass() takes it away)"
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let the caller write tensors within the block, while no other thread runs the model."""
        with self._readers.writing(), self._lock:
            yield

    def set_mode(self, training: bool) -> None:
        """Switch to training or evaluation mode; the graph of the other mode stays cached."""
        with self._lock:
            before = self.current
            if training == before.state.training:
                return
            other, is_edited = self._cached(dataclasses.replace(before.state, training=training)), before.is_edited
            if is_edited and not before.is_compiled:
                self.check_adopted()  # the other mode would run what this one does not
            if other is not None and not (is_edited or other.is_edited):
                self.current = other
                self._remember()
                return
            flat = before.flat.module
            graph = copy_graph(flat)
            if set_mode(graph, training, drops=before.state.drops) or graph.find_nodes(op="call_module"):
                flat = overlay(flat, graph, training)
            self.current = before.with_state(dataclasses.replace(before.state, training=training), flat)
            self._remember()

    def set_checkpointing(self, checkpointing: Checkpointing | None) -> None:
        """Set which blocks are recomputed in the backward pass."""
        with self._lock:
            if checkpointing == self.state.checkpointing:
                return
            state = dataclasses.replace(self.state, checkpointing=checkpointing)
            if self._current is None:
                self._state = state
                return
            self.current = self.current.with_state(state)
            self._remember()

    def set_dropout(self, drops: bool) -> None:
        """Set whether training applies dropout."""
        with self._lock:
            if drops != self.state.drops:
                self._make(drops=drops)

    def largest_dropout(self) -> float:
        """Return the largest dropout probability in training."""
        if not self.state.drops:
            return 0.0
        graph = self.current.flat.module.graph
        return max((trained_probability(node) for node in dropouts(graph)), default=0.0)

    def _take(self, adapters: dict[str, ModelAdapter]) -> None:
        self.adapters = adapters
        self._cache.clear()
        self._make()

    def _show_adapters(self) -> None:
        """Point the current graph module's adapter tensors to the current adapters."""
        self.current.show_adapters()
        self._cache.clear()
        self._remember()

    @contextmanager
    def acting_everywhere(self) -> Iterator[None]:
        """Make adapters that act on some tokens act on all, within the block."""
        before = self.adapters
        self._take({name: adapter.everywhere() for name, adapter in before.items()})
        try:
            yield
        finally:
            self._take(before)

    # -- within -----------------------------------------------------------------------------------------------------

    def _for_rows(
        self, inputs: Mapping[str, Any], rows: Mapping[str, Rows] | None
    ) -> tuple[StateGraph, Mapping[str, Any]]:
        """Return the graph with adapters by row and its inputs; the base's graph while adapters are disabled."""
        if rows is None or self._suspended is not None:
            return self.current, inputs
        if not torch.compiler.is_compiling():
            self.check_adopted()
        given = {**inputs, ROWS: tuple(rows.values())} if rows else inputs
        if torch.compiler.is_compiling():
            if (made := self._cached(self._by_row(rows))) is None:
                raise RewriteError(f"call the model once with adapter_names of {', '.join(rows)} before it is compiled")
            return made, given
        with self._lock:
            state = self._by_row(rows)
            if (made := self._cached(state)) is None:
                made = self._build(state)
                self._cache.put(made, self._suspended)
        return made, given

    def _by_row(self, rows: Mapping[str, Rows]) -> GraphState:
        """Return the current state with adapters by row only, over the base's own weights."""
        return dataclasses.replace(self.state, active=(), merged=(), weights={}, unties=False, by_row=tuple(rows))

    def _make(self, **changes: Any) -> None:
        """Switch to the current state with some fields changed, cached if possible; an error changes nothing."""
        self.check_adopted()
        state = dataclasses.replace(self.state, **changes)
        cached = self._cached(state) if state.is_repeatable else None
        self.current = cached if cached is not None and not cached.is_edited else self._build(state)
        self._remember()

    def _cached(self, state: GraphState) -> StateGraph | None:
        """Return the cached graph of a state if it is still valid."""
        current = self._cache.get(state)
        return current if current is not None and self.base.is_current and self._is_valid(current) else None

    def _remember(self) -> None:
        self._cache.put(self.current, self._suspended)

    def _build(self, state: GraphState) -> StateGraph:
        """Build the graph of a state over the current tensors."""
        self.traced  # noqa: B018  # it follows the tree
        return build_graph(state, self.base, self.adapters)

    def _is_valid(self, graph: StateGraph) -> bool:
        """Return whether rebuilding a graph, merged weights included, would give the same."""
        return graph.is_fresh and graph.casts == dtypes_of(graph.state, self.adapters)


def _check_picklable(graph_pass: GraphPass) -> None:
    from gralora_fx.core.graph.user_pass import label_of

    try:
        pickle.dumps(graph_pass)
    except Exception as error:  # pickle, and the objects in it, raise errors of many types
        raise RewriteError(
            f"{label_of(graph_pass)} cannot be pickled ({first_line(error)}); define it at the top of a module, or "
            "remove it with remove_pass() first"
        ) from error


class ReadWriteLock:
    """A lock that lets any number of threads run the model, or one thread write its tensors.

    Switching adapters needs neither: it builds another graph and swaps one reference. The lock is reentrant: a thread
    that runs the model may run it again or write within that run, as a hook does.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reading: dict[int, int] = {}  # number of reads by thread
        self._writer: int | None = None
        self._writing = 0

    def __enter__(self) -> None:
        """Start reading once no other thread writes."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._writer in (None, me) or me in self._reading)
            self._reading[me] = self._reading.get(me, 0) + 1

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        with self._changed:
            self._reading[me] -= 1
            if not self._reading[me]:
                del self._reading[me]
                self._changed.notify_all()

    @property
    def is_read(self) -> bool:
        """True if any thread reads."""
        return bool(self._reading)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Exclude other readers and writers within the block, once current ones have finished."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._writer in (None, me))
            self._writer = me
            self._writing += 1
            self._changed.wait_for(lambda: not self._reading.keys() - {me})
        try:
            yield
        finally:
            with self._changed:
                self._writing -= 1
                if not self._writing:
                    self._writer = None
                    self._changed.notify_all()
