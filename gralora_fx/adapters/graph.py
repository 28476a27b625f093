"""A copy of a traced graph and the adapters in it: which are active, which are merged, and the switches between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from gralora_fx.adapter import Factors
from gralora_fx.adapters.installed import InstalledAdapter
from gralora_fx.errors import ConfigError, MergeError, RewriteError
from gralora_fx.passes.fold import SiteUpdate, fold_in_place, folded_weights, set_weights, shared_sites
from gralora_fx.passes.protect import protect_outputs
from gralora_fx.passes.separate import rejoin_weights, separate_weights
from gralora_fx.planning.rewrite_plan import RewritePlan
from gralora_fx.tracing.clean import copy_graph
from gralora_fx.tracing.modes import record_switches, set_mode
from gralora_fx.tracing.traced import TracedModel
from gralora_fx.tracing.user_pass import GraphPass, run_pass


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
        self._unties = False
        self._passes: list[GraphPass] = []
        self._plain: fx.Graph | None = None  # the graph as passes have not seen it, where there are any

    def __getitem__(self, name: str) -> InstalledAdapter:
        """An adapter by name; a `RewriteError` where there is none."""
        if name not in self.adapters:
            raise RewriteError(f"no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    def set_mode(self, training: bool) -> None:
        """Switch everything in the graph that depends on the mode."""
        self.training = training
        if self._plain is not None:
            set_mode(self._plain, training)
        if set_mode(self.graph_module.graph, training):
            self.graph_module.recompile()

    # -- adding and switching ---------------------------------------------------------------------------------------

    def add(self, name: str, planned: RewritePlan, *, factors: Mapping[str, Factors] | None = None) -> None:
        """Store a new adapter, with given tensors or fresh ones; the first one becomes active."""
        if name in self.adapters:
            raise ConfigError(f"adapter {name!r} exists already; delete it first or take another name")
        with_bias = [other for other, adapter in self.adapters.items() if adapter.config.bias != "none"]
        if planned.config.bias != "none" and with_bias:
            raise ConfigError(
                f"adapter {with_bias[0]!r} trains biases already, and only one adapter may; set bias='none'"
            )
        self.refuse_merged("add an adapter")
        is_first = not self.adapters
        adapter = InstalledAdapter.create(self.graph_module, name, planned, self.traced.tree, factors)
        adapter.requires_grad_(is_first)
        self.adapters[name] = adapter
        if is_first:
            try:
                self._set_active([name])
            except RewriteError:
                self.remove(name)
                raise

    def switch(self, names: Sequence[str]) -> None:
        """Make these adapters active and let them train, and no others."""
        for name in names:
            self[name]
        self.refuse_merged("switch adapters")
        self._refuse_shared_copies(names)
        if list(names) != self.active:
            self._set_active(names)
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in names)

    def disable(self) -> tuple[list[str], list[str]]:
        """Make the graph the base's; the result is what `restore` takes."""
        state = list(self.active), list(self.merged)
        if self.merged:
            self.unmerge()
        self._set_active([])
        return state

    def restore(self, state: tuple[list[str], list[str]]) -> None:
        """Undo `disable`, for the adapters that are still there."""
        active, merged = ([name for name in names if name in self.adapters] for names in state)
        self._set_active(active)
        if merged:
            self.merge(merged, untie=self._unties)

    def remove(self, name: str) -> None:
        """Remove an adapter and its tensors, active or not."""
        adapter = self[name]
        if name in self.active:
            self._set_active([other for other in self.active if other != name])
        adapter.drop(self.graph_module)
        del self.adapters[name]

    def clear(self) -> None:
        """Remove every adapter and every pass: the graph is the base's again, node for node."""
        self.set_passes([])
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

    def merge(self, names: Sequence[str], *, safe: bool = False, untie: bool = False) -> None:
        """Fold active adapters into copies of the weights; their nodes leave the graph."""
        work = self.updates([*self.merged, *names])
        weights = folded_weights(self.traced.graph_module, work, spare=self._spare, safe=safe, untie=untie)
        self._open()
        if untie:
            separate_weights(self.graph_module, [entry.site for entry in work])
        set_weights(self.graph_module, self.traced.sites, weights)
        for name in names:
            self.adapters[name].detach(self.graph_module)
        self._spare, self._merged_weights, self._unties = {}, weights, untie
        self.merged += names
        try:
            self._settle()
        except RewriteError:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Put the base's own weights back and the adapters' nodes into the graph; the buffers wait for a next merge."""
        if not self.merged:
            raise MergeError("nothing is merged, so there is nothing to unmerge")
        self._open()
        base = {site.path: site.weight for site in self.traced.sites if site.path in self._merged_weights}
        set_weights(self.graph_module, self.traced.sites, base)
        rejoin_weights(self.graph_module)
        self._spare = {path: weight.data for path, weight in self._merged_weights.items()}
        merged, self.merged, self._merged_weights = self.merged, [], {}
        self._attach(list(self.active))  # all of them, so that they add up in their order again
        try:
            self._settle()
        except RewriteError:
            self.merge(merged, untie=self._unties)
            raise

    def fold_into_base(
        self, names: Sequence[str], *, safe: bool = False, untie: bool = False
    ) -> dict[str, nn.Parameter]:
        """Fold adapters and their copies of parameters into the base's own parameters.

        Returns:
            The folded weights of layers that share theirs (`untie`), by site path; the base keeps its own there.
        """
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
        graph_module, work = self.traced.graph_module, self.updates(names)
        shared = shared_sites(graph_module, [entry.site for entry in work]) if untie else {}
        tied = [entry for entry in work if entry.site.path in shared]
        weights = folded_weights(graph_module, tied, safe=safe, untie=True)
        fold_in_place(graph_module, [entry for entry in work if entry not in tied], safe=safe)
        with torch.no_grad():
            for name in names:
                for owned in self.adapters[name].copies.values():
                    for base, parameter in owned.items():
                        self.traced.tree.parameters[base].copy_(parameter)
        return weights

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

    # -- passes of the user -----------------------------------------------------------------------------------------

    @property
    def passes(self) -> tuple[GraphPass, ...]:
        """The user's passes, in the order they run in."""
        return tuple(self._passes)

    def set_passes(self, passes: Sequence[GraphPass]) -> None:
        """Run these passes over the graph, now and after every change of it, and no others."""
        previous, self._passes = self._passes, list(passes)
        self._open()
        try:
            self._settle()
        except RewriteError:
            self._passes = previous
            self._settle()
            raise

    # -- within -----------------------------------------------------------------------------------------------------

    def _set_active(self, names: Sequence[str]) -> None:
        """Attach these adapters and no others."""
        previous = list(self.active)
        self._open()
        try:
            self._attach(names)
            self._settle()
        except RewriteError:
            self._attach(previous)
            self._settle()
            raise

    def _attach(self, names: Sequence[str]) -> None:
        for name in list(self.active):
            self.adapters[name].detach(self.graph_module)
            self.adapters[name].release(self.graph_module)
            self.active.remove(name)
        for name in names:
            self.active.append(name)
            self.adapters[name].attach(self.graph_module)
            self.adapters[name].own(self.graph_module, self.traced.tree)

    def _open(self) -> None:
        """Bring back the graph as passes have not seen it, to edit it."""
        if self._plain is not None:
            self.graph_module.graph, self._plain = self._plain, None

    def _settle(self) -> None:
        """Set the mode of fresh nodes, check the graph, run the passes over a copy of it and compile."""
        plain = self.graph_module.graph
        self._check(plain)
        if self._passes:
            self.graph_module.graph = copy_graph(self.graph_module)
            try:
                for graph_pass in self._passes:
                    run_pass(self.graph_module, graph_pass)
            except RewriteError:
                self.graph_module.graph = plain
                raise
            protect_outputs(self.graph_module.graph)
            self._check(self.graph_module.graph)
            self._plain = plain
        self.graph_module.recompile()

    def _check(self, graph: fx.Graph) -> None:
        record_switches(graph)
        set_mode(graph, self.training)
        graph.lint()

    def _refuse_shared_copies(self, names: Sequence[str]) -> None:
        seen: dict[str, str] = {}
        for name in names:
            for module in self.adapters[name].copies:
                if module in seen:
                    raise RewriteError(
                        f"adapters {seen[module]!r} and {name!r} both train a copy of {module}; set one of them"
                    )
                seen[module] = name
