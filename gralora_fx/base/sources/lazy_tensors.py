"""Lazy parameters: on the meta device, with a source that computes their values when they are read.

A weight that is folded, cast, or read from a file only when it is written takes no memory before or after that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gralora_fx.errors import ExportError

_SOURCE = "_gralora_source"


def lazy_parameter(source: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the meta device whose values are computed by a function whenever they are read."""
    return with_source(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False), source)


def with_source(parameter: nn.Parameter, source: Callable[[], Tensor]) -> nn.Parameter:
    """Make an existing parameter on the meta device lazy."""
    setattr(parameter, _SOURCE, source)
    return parameter


def is_lazy(tensor: Tensor) -> bool:
    """Whether a tensor's values are computed when they are read."""
    return hasattr(tensor, _SOURCE)


def source_of(tensor: object) -> Callable[[], Tensor] | None:
    """Return what computes a lazy tensor's values; None of any other."""
    source: Callable[[], Tensor] | None = getattr(tensor, _SOURCE, None)
    return source


def copy_lazy(parameter: nn.Parameter) -> nn.Parameter:
    """A copy of a lazy parameter with the same source."""
    return lazy_parameter(getattr(parameter, _SOURCE), parameter.shape, parameter.dtype)


@dataclass(frozen=True)
class EntrySource:
    """A source of values along a first axis, such as stacked matrices, which can be read one at a time."""

    entries: Callable[[], Iterable[Tensor]]  # computes them, in order

    def __call__(self) -> Tensor:
        """All of them."""
        return torch.stack([entry.detach() for entry in self.entries()])


def raw_entries(tensor: Tensor, name: str) -> Iterator[Tensor]:
    """The entries of a tensor along its first axis in the dtype of their source, one at a time where it allows that."""
    source = getattr(tensor, _SOURCE, None)
    entries = source.entries() if isinstance(source, EntrySource) else raw_values_of(tensor, name)
    return map(Tensor.detach, entries)  # which keeps no entry while it reads the next, as a generator would


def value_entries(tensor: Tensor, name: str) -> Iterator[Tensor]:
    """The same in the tensor's dtype."""
    return map(operator.methodcaller("to", tensor.dtype), raw_entries(tensor, name))


def sampled_values(tensor: Tensor, name: str, count: int) -> Tensor:
    """Some values of a tensor, evenly spread over it, in the dtype of their source."""
    step = max(1, tensor.numel() // count)
    if not isinstance(getattr(tensor, _SOURCE, None), EntrySource):
        return raw_values_of(tensor, name).reshape(-1)[::step][:count]
    size = tensor[0].numel()
    parts = [  # copies: a view would keep its entry
        entry.reshape(-1)[-index * size % step :: step].clone() for index, entry in enumerate(raw_entries(tensor, name))
    ]
    return torch.cat(parts)[:count]


def values_of(tensor: Tensor, name: str) -> Tensor:
    """The values of a tensor: its own, or those of its source, cast to its dtype and not kept."""
    return raw_values_of(tensor, name).to(tensor.dtype)


def raw_values_of(tensor: Tensor, name: str) -> Tensor:
    """The values in the dtype of their source; those of a file are memory-mapped, and read when they are used."""
    if not tensor.is_meta:
        return tensor.detach()
    source: Callable[[], Tensor] | None = getattr(tensor, _SOURCE, None)
    if source is None:
        raise ExportError(
            f"{name} is on the meta device and has no source of values; load the model with its "
            "weights, or with gralora_fx.loading.load_streamed"
        )
    return source().detach()
