"""Models that an export is compared with: with its weights, rounded as the export's are, or in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from gralora_fx.errors import ExportError
from gralora_fx.exporters.conversion import base_trace, fold_adapters
from gralora_fx.exporters.fx_passes.cast_graph import DTYPES, cast_graph, precision_of
from gralora_fx.exporters.quantization.block_arrays import rounded_to_blocks
from gralora_fx.exporters.quantization.column_arrays import rounded_to_columns
from gralora_fx.exporters.quantization.formats import Blocks, Format
from gralora_fx.exporters.quantization.plan import QuantizationPlan
from gralora_fx.exporters.quantization.record import plan_of
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
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.sources.lazy_tensors import values_of
from gralora_fx.tracing.normalize.modes import set_mode
from gralora_fx.tracing.traced_model import TracedModel

_COLUMNS = 4096  # dequantized at once


@contextmanager
def evaluating(model: TracedModel | GraloraModel, reference: TracedModel | GraloraModel) -> Iterator[None]:
    """The reference in evaluation mode; afterwards it is in the model's again."""
    was_training = model.training
    reference.eval()
    try:
        yield
    finally:
        reference.train(was_training)


def reference_model(model: TracedModel | GraloraModel, manifest: Manifest) -> TracedModel | GraloraModel:
    """The model itself; for an export of another precision, the adapter-free model with the same rounded weights.

    Args:
        model: The model that was exported.
        manifest: The export's manifest.

    Raises:
        ExportError: The export holds quantized matrices that no linear layer of the model has.
    """
    precision, blocks = manifest.precision, manifest.quantization
    traced = base_trace(model)
    if blocks is None and {precision, precision_of(traced.graph_module)} == {"fp32"}:
        return model
    plan = None if blocks is None else plan_of(blocks)
    called = {id(site.weight): site.weight.numel() for site in traced.sites if site.calls}
    known = sum(called.values())
    if blocks is not None and blocks.values != known:
        raise ExportError(
            f"the export holds {blocks.values:,} quantized values and the model's linear layers {known:,}, so it "
            "cannot be compared with a model of the same rounded weights; export with verify=False and "
            "judge the export by its results"
        )
    return dequantized_model(
        fold_adapters(model), precision, plan, with_tables=blocks is not None and blocks.lookups > 0
    )


def dequantized_model(
    traced: TracedModel,
    precision: str,
    plan: QuantizationPlan | None = None,
    *,
    with_tables: bool = False,
) -> TracedModel:
    """The model with an export's rounded weights, in float32 arithmetic: activations are not rounded.

    Args:
        traced: The adapter-free model, of any precision, its folded weights lazy or not.
        precision: Precision to which the export's weights were cast.
        plan: How its matrices were quantized after that, or None.
        with_tables: Whether an embedding that is tied to a head reads the head's blocks.

    Returns:
        A model with weights of its own, which can be run.
    """
    dtype = DTYPES[precision]
    model = _in_float32(traced, dtype)
    if plan is None:
        return model
    formats = {site.path: plan.format_of(model.tree.names_of(site.weight)) for site in model.sites}
    rounded = {site.path: _rounded(site, form, dtype) for site in model.sites if (form := formats[site.path])}
    shared = [site for site in model.sites if with_tables and _is_shared(model, site, formats[site.path])]
    tables = {id(site.weight): rounded.pop(site.path) for site in shared}
    return _with_parameters(replace_weights(model, rounded), tables)


def _in_float32(traced: TracedModel, dtype: torch.dtype) -> TracedModel:
    """The model with float32 weights rounded to another dtype."""
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


def _is_shared(traced: TracedModel, site: LinearSite, form: Format | None) -> bool:
    """Whether a weight with other readers is stored as blocks for all of them."""
    is_read = bool(site.tied_with) or bool(other_readers(traced.graph_module, [site])[site.path])
    return is_read and isinstance(form, Blocks) and site.in_features % form.block_size == 0


def _rounded(site: LinearSite, form: Format, dtype: torch.dtype) -> nn.Parameter:
    """A site's weight, quantized and dequantized."""
    matrix = site.weight if site.kind == "conv1d" else site.weight.t()  # [in, out]
    values = torch.cat(list(_parts(matrix.detach(), form, dtype, site.path)), dim=1)
    return nn.Parameter((values if site.kind == "conv1d" else values.t()).contiguous(), requires_grad=False)


def _parts(matrix: Tensor, form: Format, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
    half = np.float16 if dtype == torch.float16 else np.float32  # the quantizer's input
    for part in torch.split(matrix, _COLUMNS, dim=1):
        values = np.ascontiguousarray(part.numpy(), dtype=half)
        if isinstance(form, Blocks):
            yield torch.from_numpy(rounded_to_blocks(values, form, dtype))
        else:
            yield torch.from_numpy(rounded_to_columns(values, name))


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
