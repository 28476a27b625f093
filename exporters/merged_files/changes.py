"""What an adapter changes in the files of a base: a source for every tensor of the result."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gralora_fx.adapters.stored import StoredAdapter
from gralora_fx.errors import CheckpointError, bulleted
from gralora_fx.exporters.merged_files.base_files import BaseFiles, Names
from gralora_fx.sources.safetensors_layout import FLOATS, Extent, bytes_of, element_rows, read_into, read_tensor

_COMPARED = 2**20  # values that are compared at a time


@dataclass(frozen=True)
class Change:
    """A tensor of the result that is not simply copied.

    Attributes:
        dtype: safetensors' name of its dtype.
        shape: Its shape.
        source: Key of the base's tensor that it is made from; None for one that the adapter brings.
        site: Path of the site whose update is folded into it, or None.
        transposed: Whether it is stored `[in, out]`.
        values: Where the adapter's file has its values, or None.
    """

    dtype: str
    shape: tuple[int, ...]
    source: str | None = None
    site: str | None = None
    transposed: bool = False
    values: Extent | None = None


@dataclass(frozen=True)
class Changes:
    """The changes of a merge.

    Attributes:
        changed: Changes of tensors that the base has, by key.
        added: Tensors that it does not have, by their new key, with the key of a tensor in whose file they go.
        untied: Pairs of names that were one parameter and have different values now.
    """

    changed: dict[str, Change] = field(default_factory=dict)
    added: dict[str, tuple[Change, str]] = field(default_factory=dict)
    untied: list[tuple[str, str]] = field(default_factory=list)


def find_changes(base: BaseFiles, names: Names, adapter: StoredAdapter, handles: Mapping[str, int]) -> Changes:
    """Decide for every tensor that an adapter changes where it comes from and where it goes.

    Args:
        base: The base's files.
        names: What its tensors are in the model.
        adapter: The adapter.
        handles: Descriptors of the base's files.

    Raises:
        CheckpointError: The adapter does not fit the base; every problem is named.
    """
    problems: list[str] = []
    wanted: dict[str, Change] = {}
    for path in adapter.sites:
        if change := _fold_at(path, base, names, adapter, problems):
            wanted[f"{path}.weight"] = change
    for name, extent in adapter.copies.items():
        if change := _replacement(name, extent, base, names, problems):
            wanted[name] = change
    for name, extent in adapter.repeats.items():
        problems += _difference(name, extent, base, names, adapter, handles)
    if problems:
        made_for = adapter.config.base_model_name_or_path
        hint = f"it was made for {made_for}" if made_for else "it does not say which base it was made for"
        raise CheckpointError(
            f"the adapter {adapter.directory} does not fit {base.directory}; {hint}, so give that base, or another "
            f"adapter:\n{bulleted(problems)}"
        )
    return _placed(wanted, base, names, adapter, handles)


def _fold_at(path: str, base: BaseFiles, names: Names, adapter: StoredAdapter, problems: list[str]) -> Change | None:
    name = f"{path}.weight"
    key = names.key_of(name)
    if name in names.parts:
        problems.append(f"{name} is put together from several tensors of the files, which cannot be merged one by one")
    elif key is None:
        problems.append(f"missing {name}")
    else:
        extent = base.extent(key)
        in_features, out_features = adapter.sites[path].features
        transposed = names.is_transposed(path)
        if transposed is None:
            transposed = adapter.config.fan_in_fan_out
        expected = (in_features, out_features) if transposed else (out_features, in_features)
        if extent.dtype not in FLOATS:
            problems.append(f"{key} is {extent.dtype}, not a float tensor; a quantized base cannot be merged into")
        elif extent.shape != expected:
            problems.append(f"{key} has shape {list(extent.shape)} instead of {list(expected)}")
        else:
            return Change(extent.dtype, extent.shape, source=key, site=path, transposed=transposed)
    return None


def _replacement(name: str, extent: Extent, base: BaseFiles, names: Names, problems: list[str]) -> Change | None:
    parameters = names.parameters
    key = names.key_of(name)
    if name in names.parts:
        problems.append(
            f"{name} is put together from several tensors of the files, which cannot be replaced one by one"
        )
    elif name in parameters and tuple(parameters[name].shape) != extent.shape:
        problems.append(f"{name} has shape {list(extent.shape)} instead of {list(parameters[name].shape)}")
    elif key is not None and base.extent(key).dtype not in FLOATS:
        problems.append(
            f"{key} is {base.extent(key).dtype}, not a float tensor; a quantized base cannot be merged into"
        )
    elif key is not None and not parameters and base.extent(key).shape != extent.shape:
        problems.append(f"{name} has shape {list(extent.shape)} instead of {list(base.extent(key).shape)}")
    else:
        dtype = _common_dtype(base) if key is None else base.extent(key).dtype
        return Change(dtype, extent.shape, values=extent)
    return None


def _common_dtype(base: BaseFiles) -> str:
    """The dtype of most of the base's float tensors."""
    dtypes = Counter(e.dtype for shard in base.shards for e in shard.tensors.values() if e.dtype in FLOATS)
    return dtypes.most_common(1)[0][0] if dtypes else "F32"


