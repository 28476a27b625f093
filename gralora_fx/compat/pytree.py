"""Flattening of nested inputs and outputs: `torch.utils._pytree`, which `torch.export` uses."""

from gralora_fx.compat.versions import fenced

with fenced("torch"):
    from torch.utils._pytree import (
        SUPPORTED_NODES,
        GetAttrKey,
        KeyPath,
        MappingKey,
        SequenceKey,
        TreeSpec,
        tree_flatten_with_path,
        tree_leaves,
        tree_map,
        tree_map_only,
        tree_map_with_path,
        tree_unflatten,
        treespec_leaf,
    )

__all__ = [
    "SUPPORTED_NODES",
    "GetAttrKey",
    "KeyPath",
    "MappingKey",
    "SequenceKey",
    "TreeSpec",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_map_with_path",
    "tree_unflatten",
    "treespec_leaf",
]
