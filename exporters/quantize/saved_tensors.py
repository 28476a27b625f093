"""Tensors saved for the backward pass of a streamed model: weights are read again, activations are in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from gralora_fx.base.compat.torch_graphs import memory_of
from gralora_fx.core.graph.packed_weights import StreamedWeight
from gralora_fx.exporters.quantize.kept_work import cannot_keep

_LEAST = 2**16  # bytes of a tensor that goes to the file


class _Form(NamedTuple):
    """Layout of a tensor in its memory."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # its first element


class _Weight(NamedTuple):
    """A saved weight, or a view of one."""

    read: StreamedWeight
    form: _Form


class _Stored(NamedTuple):
    """A saved activation in the file."""

    start: int  # its first byte
    values: int  # number of values in memory, from the first to the last
    dtype: torch.dtype
    form: _Form


@dataclass(eq=False)
class SavedTensors:
    """Keeps the tensors that autograd saves while a graph runs."""

    directory: Path | None = None  # of the file of activations; None for the system's own
    _weights: dict[Any, StreamedWeight] = field(default_factory=dict)  # those read, by their memory
    _file: IO[bytes] = field(init=False)

    def watch(self, graph_module: fx.GraphModule) -> None:
        """Let a graph's reads of weights be noted, in place."""
        for node in graph_module.graph.nodes:
            if isinstance(node.target, StreamedWeight):
                node.target = _NotedWeight(node.target, self._weights)
        graph_module.recompile()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what autograd saves apart within the block; the file has no name, so nothing is left after a kill."""
        self._weights.clear()
        with tempfile.TemporaryFile(dir=self.directory) as file, saved_tensors_hooks(self._pack, self._unpack):
            self._file = file
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Weight | _Stored:
        form = _Form(tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        read = self._weights.get(memory_of(tensor))
        if read is not None:
            return _Weight(read, form)
        count = 1 + sum((size - 1) * step for size, step in zip(form.size, form.stride, strict=True))
        if tensor.nbytes < _LEAST or count > 2 * tensor.numel():
            return tensor.detach()
        values = tensor.detach().as_strided((count,), (1,), form.offset)
        start = self._file.seek(0, 2)
        try:
            self._file.write(values.view(torch.uint8).numpy().tobytes())
        except OSError as error:
            raise cannot_keep(self.directory or Path(tempfile.gettempdir()), error) from error
        return _Stored(start, count, tensor.dtype, form)

    def _unpack(self, saved: Tensor | _Weight | _Stored) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if isinstance(saved, _Weight):
            return saved.read().as_strided(*saved.form)
        self._file.seek(saved.start)
        content = np.fromfile(self._file, np.uint8, saved.values * saved.dtype.itemsize)
        return torch.from_numpy(content).view(saved.dtype).as_strided(saved.form.size, saved.form.stride)


@dataclass(frozen=True, eq=False)
class _NotedWeight:
    """Reads a streamed weight, and notes its memory."""

    weight: StreamedWeight
    noted: dict[Any, StreamedWeight]
    __name__ = "noted_weight"

    def __call__(self) -> Tensor:
        values = self.weight()
        self.noted[memory_of(values)] = self.weight
        return values
