"""Locations of the weights of adapted layers in ONNX files: as the export recorded, by name, or by value."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.errors import MergeError, bulleted, command, listed, marked, option, remedy
from gralora_fx.exporters.fold.matching_weights import BaseWeights, find_values, foreign_names, holds, ranges, reduced
from gralora_fx.exporters.rules.products.initializers import ProductWeight, Reader, parameter_names, product_weights
from gralora_fx.format.manifest import Manifest, WeightEntry

RECORDED, BY_NAME, BY_VALUE = "as recorded", "by name", "by value"


@dataclass(frozen=True)
class WeightLocation:
    """The location of a layer's weight."""

    path: str  # the layer
    file: str  # the ONNX file
    weight: ProductWeight  # the initializer
    start: int  # first of the layer's output features in it
    stop: int  # end of them
    how: str  # how it was found: `"as recorded"`, `"by name"` or `"by value"`


@dataclass(frozen=True)
class Export:
    """An export to search for weights."""

    graphs: Mapping[str, ir.Graph]  # its graphs by ONNX file
    manifest: Manifest | None = None  # the manifest; None of other exporters' files
    base: BaseWeights | None = None  # the base model's weights, if they were given

    @cached_property
    def weights(self) -> Mapping[str, Sequence[ProductWeight]]:
        """The weights that products multiply by, by ONNX file."""
        return {file: product_weights(graph) for file, graph in self.graphs.items()}

    @cached_property
    def by_name(self) -> Mapping[tuple[str, str], ProductWeight]:
        """The weights by file and name."""
        return {(file, weight.name): weight for file, weights in self.weights.items() for weight in weights}

    @property
    def record(self) -> Mapping[str, Sequence[WeightEntry]] | None:
        """The locations of each layer's weight that the manifest records; None if it does not."""
        return None if self.manifest is None else self.manifest.weights

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Output features of the layers that the manifest names."""
        return {} if self.manifest is None else {site.path: site.out_features for site in self.manifest.sites}

    @cached_property
    def _kinds(self) -> Mapping[str, str]:
        return {} if self.manifest is None else {site.path: site.kind for site in self.manifest.sites}

    @cached_property
    def _layers(self) -> Mapping[tuple[str, str], list[tuple[str, int, int]]]:
        """The layers recorded in each initializer, with their first and last output feature."""
        layers: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
        for path, entries in (self.record or {}).items():
            for entry in entries:
                layers.setdefault((entry.file, entry.initializer), []).append((path, entry.start, entry.stop))
        return layers

    def is_conv1d(self, path: str) -> bool:
        """Return whether a layer is transformers' `Conv1D`, whose weight is `[in, out]` in the model."""
        return self._kinds.get(path) == "conv1d"

    def sharing(self, locations: Iterable[WeightLocation]) -> list[str]:
        """Return other layers that the record places at these locations."""
        sharing = [
            path
            for location in locations
            for path, start, stop in self._layers.get((location.file, location.weight.name), ())
            if path != location.path and start < location.stop and location.start < stop
        ]
        return list(dict.fromkeys(sharing))

    def base_values(self, path: str, features: tuple[int, int]) -> tuple[NDArray[Any], ...]:
        """Return a layer's weight `[out, in]` from the given base; both readings of a square one of unknown layout."""
        assert self.base is not None
        values = self.base.weight(path, features)
        if features[0] != features[1]:
            return (values,)
        if path not in self._kinds:
            return values, values.T
        return (values.T if self.is_conv1d(path) else values,)


def find_locations(export: Export, adapter: StoredAdapter) -> list[WeightLocation]:
    """Return where the weight of every adapted layer lies; one may lie in several files."""
    locations: list[WeightLocation] = []
    problems: list[str] = []
    for path, site in adapter.layers.items():
        try:
            of_layer = _locate(export, adapter, path)
            _check_widths(of_layer, site.features)
            of_layer = [_unshared(export, location, site.features) for location in of_layer]
            _check_base(export, of_layer, site.features)
        except MergeError as error:
            problems.append(f"{path}: {marked(error)}")
        else:
            locations += of_layer
    problems += list(_overlaps(locations))
    if problems:
        raise MergeError(f"{adapter.directory} cannot be folded into this export:\n{bulleted(problems)}")
    return locations