def _difference(
    name: str, extent: Extent, base: BaseFiles, names: Names, adapter: StoredAdapter, handles: Mapping[str, int]
) -> list[str]:
    """Whether the adapter's file has the base's values of a parameter that it does not train."""
    key = names.key_of(name)
    if key is None:
        return [f"unexpected {name}, which is not trained and not in the base"]
    own = base.extent(key)
    if own.shape != extent.shape or own.dtype not in FLOATS:
        return [f"{name} has shape {list(extent.shape)} instead of {list(own.shape)}; resize and save the base first"]
    if not _same_values(own, handles[base.shard_of[key].file.name], extent, adapter.handle):
        return [f"{name} has other values than the base, and is not trained"]
    return []


def _same_values(one: Extent, one_handle: int, other: Extent, other_handle: int) -> bool:
    """Whether a tensor cast to the dtype of another of its shape equals it; some rows of both are read at a time."""
    for first, end in element_rows(one, _COMPARED):
        parts = []
        for extent, handle in ((one, one_handle), (other, other_handle)):
            part = np.empty((end - first, *extent.shape[1:]), FLOATS[extent.dtype])
            read_into(handle, part, extent.begin + first * (extent.nbytes // extent.shape[0]))
            parts.append(part)
        with np.errstate(over="ignore"):
            if not np.array_equal(parts[0].astype(parts[1].dtype), parts[1]):
                return False
    return True


def _placed(
    wanted: Mapping[str, Change], base: BaseFiles, names: Names, adapter: StoredAdapter, handles: Mapping[str, int]
) -> Changes:
    """The changes by key, with tensors of their own for weights that are no longer tied."""
    changes = Changes()
    last = list(base.shards[-1].tensors)[-1]
    tokens: dict[str, tuple[str | None, str | None]] = {}
    for name in wanted:
        for other in names.tied_with(name):
            tokens[other] = _token(other, wanted, names, adapter)
    owner = {key: name for name, key in names.keys.items()}
    for name, token in tokens.items():
        key, source = names.keys.get(name), names.key_of(name)
        if key is not None:
            if name in wanted:
                changes.changed[key] = wanted[name]
        elif source is None:
            changes.added[name] = wanted[name], last
        elif token != tokens[owner[source]]:
            extent = base.extent(source)
            change = wanted.get(name) or Change(extent.dtype, extent.shape, source=source)
            changes.added[name] = change, source
    for name in tokens:
        for other in names.tied_with(name):
            if name < other and tokens[other] != tokens[name] and _is_one(name, other, base, names, handles):
                changes.untied.append((name, other))
    return changes


def _is_one(name: str, other: str, base: BaseFiles, names: Names, handles: Mapping[str, int]) -> bool:
    """Whether the base has one weight by two names; transformers does not tie those stored with different values."""
    keys = names.key_of(name), names.key_of(other)
    if keys[0] == keys[1] or keys[0] is None or keys[1] is None:
        return keys[0] == keys[1]
    (one, first), (two, second) = ((base.extent(key), handles[base.shard_of[key].file.name]) for key in keys if key)
    return one.shape == two.shape and one.dtype == two.dtype in FLOATS and _same_values(one, first, two, second)


def _token(
    name: str, wanted: Mapping[str, Change], names: Names, adapter: StoredAdapter
) -> tuple[str | None, str | None]:
    """What tells a parameter's new values from others: where they come from, and what is done with them."""
    change = wanted.get(name)
    if change is None or change.values is None:
        return names.key_of(name), None if change is None else change.site
    values = read_tensor(adapter.handle, change.values)
    return None, hashlib.sha256(bytes_of(values)).hexdigest()
