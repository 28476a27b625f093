"""Blocks as modules, in the tree that owns the tensors and in the module that runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import fx, nn

from gralora_fx.core.graph.block_calls import BlockCall, call_blocks
from gralora_fx.core.graph.pipeline import Pass
from gralora_fx.core.graph.surgery import overlay, replace_module
from gralora_fx.errors import RewriteError, an

if TYPE_CHECKING:  # loaded where blocks are recomputed
    from gralora_fx.core.graph.checkpointing import Checkpointing

_TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_OWN = (*_TENSORS, *_HOOKS, "training", "_is_full_backward_hook")  # attributes shared with the replaced container


class GraphBlock(fx.GraphModule):
    """A block of a rewritten model in the module tree, with the current state's graph; FSDP2 shards it."""

    _running: Callable[[], fx.GraphModule]
    _compiled_with: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __new__(cls, *_: Any) -> Self:
        """Create an object of this class; other graph modules get a class each."""
        return object.__new__(cls)

    def __init__(self, container: nn.Module, running: Callable[[], fx.GraphModule]) -> None:
        nn.Module.__init__(self)
        _share(self, container, (*_OWN, "_modules"))
        self.__dict__["_running"] = running

    @property
    def graph(self) -> fx.Graph:
        """The block's graph in the current state."""
        return self._running().graph

    @graph.setter
    def graph(self, _: fx.Graph) -> None:
        raise RewriteError("a block's graph is made from the model's; edit model.graph_module, and recompile that")

    @property
    def _code(self) -> str:
        """The code of that graph, which `fx.GraphModule` prints."""
        return self._running().code

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run the block with `torch.compile` in every state; blocks that compute the same share the compiled code."""
        self.__dict__["_compiled_with"] = (args, kwargs)

    def recompile(self) -> Any:
        """Do nothing, since the code is the running block's; graph modules call this after edits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block in the current state on its activations, then tensors of adapters."""
        running = self._running()
        return type(running).forward(running, *args, **kwargs)  # without its hooks, which have run

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:  # type: ignore[override]  # a copy calls no block
        """Return a plain container with copies of the tensors, for a copied flat graph, which calls no block."""
        return copy.deepcopy(without_blocks(self), memo)

    def __reduce_ex__(self, _: Any) -> Any:
        """Return the state for pickle: a plain container of the tensors."""
        return _itself, (without_blocks(self),)


@functools.cache
def _class_of(kind: str) -> type[GraphBlock]:
    """Return the class of all blocks of one source class, by whose name accelerate finds the layers to shard."""
    return type(kind, (GraphBlock,), {"__module__": __name__})


def _itself(module: nn.Module) -> nn.Module:
    return module


class _RunningBlock(fx.GraphModule):
    """A block of the module of one state; it shares the hooks of the tree's block."""

    _tree_block: GraphBlock

    @property
    def _is_full_backward_hook(self) -> bool | None:
        return self._tree_block._is_full_backward_hook

    @_is_full_backward_hook.setter
    def _is_full_backward_hook(self, _: bool | None) -> None:
        pass  # torch's constructor begins with None

    @property
    def _compiled_call_impl(self) -> Callable[..., Any] | None:  # type: ignore[override]  # torch's is assigned
        options = self._tree_block._compiled_with
        if options is None:
            return None
        made: Any = self.__dict__.get("_compiled")
        if made is None or made[0] is not options:
            args, kwargs = options
            self.__dict__["_compiled"] = made = (options, torch.compile(self._call_impl, *args, **kwargs))
        return made[1]  # type: ignore[no-any-return]


def _share(module: nn.Module, other: nn.Module, attributes: Iterable[str]) -> None:
    """Let a module share attributes of another one, such as tables of tensors and hooks."""
    module.__dict__.update({name: other.__dict__[name] for name in attributes})


def install_blocks(tree: nn.Module, kinds: Mapping[str, str], running: Callable[[str], fx.GraphModule]) -> None:
    """Replace the containers at some paths of a tree by blocks, in place."""
    for path, kind in kinds.items():
        replace_module(tree, path, _class_of(kind)(tree.get_submodule(path), functools.partial(running, path)))


def without_blocks(tree: nn.Module) -> nn.Module:
    """Return a copy of a tree's containers over the same tensors, with plain containers in place of blocks."""
    is_block = isinstance(tree, GraphBlock)
    plain = nn.Module() if is_block else object.__new__(type(tree))
    _share(plain, tree, _OWN if is_block else tree.__dict__)
    plain.__dict__["_modules"] = {
        name: None if module is None else without_blocks(module) for name, module in tree._modules.items()
    }
    return plain


def running_module(
    flat: fx.GraphModule,
    tree: nn.Module,
    paths: Collection[str],
    checkpointing: Checkpointing | None,
    passes: Sequence[Pass[fx.Graph]] = (),
) -> fx.GraphModule:
    """Return a module equivalent to a flat graph that calls blocks as submodules; raise `NoBlock` if one cannot run.

    `passes` run over each block's graph and over the graph that calls them.
    """
    graph, calls = call_blocks(flat, paths)
    for own in (graph, *(call.graph for call in calls)):
        for graph_pass in passes:
            graph_pass(own)
    running = overlay(flat, graph, flat.training)
    alike: list[tuple[list[Any], _RunningBlock]] = []  # layers that compute the same have one class and one code
    for call in calls:
        structure = call.structure
        first = next((block for other, block in alike if other == structure), None)
        block = _running_block(call, flat, tree, first)
        if first is None:
            alike.append((structure, block))
        replace_module(running, call.path, block)
    if checkpointing is not None:
        from gralora_fx.core.graph.checkpointing import checkpoint_blocks

        checkpoint_blocks(graph, calls, checkpointing)
    running.recompile()
    return running


def _running_block(
    call: BlockCall, flat: fx.GraphModule, tree: nn.Module, first: _RunningBlock | None
) -> _RunningBlock:
    """Return the module of a block's graph, sharing class and compiled code with `first` if that computes the same."""
    container, owner = flat.get_submodule(call.path), tree.get_submodule(call.path)
    if not isinstance(owner, GraphBlock):
        raise RewriteError(
            f"the block {call.path} of the model was replaced by {an(type(owner).__name__)}, which its graph cannot "
            "call; the model recomputes blocks by itself (gradient_checkpointing_enable)"
        )
    if first is None:
        block = _RunningBlock(nn.Module(), fx.Graph(), type(owner).__name__)
    else:
        block = object.__new__(type(first))
        block.__dict__.update(first.__dict__)
    _share(block, container, _TENSORS)
    _share(block, owner, _HOOKS)
    outside = {name: flat.get_submodule(path) for name, path in call.outside.items()}
    block.__dict__["_modules"] = {**container._modules, **outside}
    block.__dict__["_tree_block"] = owner
    block.training = flat.training
    if first is None:
        block.graph = call.graph  # this compiles it
    else:
        block.__dict__["_graph"] = call.graph
        call.graph.owning_module = block
    return block
