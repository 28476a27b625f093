"""Which weights of the model the initializers of an export hold, by their names; manifests record it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from gralora_fx.exporters.fold.initializers import ProductWeight, product_weights
from gralora_fx.format.manifest import WeightEntry

if TYPE_CHECKING:
    from gralora_fx.core.tracing.traced_model import TracedModel

_QUANTIZED = re.compile(r"(_transposed)?_(Q[48](G\d+)?|quantized)$")
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"  # which constants onnxscript computed one from


def parameter_names(value: ir.Value) -> list[tuple[str, ...]]:
    """Return the parameters that an initializer may hold by its name, side by side along its output features.

    `attn.q_proj+k_proj.weight` is `attn.q_proj.weight` and `attn.k_proj.weight`. A name can be read in several ways.
    """
    origin = value.metadata_props.get(_FOLDED_FROM)
    if origin is not None:
        names = ast.literal_eval(origin)
        return [(str(names[0]),)] if isinstance(names, list) and len(names) == 1 else []
    name = _QUANTIZED.sub("", str(value.name))
    if "+" not in name:
        return [(name,)]
    columns = [part.split("+") for part in name.split(".")]
    count = max(len(column) for column in columns)
    readings = []
    if all(len(column) in (1, count) for column in columns):
        rows = zip(*(column * count if len(column) == 1 else column for column in columns), strict=True)
        readings.append(tuple(".".join(row) for row in rows))
    return [*readings, tuple(name.split("+"))]  # the latter is of names with unequal numbers of parts


def weight_entries(traced: TracedModel, graphs: Mapping[str, ir.Graph]) -> dict[str, tuple[WeightEntry, ...]]:
    """Return where the weight of each linear layer lies, by the layer's path."""
    names = {site.path: {f"{site.path}.weight", *traced.tree.names_of(site.weight)} for site in traced.sites}
    sites: dict[str, list[str]] = {}
    for path, of_site in names.items():
        for name in of_site:
            sites.setdefault(name, []).append(path)
    widths = {site.path: site.out_features for site in traced.sites}
    entries: dict[str, list[WeightEntry]] = {}
    for file, graph in graphs.items():
        for weight in product_weights(graph):
            start = 0
            for part in _parts(weight, sites, widths):
                stop = start + widths[sites[part][0]]
                entry = WeightEntry(f"{file}.onnx", weight.name, start, stop, weight.transposed)
                for path in sites[part]:
                    entries.setdefault(path, []).append(entry)
                start = stop
    return {path: tuple(of_layer) for path, of_layer in entries.items()}


def _parts(weight: ProductWeight, sites: Mapping[str, list[str]], widths: Mapping[str, int]) -> tuple[str, ...]:
    """The parameters that an initializer holds; none if it does not hold weights of layers alone."""
    for names in parameter_names(weight.value):
        is_known = all(name in sites for name in names)
        if is_known and sum(widths[sites[name][0]] for name in names) == weight.out_features:
            return names
    return ()
