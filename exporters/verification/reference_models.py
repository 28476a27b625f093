"""Models that an export is compared with: with its weights, rounded as the export's are, or in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import fx, nn

from gralora_fx.errors import ExportError
from gralora_fx.exporters.conversion import base_trace, fold_adapters
from gralora_fx.exporters.folding.initializers import ProductWeight, product_weights
from gralora_fx.exporters.folding.matching_weights import weight_entries
from gralora_fx.exporters.folding.requantize import stored_values
from gralora_fx.exporters.fx_passes.cast_graph import DTYPES, cast_graph, precision_of
from gralora_fx.exporters.verification.expert_references import rounded_experts
from gralora_fx.graph.overlay import map_parameters
from gralora_fx.graph.sites import LinearSite, other_readers
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.methods import AdapterTensors, Update
from gralora_fx.methods.fold import fold
from gralora_fx.methods.gralora import Factors
from gralora_fx.methods.lora import LoraFactors
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.model.merging import replace_weights
from gralora_fx.runtime.adapter_inputs import AdapterInputs
from gralora_fx.runtime.export_directory import ROWS_NAME
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.sources.lazy_tensors import values_of
from gralora_fx.tracing.normalize.modes import set_mode
from gralora_fx.tracing.traced_model import TracedModel

_ROWS = 4096  # dequantized at once


@contextmanager
def evaluating(model: TracedModel | GraloraModel, reference: TracedModel | GraloraModel) -> Iterator[None]:
    """The reference in evaluation mode; afterwards it is in the model's again."""
    was_training = model.training
    reference.eval()
    try:
        yield
    finally:
        reference.train(was_training)


def reference_model(
    model: TracedModel | GraloraModel, manifest: Manifest, directory: Path
) -> TracedModel | GraloraModel:
    """The model itself; for an export of another precision, the adapter-free model with the same rounded weights.

    A quantized weight is what the export holds, if that is what the model's weight may be rounded to; else it is the
    model's own, and a comparison shows the difference. So nothing here depends on how a weight was rounded.

    Args:
        model: The model that was exported.
        manifest: The export's manifest.
        directory: The export directory.

    Raises:
        ExportError: The export holds quantized matrices that no linear layer of the model has.
    """
    precision, quantized = manifest.precision, manifest.quantization
    traced = base_trace(model)
    if quantized is None and {precision, precision_of(traced.graph_module)} == {"fp32"}:
        return model
    reference = float32_model(fold_adapters(model), precision)
    if quantized is None:
        return reference
    stored = _stored_weights(directory, traced)
    found = {id(site.weight): site.weight.numel() for site in traced.sites if site.calls and site.path in stored}
    experts, of_experts = rounded_experts(directory, reference)
    if quantized.values != sum(found.values()) + of_experts:
        raise ExportError(
            f"the export holds {quantized.values:,} quantized values and the model's linear layers and experts "
            f"{sum(found.values()) + of_experts:,} of them, so it cannot be compared with a model of the same rounded "
            "weights; export with verify=False and judge the export by its results"
        )
    weights = {site.path: _rounded(site, stored[site.path]) for site in reference.sites if site.path in stored}
    readers = other_readers(reference.graph_module, reference.sites) if quantized.lookups else {}
    shared = [
        site
        for site in reference.sites
        if quantized.lookups and site.path in stored and _is_shared(site, readers[site.path], stored[site.path].weight)
    ]
    tables = {id(site.weight): weights.pop(site.path) for site in shared}
    return _with_parameters(replace_weights(reference, weights), tables | experts)


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


def float32_model(traced: TracedModel, precision: str) -> TracedModel:
    """The model in float32 arithmetic with weights of its own, in memory, which were rounded to a precision.

    Args:
        traced: The adapter-free model, of any precision, its folded weights lazy or not.
        precision: Precision to which weights are rounded.
    """
    dtype = DTYPES[precision]
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "RoundedGraph")
    set_mode(graph_module.graph, False)
    graph_module = cast_graph(graph_module, "fp32")

    def cast(parameter: nn.Parameter, name: str) -> nn.Parameter:
        values = values_of(parameter, name)
        values = values.to(dtype).float() if values.is_floating_point() else values
        return nn.Parameter(values, requires_grad=False)

    map_parameters(graph_module, cast)
    graph_parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    names = {
        id(own): graph_parameters[name] for name, own in traced.tree.parameters.items() if name in graph_parameters
    }  # under other names too
    parameters = {name: names.get(id(own), own) for name, own in traced.tree.parameters.items()}
    return traced.with_graph(graph_module, dataclasses.replace(traced.tree, parameters=parameters)).eval()


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


def with_folded(base: TracedModel, tensors: Mapping[str, NDArray[Any]], inputs: AdapterInputs) -> TracedModel:
    """A float32 model with an adapter folded into its weights.

    Args:
        base: The model.
        tensors: The adapter's tensors as the export has them, by name.
        inputs: The layers whose adapters are data of the export.
    """
    sites = {site.path: site for site in base.sites}
    weights: dict[str, nn.Parameter] = {}
    biases: dict[int, nn.Parameter] = {}
    for entry in inputs.sites:
        names = [name for name in entry.names(inputs.k) if name in tensors]
        own = {name: torch.from_numpy(tensors[name].astype(np.float32)) for name in names}
        A, B, A_general, B_general, bias = entry.parts(own)
        if A_general is not None and B_general is not None:
            site, general = sites[entry.path], (A_general.t(), B_general.t())
            factors: AdapterTensors = LoraFactors(*general) if A is None or B is None else Factors(A, B, *general)
            folded = fold(site.weight.detach(), [Update(factors, 1.0)], transposed=site.kind == "conv1d")
            weights[entry.path] = nn.Parameter(folded, requires_grad=False)
        if bias is not None:
            before = base.tree.parameters[f"{entry.path}.bias"]
            biases[id(before)] = nn.Parameter(before.detach() + bias, requires_grad=False)
    return _with_parameters(replace_weights(base, weights), biases)


def _with_parameters(model: TracedModel, parameters: Mapping[int, nn.Parameter]) -> TracedModel:
    """A copy of a model whose graph reads other parameters, by the ids of those that it read."""
    graph_module = fx.GraphModule(model.graph_module, copy_graph(model.graph_module), "RoundedGraph")
    map_parameters(graph_module, lambda parameter, _: parameters.get(id(parameter), parameter))
    return model.with_graph(graph_module, model.tree)
