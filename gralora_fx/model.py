"""`GraloraModel`: a rewritten graph as the module that a user trains, switches, saves and merges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import fx, nn

from gralora_fx.adapters.graph import AdapterGraph
from gralora_fx.adapters.installed import InstalledAdapter
from gralora_fx.adapters.weighted import weighted_sum
from gralora_fx.checkpoint import load_tensors, read_adapter, write_adapter
from gralora_fx.config import GraloraConfig
from gralora_fx.errors import CheckpointError, ConfigError, RewriteError
from gralora_fx.losses import LABELS, decoder_inputs, model_loss, split_labels
from gralora_fx.passes.fold import SiteUpdate
from gralora_fx.picture import html_of, save, svg_of
from gralora_fx.planning import plan
from gralora_fx.planning.rewrite_plan import RewritePlan
from gralora_fx.queries import AdapterQueries
from gralora_fx.reweighted import with_weights
from gralora_fx.store import check_adapter_name
from gralora_fx.tracing.traced import TracedModel
from gralora_fx.tracing.user_pass import GraphPass


class GraloraModel(AdapterQueries, nn.Module):
    """A traced model with GraLoRA adapters in its graph.

    Only the adapters' tensors require gradients (and what `bias` and `modules_to_save` name, as the adapters' own
    copies: the base stays bit for bit). The nodes of inactive and merged adapters are not in the graph, so they cost
    nothing; switching edits the graph and recompiles it, which takes milliseconds for each hundred nodes.
    """

    graph_module: fx.GraphModule

    def __init__(self, traced: TracedModel) -> None:
        """Copy a traced model's graph, without an adapter; `rewrite` is the public way to make one."""
        super().__init__()
        self._state = AdapterGraph(traced)
        self.graph_module = self._state.graph_module
        self._was_trainable = [p for p in traced.tree.parameters.values() if p.requires_grad]
        super().train(traced.training)

    @classmethod
    def from_pretrained(
        cls, traced: TracedModel, directory: str | Path, *, adapter_name: str = "default", revision: str | None = None
    ) -> GraloraModel:
        """Rewrite a traced model as a saved adapter says, and load its tensors.

        Args:
            traced: The traced base model.
            directory: A PEFT-format adapter: a local directory or a hub id.
            adapter_name: Name to give the adapter.
            revision: Revision of the hub repository.

        Raises:
            ConfigError: The adapter's configuration is missing or invalid.
            TargetError: The configuration does not fit the model.
            CheckpointError: The tensors do not fit the model.
        """
        config, tensors = read_adapter(directory, revision=revision)
        model = cls(traced)
        model.add_adapter(adapter_name, config)
        load_tensors(model.installed(adapter_name), tensors, traced.tree, str(directory))
        model.freeze_base()
        return model

    # -- pictures ---------------------------------------------------------------------------------------------------

    def to_svg(self, path: str | Path, *, full: bool = False) -> None:
        """Draw the graph by block: what is adapted, what is left and why, how large each block of an update is.

        Args:
            path: The file to write.
            full: Whether layers that look alike are all drawn, rather than one for each run of three or more.

        Raises:
            RewriteError: It cannot be drawn or written.
        """
        save(svg_of(self, full=full), path)

    def to_html(self, path: str | Path, *, full: bool = False) -> None:
        """Write the picture with its numbers, every site and every heat map on one page that fetches nothing.

        Args:
            path: The file to write.
            full: Whether layers that look alike are all drawn.

        Raises:
            RewriteError: It cannot be drawn or written.
        """
        save(html_of(self, full=full), path)

    # -- running and training ---------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as the model would run.

        Args:
            *args: Inputs by position.
            **kwargs: Inputs by name; with `labels` (or `start_positions` and `end_positions`) the result has `.loss`,
                by transformers' own function for the model's class.

        Returns:
            What the model returns.

        Raises:
            TraceError: An input is missing or was not part of the trace.
            RewriteError: Labels were given, and the model has no loss for them.
        """
        if not any(kwargs.get(name) is not None for name in LABELS):
            return self.graph_module(**self.traced.bind(args, {k: v for k, v in kwargs.items() if k not in LABELS}))
        inputs, labels = split_labels(kwargs)
        if (
            "decoder_input_ids" in self.traced.input_names
            and inputs.get("decoder_input_ids") is None
            and "labels" in labels
        ):
            inputs["decoder_input_ids"] = decoder_inputs(labels["labels"], self.config, self.traced.shift_labels)
        outputs = self.graph_module(**self.traced.bind(args, inputs))
        loss = model_loss(outputs, labels, self.traced.loss_function, self.config)
        return type(outputs)(**{"loss": loss, **{k: v for k, v in outputs.items() if k != "loss"}})

    def train(self, mode: bool = True) -> GraloraModel:
        """Switch dropout, attention dropout, adapter dropout and batch statistics."""
        super().train(mode)
        self._state.set_mode(mode)
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of values that train, and of all values."""
        counted = {id(parameter): parameter for parameter in self.parameters()}
        counted |= {id(parameter): parameter for parameter in self.traced.tree.parameters.values()}
        trainable = sum(p.numel() for p in counted.values() if p.requires_grad)
        return trainable, sum(p.numel() for p in counted.values())

    def print_trainable_parameters(self) -> None:
        """Print how many values train."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def freeze_base(self) -> None:
        """Stop the base model's parameters from requiring gradients."""
        for parameter in self.traced.tree.parameters.values():
            parameter.requires_grad_(False)

    # -- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config_or_plan: GraloraConfig | RewritePlan) -> None:
        """Add an adapter; the first one becomes active, later ones wait for `set_adapter`.

        Args:
            adapter_name: A new name.
            config_or_plan: What to adapt, or the plan already made of it.

        Raises:
            ConfigError: The name is taken or invalid, or a second adapter would train biases.
            TargetError: The configuration cannot be met.
            RewriteError: The plan is not one of this model. Nothing has changed, after any error.
        """
        check_adapter_name(adapter_name)
        self._state.add(adapter_name, self._plan(config_or_plan))

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter active, or several that sum; the others leave the graph and stop training.

        Args:
            adapter_name: Name or names of existing adapters.

        Raises:
            RewriteError: There is no such adapter, or two of them train copies of the same module.
            MergeError: Adapters are merged; unmerge first.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self._state.switch(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model while the block lasts: its graph, node for node, over its own parameters."""
        state = self._state.disable()
        try:
            yield
        finally:
            self._state.restore(state)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors.

        Raises:
            RewriteError: There is no such adapter, or it is active.
        """
        self.installed(adapter_name)
        if adapter_name in self._state.active:
            raise RewriteError(f"adapter {adapter_name!r} is active; set another one before deleting it")
        self._state.remove(adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter whose weight update is the weighted sum of others; it waits for `set_adapter`.

        The sum is exact. Adapters of the same `gralora_k` give one of that `k` whose rank is the sum of theirs; where
        different `k` meet at a site, it gets the exact LoRA form (`k = 1`, rank `sum of k*r`).

        Args:
            adapters: Names of the adapters to combine; sizes, scales and targets may differ.
            weights: A factor for each, negative ones included.
            adapter_name: A new name.
            combination_type: `"linear"`, the only one.

        Raises:
            ConfigError: The name is taken or invalid, counts differ, a weight is not finite, or the type is another.
            RewriteError: There is no such adapter, or one trains biases or whole modules.
            MergeError: Adapters are merged; unmerge first.
        """
        check_adapter_name(adapter_name)
        if combination_type != "linear":
            raise ConfigError(f"combination_type must be 'linear', but got {combination_type!r}")
        if isinstance(adapters, str):
            raise ConfigError(f"adapters must be a list of names, but got {adapters!r}; give [{adapters!r}]")
        config, factors = weighted_sum([self.installed(name) for name in adapters], list(weights))
        self._state.add(adapter_name, self._plan(config), factors=factors)

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path, adapter_names: Sequence[str] | None = None) -> None:
        """Write adapters in PEFT's format: `default` into `directory`, others into a folder of their name in it.

        Args:
            directory: Where to write; made if it does not exist.
            adapter_names: Which adapters; None for all.

        Raises:
            RewriteError: There is no such adapter.
        """
        names = list(self._state.adapters) if adapter_names is None else list(adapter_names)
        adapters = [self.installed(name) for name in names]
        for adapter in adapters:
            target = Path(directory) if adapter.name == "default" else Path(directory) / adapter.name
            write_adapter(adapter, target, self.traced)

    def load_adapter(
        self, directory: str | Path, adapter_name: str = "default", *, revision: str | None = None
    ) -> None:
        """Load a PEFT-format adapter under a new name, or into an existing adapter of the same configuration.

        Args:
            directory: Local directory or hub id.
            adapter_name: Name of the adapter.
            revision: Revision of the hub repository.

        Raises:
            ConfigError: The adapter's configuration is missing, invalid, or differs from the existing adapter's.
            TargetError: It does not fit the model.
            CheckpointError: The tensors do not fit. Nothing has changed, after any error.
        """
        config, tensors = read_adapter(directory, revision=revision)
        if adapter_name in self._state.adapters:
            self._state.refuse_merged("load tensors")
            _refuse_other_config(self.installed(adapter_name), self._plan(config), adapter_name)
            load_tensors(self.installed(adapter_name), tensors, self.traced.tree, str(directory))
            return
        self.add_adapter(adapter_name, config)
        try:
            load_tensors(self.installed(adapter_name), tensors, self.traced.tree, str(directory))
        except CheckpointError:
            self._state.remove(adapter_name)
            raise

    # -- passes of the user -----------------------------------------------------------------------------------------

    def add_pass(self, graph_pass: GraphPass) -> None:
        """Run a pass of your own over the rewritten graph, now and again after every change of adapters.

        It gets a copy of the graph, so that adapters go in and out as if it were not there, and `remove_pass` undoes
        it. It holds for running and training: `merge`, `unload` and exports give the base's graph, over which
        `TracedModel.with_pass` runs one.

        Args:
            graph_pass: Takes the `GraphModule` and edits it in place. `nodes` finds what serves a site or an adapter.

        Raises:
            RewriteError: The pass failed, returned another module, or left a graph that does not lint. The model is as
                it was.
        """
        self._state.set_passes([*self._state.passes, graph_pass])

    def remove_pass(self, graph_pass: GraphPass) -> None:
        """Take back a pass that was added.

        Raises:
            RewriteError: It was not added.
        """
        if graph_pass not in self._state.passes:
            raise RewriteError(f"{graph_pass!r} is no pass of this model; there are {list(self._state.passes)}")
        index = self._state.passes.index(graph_pass)
        self._state.set_passes([*self._state.passes[:index], *self._state.passes[index + 1 :]])

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Sequence[str] | str | None = None, safe_merge: bool = False, *, untie: bool = False
    ) -> None:
        """Fold active adapters into the weights; their nodes leave the graph, the output stays.

        The base's own weights are kept for `unmerge_adapter`, so the adapted layers stand in memory twice; the buffers
        are kept for the next merge.

        Args:
            adapter_names: Which active adapters; None for all.
            safe_merge: Whether to check that every merged weight is finite.
            untie: Whether a layer with a tied weight gets one of its own, instead of being refused.

        Raises:
            MergeError: Nothing to merge, an adapter is not active or merged already, a weight is tied or would not be
                finite. Nothing has changed, after any error.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._state.merge(self._state.mergeable(names), safe=safe_merge, untie=untie)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, bit for bit, and the adapters' nodes into the graph again.

        Raises:
            MergeError: Nothing is merged.
        """
        self._state.unmerge()

    def merge_and_unload(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | str | None = None, *, untie: bool = False
    ) -> TracedModel:
        """Fold active adapters into the base's weights themselves, and give the base model back.

        As in PEFT the base changes and no copy is kept; `gralora_fx.merge` keeps it instead. The model is empty
        afterwards.

        Args:
            safe_merge: Whether to check first that every merged weight is finite.
            adapter_names: Which active adapters; None for all.
            untie: Whether a layer with a tied weight gets one of its own in the result, instead of being refused; the
                base keeps the tied weight as it is.

        Returns:
            The base model, node for node, with folded weights.

        Raises:
            MergeError: Nothing to merge, or a weight is tied or would not be finite. Nothing has changed then.
        """
        if self._state.merged:
            self._state.unmerge()
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = self._state.fold_into_base(self._state.mergeable(names), safe=safe_merge, untie=untie)
        return with_weights(self.unload(), own)

    def unload(self) -> TracedModel:
        """Take every adapter out and give the base model back: its graph node for node, its weights as they are.

        The model is empty afterwards; parameters that required gradients before the rewrite do so again.
        """
        self._state.clear()
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        return self.traced.with_graph(self.graph_module, self.traced.tree).train(self.training)

    def updates(self, adapter_names: Sequence[str] | None = None) -> list[SiteUpdate]:
        """The weight updates of adapters, site by site; None for the active ones."""
        return self._state.updates(self._state.active if adapter_names is None else adapter_names)

    def _plan(self, config_or_plan: GraloraConfig | RewritePlan) -> RewritePlan:
        if isinstance(config_or_plan, GraloraConfig):
            return plan(self.traced, config_or_plan)
        if not isinstance(config_or_plan, RewritePlan):
            raise ConfigError(
                f"expected a GraloraConfig or a RewritePlan, but got a {type(config_or_plan).__name__}; "
                "convert a live PEFT configuration with GraloraConfig.from_peft"
            )
        known = {site.path: site.weight for site in self.sites}
        for planned in config_or_plan.selected:
            if known.get(planned.site.path) is not planned.site.weight:
                raise RewriteError(f"{planned.site.path} of the plan is no site of this model; plan it again")
        return config_or_plan


def _refuse_other_config(adapter: InstalledAdapter, other: RewritePlan, name: str) -> None:
    mine, theirs = (
        {planned.site.path: (planned.rank, planned.scale) for planned in chosen.selected}
        for chosen in (adapter.plan, other)
    )
    if mine != theirs or adapter.plan.saved_modules != other.saved_modules:
        raise ConfigError(
            f"adapter {name!r} exists with another configuration; delete it first or load under another name"
        )
