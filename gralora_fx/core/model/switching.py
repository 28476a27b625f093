"""Adding, switching, combining and removing adapters of a rewritten model; and user passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gralora_fx.core.adapters.adapter import adapter_names as as_names
from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.config.checks import check_adapter_name
from gralora_fx.core.graph.pipeline import GraphPass
from gralora_fx.core.methods import not_a_config
from gralora_fx.core.planning.planner import plan
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.planning.targets import exact_targets
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ConfigError


class Switching:
    """Changes of a model's adapters and passes, each applied completely or not at all.

    Attributes:
        _state: The graph and its adapters, of the model.
    """

    _state: AdapterGraph

    def add_adapter(self, adapter_name: str, config_or_plan: AdapterConfig | RewritePlan) -> None:
        """Add an adapter; the first one becomes active, later ones stay inactive until `set_adapter`.

        Args:
            adapter_name: A new name.
            config_or_plan: What to adapt, or a plan made from that.

        Raises:
            ConfigError: The name is taken or invalid, or a second adapter would train biases.
            TargetError: The configuration does not fit the model.
            RewriteError: The plan is for another model. Nothing has changed after an error.
        """
        check_adapter_name(adapter_name)
        self._state.add(adapter_name, planned_for(self._state.traced, config_or_plan))

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Activate one adapter, or several whose outputs are summed; the others leave the graph and stop training.

        Args:
            adapter_name: Name or names of existing adapters.

        Raises:
            RewriteError: An adapter does not exist, two of them train copies of the same module, one adapts what
                another trains as a copy, or a `disable_adapter` block is open.
            MergeError: Adapters are merged; unmerge first.
        """
        self._state.switch(list(dict.fromkeys(as_names(adapter_name))))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model within the block: its graph, node for node, over its own parameters."""
        with self._state.disabled():
            yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors.

        Args:
            adapter_name: Its name.

        Raises:
            RewriteError: The adapter does not exist or is active.
        """
        self._state.remove(adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter whose weight update is the weighted sum of others'; it is not active yet.

        The sum is exact. Adapters of the same `gralora_k` give one of that `k` whose rank is the sum of theirs; where
        different `k` meet at a site, it gets the exact LoRA form (`k = 1`, rank `sum of k*r`).

        Args:
            adapters: Names of the adapters to combine; sizes, scales and targets may differ.
            weights: A factor for each, negative ones included.
            adapter_name: A new name.
            combination_type: Must be `"linear"`.

        Raises:
            ConfigError: The name is taken or invalid, counts differ, a weight is not finite, or the type is not
                supported.
            RewriteError: An adapter does not exist, or trains biases or whole modules.
            MergeError: Adapters are merged; unmerge first.
        """
        check_adapter_name(adapter_name)
        if combination_type != "linear":
            raise ConfigError(f"combination_type must be 'linear', but got {combination_type!r}")
        if isinstance(adapters, str):
            raise ConfigError(f"adapters must be a list of names, but got {adapters!r}; give [{adapters!r}]")
        if not isinstance(weights, (list, tuple)):
            raise ConfigError(f"weights must be a list of numbers, but got {weights!r}")
        from gralora_fx.core.model.weighted_sums import weighted_sum

        config, factors = weighted_sum([self._state[name] for name in as_names(adapters)], weights)
        config = config.changed(target_modules=exact_targets(factors, self._state.traced.tree))
        self._state.add(adapter_name, planned_for(self._state.traced, config), factors=factors)

    # -- passes of the user -----------------------------------------------------------------------------------------

    def add_pass(self, graph_pass: GraphPass) -> None:
        """Run a pass of your own over the rewritten graph, now and after every change of adapters.

        It gets a copy of the graph, so that adapters can be switched as if it were not there, and `remove_pass` undoes
        it. It affects running and training; `merge`, `unload` and exports return the base's graph, over which
        `TracedModel.with_pass` runs a pass.

        Args:
            graph_pass: Takes the `GraphModule` and edits it in place. `nodes` finds the nodes of a site or an adapter.

        Raises:
            RewriteError: The pass failed, returned another module, or left a graph that does not lint. The model is
                unchanged.
        """
        self._state.add_pass(graph_pass)

    def remove_pass(self, graph_pass: GraphPass) -> None:
        """Remove a pass that was added.

        Args:
            graph_pass: The pass, as it was added.

        Raises:
            RewriteError: It was not added.
        """
        self._state.remove_pass(graph_pass)

    # -- training ---------------------------------------------------------------------------------------------------

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether adapters train, whether active or not.

        Args:
            adapter_names: Name or names of the adapters.
            requires_grad: Whether they train.

        Raises:
            RewriteError: An adapter does not exist.
        """
        for adapter in [self._state[name] for name in as_names(adapter_names)]:
            adapter.requires_grad_(requires_grad)


def planned_for(traced: TracedModel, config_or_plan: AdapterConfig | RewritePlan) -> RewritePlan:
    """The plan of a configuration, or a given plan once it is known to be for this model."""
    if isinstance(config_or_plan, AdapterConfig):
        return plan(traced, config_or_plan)
    if not isinstance(config_or_plan, RewritePlan):
        raise ConfigError(f"an adapter needs a configuration or a plan, not {not_a_config(config_or_plan)}")
    config_or_plan.check_fits(traced.adaptable)
    return config_or_plan
