"""The record of where an export's linear layers have their weights, made while the model is at hand."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from gralora_fx.exporters.folding.names import parameter_names
from gralora_fx.exporters.folding.products import ProductWeight, product_weights
from gralora_fx.runtime.manifest import WeightEntry
from gralora_fx.tracing.traced_model import TracedModel


def weight_entries(traced: TracedModel, graphs: Mapping[str, ir.Graph]) -> dict[str, tuple[WeightEntry, ...]]:
    """Where the weight of each linear layer lies, by the layer's path.

    Args:
        traced: The model, whose parameters tell which names are of one tensor.
        graphs: The exported graphs by the names of their files, without a suffix.
    """
    names = {site.path: {f"{site.path}.weight", *traced.tree.names_of(site.weight)} for site in traced.sites}
    sites: dict[str, list[str]] = {}
    for path, of_site in names.items():
        for name in of_site:
            sites.setdefault(name, []).append(path)
    widths = {site.path: site.out_features for site in traced.sites}
    found: dict[str, list[WeightEntry]] = {}
    for file, graph in graphs.items():
        for weight in product_weights(graph):
            start = 0
            for part in _parts(weight, sites, widths):
                stop = start + widths[sites[part][0]]
                entry = WeightEntry(f"{file}.onnx", weight.name, start, stop, weight.transposed)
                for path in sites[part]:
                    found.setdefault(path, []).append(entry)
                start = stop
    return {path: tuple(entries) for path, entries in found.items()}


def _parts(weight: ProductWeight, sites: Mapping[str, list[str]], widths: Mapping[str, int]) -> tuple[str, ...]:
    """The parameters that an initializer holds; none if it does not hold weights of layers alone."""
    for names in parameter_names(weight.value):
        is_known = all(name in sites for name in names)
        if is_known and sum(widths[sites[name][0]] for name in names) == weight.out_features:
            return names
    return ()
