"""Blocks as modules: in the tree that owns the tensors, and in the module that runs."""

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
from gralora_fx.errors import RewriteError

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
_OWN = (*_TENSORS, *_HOOKS, "training", "_is_full_backward_hook")  # what a block has of the container in its place


class GraphBlock(fx.GraphModule):
    """A block of a rewritten model in the tree of its tensors: what is sharded and hooked.

    Its graph and what it computes are those of the model's current state. The modules that run share its tensors and
    its hooks.
    """

    _running: Callable[[], fx.GraphModule]
    _compiled_with: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __new__(cls, *_: Any) -> Self:
        """Create a block of the class itself; of other graph modules, each has a class of its own."""
        return object.__new__(cls)

    def __init__(self, container: nn.Module, running: Callable[[], fx.GraphModule]) -> None:
        """Take the place of a container, over the same tensors."""
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
        """The code of that graph, which torch's class prints."""
        return self._running().code

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run the block by `torch.compile`, in every state; layers that compute the same share what is compiled.

        Args:
            *args: As of `torch.compile`.
            **kwargs: As of `torch.compile`.
        """
        self.__dict__["_compiled_with"] = (args, kwargs)

    def recompile(self) -> Any:
        """Do nothing, since the code is that of the running block; a graph that is compiled calls this."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block in the current state.

        Args:
            *args: The inputs that its graph names: activations, then tensors of adapters.
            **kwargs: The same by name.
        """
        running = self._running()
        return type(running).forward(running, *args, **kwargs)  # without its hooks, which have run

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:  # type: ignore[override]  # a copy calls no block
        """A plain container with copies of the tensors, for the copy of a flat graph, which calls no block."""
        return copy.deepcopy(without_blocks(self), memo)

    def __reduce_ex__(self, _: Any) -> Any:
        """Return what pickle writes: a plain container of the tensors."""
        return _itself, (without_blocks(self),)


@functools.cache
def _class_of(kind: str) -> type[GraphBlock]:
    """The class of all blocks whose source class has a name, by which tools find the layers to shard."""
    return type(kind, (GraphBlock,), {"__module__": __name__})


def _itself(module: nn.Module) -> nn.Module:
    return module


class _RunningBlock(fx.GraphModule):
    """A block of one state's module; its hooks are those of the tree's block."""

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
    """Let a module have attributes of another one, tables of tensors and hooks among them."""
    module.__dict__.update({name: other.__dict__[name] for name in attributes})


def install_blocks(tree: nn.Module, kinds: Mapping[str, str], running: Callable[[str], fx.GraphModule]) -> None:
    """Make blocks of the containers at some paths of a tree, in place."""
    for path, kind in kinds.items():
        replace_module(tree, path, _class_of(kind)(tree.get_submodule(path), functools.partial(running, path)))


def without_blocks(tree: nn.Module) -> nn.Module:
    """A copy of a tree's containers over the same tensors, in which blocks are plain containers again."""
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
    """Return a module that computes what a flat graph computes, and calls its blocks.

    Args:
        flat: The flat graph, over the tensors of the tree or others in their place.
        tree: The tree, with the blocks.
        paths: Paths of the blocks.
        checkpointing: Which blocks are recomputed in the backward pass; None for none.
        passes: Passes over the graph of each block, and over what is left of the whole.

    Raises:
        NoBlock: The operations of a block cannot run together.
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
    """The module of a block's graph; of another that computes the same, it takes the class with the compiled code."""
    container, owner = flat.get_submodule(call.path), tree.get_submodule(call.path)
    if not isinstance(owner, GraphBlock):
        raise RewriteError(
            f"the block {call.path} of the model was replaced by a {type(owner).__name__}, which its graph cannot "
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
        block.graph = call.graph  # which compiles it
    else:
        block.__dict__["_graph"] = call.graph
        call.graph.owning_module = block
    return block
