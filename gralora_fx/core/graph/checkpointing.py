"""Blocks that are recomputed in the backward pass, instead of keeping their activations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from gralora_fx.base.compat.torch_graphs import OpOverload, is_mutable, returns_alias
from gralora_fx.core.graph.block_calls import BlockCall
from gralora_fx.core.graph.effects import may_write
from gralora_fx.core.graph.kept_calls import KeptCall
from gralora_fx.errors import RewriteError, shown

_OPTIONS = {name for name, p in inspect.signature(checkpoint).parameters.items() if p.kind is p.KEYWORD_ONLY} | {
    "use_reentrant",
    "preserve_rng_state",
}


class Checkpointing(NamedTuple):
    """Choice of the blocks that are recomputed in the backward pass."""

    every: int = 1  # 1 for every block, n for the first of each n
    # options of `torch.utils.checkpoint.checkpoint`, as pairs
    options: tuple[tuple[str, Any], ...] = (("use_reentrant", False),)
    offload: bool = False  # whether the inputs of recomputed blocks are kept in the host's memory

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, every: int, *, offload: bool) -> Self:
        """Check a call's options, and fill in the defaults; raise for an unknown option or an invalid `every`."""
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise RewriteError(f"every must be a whole number of blocks of at least 1, but got {shown(every)}")
        options = {"use_reentrant": False, **(given or {})}
        if unknown := sorted(set(options) - _OPTIONS):
            raise RewriteError(
                f"gradient checkpointing has no option {', '.join(unknown)}; torch's are {', '.join(sorted(_OPTIONS))}"
            )
        return cls(every, tuple(sorted(options.items())), offload)


def offloaded_checkpoint(block: nn.Module, *args: Any, **options: Any) -> Any:
    """Checkpoint a block, keeping its inputs in the host's memory."""
    device = next((value.device for value in args if isinstance(value, Tensor)), torch.device("cpu"))
    with save_on_cpu(pin_memory=device.type != "cpu", device_type=device.type):
        return checkpoint(block, *args, **options)


def checkpoint_blocks(graph: fx.Graph, blocks: Iterable[BlockCall], checkpointing: Checkpointing) -> None:
    """Recompute blocks in the backward pass, except those that update a buffer, which would be updated twice.

    Before: `y = self.layers.0(x, mask)`
    After:  `y = checkpoint(self.layers.0, x, mask, use_reentrant=False)`
    """
    paths = {block.path for block in blocks if not _updates(block.graph)}
    calls = [node for node in graph.find_nodes(op="call_module") if node.target in paths]
    function: Any = offloaded_checkpoint if checkpointing.offload else checkpoint
    options = dict(checkpointing.options)
    if objects := {name: value for name, value in options.items() if callable(value)}:  # not literals in code
        function = functools.wraps(function)(functools.partial(function, **objects))
    written = {name: value for name, value in options.items() if name not in objects}
    for node in calls[:: checkpointing.every]:
        with graph.inserting_before(node):
            again = graph.call_function(function, (graph.get_attr(str(node.target)), *node.args), written)
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again)
        graph.erase_node(node)


def _updates(graph: fx.Graph) -> bool:
    """Return whether a block may write into a tensor that it did not compute."""
    writes = [node for node in graph.nodes if may_write(node) and not isinstance(node.target, KeptCall)]
    return any(not is_mutable(node.target) or _is_given(node.args[0]) for node in writes)


def _is_given(value: Any) -> bool:
    """Return whether a value is an argument or attribute of a block, or a view of one."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        if not (isinstance(value.target, OpOverload) and returns_alias(value.target) and value.args):
            return False
        value = value.args[0]
    return isinstance(value, fx.Node)
