"""A copy of a traced graph and the adapters in it: which are active, which are merged, and the switches between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from gralora_fx.errors import ConfigError, MergeError, RewriteError
from gralora_fx.installed import InstalledAdapter
from gralora_fx.passes.fold import SiteUpdate, fold_in_place, folded_weights, set_weights
from gralora_fx.planning import RewritePlan
from gralora_fx.tracing.clean import copy_graph
from gralora_fx.tracing.modes import record_switches, set_mode
from gralora_fx.tracing.traced import TracedModel


class AdapterGraph:
    """The state of a rewritten graph; every method leaves it complete, or as it was after an error.

    Attributes:
        traced: The base model.
        graph_module: A copy of its graph over the same parameters, with the active adapters in it.
        adapters: Adapters by name.
        active: Names of those whose outputs are added, merged ones included.
        merged: Names of those that stand folded in the weights.
        training: The graph's mode.
    """

    def __init__(self, traced: TracedModel) -> None:
        """Copy a traced model's graph."""
        self.traced = traced
        self.graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "GraloraGraph")
        self.adapters: dict[str, InstalledAdapter] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.training = traced.training
        self._merged_weights: dict[str, nn.Parameter] = {}
        self._spare: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> InstalledAdapter:
        """An adapter by name; a `RewriteError` where there is none."""
        if name not in self.adapters:
            raise RewriteError(f"no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    def set_mode(self, training: bool) -> None:
        """Switch everything in the graph that depends on the mode."""
        self.training = training
        if set_mode(self.graph_module.graph, training):
            self.graph_module.recompile()

    # -- adding and switching ---------------------------------------------------------------------------------------

    def add(self, name: str, planned: RewritePlan) -> None:
        """Store a new adapter; the first one becomes active."""
        if name in self.adapters:
            raise ConfigError(f"adapter {name!r} exists already; delete it first or take another name")
        with_bias = [other for other, adapter in self.adapters.items() if adapter.config.bias != "none"]
        if planned.config.bias != "none" and with_bias:
            raise ConfigError(
                f"adapter {with_bias[0]!r} trains biases already, and only one adapter may; set bias='none'"
            )
        self.refuse_merged("add an adapter")
        is_first = not self.adapters
        adapter = InstalledAdapter.create(self.graph_module, name, planned, self.traced.tree)
        adapter.requires_grad_(is_first)
        self.adapters[name] = adapter
        if is_first:
            try:
                self._activate([name])
            except RewriteError:
                self.remove(name)
                raise

    def switch(self, names: Sequence[str]) -> None:
        """Make these adapters active and let them train, and no others."""
        for name in names:
            self[name]
        self.refuse_merged("switch adapters")
        self._refuse_shared_copies(names)
        previous = list(self.active)
        if list(names) != previous:
            self._deactivate(previous)
            try:
                self._activate(names)
            except RewriteError:
                self._deactivate(self.active)
                self._activate(previous)
                raise
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in names)

    def disable(self) -> tuple[list[str], list[str]]:
        """Make the graph the base's; the result is what `restore` takes."""
        state = list(self.active), list(self.merged)
        if self.merged:
            self.unmerge()
        self._deactivate(self.active)
        return state

    def restore(self, state: tuple[list[str], list[str]]) -> None:
        """Undo `disable`."""
        active, merged = state
        self._activate(active)
        if merged:
            self.merge(merged)

    def remove(self, name: str) -> None:
        """Remove an adapter and its tensors, active or not."""
        adapter = self[name]
        if name in self.active:
            self._deactivate([name])
        adapter.drop(self.graph_module)
        del self.adapters[name]

    def clear(self) -> None:
        """Remove every adapter: the graph is the base's again, node for node."""
        self.disable()
        for name in list(self.adapters):
            self.remove(name)
        self._spare = {}

    # -- merging ----------------------------------------------------------------------------------------------------

    def mergeable(self, names: Sequence[str] | None) -> list[str]:
        """The adapters to merge: those named, or the active ones that are not merged."""
        chosen = [n for n in self.active if n not in self.merged] if names is None else list(names)
        for name in chosen:
            self[name]
            if name in self.merged:
                raise MergeError(f"adapter {name!r} is merged already; unmerge first")
            if name not in self.active:
                raise MergeError(f"adapter {name!r} is not active, so merging it would change the output; set it first")
        if not chosen:
            raise MergeError("there is no active adapter left to merge")
        return chosen

    def merge(self, names: Sequence[str], *, safe: bool = False) -> None:
        """Fold active adapters into copies of the weights; their nodes leave the graph."""
        work = self.updates([*self.merged, *names])
        weights = folded_weights(self.traced.graph_module, work, spare=self._spare, safe=safe)
        self._spare, self._merged_weights = {}, weights
        set_weights(self.graph_module, self.traced.sites, weights)
        for name in names:
            self.adapters[name].detach(self.graph_module)
        self.merged += names
        self.graph_module.recompile()

    def unmerge(self) -> None:
        """Put the base's own weights back and the adapters' nodes into the graph; the buffers wait for a next merge."""
        if not self.merged:
            raise MergeError("nothing is merged, so there is nothing to unmerge")
        base = {site.path: site.weight for site in self.traced.sites if site.path in self._merged_weights}
        set_weights(self.graph_module, self.traced.sites, base)
        self._spare = {path: weight.data for path, weight in self._merged_weights.items()}
        merged, self.merged, self._merged_weights = self.merged, [], {}
        for name in merged:
            self.adapters[name].attach(self.graph_module)
        self._compile()

    def fold_into_base(self, names: Sequence[str], *, safe: bool = False) -> None:
        """Fold adapters and their copies of parameters into the base's own parameters."""
        tree = self.traced.tree
        for name in names:
            for module, owned in self.adapters[name].copies.items():
                for base in owned:
                    outside = [n for n in tree.names_of(tree.parameters[base]) if n not in owned]
                    if outside:
                        raise MergeError(
                            f"{base} of {module} is tied with {', '.join(outside)}, which would change too; "
                            "use gralora_fx.merge, which leaves the base as it is"
                        )
        fold_in_place(self.traced.graph_module, self.updates(names), safe=safe)
        with torch.no_grad():
            for name in names:
                for owned in self.adapters[name].copies.values():
                    for base, parameter in owned.items():
                        self.traced.tree.parameters[base].copy_(parameter)

    def updates(self, names: Sequence[str]) -> list[SiteUpdate]:
        """The weight updates of adapters, site by site."""
        chosen = [self[name] for name in names]
        return [
            SiteUpdate(site, updates)
            for site in self.traced.sites
            if (updates := tuple(a.update(site.path) for a in chosen if site.path in a.factors))
        ]

    def refuse_merged(self, what: str) -> None:
        """Refuse a change that needs the base's own weights."""
        if self.merged:
            raise MergeError(f"cannot {what} while {', '.join(self.merged)} is merged; call unmerge_adapter() first")

    # -- within -----------------------------------------------------------------------------------------------------

    def _activate(self, names: Sequence[str]) -> None:
        for name in names:
            self.active.append(name)
            self.adapters[name].attach(self.graph_module)
            self.adapters[name].own(self.graph_module, self.traced.tree)
        self._compile()

    def _deactivate(self, names: Sequence[str]) -> None:
        for name in list(names):
            self.adapters[name].detach(self.graph_module)
            self.adapters[name].release(self.graph_module)
            self.active.remove(name)
        self.graph_module.recompile()

    def _compile(self) -> None:
        """Set the mode of fresh nodes, check the graph and compile it."""
        record_switches(self.graph_module.graph)
        set_mode(self.graph_module.graph, self.training)
        self.graph_module.graph.lint()
        self.graph_module.recompile()

    def _refuse_shared_copies(self, names: Sequence[str]) -> None:
        seen: dict[str, str] = {}
        for name in names:
            for module in self.adapters[name].copies:
                if module in seen:
                    raise RewriteError(
                        f"adapters {seen[module]!r} and {name!r} both train a copy of {module}; set one of them"
                    )
                seen[module] = name
