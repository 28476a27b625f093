"""A graph's passes and adopted edits: adding and removing them, and the forms of the base over which they ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gralora_fx.core.adapters.base import Base
from gralora_fx.core.adapters.current_graph import CurrentGraph
from gralora_fx.core.graph.module_tree import is_within
from gralora_fx.core.graph.pipeline import GraphPass
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import RewriteError, listed, warn_caller


class GraphWithHistory(CurrentGraph):
    """A graph that keeps its history, whatever form it is in."""

    def _begin(self, base: Base) -> None:
        super()._begin(base)
        self._bare: tuple[Any, TracedModel] | None = None  # see `without_adapters`

    def add_pass(self, graph_pass: GraphPass) -> None:
        """Run a pass over the graph now, and over every graph that is built later."""
        with self._lock:
            self._make(passes=(*self.state.passes, graph_pass))

    def remove_pass(self, graph_pass: GraphPass) -> None:
        """Remove a pass of `add_pass`."""
        with self._lock:
            passes = self.state.passes
            if graph_pass not in passes:
                raise RewriteError(f"{graph_pass!r} is not a pass of this model; its passes are {list(passes)}")
            index = passes.index(graph_pass)
            self._make(passes=(*passes[:index], *passes[index + 1 :]))
            self._drop_additions()

    def adopt_edits(self) -> GraphPass | None:
        """Make an edit of the current graph by hand a pass; return it, or None if there is no edit."""
        with self._lock:
            edited = self.current
            if not edited.is_edited:
                return None
            from gralora_fx.core.adapters.graph_edit import GraphEdit, is_alike
            from gralora_fx.core.adapters.history import take_over

            graph_module = edited.flat.module
            plain, known = self._build(edited.state), {node.name for node in self.traced.graph_module.graph.nodes}
            edit = GraphEdit.between(plain.flat.module.graph, graph_module.graph, known)
            with take_over(self.base, graph_module, plain.flat.module.graph, edit):
                adopted = self._build(dataclasses.replace(edited.state, passes=(*edited.state.passes, edit)))
                if not is_alike(adopted.flat.module.graph, graph_module.graph):
                    raise RewriteError(
                        "the edit cannot be adopted: it moves nodes that it keeps, or changes more than nodes compute; "
                        "write it as a pass (add_pass)"
                    )
            self.current = adopted
            self._remember()
            return edit

    def with_history(
        self, traced: TracedModel, form: str, folded: Sequence[str] = (), *, shares: bool = False
    ) -> TracedModel:
        """Return a form of the base over which the passes ran, with what they added: the same, or frozen copies."""
        with self._lock:
            self.check_adopted()
            if not self.state.passes:
                return traced
            from gralora_fx.core.adapters.history import form_with_history

            graph_module = form_with_history(traced, self.base, self.state.passes, form, folded, shares=shares)
            return traced.with_graph(graph_module, traced.tree).train(traced.training)

    def without_adapters(self) -> TracedModel:
        """Return the base with its passes, over the same tensors; it is made once for each state of these."""
        traced, tree = self.traced, self.base.tree
        key = (id(traced), *map(id, self.state.passes), *(id(added.within(tree)) for added in self.base.added))
        if self._bare is None or self._bare[0] != key:
            self._bare = key, self.with_history(traced, " in the form without adapters", shares=True)
        return self._bare[1]

    def warn_of_unsaved(self) -> None:
        """Warn of passes and what they added, which the files of adapters cannot hold."""
        self.check_adopted()
        if passes := self.state.passes:
            from gralora_fx.core.graph.user_pass import label_of

            added = [addition.path for addition in self.base.added]
            warn_caller(
                f"an adapter's files do not hold {listed(map(label_of, passes), 3)}"
                + (f", nor {listed(added, 3)}, which passes added" if added else "")
                + "; add the passes again after loading, or save the model with torch.save()"
            )

    def _drop_additions(self) -> None:
        """Remove from the tree what passes had added that are not passes of the model any more."""
        graph = self.current.flat.module.graph
        read = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        for addition, owner in list(self.base.added.items()):
            if owner not in self.state.passes and not any(is_within(path, addition.path) for path in read):
                addition.remove(self.base.tree)
                del self.base.added[addition]
