"""PEFT's methods for merging adapters into the weights, and for undoing that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import fx, nn

from gralora_fx.core.adapters.adapter import adapter_names as as_names
from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.core.adapters.folded_adapters import describe_folded
from gralora_fx.core.adapters.folded_weights import SiteUpdate
from gralora_fx.core.adapters.other_parameters import (
    OWN_WEIGHTS,
    SetWeights,
    UntieWeights,
    is_separated,
    separated_path,
)
from gralora_fx.core.graph.pipeline import Pipeline
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.tracing.traced_model import TracedModel


class Merging:
    """PEFT's merging methods, over a graph and its adapters.

    Attributes:
        _state: The model's graph and adapters.
    """

    _state: AdapterGraph

    def merge_adapter(
        self, adapter_names: Sequence[str] | str | None = None, safe_merge: bool = False, *, untie: bool = False
    ) -> None:
        """Fold active adapters into the weights; their nodes leave the graph, the output stays the same.

        The base's own weights are kept for `unmerge_adapter`, so the adapted layers are in memory twice; the buffers
        are kept for the next merge.

        Args:
            adapter_names: Names of active adapters; None for all.
            safe_merge: Whether to check that every merged weight is finite.
            untie: Whether to give a layer with a tied weight one of its own, rather than raise.

        Raises:
            MergeError: There is nothing to merge, an adapter is not active or merged already, or a weight is tied or
                would not be finite. Nothing has changed after an error.
        """
        names = None if adapter_names is None else as_names(adapter_names)
        self._state.merge(names, safe=safe_merge, untie=untie)

    def unmerge_adapter(self) -> None:
        """Restore the base's own weights, bit for bit, and the adapters' nodes in the graph.

        Raises:
            MergeError: Nothing is merged.
        """
        self._state.unmerge()

    def merge_and_unload(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | str | None = None, *, untie: bool = False
    ) -> TracedModel:
        """Fold active adapters into the base's own weights, and return the base model.

        As in PEFT, the base changes and no copy is kept; `gralora_fx.merge` leaves it unchanged instead. The model is
        empty afterwards.

        Args:
            safe_merge: Whether to check first that every merged weight is finite.
            adapter_names: Names of active adapters; None for all.
            untie: Whether to give a layer with a tied weight one of its own in the result, rather than raise; the base
                keeps the tied weight as it is.

        Returns:
            The base model, node for node, with folded weights.

        Raises:
            MergeError: There is nothing to merge, or a weight is tied or would not be finite. Nothing has changed then.
        """
        names = None if adapter_names is None else as_names(adapter_names)
        folded = [self._state[name] for name in names or self._state.state.active]
        described = describe_folded(folded, self._state.traced, own=True)
        self._state.with_history(
            self._state.traced, " in the merged form", [adapter.name for adapter in folded]
        )  # or it raises
        untied = self._state.fold_into_base(names, safe=safe_merge, untie=untie)
        return dataclasses.replace(replace_weights(Merging.unload(self), untied), merged_adapters=described)

    def unload(self) -> TracedModel:
        """Remove every adapter and return the base model: its graph node for node, its weights as they are.

        The result keeps the model's own passes and adopted edits, with what they added. The model is empty afterwards;
        parameters that required gradients before the rewrite require them again.

        Raises:
            RewriteError: A pass fails without adapters, or the graph has an edit that was not adopted.
        """
        traced, training = self._state.traced, self._state.state.training
        graph_module = self._state.base.graph_module(copy_graph(traced.graph_module), training, "GraloraGraph")
        unloaded = traced.with_graph(graph_module, traced.tree).train(training)
        unloaded = self._state.with_history(unloaded, " in the form without adapters", shares=True)
        self._state.clear()
        for name in self._state.base.trainable:
            traced.tree.parameters[name].requires_grad_(True)
        return unloaded

    def updates(self, adapter_names: Sequence[str] | None = None) -> list[SiteUpdate]:
        """Return the weight updates of adapters, by site.

        Args:
            adapter_names: Names of the adapters; None for the active ones.

        Raises:
            RewriteError: An adapter does not exist, or two of them cannot be active together.
        """
        names = self._state.state.active if adapter_names is None else adapter_names
        site_updates = self._state.updates(names)
        self._state.check_copies_not_shared(names)
        return site_updates


def replace_weights(traced: TracedModel, weights: Mapping[str, nn.Parameter]) -> TracedModel:
    """Return a copy of a traced model with other weights; of a shared weight only the layer gets the new one."""
    if not weights:
        return traced
    sites = tuple(site for site in traced.adaptable if site.path in weights)
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "MergedGraph")
    passes = (UntieWeights(sites), SetWeights(sites, weights))
    Pipeline("weights", passes, given=frozenset({OWN_WEIGHTS})).run(graph_module.graph)
    parameters = dict(traced.tree.parameters)
    for site in sites:
        names = set(traced.tree.names_of(site.weight)) - set(site.tied_with)
        if is_separated(graph_module, site):
            names = {separated_path(site)}
        parameters |= dict.fromkeys(names, weights[site.path])
    graph_module = fx.GraphModule(
        graph_module, graph_module.graph, "MergedGraph"
    )  # drops attributes that the graph no longer reads
    return traced.with_graph(graph_module, dataclasses.replace(traced.tree, parameters=parameters)).train(
        traced.training
    )
