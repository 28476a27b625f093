"""Which modules are blocks: the repeated layers of a source model, or those that are named.

A traced graph is flat. To recompute a layer, to shard it or to hook it, it must be a module again.
"""

from __future__ import annotations

import collections
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
    if patterns is None:
        return _repeated_blocks(flat, tree)
    found = matching_blocks(tree, patterns)
    if not found:
        return ()
    from gralora_fx.core.graph.block_calls import callable_blocks

    blocks, refused = callable_blocks(flat, found)
    for path, reason in refused.items():
        raise TraceError(f"blocks: {path} cannot be a block: {reason}; leave it out")
    return tuple(blocks)


def _repeated_blocks(flat: fx.GraphModule, tree: ModuleTree) -> tuple[str, ...]:
    """Return the outermost repeated modules that can be blocks; within one that cannot be, those that can."""
    candidates = repeated_modules(tree)
    if not candidates:
        return ()
    from gralora_fx.core.graph.block_calls import callable_blocks

    blocks, refused = [""], set[str]()
    while blocks:
        left = [path for path in candidates if path not in refused]
        blocks = [path for path in left if not any(o != path and is_within(path, o) for o in left)]
        found, reasons = callable_blocks(flat, blocks)
        if not reasons:
            return tuple(found)
        refused |= reasons.keys()
    return ()


def repeated_modules(tree: ModuleTree) -> tuple[str, ...]:
    """Return the modules that a `ModuleList` or `Sequential` repeats: of one class, and at one place in its members.

    The member of a list of one counts too, as a model of one layer. A module without modules of its own does not.
    """
    parents = {path.rpartition(".")[0] for path in tree.types if path}
    members = collections.Counter(path.rpartition(".")[0] for path in tree.types if path)
    alike: dict[tuple[str, str], list[str]] = {}
    for path, kind in tree.types.items():
        parent, _, name = path.rpartition(".")
        if name.isdigit() and path in parents and tree.types.get(parent, _LIST) in _CONTAINERS:
            place = ".".join("*" if part.isdigit() else part for part in path.split("."))
            alike.setdefault((place, kind), []).append(path)
    repeated = set[str]()
    for paths in alike.values():
        parent = paths[0].rpartition(".")[0]
        if len(paths) > 1 or (members[parent] == 1 and tree.types.get(parent) == _LIST):
            repeated |= set(paths)
    return tuple(path for path in tree.types if path in repeated)


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