def _locate(export: Export, adapter: StoredAdapter, path: str) -> list[WeightLocation]:
    if export.record is not None:
        locations = recorded_locations(export, path)
        if not locations:
            raise MergeError(
                "its weight is not one that the exported graph multiplies by; leave the layer out (exclude_modules)"
                if path in export.widths
                else "the export has no such layer"
            )
        return locations
    widths = {other: site.features[1] for other, site in adapter.layers.items()}
    locations = (
        list(named_locations(export, path, widths))
        or unique(list(named_locations(export, path, widths, foreign=True)))
        or list(locations_by_value(export, path, adapter.sites[path].features))
    )
    if not locations:
        base = f"; give {option(base=...)}, the base model's directory, to find it by value"
        raise MergeError(
            "no initializer that a product multiplies by is named after it, or holds its values"
            + (base if export.base is None else "")
        )
    return locations


def recorded_locations(export: Export, path: str) -> list[WeightLocation]:
    """Return the locations of a layer's weight that the manifest records; none for a layer it does not list."""
    locations = []
    for entry in (export.record or {}).get(path, ()):
        weight = export.by_name.get((entry.file, entry.initializer))
        if weight is None or not 0 <= entry.start < entry.stop <= weight.out_features or (
            weight.transposed != entry.transposed
        ):  # fmt: skip
            raise MergeError(f"{entry.file} does not hold {entry.initializer} as the manifest says; export it again")
        locations.append(WeightLocation(path, entry.file, weight, entry.start, entry.stop, RECORDED))
    return locations


def named_locations(
    export: Export, path: str, widths: Mapping[str, int] | None = None, *, foreign: bool = False
) -> Iterator[WeightLocation]:
    """Yield the locations of a layer's weight by the names of initializers."""
    rename: Callable[[str], str] = reduced if foreign else str
    wanted = rename(f"{path}.weight")
    known = {rename(f"{layer}.weight"): width for layer, width in {**export.widths, **(widths or {})}.items()}
    for file, candidates in export.weights.items():
        for weight in candidates:
            readings = foreign_names(weight.value) if foreign else parameter_names(weight.value)
            for names in readings:
                index = next((i for i, name in enumerate(names) if is_named(name, wanted, foreign)), None)
                parts = [] if index is None else list(ranges(names, weight.out_features, known.get))
                if index is not None and parts:
                    yield WeightLocation(path, file, weight, *parts[index], BY_NAME)
                    break


def is_named(name: str, wanted: str, foreign: bool) -> bool:
    """Return whether a name is the wanted one; with another exporter's names, one may be the end of the other."""
    is_end = name.endswith(f".{wanted}") or ("." in name and wanted.endswith(f".{name}"))
    return name == wanted or (foreign and is_end)


def unique(locations: list[WeightLocation]) -> list[WeightLocation]:
    """Return the locations if there is at most one in each file; else raise a `MergeError`."""
    for file in {location.file for location in locations}:
        names = [location.weight.name for location in locations if location.file == file]
        if len(names) > 1:
            raise MergeError(
                f"its weight may be any of {', '.join(names)} in {file}; give {option(base=...)} to tell them"
            )
    return locations


def locations_by_value(export: Export, path: str, features: tuple[int, int]) -> Iterator[WeightLocation]:
    """Yield the locations of a layer's weight by the values of the given base; none without a base."""
    if export.base is None:
        return
    readings, stop = export.base_values(path, features), features[1]
    for file, weights in export.weights.items():
        matches = [match for values in readings for match in find_values(weights, values)]
        locations = [WeightLocation(path, file, weight, start, start + stop, BY_VALUE) for weight, start in matches]
        if len(locations) > 1:
            names = ", ".join(f"{location.weight.name} from {location.start}" for location in locations)
            raise MergeError(
                f"its values occur several times in {file} ({names}), so which one is its weight is unknown"
            )
        yield from locations


def _check_widths(locations: Iterable[WeightLocation], features: tuple[int, int]) -> None:
    for location in locations:
        here = location.weight.in_features, location.stop - location.start
        if here != features:
            raise MergeError(
                f"the adapter is for {features[0]} inputs and {features[1]} outputs, but {location.weight.name} has "
                f"{here[0]} and {here[1]}; give an adapter of this model"
            )
        if location.weight.problem:
            raise MergeError(f"{location.weight.name} cannot be folded into: {location.weight.problem}")


