"""Inspection of a rewritten model: sites, nodes, tensors and parameter counts of its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.graph.surgery import annotation_of
from gralora_fx.core.methods import AdapterTensors, Update
from gralora_fx.core.planning.rewrite_plan import PlannedSite
from gralora_fx.errors import RewriteError


class Inspection:
    """Queries about a rewritten graph; none changes it.

    Attributes:
        _state: The model's graph and adapters.
    """

    _state: AdapterGraph

    def __repr__(self) -> str:
        """Return a line for the base model and one for each adapter."""
        lines = [f"GraloraModel({self._state.traced!r})"]
        for name, adapter in self._state.adapters.items():
            state = self._state.state
            status = "merged" if name in state.merged else "active" if name in state.active else "waiting"
            config, count = adapter.config, len(adapter.plan.selected)
            sizes = adapter.method.text(adapter.method.sizes(config, partial(getattr, config))[0])
            lines.append(f"  {name} ({status}): {sizes}, {count} sites")
        return "\n".join(lines)

    def site(self, path: str) -> LinearSite:
        """Return the linear layer at a module path.

        Args:
            path: The path, as in `sites`.

        Raises:
            TargetError: There is none.
        """
        return self._state.traced.site(path)

    def adapted_sites(self, adapter_name: str | None = None) -> tuple[PlannedSite, ...]:
        """Return the adapted sites of one adapter or of all, with their ranks, in the order of the modules.

        Args:
            adapter_name: Name of an adapter; None for all, one entry for each adapter at a site.

        Raises:
            RewriteError: There is no such adapter.
        """
        if adapter_name is not None:
            return self._state[adapter_name].plan.selected
        entries = [entry for adapter in self._state.adapters.values() for entry in adapter.plan.selected]
        order = {site.path: index for index, site in enumerate(self._state.traced.adaptable)}
        return tuple(sorted(entries, key=lambda entry: order[entry.site.path]))

    def adapters_at(self, path: str) -> tuple[str, ...]:
        """Return the names of the adapters at a site, active or not.

        Args:
            path: The path of the site.

        Raises:
            TargetError: The site does not exist.
        """
        self.site(path)
        return tuple(name for name, adapter in self._state.adapters.items() if path in adapter.factors)

    def nodes(self, path: str | None = None, adapter_name: str | None = None) -> tuple[fx.Node, ...]:
        """Return the nodes of a site, of an adapter, or of an adapter at a site, in graph order.

        Those of inactive and merged adapters are not in the graph.

        Args:
            path: Path of a site, or of a module that trains as a copy; None for all.
            adapter_name: Name of an adapter; None for all.

        Raises:
            TargetError: The site does not exist.
            RewriteError: There is no such adapter.
        """
        if adapter_name is not None:
            self._state[adapter_name]
        if path is not None and not any(path in adapter.copies for adapter in self._state.adapters.values()):
            self.site(path)
        nodes = []
        for node in self._state.lend().graph.nodes:
            annotation = annotation_of(node)
            if (
                annotation is not None
                and path in (None, annotation["site"])
                and adapter_name in (None, annotation["adapter"])
            ):
                nodes.append(node)
        return tuple(nodes)

    def factors(self, path: str, adapter_name: str | None = None) -> AdapterTensors:
        """Return an adapter's tensors at a site: the parameters themselves.

        Args:
            path: Path of the site.
            adapter_name: Name of the adapter; None for the one active adapter.

        Raises:
            RewriteError: The adapter does not exist, does not adapt the site, or several are active.
        """
        if adapter_name is None and len(self._state.state.active) != 1:
            raise RewriteError(
                f"{len(self._state.state.active)} adapters are active; name one of {list(self._state.adapters)}"
            )
        adapter = self._state[self._state.state.active[0] if adapter_name is None else adapter_name]
        if path not in adapter.factors:
            raise RewriteError(f"adapter {adapter.name!r} has no tensors at {path!r}; adapted_sites() lists its sites")
        return adapter.factors[path]

    def delta_weight(self, path: str, adapter_name: str | None = None) -> Tensor:
        """Return the update of a site's weight by an adapter, in the layout of the weight.

        Args:
            path: Path of the site.
            adapter_name: Name of the adapter; None for the sum of the active ones.

        Raises:
            TargetError: The site does not exist.
            RewriteError: The adapter does not exist, or none adapts the site.
        """
        from gralora_fx.core.methods.forms import delta_weight

        site, updates = self.site(path), self._updates(path, adapter_name)
        transposed = site.is_transposed
        if len(updates) > 1 and updates[0].stack is not None:
            return torch.stack([delta_weight(update, transposed=transposed) for update in updates]).sum(0)
        if not all(update.is_low_rank for update in updates):
            weight = values_of(site.weight, path)
            deltas = [delta_weight(update, transposed=transposed, weight=weight) for update in updates]
            return torch.stack(deltas).sum(0)
        return delta_weight(_sum(updates), transposed=transposed)

    def block_norms(self, path: str, adapter_name: str | None = None) -> Tensor:
        """Return Frobenius norms of the blocks of a site's update.

        Args:
            path: Path of the site.
            adapter_name: Name of the adapter; None for the sum of the active ones.

        Returns:
            `[k, k]` float64: row j is an output block, column n an input block. `[1, 1]` for a sum of different `k`,
            for an update that is not of low rank, and for a stack of matrices, over all of them.

        Raises:
            TargetError: The site does not exist.
            RewriteError: The adapter does not exist, or none adapts the site.
        """
        from gralora_fx.core.methods.forms import block_norms

        updates = self._updates(path, adapter_name)
        if updates[0].stack is not None or not all(update.is_low_rank for update in updates):
            norm: Tensor = torch.linalg.vector_norm(self.delta_weight(path, adapter_name).double())
            return norm.cpu().reshape(1, 1)
        update = _sum(updates)
        return block_norms(update.factors, update.scale)

    # -- parameters -------------------------------------------------------------------------------------------------

    def all_parameters(self) -> list[nn.Parameter]:
        """Return the base model's parameters and those of every adapter, each once."""
        adapters = [p for adapter in self._state.adapters.values() for p in adapter.parameters()]
        return list({id(p): p for p in (*self._state.traced.tree.parameters.values(), *adapters)}.values())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters of the base model and all adapters, tied ones counted once.

        Args:
            only_trainable: Whether to count only trainable ones.
            exclude_embeddings: Whether to leave embedding tables out.
        """
        tree = self._state.traced.tree
        tables = {f"{path}.weight" for path, kind in tree.types.items() if kind.endswith("Embedding")}
        left_out = {id(p) for name, p in tree.parameters.items() if name in tables} if exclude_embeddings else set()
        return sum(
            parameter.numel()
            for parameter in self.all_parameters()
            if id(parameter) not in left_out and (parameter.requires_grad or not only_trainable)
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def _updates(self, path: str, adapter_name: str | None) -> list[Update]:
        self.site(path)
        names = self._state.state.active if adapter_name is None else [adapter_name]
        updates = [adapter.update(path) for name in names if path in (adapter := self._state[name]).factors]
        if not updates:
            raise RewriteError(f"no adapter of {names} adapts {path!r}; adapters_at() lists those that do")
        return updates


def _sum(updates: Sequence[Update]) -> Update:
    from gralora_fx.core.methods.forms import summed

    return updates[0] if len(updates) == 1 else Update(summed(updates), 1.0)
