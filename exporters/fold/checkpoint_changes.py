"""Changes that an adapter makes to a base's files: a source and an edit for every tensor of the result."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from gralora_fx.base.sources.packed_tensors import PackedTensor, RoundedTensor
from gralora_fx.base.sources.rewriting import Kept, bytes_of
from gralora_fx.base.sources.safetensors_files import (
    FLOATS,
    Layout,
    NewShard,
    NewTensor,
    StoredTensor,
    are_same,
    rewritten_shard,
)
from gralora_fx.base.sources.saved_weights import SavedWeights
from gralora_fx.core.adapters.saved_embeddings import check_vocabulary
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.errors import CheckpointError, bulleted
from gralora_fx.exporters.fold.checkpoint_names import Names
from gralora_fx.exporters.fold.edits import LayerEdit, MatrixEdit, StackEdit, ValuesEdit, kept_updates

_NOT_FINITE = (
    "{name} would hold values that are not finite in {dtype}; nothing was written. The adapter is damaged, or too "
    "large for this dtype (merge into a copy of the base in float32), or is a DoRA adapter of zeros, without a norm"
)


@dataclass(frozen=True)
class TensorChanges:
    """The changes of a merge."""

    changed: dict[str, NewTensor] = field(default_factory=dict)  # changes of tensors that the base has, by key
    # tensors that it does not have, by their new key, with the key of a tensor in whose file they go
    added: dict[str, tuple[NewTensor, str]] = field(default_factory=dict)
    # pairs of names that were one parameter and have different values now
    untied: list[tuple[str, str]] = field(default_factory=list)

    @property
    def merged(self) -> list[str]:
        """Keys of the weights that an update is folded into, sorted."""
        everything = {**self.changed, **{key: tensor for key, (tensor, _) in self.added.items()}}
        return sorted(key for key, tensor in everything.items() if isinstance(tensor.edit, (StackEdit, MatrixEdit)))

    @property
    def replaced(self) -> list[str]:
        """Keys of the base's tensors that the adapter replaces, sorted."""
        return sorted(key for key, tensor in self.changed.items() if isinstance(tensor.edit, ValuesEdit))

    def shards(self, base: SavedWeights) -> list[NewShard]:
        """Return the files that replace the base's."""
        stored = {key for old in base.shards for key in old.tensors}
        new = {key: tensor for key, tensor in self.changed.items() if key not in stored}  # of integers of another name

        def shard_of(old: Layout) -> NewShard:
            added = {key: tensor for key, (tensor, near) in self.added.items() if near in old.tensors}
            added |= {key: tensor for key, tensor in new.items() if base.tensors[key].file == old.file}
            return rewritten_shard(old, self.changed, added, old.tensors.keys() - base.tensors.keys())

        return [shard_of(old) for old in base.shards]


def find_changes(base: SavedWeights, names: Names, adapter: StoredAdapter) -> TensorChanges:
    """Decide for every tensor that an adapter changes where it comes from and where it goes."""
    adapter = adapter.with_own_embeddings(partial(_holds, base, names, adapter.directory))
    problems: list[str] = []
    wanted: dict[str, NewTensor] = {}
    folds = StackFolds(base, names, adapter, _NOT_FINITE)
    stacks: dict[str, NewTensor] = {}
    at_parameters = adapter.parameters
    for path in at_parameters:
        stacks |= folds.at(path, problems)
    for path in (path for path in adapter.sites if path not in at_parameters):
        if change := _fold_at(path, base, names, adapter, problems):
            wanted[f"{path}.weight"] = change
    for name, trained in adapter.copies.items():
        if change := _replacement(name, trained, base, names, problems):
            wanted[name] = change
    for name, repeated in adapter.repeats.items():
        problems += _difference(name, repeated, base, names)
    if problems:
        made_for = adapter.config.base_model_name_or_path
        hint = f"it was made for {made_for}" if made_for else "it does not say which base it was made for"
        raise CheckpointError(
            f"the adapter {adapter.directory} does not fit {base.directory}; {hint}, so give that base, or another "
            f"adapter:\n{bulleted(problems)}"
        )
    changes = _placed(wanted, base, names)
    changes.changed.update(stacks)
    for key, tensor in base.tensors.items():
        if isinstance(tensor, (PackedTensor, RoundedTensor)) and key not in changes.changed:
            changes.changed[key] = NewTensor(tensor.dtype, tensor.shape, tensor, Kept())
    return changes


