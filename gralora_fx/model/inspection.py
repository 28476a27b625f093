"""Inspection of a rewritten model: its sites, its adapters, and the nodes and tensors of each."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, fx

from gralora_fx.adapters.adapter_graph import AdapterGraph
from gralora_fx.adapters.installed import InstalledAdapter
from gralora_fx.config import AdapterConfig
from gralora_fx.errors import RewriteError
from gralora_fx.graph.annotations import annotation_of
from gralora_fx.graph.sites import LinearSite
from gralora_fx.methods import AdapterTensors, Update
from gralora_fx.methods.fold import delta_weight
from gralora_fx.methods.forms import block_norms, summed
from gralora_fx.planning.rewrite_plan import PlannedSite, RewritePlan
from gralora_fx.tracing.traced_model import TracedModel


class AdapterInspection:
    """The read-only queries of a model."""

    _state: AdapterGraph

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """Every linear layer of the base model."""
        return self.traced.sites

    @property
    def configs(self) -> dict[str, AdapterConfig]:
        """The configuration of each adapter, by name."""
        return {name: adapter.config for name, adapter in self._state.adapters.items()}

    @property
    def plans(self) -> dict[str, RewritePlan]:
        """What each adapter adapts, by name."""
        return {name: adapter.plan for name, adapter in self._state.adapters.items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters whose outputs are added, merged ones included."""
        return list(self._state.state.active)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are folded into the weights."""
        return list(self._state.state.merged)

    @property
    def traced(self) -> TracedModel:
        """The base model as it was traced."""
        return self._state.traced

    @property
    def config(self) -> Any:
        """The base model's transformers configuration, or None."""
        return self.traced.config

    def installed(self, adapter_name: str) -> InstalledAdapter:
        """An adapter's plan and tensors.

        Raises:
            RewriteError: An adapter does not exist.
        """
        return self._state[adapter_name]

    def __repr__(self) -> str:
        """One line for the base model and one for each adapter."""
        lines = [f"GraloraModel({self.traced!r})"]
        for name, adapter in self._state.adapters.items():
            state = (
                "merged" if name in self.merged_adapters else "active" if name in self.active_adapters else "waiting"
            )
            config, count = adapter.config, len(adapter.plan.selected)
            sizes = adapter.method.text(adapter.method.sizes(config, partial(getattr, config))[0])
            lines.append(f"  {name} ({state}): {sizes}, {count} sites")
        return "\n".join(lines)

    # -- by site and adapter ----------------------------------------------------------------------------------------

    def site(self, path: str) -> LinearSite:
        """The linear layer at a module path.

        Raises:
            TargetError: There is none.
        """
        return self.traced.site(path)

    def adapted_sites(self, adapter_name: str | None = None) -> tuple[PlannedSite, ...]:
        """The adapted sites of one adapter or of all, with their ranks, in the order of the modules.

        Args:
            adapter_name: Name of an adapter; None for all, one entry for each adapter at a site.

        Raises:
            RewriteError: An adapter does not exist.
        """
        if adapter_name is not None:
            return self.installed(adapter_name).plan.selected
        entries = [entry for adapter in self._state.adapters.values() for entry in adapter.plan.selected]
        order = {site.path: index for index, site in enumerate(self.sites)}
        return tuple(sorted(entries, key=lambda entry: order[entry.site.path]))

    def adapters_at(self, path: str) -> tuple[str, ...]:
        """Names of the adapters at a site, active or not.

        Raises:
            TargetError: The site does not exist.
        """
        self.site(path)
        return tuple(name for name, adapter in self._state.adapters.items() if path in adapter.factors)

    def nodes(self, path: str | None = None, adapter_name: str | None = None) -> tuple[fx.Node, ...]:
        """The nodes that belong to a site, to an adapter, or to an adapter at a site, in graph order.

        Those of inactive and merged adapters are not in the graph.

        Args:
            path: Path of a site, or of a module that trains as a copy; None for all.
            adapter_name: Name of an adapter; None for all.

        Raises:
            TargetError: The site does not exist.
            RewriteError: An adapter does not exist.
        """
        if adapter_name is not None:
            self.installed(adapter_name)
        if path is not None and not any(path in adapter.copies for adapter in self._state.adapters.values()):
            self.site(path)
        nodes = []
        for node in self._state.running.graph_module.graph.nodes:
            annotation = annotation_of(node)
            if (
                annotation is not None
                and path in (None, annotation["site"])
                and adapter_name in (None, annotation["adapter"])
            ):
                nodes.append(node)
        return tuple(nodes)

    def factors(self, path: str, adapter_name: str | None = None) -> AdapterTensors:
        """An adapter's tensors at a site: the parameters themselves.

        Args:
            path: Path of the site.
            adapter_name: Name of the adapter; None for the one active adapter.

        Raises:
            RewriteError: The adapter does not exist, does not adapt the site, or several are active.
        """
        if adapter_name is None and len(self._state.state.active) != 1:
            raise RewriteError(f"{len(self._state.state.active)} adapters are active; name one of {list(self.configs)}")
        adapter = self.installed(self._state.state.active[0] if adapter_name is None else adapter_name)
        if path not in adapter.factors:
            raise RewriteError(f"adapter {adapter.name!r} has no tensors at {path!r}; adapted_sites() lists its sites")
        return adapter.factors[path]

    def delta_weight(self, path: str, adapter_name: str | None = None) -> Tensor:
        """The update of a site's weight by an adapter, in the layout of the weight.

        Args:
            path: Path of the site.
            adapter_name: Name of the adapter; None for the sum of the active ones.

        Raises:
            TargetError: The site does not exist.
            RewriteError: The adapter does not exist, or none adapts the site.
        """
        update = self._update(path, adapter_name)
        return delta_weight(update, transposed=self.site(path).kind == "conv1d")

    def block_norms(self, path: str, adapter_name: str | None = None) -> Tensor:
        """Frobenius norms of the blocks of a site's update.

        Args:
            path: Path of the site.
            adapter_name: Name of the adapter; None for the sum of the active ones.

        Returns:
            `[k, k]` float64: row j is an output block, column n an input block; `[1, 1]` for a sum of
            different `k`.

        Raises:
            TargetError: The site does not exist.
            RewriteError: The adapter does not exist, or none adapts the site.
        """
        update = self._update(path, adapter_name)
        return block_norms(update.factors, update.scale)

    def _update(self, path: str, adapter_name: str | None) -> Update:
        self.site(path)
        names = self._state.state.active if adapter_name is None else [adapter_name]
        updates = [adapter.update(path) for name in names if path in (adapter := self.installed(name)).factors]
        if not updates:
            raise RewriteError(f"no adapter of {names} adapts {path!r}; adapters_at() lists those that do")
        return updates[0] if len(updates) == 1 else Update(summed(updates), 1.0)
