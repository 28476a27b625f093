"""Updates of stacked experts folded into a checkpoint's files, one expert's matrix at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from gralora_fx.adapters.stored_adapter import StoredAdapter
from gralora_fx.exporters.folding.checkpoint_names import Names
from gralora_fx.exporters.folding.edits import NOT_FINITE, check_finite
from gralora_fx.methods.fold import fold_region
from gralora_fx.methods.method import Update
from gralora_fx.sources.rewriting import RowEdit
from gralora_fx.sources.safetensors_files import FLOATS, NewTensor, StoredTensor
from gralora_fx.sources.saved_weights import SavedWeights

_KEPT = 4  # updates of parameters that are in memory at once, since the parts of a parameter lie close together


@dataclass(frozen=True)
class ExpertEdit:
    """Updates added to matrices of experts, of which a tensor holds one, or some of its rows, or all of them.

    Attributes:
        name: The tensor, for messages.
        update: Reads the update of all experts.
        shape: `[out, in]` of an expert's whole matrix.
        transposed: Whether matrices are stored `[in, out]`.
        expert: The expert whose rows the tensor holds; None for a tensor with the matrices of all.
        start: The first of those rows in the expert's matrix.
        not_finite: Text of the error for results that are not finite, with places for `name` and `dtype`.
    """

    name: str
    update: Callable[[], Update]
    shape: tuple[int, int]
    transposed: bool = False
    expert: int | None = None
    start: int = 0
    not_finite: str = NOT_FINITE

    @property
    def takes_rows(self) -> bool:
        """True: a stored row is an expert of a whole tensor, and a row of a matrix otherwise."""
        return True

    def prepare(self) -> RowEdit:
        """Read the update; the result changes stored rows in place."""
        update = self.update()

        def change(rows: NDArray[Any], first: int) -> None:
            if self.expert is None:
                for index, row in enumerate(rows):
                    stored = row.reshape(self.shape[::-1] if self.transposed else self.shape)
                    self._fold(stored.T if self.transposed else stored, update.of_expert(first + index), 0)
            else:
                own = update if update.experts is None else update.of_expert(self.expert)
                self._fold(rows, own, self.start + first)
            check_finite(rows, self.name, self.not_finite)

        return change

    def _fold(self, part: NDArray[Any], update: Update, first: int) -> None:
        """Fold into rows of a matrix, counted from its first."""
        fold_region(part, [update], slice(first, first + part.shape[0]), slice(0, self.shape[1]), self.shape)


class ExpertFolds:
    """What becomes of a base's tensors at the parameters of an adapter."""

    def __init__(self, base: SavedWeights, names: Names, adapter: StoredAdapter, not_finite: str) -> None:
        """Read nothing yet.

        Args:
            base: The base's files.
            names: What its tensors are in the model.
            adapter: The adapter, open until all is written; it knows the names of its parameters.
            not_finite: Text of the error, as of `ExpertEdit`.
        """
        self.base, self.names, self.adapter, self.not_finite = base, names, adapter, not_finite
        self._update = functools.lru_cache(_KEPT)(adapter.update)

    def at(self, path: str, problems: list[str]) -> dict[str, NewTensor]:
        """The changed tensors of one parameter, by key.

        Args:
            path: The parameter's name.
            problems: Where to add what does not fit.
        """
        site, before = self.adapter.sites[path], len(problems)
        transposed = site.experts is not None and self.names.stores_experts_transposed(path)
        matrix = site.features[::-1]
        stored_matrix = site.features if transposed else matrix
        whole = stored_matrix if site.experts is None else (site.experts, *stored_matrix)
        key, changed = self.names.key_of(path), {}
        edit = functools.partial(
            ExpertEdit, update=functools.partial(self._update, path), shape=matrix, not_finite=self.not_finite
        )
        if (parameter := self.names.parameters.get(path)) is not None and tuple(parameter.shape) != whole:
            problems.append(_unfit(path, tuple(parameter.shape), whole, site.experts))
        elif path in self.names.stacks:
            for part in self.names.stacks[path]:
                tensor = self.base.tensors[part.key]
                self._check(part.key, tensor, (tensor.shape[0], matrix[1]), problems)
                new = edit(name=part.key, expert=part.expert, start=part.start)
                changed[part.key] = NewTensor(tensor.dtype, tensor.shape, tensor, new)
        elif path in self.names.parts:
            problems.append(
                f"{path} is put together from several tensors of the files in a way that is not known to be rows of "
                "experts, so nothing can be folded into them; merge the loaded model and save it (merge_and_unload)"
            )
        elif key is None:
            problems.append(f"missing {path}")
        else:
            tensor = self.base.tensors[key]
            self._check(key, tensor, whole, problems)
            new = edit(name=key, transposed=transposed, expert=0 if site.experts is None else None)
            changed[key] = NewTensor(tensor.dtype, tensor.shape, tensor, new)
        return changed if len(problems) == before else {}

    def _check(self, key: str, tensor: StoredTensor, shape: tuple[int, ...], problems: list[str]) -> None:
        if tensor.dtype not in FLOATS:
            problems.append(f"{key} is {tensor.dtype}, not a float tensor; a quantized base cannot be merged into")
        elif tuple(tensor.shape) != shape:
            problems.append(_unfit(key, tuple(tensor.shape), shape, None))


def _unfit(name: str, own: tuple[int, ...], wanted: tuple[int, ...], experts: int | None) -> str:
    text = f"{name} has shape {list(own)} instead of {list(wanted)}"
    return text if experts is None else f"{text}, that of the adapter's {experts} experts"
