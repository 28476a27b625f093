"""A model in float64, some runs of which add float32's rounding noise, to measure that noise in the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import Cache

from gralora_fx.base.compat.torch_graphs import TorchDispatchMode, returns_alias, tree_map, tree_map_only
from gralora_fx.core.graph.packed_weights import StreamedRows, StreamedWeight, runnable
from gralora_fx.core.graph.surgery import copied, map_parameters
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.cache import tensors_of, with_tensors
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import base_trace

_BIT = torch.finfo(torch.float32).eps


class Float64Model:
    """A model with every float32 tensor in float64: weights, inputs and intermediate results."""

    def __init__(self, model: TracedModel | GraloraModel, draw: int = 0, bit: float = _BIT) -> None:
        """Keep the model; its weights are copied for every run and freed after it.

        The noise is a whole bit of an arithmetic, as the sums within an operator round at every term too.
        """
        self.draw, self._bit = draw, bit
        self._model = model

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's outputs."""
        round_off = _RoundingNoise(self.draw, self._bit)
        graph_module = _widened(runnable(self._model.graph_module), round_off)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad(), _Float64(round_off):
                return graph_module(
                    **base_trace(self._model).bind((), {name: _wide(value) for name, value in inputs.items()})
                )
        finally:
            torch.set_default_dtype(before)


class _RoundingNoise:
    """Adds relative noise of up to a bit; draw 0 adds none."""

    def __init__(self, draw: int, bit: float) -> None:
        self._bit = bit
        self.is_paused = False  # while a weight is read
        self._generator = torch.Generator().manual_seed(draw) if draw else None

    def __call__(self, values: Tensor) -> Tensor:
        if self._generator is None:
            return values
        noise = torch.rand(values.shape, generator=self._generator, dtype=torch.float32)
        return values * noise.sub_(0.5).mul_(2 * self._bit).double().add_(1.0)


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces float32 dtype arguments by float64, and adds rounding noise to every result."""

    def __init__(self, round_off: _RoundingNoise) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noise = round_off

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if self._noise.is_paused:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda v: torch.float64 if v is torch.float32 else v, (args, dict(kwargs or {})))
        result = func(*args, **kwargs)
        is_computed = isinstance(result, Tensor) and result.dtype == torch.float64 and not returns_alias(func)
        return self._noise(result) if is_computed else result


def _widened(graph_module: fx.GraphModule, round_off: _RoundingNoise) -> fx.GraphModule:
    wide_module = copied(graph_module, "Float64Graph")
    for node in wide_module.graph.nodes:
        if isinstance(node.target, (StreamedWeight, StreamedRows)):
            node.target = _WideWeight(StreamedWeight(node.target.parameter, node.target.name), round_off)
            node.args = ()
    wide_module.recompile()

    def wide(parameter: nn.Parameter, _: str) -> nn.Parameter:
        if parameter.dtype != torch.float32:
            return parameter
        return nn.Parameter(round_off(parameter.detach().double()), requires_grad=False)

    map_parameters(wide_module, wide)
    for module in wide_module.modules():
        for tensors in (module._buffers, vars(module)):
            tensors |= {name: _wide(value) for name, value in tensors.items() if isinstance(value, Tensor)}
    return wide_module


@dataclass(frozen=True, eq=False)
class _WideWeight:
    """Reads a streamed weight as it is, then casts it to float64."""

    weight: StreamedWeight
    round_off: _RoundingNoise
    __name__ = "wide_weight"

    def __call__(self) -> Any:
        self.round_off.is_paused = True
        torch.set_default_dtype(torch.float32)
        try:
            values = self.weight()
        finally:
            torch.set_default_dtype(torch.float64)
            self.round_off.is_paused = False
        return _wide(values)


def _wide(value: Any) -> Any:
    if isinstance(value, Cache):
        return with_tensors(value, {slot: _wide(tensor) for slot, tensor in tensors_of(value).items()})
    return tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.dtype == torch.float32 else tensor, value)
