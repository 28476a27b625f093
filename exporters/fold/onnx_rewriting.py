"""ONNX files and their data files rewritten: which initializers change or are added, and which nodes read them."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.base.sources.rewriting import Edit, NewFile, Part, StoredBytes
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.errors import MergeError
from gralora_fx.exporters.fold.edits import LayerEdit, MatrixEdit, StackEdit, ValuesEdit, kept_updates
from gralora_fx.exporters.fold.replaced_parameters import Replacements, ValueLocation
from gralora_fx.exporters.fold.requantize import QuantizedEdit
from gralora_fx.exporters.fold.stack_locations import StackLocation
from gralora_fx.exporters.fold.weight_locations import Export, WeightLocation
from gralora_fx.exporters.rules.builder import attributes_of
from gralora_fx.exporters.rules.products.initializers import ProductWeight, Reader
from gralora_fx.exporters.rules.products.stored_rows import (
    dtype_of,
    external_tensors,
    read_rows,
    rows_and_columns,
    stored_bytes,
    tensor_of,
)

_ALIGNED = 4096  # bytes; where a new tensor begins, as ONNX Runtime maps files into memory


@dataclass
class OnnxRewriting:
    """The changes to an export's files."""

    models: Mapping[str, ir.Model]  # the models by file, whose initializers are changed in place
    changed: set[str] = field(default_factory=set)  # the files whose graphs changed, so that they are saved again
    bytes_changed: int = 0  # bytes of rewritten weights
    # names of the new initializers of single layers, by file, layer and old name
    renamed: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _parts: dict[Path, list[Part]] = field(default_factory=dict)  # the tensors that change, by data file
    _edited: dict[tuple[Path, int], tuple[int, object]] = field(default_factory=dict)
    _added: dict[tuple[Path, int, str], int] = field(default_factory=dict)  # where copies begin
    _names: set[tuple[str, str]] = field(default_factory=set)  # files and initializers that are edited in place

    def fold_matrix(self, file: str, weight: ProductWeight, layers: tuple[LayerEdit, ...]) -> None:
        """Fold into a float matrix; if it has other readers, they keep the old values."""
        edit = MatrixEdit(layers, weight.in_features, weight.transposed)
        if weight.others:
            name = self._new_name(file, f"{layers[0].name}.weight")
            self._add(file, weight.value, name, edit, weight.readers)
            self._note(file, layers, weight.name, name)
        else:
            self._edit(file, weight.value, edit, _identity(layers))

    def fold_quantized(self, file: str, edit: QuantizedEdit) -> None:
        """Fold into a quantized matrix; its other readers keep the old values too."""
        weight = edit.weight
        if not weight.others:
            for value, part in zip(weight.parts, edit.parts, strict=True):
                self._edit(file, value, part, (_identity(edit.layers), str(value.name)))
            return
        name = self._new_name(file, f"{edit.layers[0].name}.weight")
        is_blocks = weight.storage == "blocks"
        endings = (f"_Q{weight.bits}", "_scales", "_zero_points") if is_blocks else ("_quantized", "_scale")
        for index, (value, part) in enumerate(zip(weight.parts, edit.parts, strict=True)):
            readers = [Reader(reader.node, reader.position + index) for reader in weight.readers]
            if value is weight.scales and weight.is_widened:
                readers = [_widening(reader) for reader in readers]
            self._add(file, value, f"{name}{endings[index]}", part, readers)
        self._note(file, edit.layers, weight.name, f"{name}{endings[0]}")

    def replace(self, location: ValueLocation, edit: ValuesEdit) -> None:
        """Replace the values of a parameter; products that read it keep the old ones."""
        file, value = location.file, location.value
        if location.is_shared:
            self._add(file, value, self._new_name(file, f"{location.name}_trained"), edit, location.readers)
        else:
            self._edit(file, value, edit, (location.name, location.start))

    def fold_stack(self, location: StackLocation, edit: StackEdit) -> None:
        """Fold into the matrices of a parameter."""
        self._edit(location.file, location.value, edit, (location.path, location.arrangement))

    def files(self, data: Iterable[Path]) -> list[NewFile]:
        """Return the new data files: changed tensors in place, added ones at the end; raise if others share bytes."""
        self._check_apart()
        return [NewFile(path.name, list(_with_copies(path, self._parts.get(path, ())))) for path in data]

    def _edit(self, file: str, value: ir.Value, edit: Edit, what: object) -> None:
        """Change an initializer in place; graphs over the same bytes must agree on the edit, given as `what`."""
        tensor = tensor_of(value)
        self._names.add((file, str(value.name)))
        if not isinstance(tensor, ir.ExternalTensor):
            value.const_value = _inline(value, edit)
            self.changed.add(file)
            self.bytes_changed += tensor.nbytes
            return
        source = stored_bytes(tensor)
        key = source.file, source.begin
        if key not in self._edited:
            self._edited[key] = source.nbytes, what
            self._schedule(value, source, edit, source.begin)
        elif self._edited[key] != (source.nbytes, what):
            raise MergeError(
                f"{value.name} of {file} shares its bytes with another initializer that changes differently"
            )

    def _add(self, file: str, value: ir.Value, name: str, edit: Edit, readers: Iterable[Reader]) -> None:
        """Add an initializer, an edited copy of another, and redirect some readers to it."""
        old = tensor_of(value)
        new = ir.Value(name=name, shape=ir.Shape(old.shape.numpy()), type=ir.TensorType(old.dtype))
        if isinstance(old, ir.ExternalTensor):
            source = stored_bytes(old)
            key = source.file, source.begin, name  # graphs of other files over these bytes share the copy
            if key not in self._added:
                ends = [part.end for part in self._parts.get(source.file, ())]
                end = max([source.file.stat().st_size, *ends])
                self._added[key] = -(-end // _ALIGNED) * _ALIGNED
                self._schedule(value, source, edit, self._added[key])
            new.const_value = ir.ExternalTensor(
                old.location, self._added[key], old.nbytes, old.dtype, shape=ir.Shape(old.shape.numpy()), name=name,
                base_dir=old.base_dir,
            )  # fmt: skip
        else:
            new.const_value = _inline(value, edit)
            new.const_value.name = name
            self.bytes_changed += old.nbytes
        self.models[file].graph.initializers[name] = new
        for reader in readers:
            reader.node.replace_input_with(reader.position, new)
        self.changed.add(file)

    def _schedule(self, value: ir.Value, source: StoredBytes, edit: Edit, begin: int) -> None:
        part = Part(begin, source.nbytes, source, edit, dtype_of(value), rows_and_columns(value)[1])
        self._parts.setdefault(source.file, []).append(part)
        self.bytes_changed += source.nbytes

    def _new_name(self, file: str, name: str) -> str:
        taken = {str(value.name) for value in self.models[file].graph.initializers.values()}
        return f"{name}_untied" if name in taken or f"{name}_scales" in taken else name

    def _note(self, file: str, layers: Iterable[LayerEdit], old: str, new: str) -> None:
        self.renamed |= {(file, layer.name, old): new for layer in layers}

    def _check_apart(self) -> None:
        ranges: dict[Path, list[tuple[int, int]]] = {}
        for (path, begin), (length, _) in sorted(self._edited.items()):
            ranges.setdefault(path, []).append((begin, begin + length))
        for file, model in self.models.items():
            for name, tensor in external_tensors(model):
                if (file, name) in self._names:
                    continue
                own = stored_bytes(tensor)
                edited = ranges.get(own.file, [])
                before = bisect.bisect_left(edited, (own.end, 0)) - 1
                if before >= 0 and edited[before][1] > own.begin:
                    raise MergeError(
                        f"{name} of {file} lies in bytes of {own.file.name} that would change with another "
                        "weight; export the merged model instead"
                    )


def plan_rewriting(
    models: Mapping[str, ir.Model],
    export: Export,
    adapter: StoredAdapter,
    locations: Iterable[WeightLocation],
    replacements: Replacements,
    stacks: Sequence[StackLocation] = (),
) -> tuple[OnnxRewriting, list[QuantizedEdit]]:
    """Return the rewriting of files, and the edits of quantized weights; raise if weights share bytes."""
    layers: dict[tuple[str, int], list[LayerEdit]] = {}
    weights: dict[tuple[str, int], ProductWeight] = {}
    folds = (
        (place, LayerEdit.folding(adapter, place.path, place.path, place.start, place.stop)) for place in locations
    )
    for location, edit in (*folds, *replacements.layers):
        key = location.file, id(location.weight)
        weights[key] = location.weight
        layers.setdefault(key, []).append(edit)
    rewriting = OnnxRewriting(models)
    quantized: list[QuantizedEdit] = []

    def base_weight(path: str) -> NDArray[Any]:
        return export.base_values(path, adapter.sites[path].features)[0]

    for key, edits in layers.items():
        if weights[key].storage == "float":
            rewriting.fold_matrix(key[0], weights[key], tuple(edits))
        else:
            quantized.append(QuantizedEdit(weights[key], tuple(edits), None if export.base is None else base_weight))
            rewriting.fold_quantized(key[0], quantized[-1])
    update = kept_updates(adapter)
    for at in stacks:
        rewriting.fold_stack(at, at.edit(functools.partial(update, at.path)))
    for value_location, values in replacements.values:
        rewriting.replace(value_location, values)
    return rewriting, quantized


def _widening(reader: Reader) -> Reader:
    """Give a node its own copy of a cast that it shares; return the input of the copy."""
    node, position = reader
    shared = node.inputs[position]
    cast = None if shared is None else shared.producer()
    assert cast is not None
    assert isinstance(node.graph, ir.Graph)
    own = ir.node("Cast", list(cast.inputs), attributes_of(cast))
    node.graph.insert_before(node, own)
    node.replace_input_with(position, own.outputs[0])
    return Reader(own, 0)


def _with_copies(path: Path, changed: Iterable[Part]) -> Iterator[Part]:
    """Yield the parts of a new data file: the changed ones, and copies of the bytes between them."""
    position, size = 0, path.stat().st_size
    for part in sorted(changed, key=lambda part: part.begin):
        if position < (stop := min(part.begin, size)):
            yield Part(position, stop - position, StoredBytes(path, position, stop))
        yield part
        position = part.end
    if position < size:
        yield Part(position, size - position, StoredBytes(path, position, size))


def _inline(value: ir.Value, edit: Edit) -> ir.TensorProtocol:
    """Return an initializer's tensor after an edit, to be stored in the ONNX file itself."""
    old, rows = tensor_of(value), read_rows(value)
    edit.prepare()(rows, 0)
    proto = onnx.TensorProto(name=value.name, dims=old.shape.numpy(), data_type=int(old.dtype))
    proto.raw_data = rows.tobytes()
    return ir.TensorProtoTensor(proto)


def _identity(layers: Iterable[LayerEdit]) -> object:
    return tuple((layer.name, layer.start, layer.stop) for layer in layers)
