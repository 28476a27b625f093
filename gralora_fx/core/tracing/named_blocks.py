"""The blocks of a trace named by the caller: `trace(model, blocks=["encoder.layers.*"])`."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import fx

from gralora_fx.core.graph.block_calls import callable_blocks
from gralora_fx.core.graph.module_tree import ModuleTree, is_within
from gralora_fx.errors import TraceError


def named_blocks(flat: fx.GraphModule, tree: ModuleTree, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that patterns name, where `*` is one part of a path; raise for any that cannot be a block."""
    blocks, refused = callable_blocks(flat, _matching_modules(tree, patterns))
    for path, reason in refused.items():
        raise TraceError(f"blocks: {path} cannot be a block: {reason}; leave it out")
    return tuple(blocks)


def _matching_modules(tree: ModuleTree, patterns: Sequence[str]) -> tuple[str, ...]:
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
