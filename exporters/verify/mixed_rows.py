"""Rows beside others with other adapters, so that a row that gets a wrong adapter shows.

What is compared of an export with one adapter is compared of a batch of several: each row is run beside a copy of
itself with another adapter, or none. Without a cache that is a session, `MixedRows`; with one it is the rows of an
engine, `RowSteps`, which are driven as users drive them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime import OrtValue
from torch import Tensor

from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters.verify.cases import PromptBatch
from gralora_fx.format.adapter_inputs import ADAPTER_IDS, is_adapter_input
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.engine.adapters import Adapters, LoadedAdapter, Stack
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.engine.session_decoders import RowsDecoder
from gralora_fx.run.sessions.ort_values import as_tensor, as_value, own_value
from gralora_fx.run.sessions.session_views import SessionView

_BYSTANDER = (0, 0, 0)  # what the row reads that is idle from then on; every vocabulary has this token


@contextmanager
def engine_errors(case: str) -> Iterator[None]:
    """The engine's errors as those of a verification."""
    try:
        yield
    except ServingError as error:
        raise ExportError(f"{error} ({case})") from error


class AdaptersAsTaken(Adapters):
    """The adapters of an export in the types that a session takes, such as one over a float32 copy."""

    def __init__(self, directory: Path, manifest: Manifest, session: Any) -> None:
        """Start with none loaded."""
        super().__init__(directory, manifest)
        self._types = {value.name: value.type for value in session.get_inputs()}

    def stack_of(self, used: Sequence[LoadedAdapter]) -> Stack:
        """As of `Adapters`, converted."""
        stack = super().stack_of(used)
        values = {name: as_value(as_tensor(value), self._types[name]) for name, value in stack.values.items()}
        return dataclasses.replace(stack, values=values)


class MixedRows(SessionView):
    """A session over `model_rows.onnx` with the interface of one whose rows all have one adapter."""

    def __init__(self, session: Any, adapters: Adapters, name: str | None, names: Sequence[str]) -> None:
        """Stack the adapters."""
        super().__init__(session)
        stack = adapters.stack_of([adapters[other] for other in names])
        self.count, self.tensors = 1 + len(names), stack.values
        self.number = stack.ids[None if name is None else adapters[name]]

    def get_inputs(self) -> list[Any]:
        """The inputs of the model."""
        return [value for value in self.session.get_inputs() if not is_adapter_input(value.name)]

    def ids(self, rows: int) -> NDArray[np.int64]:
        """`[2 * rows]`: the adapter of every row and, after it, of its copy: the others in turn."""
        others = [number for number in range(self.count) if number != self.number] or [self.number]
        return np.array([number for row in range(rows) for number in (self.number, others[row % len(others)])])

    def run_with_ort_values(self, names: Sequence[str], feed: Mapping[str, Any], options: Any = None) -> list[Any]:
        """Run on the rows and their copies; outputs are those of the rows."""
        types = {value.name: (value.type, value.shape) for value in self.session.get_inputs()}
        batch_axis = types[ADAPTER_IDS][1][0]
        rows, doubled = 0, {}
        for name, value in feed.items():
            kind, shape = types[name]
            if shape and shape[0] == batch_axis:
                rows = value.shape()[0]
                value = as_value(as_tensor(value).repeat_interleave(2, dim=0), kind)
            doubled[name] = value
        ids = OrtValue.ortvalue_from_numpy(self.ids(rows))
        results = self.session.run_with_ort_values(names, {**doubled, **self.tensors, ADAPTER_IDS: ids}, options)
        outputs = zip(names, results, self.session.get_outputs(), strict=True)
        return [_own_rows(name, value, rows, described.type) for name, value, described in outputs]


def _own_rows(name: str, value: Any, rows: int, kind: str) -> Any:
    tensor = as_tensor(value)
    if tensor.ndim == 0 or tensor.shape[0] != 2 * rows:
        raise ExportError(
            f"the output {name} of shape {list(tensor.shape)} is not made of {2 * rows} rows, so adapters cannot be "
            "chosen by row; export the model with adapters='inputs'"
        )
    return own_value(tensor[::2], kind)


class RowSteps:
    """A decoder's rows in the engine, seen as a batch with a mask, each beside a copy of itself with another adapter.

    New tokens are read in steps: some rows read theirs at once, some in two chunks, some are idle first. One more row
    is idle in every step. The cache of a row that is idle has to stay as it is, bit for bit.
    """

    def __init__(
        self, session: Any, adapters: Adapters, name: str | None, others: Sequence[str | None], prompts: PromptBatch
    ) -> None:
        """Open the rows, with room for prompts and the tokens that follow."""
        rows, length = prompts.ids.shape[0], prompts.ids.shape[1] + prompts.steps
        limits = DecoderLimits(None, max(length, len(_BYSTANDER)), frozenset())
        self._description = prompts.description
        with engine_errors(self._description):
            self._decoder = RowsDecoder(session, adapters, limits, DecoderSize(2 * rows + 1, chunk=limits.context))
            names = self.adapters(name, others, rows)
            # the one that rests is between others, since a step gives the graph the rows from the first to the last
            first, self._idle, *rest = [self._decoder.open(name) for name in (names[0], name, *names[1:])]
            self._rows = [first, *rest]
            self._decoder.step({self._idle: _BYSTANDER})

    @staticmethod
    def adapters(name: str | None, others: Sequence[str | None], rows: int) -> list[str | None]:
        """The adapter of every row and, after it, of its copy: the others in turn."""
        return [adapter for row in range(rows) for adapter in (name, others[row % len(others)])]

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens.

        Args:
            ids: `[batch, new]`.
            mask: `[batch, all]`, over those that were read before too; 0 where a position is padding.

        Returns:
            The logits after the last token of each row, `[batch, 1, vocabulary]`.
        """
        is_new = mask[:, -ids.shape[1] :].bool()
        tokens = [row[new].tolist() for row, new in zip(ids, is_new, strict=True)]
        logits: dict[int, Any] = {}
        for part in range(2):
            chunks = {row: _chunk(tokens[index // 2], index, part) for index, row in enumerate(self._rows)}
            logits |= self._step({row: chunk for row, chunk in chunks.items() if chunk})
        return torch.stack([torch.from_numpy(logits[row])[None] for row in self._rows[::2]])

    def _step(self, tokens: dict[int, list[int]]) -> dict[int, Any]:
        idle = [row for row in (*self._rows, self._idle) if row not in tokens]
        before = [{name: value.clone() for name, value in self._decoder.cached(row).items()} for row in idle]
        with engine_errors(self._description):
            logits = self._decoder.step(tokens)
        for row, own in zip(idle, before, strict=True):
            now = self._decoder.cached(row)
            if changed := [name for name, value in own.items() if not torch.equal(now[name], value)]:
                raise ExportError(f"a step changes {changed[0]} of a row that reads nothing; export the model again")
        return {row: array[-1] if self._decoder.gives_all else array for row, array in logits.items()}


def _chunk(tokens: list[int], row: int, part: int) -> list[int]:
    """What a row reads of new tokens in the first step or the second; of two, none by itself (see `PromptClamp`)."""
    half = len(tokens) // 2 if len(tokens) > 2 else 0
    first = (len(tokens), half, 0)[row % 3]
    return tokens[first:] if part else tokens[:first]