def _fold_at(
    path: str, base: SavedWeights, names: Names, adapter: StoredAdapter, problems: list[str]
) -> NewTensor | None:
    name = f"{path}.weight"
    key = names.key_of(name)
    if name in names.parts:
        problems.append(f"{name} is put together from several tensors of the files, which cannot be merged one by one")
    elif key is None:
        problems.append(f"missing {name}")
    else:
        tensor = base.tensors[key]
        in_features, out_features = adapter.sites[path].features
        transposed = names.is_transposed(path)
        if transposed is None:
            transposed = adapter.config.fan_in_fan_out
        expected = (in_features, out_features) if transposed else (out_features, in_features)
        if tensor.dtype not in FLOATS:
            problems.append(f"{key} is {tensor.dtype}, not a float tensor; a quantized base cannot be merged into")
        elif tensor.shape != expected:
            problems.append(f"{key} has shape {list(tensor.shape)} instead of {list(expected)}")
        else:
            layer = LayerEdit.folding(adapter, path, key, 0, out_features)
            edit = MatrixEdit((layer,), in_features, transposed, _NOT_FINITE)
            return NewTensor(tensor.dtype, tensor.shape, tensor, edit)
    return None


def _replacement(
    name: str, trained: StoredTensor, base: SavedWeights, names: Names, problems: list[str]
) -> NewTensor | None:
    parameters = names.parameters
    key = names.key_of(name)
    own = None if key is None else base.tensors[key]
    if name in names.parts:
        problems.append(
            f"{name} is put together from several tensors of the files, which cannot be replaced one by one"
        )
    elif name in parameters and tuple(parameters[name].shape) != trained.shape:
        problems.append(f"{name} has shape {list(trained.shape)} instead of {list(parameters[name].shape)}")
    elif own is not None and own.dtype not in FLOATS:
        problems.append(f"{key} is {own.dtype}, not a float tensor; a quantized base cannot be merged into")
    elif own is not None and not parameters and own.shape != trained.shape:
        problems.append(f"{name} has shape {list(trained.shape)} instead of {list(own.shape)}")
    else:
        dtype = _common_dtype(base) if own is None else own.dtype
        edit = ValuesEdit(key or name, trained.array, not_finite=_NOT_FINITE)
        return NewTensor(dtype, trained.shape, edit=edit)
    return None


def _common_dtype(base: SavedWeights) -> str:
    """Return the dtype of most of the base's float tensors."""
    dtypes = Counter(tensor.dtype for tensor in base.tensors.values() if tensor.dtype in FLOATS)
    return dtypes.most_common(1)[0][0] if dtypes else "F32"


def _holds(base: SavedWeights, names: Names, adapter: Path, name: str, saved: StoredTensor) -> bool | None:
    """Return whether a base has these values of an embedding; None if it has no floats for it."""
    key = names.key_of(name)
    if key is None or (own := base.tensors[key]).dtype not in FLOATS:
        return None
    check_vocabulary(name, saved.shape, own.shape, adapter)
    return _same_values(own, saved)


