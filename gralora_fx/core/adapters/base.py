"""The base model under the adapters: a module tree owns its tensors, and the trace is rebuilt when they change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx, nn

from gralora_fx.base.sources.lazy_tensors import is_lazy
from gralora_fx.core.graph.surgery import copy_graph, copy_in_mode, parameter_tree, replace_parameters
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import MergeError

if TYPE_CHECKING:
    from gralora_fx.base.sources.same_base import BaseSource
    from gralora_fx.core.adapters.additions import Additions
    from gralora_fx.core.graph.packed_weights import PackedWeight, StreamedWeight


class ParameterSlot(NamedTuple):
    """The place of a base parameter in the tree, and the parameter seen there at the last comparison."""

    name: str
    module: nn.Module
    key: str
    parameter: nn.Parameter

    @property
    def now(self) -> Tensor | None:
        """The tensor at this place now."""
        return self.module._parameters.get(self.key)


class Base:
    """A trace, and the module tree that owns its tensors and those of the adapters.

    Sites, plans and graphs refer to tensors of the trace, so the trace is rebuilt over the tree's tensors whenever they
    differ (see `replaced_tensors`).

    Attributes:
        tree: A plain module with everything that the graph reads, at its paths, and the adapters below `gralora`.
        trainable: Names of the parameters that required gradients before there was an adapter.
        running_block: Returns a block of the module that runs, by its path.
        computed: Packed and streamed weights by name; the tree has buffers in place of packed ones.
        slots: The parameters of the trace, and the place of each in the tree.
        added: What the user's passes registered in the tree, each with its pass.
        seen_graph: The trace's graph at the last comparison.
    """

    computed: Mapping[str, PackedWeight | StreamedWeight]

    def __init__(self, traced: TracedModel) -> None:
        """Start with the trace's own parameters."""
        copied = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "ParameterTree")
        self.tree = parameter_tree(copied)
        self.traced = traced
        self.added: Additions = {}
        self._hold_packed()
        self.seen_graph = traced.graph_module
        self._install_blocks()
        self.trainable = [name for name, p in traced.tree.parameters.items() if p.requires_grad]
        self.slots = self.find_slots(traced)

    @property
    def is_current(self) -> bool:
        """True if the trace uses the tree's current tensors, and its graph is the one last seen."""
        return self.has_graph and all(slot.now is slot.parameter for slot in self.slots)

    @property
    def has_graph(self) -> bool:
        """True if the trace's graph is the one last seen: a conversion replaces it."""
        return self.traced.graph_module is self.seen_graph

    @property
    def modules(self) -> dict[int, tuple[nn.Module, str]]:
        """The module of the tree that holds each parameter, by its id, and its name there."""
        return {id(slot.parameter): (slot.module, slot.key) for slot in self.slots}

    def __getstate__(self) -> dict[str, Any]:
        from gralora_fx.core.tracing.graph_record import pack_module

        tree = pack_module(self._plain_tree())
        return {"tree": tree, "traced": self.traced, "trainable": self.trainable, "added": self.added}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and find the parameters in the tree again."""
        from gralora_fx.core.tracing.graph_record import unpack_module

        self.tree, self.traced = unpack_module(state["tree"]), state["traced"]
        self.seen_graph = self.traced.graph_module
        self.computed = {}  # a trace with packed weights is not pickled
        self.trainable, self.added = state["trainable"], state.get("added", {})
        self._install_blocks()
        self.slots = self.find_slots(self.traced)

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        other = object.__new__(type(self))
        memo[id(self)] = other
        other.traced = copy.deepcopy(self.traced, memo)
        other.tree = copy.deepcopy(self._plain_tree(), memo)
        other.seen_graph = other.traced.graph_module
        other.trainable = list(self.trainable)
        other.added = copy.deepcopy(self.added, memo)
        other.computed = self.computed
        other._install_blocks()
        other.slots = other.find_slots(other.traced)
        return other

    def check_whole(self) -> None:
        """Raise if the weights are sharded, for operations that need whole weights in one process."""
        if is_sharded(slot.now for slot in self.slots):
            raise MergeError(
                "the model is distributed over processes (FSDP2), which hold parts of its weights; save the adapter "
                "with save_pretrained, and merge it in a process that loads the model whole"
            )

    def _hold_packed(self) -> None:
        """Put buffers in the tree in place of the trace's packed weights."""
        self.computed = {}
        if any(is_lazy(parameter) for parameter in self.traced.tree.parameters.values()):
            from gralora_fx.core.graph.packed_weights import computed_parameters, hold_packed

            self.computed = computed_parameters(self.traced.graph_module)
            hold_packed(self.tree)

    def graph_module(self, graph: fx.Graph, training: bool, class_name: str) -> fx.GraphModule:
        """Return a graph module of a graph of the trace, over the tree's tensors."""
        root = self.tree
        if self.computed:
            root = copy.copy(root)
            root.__dict__["_modules"] = dict(root._modules)
            names = self.computed.keys() & self.traced.tree.parameters.keys()
            replace_parameters(root, {name: self.traced.tree.parameters[name] for name in names})
        return copy_in_mode(root, graph, training, class_name)

    def _install_blocks(self) -> None:
        """Replace containers of the tree by the modules of the trace's blocks."""
        self.running_block: Callable[[str], fx.GraphModule] | None = None
        if not self.traced.blocks:
            return
        from gralora_fx.core.graph.block_modules import install_blocks

        kinds = {path: self.traced.tree.types[path].rpartition(".")[2] for path in self.traced.blocks}
        install_blocks(self.tree, kinds, self._running_block)

    def _plain_tree(self) -> nn.Module:
        """Return the tree with plain containers in place of block modules."""
        if not self.traced.blocks:
            return self.tree
        from gralora_fx.core.graph.block_modules import without_blocks

        return without_blocks(self.tree)

    def _running_block(self, path: str) -> fx.GraphModule:
        assert self.running_block is not None  # set by the owner of the graphs
        return self.running_block(path)

    def parameters_now(self) -> dict[str, nn.Parameter]:
        """Return the tree's current parameters by the source model's names, also inside FSDP2's forward."""
        now = {id(slot.parameter): slot.now for slot in self.slots}
        return {name: now.get(id(p), p) for name, p in self.traced.tree.parameters.items()}  # type: ignore[misc]

    def find_slots(self, traced: TracedModel) -> list[ParameterSlot]:
        """Find the place of every parameter of a trace in the tree."""
        parameters = dict(traced.graph_module.named_parameters(remove_duplicate=False))
        slots = []
        for name, parameter in parameters.items():
            owner, _, key = name.rpartition(".")
            module = self.tree.get_submodule(owner)
            if key in module._parameters:  # a packed one is not there
                slots.append(ParameterSlot(name, module, key, parameter))
        return slots


def is_sharded(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether a tensor is distributed over processes, as FSDP2 does."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors)


def base_of(traced: TracedModel) -> BaseSource:
    """Return the name, the hub commit and the configuration that a traced model was loaded with."""
    from gralora_fx.base.sources.same_base import BaseSource

    config = traced.config
    if config is None:
        return BaseSource(None)
    return BaseSource(traced.tokenizer_source, getattr(config, "_commit_hash", None), config.to_dict())
