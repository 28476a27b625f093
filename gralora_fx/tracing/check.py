"""A trace held against its model: on the example, on other sizes, and in words where it fails."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from gralora_fx.errors import TraceError, first_line
from gralora_fx.tracing.cached import PAST, copied, other_cached_sizes
from gralora_fx.tracing.encoder_decoder import other_step_sizes
from gralora_fx.tracing.modes import set_mode
from gralora_fx.tracing.quiet import quiet
from gralora_fx.tracing.samples import other_sizes
from gralora_fx.tracing.stand_ins import is_without_values

# Largest difference from the eager model, relative to its largest output, by the dtype of that output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def difference(model: nn.Module, graph_module: fx.GraphModule, sample: Mapping[str, Any]) -> str | None:
    """How the graph differs from the eager model in evaluation mode, or None where it does not."""
    if is_without_values(model):
        return None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    set_mode(graph_module.graph, False)
    graph_module.recompile()
    try:
        with torch.no_grad(), quiet():
            try:
                expected = tree_leaves(_call_eager(model, sample))
            except Exception as error:  # a model raises what it likes
                raise TraceError(
                    f"{type(model).__name__} itself fails on the example inputs{where(model, error)}: "
                    f"{first_line(error)}"
                ) from error
            try:
                actual = tree_leaves(graph_module(**copied(sample)))
            except Exception as error:  # noqa: BLE001  # a graph of a fixed size raises what its operators do
                return f"it fails with {type(error).__name__}: {first_line(error)}"
    finally:
        for module, mode in modes:
            module.training = mode
    expected, actual = ([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] for leaves in (expected, actual))
    if len(expected) != len(actual):
        return f"it returns {len(actual)} tensors, the model {len(expected)}"
    for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if want.shape != got.shape:
            return f"output {index} has shape {tuple(got.shape)}, the model's {tuple(want.shape)}"
        if not want.numel() or not want.is_floating_point():
            continue
        largest = want.abs().nan_to_num().max().item()
        gap = (want - got).abs().nan_to_num().max().item()
        if gap > _TOLERANCE.get(want.dtype, 1e-4) * max(largest, 1e-6):
            return f"output {index} differs by {gap:.3g} where the largest value is {largest:.3g}"
    return None


def refuse_fixed_sizes(model: nn.Module, graph_module: fx.GraphModule, sample: Mapping[str, Any]) -> None:
    """Compare on other sizes that the model takes: a branch or a loop over a size is baked into a trace."""
    if is_without_values(model):
        return
    for what, other in _other_calls(model, sample):
        try:
            found = difference(model, graph_module, other)
        except TraceError:  # the model itself does not take this size
            continue
        if found is not None:
            raise TraceError(
                f"the trace of {type(model).__name__} holds for the example's sizes only; with {what} {found}. "
                "The forward branches or loops on a size: trace with dynamic=False for one size, or rewrite it"
            )


def _other_calls(model: nn.Module, sample: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if PAST not in sample or not isinstance(model, PreTrainedModel):
        return other_sizes(sample)
    return other_step_sizes(model, sample) if model.config.is_encoder_decoder else other_cached_sizes(model)


def _call_eager(model: nn.Module, sample: Mapping[str, Any]) -> Any:
    inputs = copied(sample)
    if isinstance(model, PreTrainedModel) and "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = PAST in sample
    return model(**inputs)


def where(model: nn.Module, error: BaseException) -> str:
    """The innermost module and line of the model that an error passed through."""
    paths = {id(module): path or "the root module" for path, module in model.named_modules()}
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths and frame.f_code.co_name != "_wrapped_call_impl":
            file = frame.f_code.co_filename
            if "/torch/" not in file:
                place = f" at {paths[id(owner)]} ({file.rsplit('/', 1)[-1]}:{line})"
    return place