def _unshared(export: Export, location: WeightLocation, features: tuple[int, int]) -> WeightLocation:
    """Return a location whose weight only the layer's own products read; the others keep theirs."""
    weight = location.weight
    if export.record is not None:
        if same := export.sharing([location]):
            raise MergeError(
                f"{weight.name} is the weight of {', '.join(same)} too, which would change with it; export the "
                f"merged model ({remedy('merge with untie=True', 'run gralora-fx merge')}), or leave the layer "
                "out (exclude_modules)"
            )
        return location
    if not _is_read_several_times(weight) or _is_named_apart(export, weight):
        return location
    if export.base is None:
        raise MergeError(
            f"{len(weight.readers)} products read {weight.name}, and nothing says that all are of this layer; give "
            f"{option(base=...)}, or export the model again"
        )
    equal = export.base.equal_to(location.path, features)
    if not equal:  # the layer runs several times, or those that are tied to it do
        return location
    own = _readers_in(weight.readers, location.path)
    if not own or any(len(_products_behind(reader)) > 1 for reader in own):
        raise MergeError(
            f"{weight.name} is the weight of {listed(equal, 3)} too, since its exporter stores equal weights once, and "
            f"nothing says which products are of this layer; export the merged model ({command('export_onnx')})"
        )
    others = (*weight.others, *(reader for reader in weight.readers if reader not in own))
    return dataclasses.replace(location, weight=dataclasses.replace(weight, readers=own, others=others))


def _readers_in(readers: Iterable[Reader], path: str) -> tuple[Reader, ...]:
    """Return the readers that PyTorch's exporters note to be of a module, below any prefix if none is of just this."""
    modules = {reader: _modules_of(reader.node) for reader in readers}
    exact = tuple(reader for reader, names in modules.items() if path in names)
    return exact or tuple(r for r, names in modules.items() if any(name.endswith(f".{path}") for name in names))


def _modules_of(node: ir.Node) -> list[str]:
    """Return the modules that a node is noted to be in, by its metadata or a name like `/layers.0/linear1/MatMul`."""
    noted = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    return [".".join(str(node.name).split("/")[1:-1])] if noted is None else list(ast.literal_eval(noted))


def _products_behind(reader: Reader) -> list[ir.Node]:
    """Return the nodes that read a weight through an input, behind transposes and casts."""
    if reader.node.op_type not in ("Transpose", "Cast", "Identity"):
        return [reader.node]
    uses = reader.node.outputs[0].uses()
    return [node for use in uses for node in _products_behind(Reader(use.node, use.idx))]


def _is_read_several_times(weight: ProductWeight) -> bool:
    """Return whether several products in one graph read a weight; products in different branches count once."""
    graphs = [id(node.graph) for reader in weight.readers for node in _products_behind(reader)]
    return len(graphs) > len(set(graphs))


def _is_named_apart(export: Export, weight: ProductWeight) -> bool:
    """Return whether every layer of the same widths has an initializer of its name, so that none shares a weight."""
    if export.manifest is None:
        return False
    widths = weight.in_features, weight.out_features
    alike = [site.path for site in export.manifest.sites if (site.in_features, site.out_features) == widths]
    return all(any(named_locations(export, path)) for path in alike)


def _check_base(export: Export, locations: Iterable[WeightLocation], features: tuple[int, int]) -> None:
    """Check that a weight found by name is the given base's, unless an adapter was folded into it."""
    if export.base is None or (export.manifest is not None and export.manifest.adapters):
        return
    for location in locations:
        if location.how == BY_VALUE or location.weight.storage != "float":
            continue
        readings = export.base_values(location.path, features)
        if not any(holds(location.weight, location.start, values) for values in readings):
            raise MergeError(
                f"{location.weight.name} does not hold the weight of {export.base.directory}; give the base that was "
                "exported"
            )


def _overlaps(locations: Sequence[WeightLocation]) -> Iterator[str]:
    """Yield a problem for each pair of layers found at the same location."""
    earlier: dict[int, list[WeightLocation]] = {}
    for location in locations:
        for other in earlier.setdefault(id(location.weight), []):
            if other.path != location.path and other.start < location.stop and location.start < other.stop:
                yield f"{location.path} and {other.path} have one weight, {location.weight.name}; adapt one of them"
        earlier[id(location.weight)].append(location)
