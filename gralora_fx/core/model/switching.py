"""Adds, switches, combines, removes, saves and loads adapters of a rewritten model; and runs user passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from gralora_fx.core.adapters.adapter import adapter_names as as_names
from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.config.checks import check_adapter_name
from gralora_fx.core.graph.pipeline import GraphPass
from gralora_fx.core.planning.planner import planned_for
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.planning.targets import exact_targets
from gralora_fx.errors import CheckpointError, ConfigError, RewriteError


class Switching:
    """Changes of a model's adapters and passes, each applied completely or not at all.

    Attributes:
        _state: The model's graph and adapters.
    """

    _state: AdapterGraph

    def add_adapter(self, adapter_name: str, config_or_plan: AdapterConfig | RewritePlan) -> None:
        """Add an adapter; the first one becomes active, later ones stay inactive until `set_adapter`.

        Args:
            adapter_name: A new name.
            config_or_plan: The configuration of the adapter, or a plan made from it.

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
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose weight update is the weighted sum of others'; it is not active yet.

        The sum is exact. Adapters of the same `gralora_k` give one of that `k` whose rank is the sum of theirs; a site
        where different `k` meet gets the exact LoRA form (`k = 1`, rank `sum of k*r`).

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

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        directory: str | Path,
        adapter_names: Sequence[str] | str | None = None,
        *,
        selected_adapters: Sequence[str] | str | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        save_function: object = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write adapters in PEFT's format: `default` into `directory`, others into a folder of their name in it.

        An error writes none of them; other files in the directory stay. The files hold no passes, nor what these
        added, of which a warning reminds.

        Args:
            directory: The directory, created if it does not exist.
            adapter_names: Names of the adapters; None for all.
            selected_adapters: PEFT's name for `adapter_names`.
            is_main_process: Whether to write at all; the other processes of a distributed training do not. If
                `fully_shard` has distributed the model, every process must call this, and the first one writes.
            state_dict: The model's state dict, as Accelerate gathers it; it must hold the model's current values. For a
                distributed model it is what is written, by the process that calls this.
            safe_serialization: Must be True: pickles are not written.
            save_function: Accepted for Accelerate's loops, and ignored: the files are always written by safetensors.
            max_shard_size: Accepted for `push_to_hub`, and ignored: an adapter is one file.

        Raises:
            RewriteError: An adapter does not exist, or the graph has an edit that was not adopted.
            CheckpointError: The directory cannot be written, or the state dict holds other values; the directory's
                contents are unchanged.
        """
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False writes a pickle, which is not supported; leave it out")
        if adapter_names is not None and selected_adapters is not None:
            raise RewriteError("adapter_names and selected_adapters are one argument; give one of them")
        from gralora_fx.core.adapters.checkpoint import save_adapters

        chosen = selected_adapters if adapter_names is None else adapter_names
        names = list(self._state.adapters) if chosen is None else as_names(chosen)
        adapters = {"" if name == "default" else name: self._state[name] for name in names}
        model: nn.Module = self  # type: ignore[assignment]  # a base class of the model
        self._state.warn_of_unsaved()
        save_adapters(self._state, adapters, directory, model, is_main_process=is_main_process, state_dict=state_dict)

    def load_adapter(
        self,
        directory: str | Path,
        adapter_name: str = "default",
        is_trainable: bool | None = None,
        *,
        revision: str | None = None,
        strict_base: bool = False,
    ) -> None:
        """Load a PEFT-format adapter under a new name, or into an existing adapter of the same configuration.

        Args:
            directory: Local directory or hub id.
            adapter_name: Name of the adapter.
            is_trainable: Whether its tensors train; None for the default: active adapters train, others do not.
            revision: Revision of the hub repository.
            strict_base: Whether to raise, instead of warn, if the adapter is not known to be of this base.

        Raises:
            ConfigError: The adapter's configuration is missing, invalid, or differs from the existing adapter's.
            TargetError: It does not fit the model.
            CheckpointError: The tensors do not fit the model or their configuration, or the base is another one.
                Nothing has changed, after any error.
        """
        from gralora_fx.core.adapters.checkpoint import load_adapter

        load_adapter(self._state, directory, adapter_name, revision=revision, strict_base=strict_base)
        if is_trainable is not None:
            self._state[adapter_name].requires_grad_(is_trainable)

    # -- passes of the user -----------------------------------------------------------------------------------------

    def add_pass(self, graph_pass: GraphPass) -> None:
        """Run a pass of your own over the rewritten graph, now and after every change of adapters.

        It gets a copy of the graph, so that adapters can still be switched, and `remove_pass` undoes it. It affects
        running and training; `merge`, `unload` and exports return the base's graph, over which `TracedModel.with_pass`
        runs a pass.

        Args:
            graph_pass: Takes the `GraphModule` and edits it in place. `nodes` finds the nodes of a site or an adapter.

        Raises:
            RewriteError: The pass failed, returned another module, or left a graph that does not lint. The model is
                unchanged.
        """
        self._state.add_pass(graph_pass)

    def adopt_edits(self) -> GraphPass | None:
        """Take over what was edited in `graph_module` by hand, as a pass that every other form of the graph has too.

        It need not be recompiled. Edits of an adapter's own nodes go with the adapter. Where an edit does not fit, such
        as at nodes that a merge removes, that is an error which names the node.

        Returns:
            The edit as a pass, for `remove_pass`; None if nothing was edited.

        Raises:
            RewriteError: The edit adds inputs, or moves nodes; the edited graph stays as it is.
        """
        return self._state.adopt_edits()

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
