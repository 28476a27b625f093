"""`GraloraModel`: a rewritten graph as a module to train, switch, save and merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from gralora_fx.adapters.adapter_graph import AdapterGraph
from gralora_fx.adapters.checkpoint import check_state_dict, load_tensors, read_adapter, write_adapters
from gralora_fx.adapters.installed import InstalledAdapter
from gralora_fx.errors import CheckpointError, ConfigError, RewriteError
from gralora_fx.model.merging import AdapterMerging
from gralora_fx.model.model_class import class_for
from gralora_fx.model.peft_attributes import PeftAttributes
from gralora_fx.model.switching import AdapterSwitching
from gralora_fx.passes.adapter_paths import adapter_names as as_names
from gralora_fx.picture import html_of, save, svg_of
from gralora_fx.planning.rewrite_plan import RewritePlan
from gralora_fx.tracing.losses import ITEM_COUNT, decoder_inputs, model_loss, split_labels
from gralora_fx.tracing.traced_model import TracedModel, check_traced

_TREE = "graph_module"  # names of parameters begin with it


class GraloraModel(AdapterSwitching, AdapterMerging, PeftAttributes):
    """A traced model with adapters (GraLoRA, LoRA) in its graph.

    Only the adapters' tensors require gradients (and what `bias` and `modules_to_save` name, as the adapters' own
    copies: the base stays bit for bit). The nodes of inactive and merged adapters are not in the graph, so they cost
    nothing. The first switch to a state builds its graph and compiles it, which takes milliseconds for each hundred
    nodes; the graphs of the last 32 states are kept.
    """

    def __new__(cls, traced: TracedModel) -> GraloraModel:
        """Create a model whose class has the traced inputs in its signature.

        Raises:
            RewriteError: `traced` is not a traced model.
        """
        check_traced(traced, RewriteError, "rewrite")
        return super().__new__(class_for(cls, traced))

    def __init__(self, traced: TracedModel) -> None:
        """Copy a traced model's graph, without an adapter; use `rewrite` to create a model."""
        nn.Module.__init__(self)
        self._state = AdapterGraph(traced)
        self._modules[_TREE] = self._state.base.tree
        self._was_trainable = [name for name, p in traced.tree.parameters.items() if p.requires_grad]
        self.register_load_state_dict_post_hook(_keep_up)  # type: ignore[no-untyped-call]
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
            RewriteError: The model is not traced.
            ConfigError: The adapter's configuration is missing or invalid.
            TargetError: The configuration does not fit the model.
            CheckpointError: The tensors do not fit the model.
            RewriteError: `traced` is not a traced model.
        """
        check_traced(traced, RewriteError, "load an adapter into")
        config, tensors = read_adapter(directory, revision=revision)
        model = cls(traced)
        model.add_adapter(adapter_name, config)
        load_tensors(model.installed(adapter_name), tensors, traced.tree, str(directory))
        model.freeze_base()
        return model

    # -- pictures ---------------------------------------------------------------------------------------------------

    def to_svg(self, path: str | Path, *, full: bool = False) -> None:
        """Draw the graph by block: what is adapted, what is not and why, and the norms of the updates' blocks.

        Args:
            path: The file to write.
            full: Whether to draw all layers, rather than one for each run of three or more equal ones.

        Raises:
            RewriteError: It cannot be drawn or written.
        """
        save(svg_of(self, full=full), path)

    def to_html(self, path: str | Path, *, full: bool = False) -> None:
        """Write a self-contained HTML page with the picture, its numbers, every site and every heat map.

        Args:
            path: The file to write.
            full: Whether to draw all layers, rather than one for each run of equal ones.

        Raises:
            RewriteError: It cannot be drawn or written.
        """
        save(html_of(self, full=full), path)

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and `copy.deepcopy`: everything but the graph, which is rebuilt."""
        modules = {name: module for name, module in self._modules.items() if name != _TREE}
        return {**self.__dict__, "_modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the model's tensors."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._modules = {_TREE: self._state.base.tree, **self._modules}

    # -- running and training ---------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph like the model.

        Args:
            *args: Inputs by position.
            **kwargs: Inputs by name; with `labels` (or `start_positions` and `end_positions`) the result has `.loss`,
                by transformers' own function for the model's class. With `num_items_in_batch` the loss is a sum
                divided by it, as Trainer asks for when it accumulates gradients.

        Returns:
            What the model returns.

        Raises:
            TraceError: An input is missing or was not part of the trace.
            RewriteError: Labels were given, and the model has no loss for them.
        """
        traced = self._state.base.traced
        inputs, labels = split_labels(kwargs, traced.input_names)
        item_count = inputs.pop(ITEM_COUNT, None)
        if not labels:
            return self._state.run(traced.bind(args, inputs))
        if "decoder_input_ids" in traced.input_names and inputs.get("decoder_input_ids") is None and "labels" in labels:
            inputs["decoder_input_ids"] = decoder_inputs(labels["labels"], self.config, traced.shift_labels)
        outputs = self._state.run(traced.bind(args, inputs))
        loss = model_loss(outputs, labels, traced.loss_function, self.config, item_count)
        return type(outputs)(**{"loss": loss, **{k: v for k, v in outputs.items() if k != "loss"}})

    @property
    def graph_module(self) -> fx.GraphModule:
        """The current graph: a new object after every change of adapters or mode, over the same parameters.

        While adapters are merged it holds the merged weights; `parameters()` and `state_dict()` of the model are the
        base's own and the adapters' at any time.
        """
        return self._state.lend()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict, as any module does; merged weights are folded again from the loaded tensors."""
        with self._state.writing():
            return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GraloraModel:
        """Convert or move every tensor, as `to()`, `half()` and `to_empty()` do, and fold merged weights again."""
        with self._state.writing():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._state.keep_up()
        return self

    def train(self, mode: bool = True) -> GraloraModel:
        """Switch dropout, attention dropout, adapter dropout and batch statistics."""
        super().train(mode)
        self._state.set_mode(mode)
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def freeze_base(self) -> None:
        """Stop the base model's parameters from requiring gradients."""
        for parameter in self.traced.tree.parameters.values():
            parameter.requires_grad_(False)

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

        Args:
            directory: Where to write; made if it does not exist.
            adapter_names: Names of the adapters; None for all.
            selected_adapters: PEFT's name for `adapter_names`.
            is_main_process: Whether to write at all; the other processes of a distributed training do not.
            state_dict: The model's state dict, as Accelerate gathers it; it must hold the model's current values.
            safe_serialization: Must be True: pickles are not written.
            save_function: Accepted for Accelerate's loops, and ignored: the files are always written by safetensors.
            max_shard_size: Accepted for `push_to_hub`, and ignored: an adapter is one file.

        All of them are written, or none after an error; other files in the directory stay.

        Raises:
            RewriteError: An adapter does not exist.
            CheckpointError: The directory cannot be written, or the state dict holds other values; its contents are
                unchanged.
        """
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False writes a pickle, which is not supported; leave it out")
        if adapter_names is not None and selected_adapters is not None:
            raise RewriteError("adapter_names and selected_adapters are one argument; give one of them")
        chosen = selected_adapters if adapter_names is None else adapter_names
        names = list(self._state.adapters) if chosen is None else as_names(chosen)
        adapters = {"" if name == "default" else name: self.installed(name) for name in names}
        for adapter in adapters.values() if state_dict is not None else ():
            check_state_dict(adapter, state_dict or {})
        if is_main_process:
            write_adapters(adapters, directory, self.traced)

    def load_adapter(
        self,
        directory: str | Path,
        adapter_name: str = "default",
        is_trainable: bool | None = None,
        *,
        revision: str | None = None,
    ) -> None:
        """Load a PEFT-format adapter under a new name, or into an existing adapter of the same configuration.

        Args:
            directory: Local directory or hub id.
            adapter_name: Name of the adapter.
            is_trainable: Whether its tensors train; None for the default: active adapters train, others do not.
            revision: Revision of the hub repository.

        Raises:
            ConfigError: The adapter's configuration is missing, invalid, or differs from the existing adapter's.
            TargetError: It does not fit the model.
            CheckpointError: The tensors do not fit. Nothing has changed, after any error.
        """
        config, tensors = read_adapter(directory, revision=revision)
        if adapter_name in self._state.adapters:
            with self._state.writing():
                self._state.check_not_merged("load tensors")
                _check_same_config(self.installed(adapter_name), self._plan(config), adapter_name)
                load_tensors(self.installed(adapter_name), tensors, self.traced.tree, str(directory))
        else:
            self.add_adapter(adapter_name, config)
            try:
                load_tensors(self.installed(adapter_name), tensors, self.traced.tree, str(directory))
            except CheckpointError:
                self._state.discard(adapter_name)
                raise
        if is_trainable is not None:
            self.installed(adapter_name).requires_grad_(is_trainable)


def _check_same_config(adapter: InstalledAdapter, other: RewritePlan, name: str) -> None:
    mine, theirs = (
        {planned.site.path: (planned.dims, planned.scale) for planned in chosen.selected}
        for chosen in (adapter.plan, other)
    )
    if mine != theirs or adapter.plan.saved_modules != other.saved_modules:
        raise ConfigError(
            f"adapter {name!r} exists with another configuration; delete it first or load under another name"
        )


def _keep_up(model: GraloraModel, _: Any) -> None:
    """Update the graph after a state dict was loaded into the model or a module that contains it."""
    model._state.keep_up()
