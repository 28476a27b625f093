"""A copy of a traced graph and the adapters in it: which are active, which are merged, and the switches between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from gralora_fx.adapter import Factors
from gralora_fx.adapters.installed import InstalledAdapter
from gralora_fx.errors import ConfigError, MergeError, RewriteError
from gralora_fx.passes.fold import (
    SiteUpdate,
    fold_in_place,
    folded_weights,
    refuse_shared,
    set_weights,
    shared_sites,
)
from gralora_fx.passes.protect import protect_outputs
from gralora_fx.passes.separate import drop_separated, separate_weights
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
        passes: The user's passes, which run over the graph whenever it is made.
        training: The graph's mode.
        version: Changes with the graph, so that a model compiled by `torch.compile` is compiled again.
    """

    def __init__(self, traced: TracedModel) -> None:
        """Copy a traced model's graph."""
        self.traced = traced
        self.graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "GraloraGraph")
        self.adapters: dict[str, InstalledAdapter] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.passes: tuple[GraphPass, ...] = ()
        self.training = traced.training
        self.version = "0"
        self._merged_weights: dict[str, nn.Parameter] = {}
        self._spare: dict[str, Tensor] = {}
        self._unties = False
        self._is_disabled = False

    def __getitem__(self, name: str) -> InstalledAdapter:
        """An adapter by name; a `RewriteError` where there is none."""
        if not isinstance(name, str) or name not in self.adapters:
            raise RewriteError(f"no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    def set_mode(self, training: bool) -> None:
        """Switch everything in the graph that depends on the mode."""
        self.training = training
        if set_mode(self.graph_module.graph, training):
            self._compile()

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
                self._make(active=[name])
            except RewriteError:
                self.remove(name)
                raise

    def switch(self, names: Sequence[str]) -> None:
        """Make these adapters active and let them train, and no others."""
        for name in names:
            self[name]
        self.refuse_merged("switch adapters")
        if self._is_disabled:
            raise RewriteError("cannot switch adapters within disable_adapter(), which sets those before it again")
        self.refuse_shared_copies(names)
        if list(names) != self.active:
            self._make(active=names)
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in names)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base's graph while the block lasts."""
        before, active, merged, unties = self._is_disabled, list(self.active), list(self.merged), self._unties
        if merged:
            self.unmerge()
        self._make(active=[])
        self._is_disabled = True
        try:
            yield
        finally:
            self._is_disabled = before
            active, merged = ([name for name in names if name in self.adapters] for names in (active, merged))
            self._make(active=active)
            if merged:
                self.merge(merged, untie=unties)

    def remove(self, name: str) -> None:
        """Remove an adapter and its tensors, active or not."""
        adapter = self[name]
        if name in self.active:
            self._make(active=[other for other in self.active if other != name])
        adapter.drop(self.graph_module)
        del self.adapters[name]

    def clear(self) -> None:
        """Remove every adapter and every pass: the graph is the base's again, node for node."""
        self._make(active=[], merged=[], weights={}, passes=())
        for name in list(self.adapters):
            self.remove(name)
        self._spare = {}

    # -- merging ----------------------------------------------------------------------------------------------------

    def mergeable(self, names: Sequence[str] | None, *, again: bool = False) -> list[str]:
        """The adapters to merge: those named, or the active ones; without those merged, or with them (`again`)."""
        done = [] if again else self.merged
        chosen = [name for name in self.active if name not in done] if names is None else list(names)
        for name in chosen:
            self[name]
            if chosen.count(name) > 1:
                raise MergeError(f"adapter {name!r} is named twice, and would be folded twice; name it once")
            if name in done:
                raise MergeError(f"adapter {name!r} is merged already; unmerge first")
            if name not in self.active:
                raise MergeError(f"adapter {name!r} is not active, so merging it would change the output; set it first")
        if not chosen:
            raise MergeError("there is no active adapter left to merge")
        return chosen

    def merge(self, names: Sequence[str], *, safe: bool = False, untie: bool = False) -> None:
        """Fold active adapters into copies of the weights; their nodes leave the graph."""
        work = self.updates([*self.merged, *names])
        if not untie:
            refuse_shared(self.traced.graph_module, [w.site for w in work if w.site.path not in self._merged_weights])
        weights = folded_weights(self.traced.graph_module, work, spare=self._spare, safe=safe, untie=True)
        self._make(merged=[*self.merged, *names], weights=weights)
        self._spare, self._unties = {}, untie or self._unties

    def unmerge(self) -> None:
        """Put the base's own weights back and the adapters' nodes into the graph; the buffers wait for a next merge."""
        if not self.merged:
            raise MergeError("nothing is merged, so there is nothing to unmerge")
        weights = self._merged_weights
        self._make(merged=[], weights={})
        self._spare, self._unties = {path: weight.data for path, weight in weights.items()}, False

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

    def refuse_shared_copies(self, names: Sequence[str]) -> None:
        """Refuse adapters of which two train copies of one parameter, or one adapts what another trains as a copy."""
        owners: dict[int, tuple[str, str]] = {}
        for name in names:
            for module, owned in self.adapters[name].copies.items():
                for base in owned:
                    parameter = id(self.traced.tree.parameters[base])
                    other, _ = owners.setdefault(parameter, (name, module))
                    if other != name:
                        raise RewriteError(
                            f"adapters {other!r} and {name!r} both train a copy of {module}; set one of them"
                        )
        for name in names:
            for planned in self.adapters[name].plan.selected:
                other, module = owners.get(id(planned.site.weight), (name, ""))
                if other != name:
                    raise RewriteError(
                        f"adapter {name!r} adapts {planned.site.path}, of which adapter {other!r} trains a copy; "
                        "set one of them"
                    )

    def set_passes(self, passes: Sequence[GraphPass]) -> None:
        """Run these passes over the graph, now and whenever it is made, and no others."""
        self._make(passes=tuple(passes))

    # -- within -----------------------------------------------------------------------------------------------------

    def _make(
        self,
        *,
        active: Sequence[str] | None = None,
        merged: Sequence[str] | None = None,
        weights: Mapping[str, nn.Parameter] | None = None,
        passes: tuple[GraphPass, ...] | None = None,
    ) -> None:
        """Make the graph anew from the base's, in another state; an error leaves the graph and the state before it.

        Args:
            active: The active adapters; None for those before.
            merged: Those of them that stand in `weights`; None for those before.
            weights: Folded weights by site path; None for those before.
            passes: The user's passes; None for those before.
        """
        before = self.active, self.merged, self._merged_weights, self.passes, self.graph_module.graph
        self._put_base_weights()
        self.active = list(self.active if active is None else active)
        self.merged = list(self.merged if merged is None else merged)
        self._merged_weights = dict(self._merged_weights if weights is None else weights)
        self.passes = self.passes if passes is None else passes
        try:
            fresh = copy_graph(self.traced.graph_module)
            fresh.owning_module = self.graph_module
            self.graph_module._graph = fresh  # the public setter would compile it before it is complete
            self._fill()
        except BaseException:
            self._put_base_weights()
            self.active, self.merged, self._merged_weights, self.passes, self.graph_module.graph = before
            self._put_weights()
            raise
        self._compile()

    def _fill(self) -> None:
        """Give a copy of the base's graph the weights and adapters of the state, then run the passes."""
        graph_module = self.graph_module
        separate_weights(graph_module, [site for site in self.traced.sites if site.path in self._merged_weights])
        self._put_weights()
        for name in self.active:
            if name not in self.merged:
                self.adapters[name].attach(graph_module)
            self.adapters[name].own(graph_module, self.traced.tree)
        self._set_fresh_modes()
        graph_module.graph.lint()
        for graph_pass in self.passes:
            run_pass(graph_module, graph_pass)
        if self.passes:
            protect_outputs(graph_module.graph)
            self._set_fresh_modes()

    def _set_fresh_modes(self) -> None:
        record_switches(self.graph_module.graph)
        set_mode(self.graph_module.graph, self.training)

    def _put_weights(self) -> None:
        set_weights(self.graph_module, self.traced.sites, self._merged_weights)

    def _put_base_weights(self) -> None:
        """Let the graph's attributes be the base's own parameters again."""
        drop_separated(self.graph_module)
        for name, parameter in self.traced.graph_module.named_parameters(remove_duplicate=False):
            owner, _, attribute = name.rpartition(".")
            self.graph_module.get_submodule(owner)._parameters[attribute] = parameter

    def _compile(self) -> None:
        self.graph_module.recompile()
        self.version = str(int(self.version) + 1)
