"""A model with the weights that an export has: cast as they were, each quantized matrix as its blocks decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, fx, nn

from gralora_fx.errors import ExportError
from gralora_fx.exporters.folded_model import as_traced, base_of
from gralora_fx.exporters.fx_passes.cast_graph import DTYPES, cast_graph, precision_of
from gralora_fx.exporters.onnx_passes.quantize import decoded
from gralora_fx.exporters.options import Quantization
from gralora_fx.graph.sites import LinearSite, other_readers
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.passes.replace_weights import with_weights
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.sources.lazy_tensors import values_of
from gralora_fx.tracing.normalize.modes import set_mode
from gralora_fx.tracing.traced_model import TracedModel

_COLUMNS = 4096  # decoded at once


def reference_model(model: TracedModel | GraloraModel, manifest: Manifest) -> TracedModel | GraloraModel:
    """The model itself; for an export of another precision the adapter-free one with the same rounded weights.

    Args:
        model: The model that was exported.
        manifest: The export's manifest.

    Raises:
        ExportError: The export holds quantized matrices that no linear layer of the model has.
    """
    precision, found = manifest.precision, manifest.quantization
    traced = base_of(model)
    if found is None and {precision, precision_of(traced.graph_module)} == {"fp32"}:
        return model
    how = None if found is None else Quantization(found.kind, found.block_size, found.accuracy_level)
    known = sum({id(site.weight): site.weight.numel() for site in traced.sites}.values())
    if found is not None and found.values != known:
        raise ExportError(
            f"the export holds {found.values:,} quantized values and the model's linear layers {known:,}, so there "
            "is no model with the same rounded weights to compare it with; export with verify=False and judge it by "
            "what it is for"
        )
    return rounded(as_traced(model), precision, how, with_tables=found is not None and found.lookups > 0)


def rounded(
    traced: TracedModel, precision: str, how: Quantization | None = None, *, with_tables: bool = False
) -> TracedModel:
    """The model that an export computes, in float32 arithmetic.

    Args:
        traced: The adapter-free model, of any precision, its folded weights deferred or not.
        precision: Precision that the export's weights were cast to.
        how: How its matrices were quantized then, or None.
        with_tables: Whether an embedding that is a head's weight too is read from the head's blocks.

    Returns:
        A model with weights of its own, to be run.
    """
    dtype = DTYPES[precision]
    model = _in_float32(traced, dtype)
    if how is None:
        return model
    blocks = {site.path: _as_blocks(site, how, dtype) for site in model.sites}
    shared = [site for site in model.sites if with_tables and _is_shared(model, site, how)]
    tables = {id(site.weight): blocks.pop(site.path) for site in shared}
    model = with_weights(model, blocks)
    graph_module = fx.GraphModule(model.graph_module, copy_graph(model.graph_module), "RoundedGraph")
    _replace(graph_module, lambda parameter, _: tables.get(id(parameter), parameter))
    return model.with_graph(graph_module, model.tree)


def _in_float32(traced: TracedModel, dtype: torch.dtype) -> TracedModel:
    """The model with float32 weights that were cast to another dtype before."""
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "RoundedGraph")
    set_mode(graph_module.graph, False)
    graph_module = cast_graph(graph_module, "fp32")
    made: dict[int, nn.Parameter] = {}

    def cast(parameter: nn.Parameter, name: str) -> nn.Parameter:
        if id(parameter) not in made:
            values = values_of(parameter, name)
            values = values.to(dtype).float() if values.is_floating_point() else values
            made[id(parameter)] = nn.Parameter(values, requires_grad=False)
        return made[id(parameter)]

    _replace(graph_module, cast)
    found = dict(graph_module.named_parameters(remove_duplicate=False))
    names = {id(own): found[name] for name, own in traced.tree.parameters.items() if name in found}  # other names too
    parameters = {name: names.get(id(own), own) for name, own in traced.tree.parameters.items()}
    return traced.with_graph(graph_module, dataclasses.replace(traced.tree, parameters=parameters)).eval()


def _is_shared(traced: TracedModel, site: LinearSite, how: Quantization) -> bool:
    """Whether a table that something else reads too is stored as blocks for both."""
    is_read = bool(site.tied_with) or bool(other_readers(traced.graph_module, [site])[site.path])
    return is_read and site.in_features % how.block_size == 0


def _as_blocks(site: LinearSite, how: Quantization, dtype: torch.dtype) -> nn.Parameter:
    turned = site.weight if site.kind == "conv1d" else site.weight.t()  # [in, out]
    values = torch.cat(list(_parts(turned.detach(), how, dtype)), dim=1)
    return nn.Parameter((values if site.kind == "conv1d" else values.t()).contiguous(), requires_grad=False)


def _parts(matrix: Tensor, how: Quantization, dtype: torch.dtype) -> Iterator[Tensor]:
    half = np.float16 if dtype == torch.float16 else np.float32  # what the quantizer is given
    for part in torch.split(matrix, _COLUMNS, dim=1):
        yield torch.from_numpy(decoded(np.ascontiguousarray(part.numpy(), dtype=half), how, dtype))


def _replace(graph_module: fx.GraphModule, replacement: Callable[[nn.Parameter, str], nn.Parameter]) -> None:
    for path, module in graph_module.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replacement(parameter, f"{path}.{name}")
