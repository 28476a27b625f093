"""`TracedModel`: a graph over a model's own parameters, with facts about the source model."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from transformers import GenerationConfig, PreTrainedConfig

from gralora_fx.base.sources.lazy_tensors import copy_lazy, is_lazy
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.graph.out_of_reach import layers_of
from gralora_fx.core.graph.pipeline import GraphPass, PassReport
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.operators import operators_called
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout, cache_layout
from gralora_fx.core.tracing.inputs.signature import CallSignature
from gralora_fx.core.tracing.normalize.modes import set_mode
from gralora_fx.core.tracing.source_model import main_input
from gralora_fx.errors import GraloraError, TargetError, TraceError, an
from gralora_fx.format.input_names import packed_problem

if TYPE_CHECKING:
    from gralora_fx.core.graph.checkpointing import Checkpointing
    from gralora_fx.core.graph.sites import ParameterSite
    from gralora_fx.core.tracing.as_transformers import TransformersView
    from gralora_fx.core.tracing.draft import AppendedModules, Draft

CALL_TRACE = "trace it first: call trace() with the model,"


@dataclass(frozen=True, eq=False, repr=False)
class TracedModel:
    """A traced model: callable like the model, its graph open to passes.

    It shares the source model's parameters. `trace` makes it; `dataclasses.replace` makes a changed one, or
    `with_graph` if the graph is another. Only mode, dtype and device change in place, as on any module.

    Attributes:
        graph_module: The graph; calling it takes every traced input by name.
        tree: Module paths and parameters of the source model.
        example_inputs: The arguments it was traced with, by name: inputs, and constants that are part of the graph.
        signature: Its call signature, with the value of every argument that is part of the graph.
        sites: Every linear layer of the model, in the order of its modules.
        out_of_reach: Reasons why an adapter would not take effect at every call of a layer, by the layer's path.
        in_subgraphs: The operators of branches and loops that call layers, by the layer's path.
        task: The task it was traced for, or None.
        config: The model's transformers configuration, or None.
        generation_config: The model's generation configuration, or None.
        tokenizer_source: The directory or hub id of the model's tokenizer, or None.
        loss_function: transformers' loss for the model's class, or None.
        shift_labels: The model's own function from labels to decoder inputs, or None.
        merged_adapters: Configuration and digest of each adapter that was merged into the weights, by name.
        appended: The modules that the task appends to the model, or None.
        passes: Reports of the passes that normalized the graph, in order.
        blocks: Paths of the modules that are blocks of the rewritten model (see `trace`).
        checkpointing: How the source model recomputed blocks in its backward pass, or None.
        source: The draft to trace again in another dtype (see `to`), or why there is none.
    """

    graph_module: fx.GraphModule
    tree: ModuleTree
    example_inputs: Mapping[str, Any]
    signature: CallSignature
    sites: tuple[LinearSite, ...]
    out_of_reach: Mapping[str, str]
    in_subgraphs: Mapping[str, str]
    task: str | None = None
    config: PreTrainedConfig | None = None
    generation_config: GenerationConfig | None = None
    tokenizer_source: str | None = None
    loss_function: Callable[..., torch.Tensor] | None = None
    shift_labels: Callable[[torch.Tensor], torch.Tensor] | None = None
    merged_adapters: Mapping[str, Any] = field(default_factory=dict)
    appended: AppendedModules | None = None
    passes: tuple[PassReport, ...] = ()
    blocks: tuple[str, ...] = ()
    checkpointing: Checkpointing | None = None
    source: Draft | str = "it was made from a graph"

    @property
    def training(self) -> bool:
        """True if the graph is in training mode."""
        return self.graph_module.training

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the graph, in its order."""
        return self.signature.inputs

    @property
    def cache_layout(self) -> CacheLayout:
        """The layout of the cache that the model keeps between its steps."""
        return cache_layout(self.example_inputs)

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments of the trace that are part of the graph; calls pass them again."""
        return {name: value for name, value in self.example_inputs.items() if name not in self.input_names}

    @property
    def graph_inputs(self) -> dict[str, Any]:
        """The example inputs without the constants that are part of the graph."""
        return {name: value for name, value in self.example_inputs.items() if name in self.input_names}

    @functools.cached_property
    def operators(self) -> frozenset[str]:
        """Names of the operators in the graph and its subgraphs, such as `"gralora::attention"`."""
        graphs = (part.graph for part in self.graph_module.modules() if isinstance(part, fx.GraphModule))
        return frozenset[str]().union(*map(operators_called, graphs))

    @functools.cached_property
    def companions(self) -> Mapping[str, TracedModel]:
        """Traces of the source model's parts that run outside this graph, by their files' names.

        They share the parameters, and are made on first access.
        """
        from gralora_fx.base.features import parts

        found: dict[str, TracedModel] = {}
        for companions_of in parts("companions", self.signature.inputs):
            found |= companions_of(self)
        return found

    @functools.cached_property
    def parameter_sites(self) -> tuple[ParameterSite, ...]:
        """Every parameter that `target_parameters` can name and that is no linear layer's weight."""
        from gralora_fx.core.graph.sites import parameter_sites

        return parameter_sites(self.graph_module, self.tree, self.sites)

    @property
    def adaptable(self) -> tuple[LinearSite, ...]:
        """The linear layers, then the other parameters: everything that an adapter can be at."""
        return (*self.sites, *self.parameter_sites)

    def site(self, path: str) -> LinearSite:
        """Return the linear layer at a module path, or the parameter of a name.

        Args:
            path: The path, as in `sites` or `parameter_sites`.

        Raises:
            TargetError: There is none.
        """
        match = next((site for site in self.adaptable if site.path == path), None)
        if match is None:
            near = ", ".join(difflib.get_close_matches(str(path), [site.path for site in self.sites], n=3, cutoff=0.4))
            raise TargetError(f"there is no linear layer at {path!r}; nearest: {near or 'none'}")
        return match

    def with_pass(self, graph_pass: GraphPass) -> TracedModel:
        """Return a copy of the traced model, over the same parameters, whose graph a pass has edited.

        Args:
            graph_pass: Takes the copy's `GraphModule` and edits it in place. Linear layers are looked up again
                afterwards.

        Raises:
            RewriteError: The pass failed, or left a graph that does not lint. This model is unchanged.
        """
        from gralora_fx.core.graph.user_pass import run_pass

        graph_module = fx.GraphModule(self.graph_module, copy_graph(self.graph_module), "TracedGraph")
        run_pass(graph_module, graph_pass)
        return self.with_graph(graph_module, self.tree)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph like the model; a weight that is packed, or left in a file, is computed for its reader."""
        inputs = self.bind(args, kwargs)
        if not any(map(is_lazy, self.tree.parameters.values())):
            return self.graph_module(**inputs)
        from gralora_fx.core.graph.packed_weights import runnable

        return runnable(self.graph_module)(**inputs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with transformers' own loop, as the source model's `generate` does.

        Args:
            *args: As in transformers' `generate`: the prompt's token ids `[batch, length]`.
            **kwargs: As in transformers' `generate`: `attention_mask`, `max_new_tokens`, `do_sample`, `num_beams`,
                `streamer`, `generation_config` and the others.

        Returns:
            The result of transformers' `generate`: token ids `[batch, length]`, the prompt included.

        Raises:
            TraceError: The model does not generate, or an option is not supported over a trace.
        """
        return self._view().generate(*args, **kwargs)

    def can_generate(self) -> bool:
        """Return whether the model can generate."""
        return self.generation_config is not None

    @property
    def main_input_name(self) -> str:
        """Name of the main input."""
        return main_input(self)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._view().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self._view().dtype

    def _view(self) -> TransformersView:
        from gralora_fx.core.tracing.as_transformers import Viewed, view_of

        return view_of(Viewed(lambda: self, self.__call__, lambda: self.tree.parameters), labels=False)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of one call by name, with the source model's defaults.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.

        Raises:
            TraceError: An input is missing, given twice, of another structure than the example's, or was not part of
                the trace; a mask does not cover all positions; an argument that is part of the graph has another
                value; a size is beyond a limit; or a row's positions begin anew.
        """
        from gralora_fx.core.tracing.inputs.binding import bind_call

        inputs = bind_call(self.signature, self.example_inputs, args, kwargs)
        if "position_ids" in inputs and not torch.compiler.is_compiling():
            if (problem := packed_problem(self.task, inputs)) is not None:
                raise TraceError(problem)
        return inputs

    def train(self, mode: bool = True) -> TracedModel:
        """Switch dropout, attention dropout and batch statistics as the source model's `train()` does.

        Args:
            mode: True for training, False for evaluation.
        """
        self.graph_module.train(mode)
        if set_mode(self.graph_module.graph, mode):
            self.graph_module.recompile()
        return self

    def eval(self) -> TracedModel:
        """Switch to evaluation mode."""
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> TracedModel:
        """Convert the source model's tensors, trace it again in their new dtype or device, and return this trace.

        Args:
            *args: As in `torch.nn.Module.to`.
            **kwargs: As in `torch.nn.Module.to`.

        Raises:
            TraceError: The model cannot be traced this way, or the graph has changed since; nothing is converted.
        """
        return self._converted("to", *args, **kwargs)

    def _converted(self, by: str, *args: Any, **kwargs: Any) -> TracedModel:
        from gralora_fx.core.tracing.other_dtypes import ToConvert

        getattr(ToConvert(self), by)(*args, **kwargs)
        return self

    float = functools.partialmethod(_converted, "float")
    double = functools.partialmethod(_converted, "double")
    half = functools.partialmethod(_converted, "half")
    bfloat16 = functools.partialmethod(_converted, "bfloat16")
    cpu = functools.partialmethod(_converted, "cpu")
    cuda = functools.partialmethod(_converted, "cuda")

    def with_graph(self, graph_module: fx.GraphModule, tree: ModuleTree) -> TracedModel:
        """Return the model with another graph over the parameters of a tree, such as one with folded weights.

        Args:
            graph_module: The graph.
            tree: The modules that hold its parameters.
        """
        source = self.source
        if any(parameter is not self.tree.parameters.get(name) for name, parameter in tree.parameters.items()):
            from gralora_fx.core.tracing.draft import skeleton_of

            source = skeleton_of(source)  # which keeps no tensors of the source model in memory
        layers = layers_of(graph_module, tree)
        return dataclasses.replace(self, graph_module=graph_module, tree=tree, source=source, **layers._asdict())

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle, with the graph as a record of its nodes (see `graph_record`)."""
        from gralora_fx.core.tracing.graph_record import pack_module

        if streamed := [name for name, parameter in self.tree.parameters.items() if is_lazy(parameter)]:
            raise TraceError(
                f"{streamed[0]} is read from its file when it is needed, so the model cannot be pickled; load it with "
                "its weights"
            )
        return {**self.__dict__, "graph_module": pack_module(self.graph_module), "source": "it was read from a file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the graph from its record."""
        from gralora_fx.core.tracing.graph_record import unpack_module

        self.__dict__.update(state, graph_module=unpack_module(state["graph_module"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModel:
        """Return a copy with its own parameters, tied as in the original."""
        from gralora_fx.core.tracing.draft import skeleton_of
        from gralora_fx.core.tracing.graph_record import deep_copy

        other = object.__new__(type(self))
        memo[id(self)] = other
        for parameter in self.tree.parameters.values():
            if is_lazy(parameter):
                memo[id(parameter)] = copy_lazy(parameter)
        graph_module = deep_copy(self.graph_module, memo)
        apart = {"graph_module": graph_module, "source": skeleton_of(self.source, memo)}
        fields = {name: value for name, value in self.__dict__.items() if name not in apart}
        other.__dict__.update(copy.deepcopy(fields, memo), **apart)
        return other

    def __repr__(self) -> str:
        """Return a line that says what was traced and how large it is."""
        name = type(self.config).__name__.removesuffix("Config") if self.config is not None else "module"
        return (
            f"TracedModel({name}, task={self.task!r}, {len(self.graph_module.graph.nodes)} nodes, "
            f"{len(self.sites)} linear sites{''.join(f', {limit}' for limit in self.signature.limits)})"
        )


def check_traced(model: object, error: type[GraloraError], action: str) -> None:
    """Check that an object is a traced model."""
    if not isinstance(model, TracedModel):
        is_rewritten = isinstance(getattr(model, "traced", None), TracedModel)
        remedy = (
            "it is rewritten already: give its .traced" if is_rewritten else f"{CALL_TRACE} and give what it returned"
        )
        raise error(f"cannot {action} {an(type(model).__name__)}; {remedy}")
