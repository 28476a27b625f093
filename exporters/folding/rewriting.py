"""ONNX files and data files rewritten: which bytes change, which tensors are new, and who reads those."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.errors import MergeError
from gralora_fx.exporters.folding.data_files import Change, aligned
from gralora_fx.exporters.folding.edits import LayerEdit, MatrixEdit, ValuesEdit
from gralora_fx.exporters.folding.parameters import ValuePlace
from gralora_fx.exporters.folding.products import Reader
from gralora_fx.exporters.folding.requantize import QuantizedEdit
from gralora_fx.exporters.folding.stored import dtype_of, inline_tensor, read_rows, rows_and_columns, tensor_of

_Edit = Callable[[NDArray[Any], int], None]  # changes some stored rows in place, given them and the first one's number


@dataclass
class Rewriting:
    """What is written instead of an export's files.

    Attributes:
        models: The models by file, whose initializers are changed in place.
        changed: The files whose graphs changed, so that they are saved anew.
        changes: Changes of the data files by their paths.
        bytes_changed: How many bytes of weights are written anew.
        renamed: Names of the initializers that layers have of their own now, by file, layer and old name.
    """

    models: Mapping[str, ir.Model]
    changed: set[str] = field(default_factory=set)
    changes: dict[Path, list[Change]] = field(default_factory=dict)
    bytes_changed: int = 0
    renamed: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _ends: dict[Path, int] = field(default_factory=dict)
    _edited: dict[tuple[Path, int], tuple[int, object]] = field(default_factory=dict)
    _added: dict[tuple[Path, int, str], int] = field(default_factory=dict)  # where copies begin
    _names: set[tuple[str, str]] = field(default_factory=set)  # files and initializers that are edited in place

    def fold_matrix(self, file: str, edit: MatrixEdit) -> None:
        """Fold into a matrix of floats; one that others read too is left to them."""
        weight = edit.weight
        what = _identity(edit.layers)
        if weight.others:
            name = self._new_name(file, f"{edit.layers[0].path}.weight")
            self._add(file, weight.value, name, edit, weight.readers)
            self._note(file, edit.layers, weight.name, name)
        else:
            self._edit(file, weight.value, edit, what)

    def fold_quantized(self, file: str, edit: QuantizedEdit) -> None:
        """Fold into a quantized matrix; likewise."""
        weight = edit.weight
        parts = [(value, functools.partial(edit.part, index)) for index, value in enumerate(weight.parts)]
        if not weight.others:
            for value, content in parts:
                self._edit(file, value, _taking(content), (_identity(edit.layers), str(value.name)))
            return
        if weight.storage != "blocks":
            raise MergeError(f"{weight.name} is read by {weight.others[0].text} too, which would change with it")
        name = self._new_name(file, f"{edit.layers[0].path}.weight")
        endings = (f"_Q{weight.bits}", "_scales", "_zero_points")[: len(parts)]
        for index, ((value, content), ending) in enumerate(zip(parts, endings, strict=True), 1):
            readers = [Reader(reader.node, index) for reader in weight.readers]
            self._add(file, value, f"{name}{ending}", _taking(content), readers)
        self._note(file, edit.layers, weight.name, f"{name}{endings[0]}")

    def replace(self, place: ValuePlace, values: NDArray[Any]) -> None:
        """Replace the values of a parameter that is not multiplied by; products that read it keep the old ones."""
        edit = ValuesEdit(place.name, place.start, values)
        if place.is_shared:
            name = self._new_name(place.file, f"{place.name}_trained")
            self._add(place.file, place.value, name, edit, place.readers)
        else:
            self._edit(place.file, place.value, edit, (place.name, place.start))

    def _edit(self, file: str, value: ir.Value, edit: _Edit, what: object) -> None:
        """Change an initializer where it is."""
        tensor = tensor_of(value)
        self._names.add((file, str(value.name)))
        if not isinstance(tensor, ir.ExternalTensor):
            rows = read_rows(value)
            edit(rows, 0)
            value.const_value = inline_tensor(value, rows)
            self.changed.add(file)
            self.bytes_changed += tensor.nbytes
            return
        key = Path(tensor.path), tensor.offset or 0
        known = self._edited.get(key)
        if known is None:
            self._edited[key] = tensor.nbytes, what
            self._schedule(value, edit, None)
        elif known != (tensor.nbytes, what):
            raise MergeError(f"{value.name} of {file} shares its bytes with another initializer that changes otherwise")

    def _add(self, file: str, source: ir.Value, name: str, edit: _Edit, readers: Iterable[Reader]) -> None:
        """Add an initializer, an edited copy of another, for some readers."""
        old = tensor_of(source)
        new = ir.Value(name=name, shape=ir.Shape(old.shape.numpy()), type=ir.TensorType(old.dtype))
        if isinstance(old, ir.ExternalTensor):
            path = Path(old.path)
            key = path, old.offset or 0, name  # the same copy of another file's graph over these bytes
            is_new = key not in self._added
            if is_new:
                self._added[key] = aligned(self._ends.get(path) or path.stat().st_size)
                self._ends[path] = self._added[key] + old.nbytes
            target = self._added[key]
            new.const_value = ir.ExternalTensor(
                old.location, target, old.nbytes, old.dtype, shape=ir.Shape(old.shape.numpy()), name=name,
                base_dir=old.base_dir,
            )  # fmt: skip
            if is_new:
                self._schedule(source, edit, target)
        else:
            rows = read_rows(source)
            edit(rows, 0)
            new.const_value = inline_tensor(source, rows)
            new.const_value.name = name
            self.bytes_changed += old.nbytes
        self.models[file].graph.initializers[name] = new
        for reader in readers:
            reader.node.replace_input_with(reader.position, new)
        self.changed.add(file)

    def _schedule(self, value: ir.Value, edit: _Edit, target: int | None) -> None:
        tensor, dtype = tensor_of(value), dtype_of(value)
        assert isinstance(tensor, ir.ExternalTensor)
        _, columns = rows_and_columns(value)

        def rewrite(part: NDArray[Any], first: int) -> None:
            edit(part.view(dtype).reshape(-1, columns), first)

        change = Change(tensor.offset or 0, tensor.nbytes, columns * dtype.itemsize, rewrite, target)
        self.changes.setdefault(Path(tensor.path), []).append(change)
        self.bytes_changed += tensor.nbytes

    def _new_name(self, file: str, name: str) -> str:
        taken = {str(value.name) for value in self.models[file].graph.initializers.values()}
        return f"{name}_untied" if name in taken or f"{name}_scales" in taken else name

    def _note(self, file: str, layers: Iterable[LayerEdit], old: str, new: str) -> None:
        self.renamed |= {(file, layer.path, old): new for layer in layers}

    def check_apart(self) -> None:
        """Check that no other initializer lies in the bytes that change.

        Raises:
            MergeError: One does, and would change with them.
        """
        edited: dict[str, list[tuple[int, int]]] = {}
        for (path, offset), (length, _) in sorted(self._edited.items()):
            edited.setdefault(str(path), []).append((offset, offset + length))
        for file, model in self.models.items():
            for value in (v for g in (model.graph, *model.graph.subgraphs()) for v in g.initializers.values()):
                tensor = value.const_value
                if not isinstance(tensor, ir.ExternalTensor) or (file, str(value.name)) in self._names:
                    continue
                ranges, start = edited.get(str(Path(tensor.path)), []), tensor.offset or 0
                before = bisect.bisect_left(ranges, (start + tensor.nbytes, 0)) - 1
                if before >= 0 and ranges[before][1] > start:
                    raise MergeError(
                        f"{value.name} of {file} lies in bytes of {Path(tensor.path).name} that would change with "
                        "another weight; export the merged model instead"
                    )


def _identity(layers: Iterable[LayerEdit]) -> object:
    return tuple((layer.path, layer.start, layer.stop) for layer in layers)


def _taking(content: Callable[[], NDArray[Any]]) -> _Edit:
    """An edit that takes computed rows, which are kept while the initializer is written."""
    kept: list[NDArray[Any]] = []

    def edit(rows: NDArray[Any], first: int) -> None:
        if first == 0:
            kept[:] = [content()]
        part = kept[0].reshape(-1, rows.shape[1])
        rows[...] = part[first : first + len(rows)]
        if first + len(rows) == len(part):
            kept.clear()

    return edit