def _difference(name: str, repeated: StoredTensor, base: SavedWeights, names: Names) -> list[str]:
    """Return what differs if the adapter's file repeats an untrained parameter with other values than the base's."""
    key = names.key_of(name)
    if key is None:
        return [f"unexpected {name}, which is not trained and not in the base"]
    own = base.tensors[key]
    if own.shape != repeated.shape or own.dtype not in FLOATS:
        return [f"{name} has shape {list(repeated.shape)} instead of {list(own.shape)}"]
    if not _same_values(own, repeated):
        return [f"{name} has other values than the base, and is not trained"]
    return []


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors of a shape are the same values, perhaps in two dtypes; both are read in blocks."""
    return all(are_same(*pair) for pair in zip(one.blocks(), other.blocks(), strict=True))


def _placed(wanted: Mapping[str, NewTensor], base: SavedWeights, names: Names) -> TensorChanges:
    """Return the changes by key; weights that are no longer tied get their own tensors."""
    changes = TensorChanges()
    last = [key for shard in base.shards for key in shard.tensors if key in base.tensors][-1]
    tokens = {other: _token(other, wanted.get(other), names) for name in wanted for other in names.tied_with(name)}
    owner = {key: name for name, key in names.keys.items()}
    for name, token in tokens.items():
        key, source = names.keys.get(name), names.key_of(name)
        if key is not None:
            if name in wanted:
                changes.changed[key] = wanted[name]
        elif source is None:
            changes.added[name] = wanted[name], last
        elif token != tokens[owner[source]]:
            own = base.tensors[source]
            changes.added[name] = wanted.get(name) or NewTensor(own.dtype, own.shape, own), source
    for name in tokens:
        for other in names.tied_with(name):
            if name < other and tokens[other] != tokens[name] and _is_one(name, other, base, names):
                changes.untied.append((name, other))
    return changes


def _is_one(name: str, other: str, base: SavedWeights, names: Names) -> bool:
    """Return whether two names are one weight in the base; transformers unties weights stored with different values."""
    keys = names.key_of(name), names.key_of(other)
    if keys[0] == keys[1] or keys[0] is None or keys[1] is None:
        return keys[0] == keys[1]
    one, two = (base.tensors[key] for key in keys if key)
    return one.shape == two.shape and one.dtype == two.dtype in FLOATS and _same_values(one, two)


def _token(name: str, change: NewTensor | None, names: Names) -> tuple[str | None, str | None]:
    """Return a token that equals another parameter's if both get the same values: their source and their edit."""
    if change is None or not isinstance(change.edit, ValuesEdit):
        return names.key_of(name), None if change is None else name
    return None, hashlib.sha256(bytes_of(change.edit.values())).hexdigest()


class StackFolds:
    """Edits of a base's tensors that fold the parameters of an adapter."""

    def __init__(self, base: SavedWeights, names: Names, adapter: StoredAdapter, not_finite: str) -> None:
        self.base, self.names, self.adapter, self.not_finite = base, names, adapter, not_finite
        self._update = kept_updates(adapter)

    def at(self, path: str, problems: list[str]) -> dict[str, NewTensor]:
        """Return the changed tensors of one parameter, by key; problems are appended to the list."""
        site, before = self.adapter.sites[path], len(problems)
        transposed = site.stack is not None and self.names.stacks_transposed(path)
        matrix = site.features[::-1]
        stored_matrix = site.features if transposed else matrix
        whole = stored_matrix if site.stack is None else (site.stack, *stored_matrix)
        key, changed = self.names.key_of(path), {}
        edit = functools.partial(
            StackEdit, update=functools.partial(self._update, path), shape=matrix, not_finite=self.not_finite
        )
        if (parameter := self.names.parameters.get(path)) is not None and tuple(parameter.shape) != whole:
            problems.append(_unfit(path, tuple(parameter.shape), whole, site.stack))
        elif path in self.names.stacks:
            for part in self.names.stacks[path]:
                tensor = self.base.tensors[part.key]
                self._check(part.key, tensor, (tensor.shape[0], matrix[1]), problems)
                new = edit(name=part.key, index=part.matrix, start=part.start)
                changed[part.key] = NewTensor(tensor.dtype, tensor.shape, tensor, new)
        elif path in self.names.parts:
            problems.append(
                f"{path} is put together from several tensors of the files in a way that is not known to be rows of "
                "stacked matrices, so nothing can be folded into them; merge the loaded model and save it "
                "(merge_and_unload)"
            )
        elif key is None:
            problems.append(f"missing {path}")
        else:
            tensor = self.base.tensors[key]
            self._check(key, tensor, whole, problems)
            new = edit(name=key, stored=None if site.stack is None else stored_matrix)
            if transposed:
                new = dataclasses.replace(new, as_modelled=np.transpose, as_stored=np.transpose)
            changed[key] = NewTensor(tensor.dtype, tensor.shape, tensor, new)
        return changed if len(problems) == before else {}

    def _check(self, key: str, tensor: StoredTensor, shape: tuple[int, ...], problems: list[str]) -> None:
        if tensor.dtype not in FLOATS:
            problems.append(f"{key} is {tensor.dtype}, not a float tensor; a quantized base cannot be merged into")
        elif tuple(tensor.shape) != shape:
            problems.append(_unfit(key, tuple(tensor.shape), shape, None))


def _unfit(name: str, own: tuple[int, ...], wanted: tuple[int, ...], stack: int | None) -> str:
    text = f"{name} has shape {list(own)} instead of {list(wanted)}"
    return text if stack is None else f"{text}, that of the adapter's {stack} matrices"
