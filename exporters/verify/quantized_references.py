"""Models that a quantized export is compared with: with the values that the export holds of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import torch
from torch import nn

from gralora_fx.base.features import parts
from gralora_fx.core.graph.sites import LinearSite, other_readers
from gralora_fx.core.model.merging import replace_weights, with_parameters
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, option
from gralora_fx.exporters.fold.initializers import ProductWeight, product_weights
from gralora_fx.exporters.fold.requantize import stored_values
from gralora_fx.exporters.fold.weight_names import weight_entries
from gralora_fx.format.export_directory import ROWS_NAME
from gralora_fx.format.quantized_weights import QuantizedWeights

_ROWS = 4096  # dequantized at once


def with_stored_weights(
    reference: TracedModel, traced: TracedModel, quantized: QuantizedWeights, directory: Path
) -> TracedModel:
    """Return a float32 model with the values that an export holds of its weights (see `reference_model`)."""
    stored = _stored_weights(directory, traced)
    found = {id(site.weight): site.weight.numel() for site in traced.sites if site.calls and site.path in stored}
    others = [rounded(directory, reference) for rounded in parts("rounded weights", reference.operators)]
    count = sum(found.values()) + sum(values for _, values in others)
    if quantized.values != count:
        raise ExportError(
            f"the export holds {quantized.values:,} quantized values and the model's layers {count:,} of them, so it "
            f"cannot be compared with a model of the same rounded weights; export with {option(verify=False)} and "
            "judge the export by its results"
        )
    weights = {site.path: _rounded(site, stored[site.path]) for site in reference.sites if site.path in stored}
    readers = other_readers(reference.graph_module, reference.sites) if quantized.lookups else {}
    shared = [
        site
        for site in reference.sites
        if quantized.lookups and site.path in stored and _is_shared(site, readers[site.path], stored[site.path].weight)
    ]
    tables = {id(site.weight): weights.pop(site.path) for site in shared}
    for rounded, _ in others:
        tables |= rounded
    return with_parameters(replace_weights(reference, weights), tables)


class _StoredWeight(NamedTuple):
    """The quantized weight of a layer: output features of an initializer."""

    weight: ProductWeight
    start: int
    stop: int


def _stored_weights(directory: Path, traced: TracedModel) -> dict[str, _StoredWeight]:
    """The quantized weights of an export by the paths of the layers."""
    paths = [path for path in sorted(directory.glob("*.onnx")) if path.name != ROWS_NAME]
    graphs = {path.stem: ir.load(path).graph for path in paths}
    weights = {
        (f"{file}.onnx", weight.name): weight
        for file, graph in graphs.items()
        for weight in product_weights(graph)
        if weight.storage != "float"
    }
    return {
        path: _StoredWeight(weights[entry.file, entry.initializer], entry.start, entry.stop)
        for path, entries in weight_entries(traced, graphs).items()
        for entry in entries[:1]
        if (entry.file, entry.initializer) in weights
    }


def _is_shared(site: LinearSite, others: Sequence[str], weight: ProductWeight) -> bool:
    """Whether a weight is quantized for others that read it too."""
    return bool(site.tied_with or others) and (weight.storage == "columns" or site.in_features % weight.block_size == 0)


def _rounded(site: LinearSite, stored: _StoredWeight) -> nn.Parameter:
    """What the export holds of a site's weight, or the weight itself if that is not rounded to it."""
    is_conv1d, (weight, start, stop) = site.kind == "conv1d", stored
    held = stored_values(weight)
    own = site.weight.detach().t() if is_conv1d else site.weight.detach()  # [out, in]
    parts = []
    for first in range(0, len(own), _ROWS):
        rows = own[first : first + _ROWS]
        outputs = slice(start + first, min(start + first + _ROWS, stop))
        is_rounding = held.is_rounded(rows.numpy(), outputs)
        parts.append(torch.from_numpy(held.values(outputs)) if is_rounding else rows)
    values = torch.cat(parts)
    return nn.Parameter((values.t() if is_conv1d else values).contiguous(), requires_grad=False)
