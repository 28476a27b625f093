"""Where updates of stacked matrices go in a checkpoint's files, one matrix at a time."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from gralora_fx.base.sources.safetensors_files import FLOATS, NewTensor, StoredTensor
from gralora_fx.base.sources.saved_weights import SavedWeights
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.exporters.fold.checkpoint_names import Names
from gralora_fx.exporters.fold.edits import StackEdit, kept_updates


class StackFolds:
    """What becomes of a base's tensors at the parameters of an adapter."""

    def __init__(self, base: SavedWeights, names: Names, adapter: StoredAdapter, not_finite: str) -> None:
        """Read nothing yet."""
        self.base, self.names, self.adapter, self.not_finite = base, names, adapter, not_finite
        self._update = kept_updates(adapter)

    def at(self, path: str, problems: list[str]) -> dict[str, NewTensor]:
        """The changed tensors of one parameter, by key."""
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
