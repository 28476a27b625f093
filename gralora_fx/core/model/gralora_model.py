"""`GraloraModel`: a rewritten graph as a module to train, switch, save and merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import fx, nn

from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.model.inspection import Inspection
from gralora_fx.core.model.merging import Merging
from gralora_fx.core.model.model_class import class_for
from gralora_fx.core.model.switching import Switching
from gralora_fx.core.model.trainable import GraphDropout, Trainable
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.tracing.traced_model import TracedModel, check_traced
from gralora_fx.errors import RewriteError

_TREE = "graph_module"  # names of parameters begin with it


class GraloraModel(Switching, Merging, Inspection, Trainable, nn.Module):
    """A traced model with adapters (GraLoRA, LoRA, DoRA) in its graph.

    Only the adapters' tensors require gradients. They include copies of the parameters that `bias` and
    `modules_to_save` name, so the base stays the same bit for bit. The nodes of inactive and merged adapters are not in
    the graph, so they cost nothing. The first switch to a state builds its graph and compiles it, which takes
    milliseconds for each hundred nodes; the graphs of the last 32 states are kept.

    Its methods are in the base classes, over one `AdapterGraph`: the base, the adapters and the graph that runs.
    """

    def __new__(cls, traced: TracedModel) -> GraloraModel:
        """Create a model whose class has the traced inputs in its signature."""
        check_traced(traced, RewriteError, "rewrite")
        return super().__new__(class_for(cls, traced))

    def __init__(self, traced: TracedModel) -> None:
        """Copy a traced model's graph, without an adapter; use `rewrite` to create a model."""
        nn.Module.__init__(self)
        self._state = AdapterGraph(traced)
        self._modules[_TREE] = self._state.base.tree
        self.dropout = GraphDropout(self._state)
        self.register_load_state_dict_post_hook(_keep_up)  # type: ignore[no-untyped-call]
        super().train(traced.training)

    @classmethod
    def from_pretrained(
        cls,
        traced: TracedModel,
        directory: str | Path,
        *,
        adapter_name: str = "default",
        revision: str | None = None,
        strict_base: bool = False,
    ) -> GraloraModel:
        """Rewrite a traced model with a saved adapter's configuration, and load its tensors.

        Args:
            traced: The traced base model.
            directory: A PEFT-format adapter: a local directory or a hub id.
            adapter_name: Name to give the adapter.
            revision: Revision of the hub repository.
            strict_base: Whether to raise, instead of warn, if the adapter is not known to be of this base.

        Raises:
            ConfigError: The adapter's configuration is missing or invalid.
            TargetError: The configuration does not fit the model.
            CheckpointError: The tensors do not fit the model or their configuration, or the base is another one.
            RewriteError: `traced` is not a traced model.
        """
        check_traced(traced, RewriteError, "load an adapter into")
        from gralora_fx.core.adapters.checkpoint import load_adapter

        model = cls(traced)
        load_adapter(model._state, directory, adapter_name, revision=revision, strict_base=strict_base)
        model.freeze_base()
        return model

    # -- questions --------------------------------------------------------------------------------------------------

    def adapter(self, adapter_name: str) -> ModelAdapter:
        """Return an adapter's plan and tensors.

        Args:
            adapter_name: Its name.

        Raises:
            RewriteError: There is no such adapter.
        """
        return self._state[adapter_name]

    @property
    def traced(self) -> TracedModel:
        """The traced base model."""
        return self._state.traced

    @property
    def without_adapters(self) -> TracedModel:
        """The base model with the passes and adopted edits of this one, over the same tensors."""
        return self._state.without_adapters()

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """Every linear layer of the base model."""
        return self.traced.sites

    @property
    def config(self) -> Any:
        """The base model's transformers configuration, or None."""
        return self.traced.config

    @property
    def configs(self) -> dict[str, AdapterConfig]:
        """The configuration of each adapter, by name."""
        return {name: adapter.config for name, adapter in self._state.adapters.items()}

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The configuration of each adapter, by name."""
        return self.configs

    @property
    def plans(self) -> dict[str, RewritePlan]:
        """The plan of each adapter, by name."""
        return {name: adapter.plan for name, adapter in self._state.adapters.items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters whose outputs are added, merged ones included."""
        return list(self._state.state.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter; a list if several or none are active."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are folded into the weights."""
        return list(self._state.state.merged)

    def to_svg(self, path: str | Path, *, full: bool = False) -> None:
        """Draw the graph by block: what is adapted, what is not and why, and the norms of the updates' blocks.

        Args:
            path: The file to write.
            full: Whether to draw all layers, rather than one for each run of three or more equal ones.

        Raises:
            RewriteError: It cannot be drawn or written.
        """
        from gralora_fx.picture import save, svg_of

        save(svg_of(self, full=full), path)

    def to_html(self, path: str | Path, *, full: bool = False) -> None:
        """Write a self-contained HTML page with the picture, its numbers, every site and every heat map.

        Args:
            path: The file to write.
            full: Whether to draw all layers, rather than one for each run of equal ones.

        Raises:
            RewriteError: It cannot be drawn or written.
        """
        from gralora_fx.picture import html_of, save

        save(html_of(self, full=full), path)

    # -- running and training ---------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph like the model.

        Args:
            *args: Inputs by position.
            **kwargs: Inputs by name; with `labels` (or `start_positions` and `end_positions`) the result has `.loss`,
                by transformers' own function for the model's class. With `num_items_in_batch` the loss is a sum divided
                by it, as Trainer needs to accumulate gradients. With `adapter_names`, a list with the name of an
                adapter for each row, rows have these adapters in place of the active ones, in training too;
                None (`"__base__"` too) is a row without one.

        Returns:
            The model's outputs.

        Raises:
            TraceError: An input is missing or was not part of the trace.
            RewriteError: Labels were given, and the model has no loss for them; rows hold several texts, which the
                graph does not keep apart; or a row names an adapter that does not exist or cannot act by row.
        """
        if self._other_forward is not None:
            return self._other_forward(*args, **kwargs)
        from gralora_fx.core.model.forward import compute

        return compute(self, *args, **kwargs)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The current graph: a new object after every change of adapters or mode, over the same parameters.

        While adapters are merged it holds the merged weights; `parameters()` and `state_dict()` of the model are the
        base's own and the adapters' at any time.
        """
        try:
            return self._state.lend()
        except AttributeError as error:  # for which torch would return the tree of this name
            raise RuntimeError(f"the graph cannot be compiled: {error}") from error

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict, as any module does; merged weights are folded again from the loaded tensors.

        Args:
            state_dict: The tensors by their names.
            strict: Whether the names must be the module's own.
            assign: Whether tensors replace the module's, instead of being copied into them.
        """
        with self._state.writing():
            self._state.check_adopted()
            return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GraloraModel:
        """Convert or move every tensor, the base's included, as `to()` does, and update the graph."""
        from gralora_fx.core.tracing.other_dtypes import convert_trace, once_each, trace_converted

        with self._state.writing():
            self._state.check_adopted()
            self._state.check_convertible(fn)
            captured, once = trace_converted(self._state.traced, fn), once_each(fn)
            super()._apply(once, recurse)  # type: ignore[no-untyped-call]
            if captured is not None:
                convert_trace(self._state.base.traced, captured, once)
            self._state.keep_up()
        return self

    def train(self, mode: bool = True) -> GraloraModel:
        """Switch dropout, attention dropout, adapter dropout and batch statistics.

        Args:
            mode: True for training, False for evaluation.
        """
        super().train(mode)
        self._state.set_mode(mode)
        return self

    def freeze_base(self) -> None:
        """Stop the base model's parameters from requiring gradients."""
        for parameter in self.traced.tree.parameters.values():
            parameter.requires_grad_(False)

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and `copy.deepcopy`: everything but the graph, which is rebuilt."""
        modules = {name: module for name, module in self._modules.items() if name != _TREE}
        state = {name: value for name, value in self.__dict__.items() if name not in ("_view", "_other_forward")}
        return {**state, "_modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._modules = {_TREE: self._state.base.tree, **self._modules}


def _keep_up(model: GraloraModel, _: Any) -> None:
    """Update the graph after a state dict was loaded into the model or a module that contains it."""
    model._state.keep_up()
