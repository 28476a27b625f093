"""Which modules are blocks: the repeated layers of a source model, or those that are named.

A traced graph is flat. To recompute a layer, to shard it or to hook it, it must be a module again.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import fx

from gralora_fx.core.graph.module_tree import ModuleTree, is_within
from gralora_fx.errors import TraceError

_LIST = "torch.nn.modules.container.ModuleList"
_CONTAINERS = (_LIST, "torch.nn.modules.container.Sequential")


def blocks_of(flat: fx.GraphModule, tree: ModuleTree, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the paths of a graph's blocks: the modules that patterns name, or the repeated ones for None.

    A repeated module is left out if the graph reads no tensor of it, or if its operations cannot run together.

    Raises:
        TraceError: A module that a pattern names cannot be a block.
    """
    found = repeated_blocks(tree) if patterns is None else matching_blocks(tree, patterns)
    if not found:
        return ()
    from gralora_fx.core.graph.block_calls import callable_blocks

    blocks, refused = callable_blocks(flat, found)
    if patterns is not None and refused:
        path, reason = next(iter(refused.items()))
        raise TraceError(f"blocks: {path} cannot be a block: {reason}; leave it out")
    return tuple(blocks)


def repeated_blocks(tree: ModuleTree) -> tuple[str, ...]:
    """Return the outermost repeated modules: members of one class of a `ModuleList` or `Sequential`.

    A list of a single module counts as a model of one layer. A member without modules of its own is no block.
    """
    parents = {path.rpartition(".")[0] for path in tree.types if path}
    members: dict[tuple[str, str], list[str]] = {}
    for path, kind in tree.types.items():
        parent, _, name = path.rpartition(".")
        if name.isdigit() and path in parents and tree.types.get(parent, _LIST) in _CONTAINERS:
            members.setdefault((parent, kind), []).append(path)
    lengths: dict[str, int] = {}
    for (parent, _), paths in members.items():
        lengths[parent] = lengths.get(parent, 0) + len(paths)
    repeated = {
        path
        for (parent, _), paths in members.items()
        for path in paths
        if len(paths) > 1 or (lengths[parent] == 1 and tree.types.get(parent) == _LIST)
    }
    return tuple(
        path for path in tree.types if path in repeated and not any(o != path and is_within(path, o) for o in repeated)
    )


def matching_blocks(tree: ModuleTree, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that patterns name; `*` stands for one part of a path, as in `"encoder.layers.*"`.

    Raises:
        TraceError: A pattern names no module, or a block is within another one.
    """
    if isinstance(patterns, str):
        raise TraceError(f"blocks must be a list of paths or patterns, but got {patterns!r}; give [{patterns!r}]")
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = [path for path in tree.types if path and _matches(path, str(pattern))]
        if not matches:
            near = ", ".join(difflib.get_close_matches(str(pattern), list(tree.types), n=3, cutoff=0.4)) or "none"
            raise TraceError(f"blocks: no module of the model matches {pattern!r}; nearest: {near}")
        found |= dict.fromkeys(matches)
    for path in found:
        for other in found:
            if path != other and is_within(path, other):
                raise TraceError(f"blocks: {path} is within {other}, which is a block too; name one of them")
    return tuple(path for path in tree.types if path in found)


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
