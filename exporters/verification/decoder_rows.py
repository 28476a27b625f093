"""A decoder's rows in the engine, driven as users drive them, seen as a batch with a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_fx.engine.adapters import Adapters, LoadedAdapter
from gralora_fx.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.engine.rows_decoder import RowsDecoder
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters.verification.prompts import Prompts
from gralora_fx.runtime.joined_adapters import Stack
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.runtime.ort_values import as_tensor, as_value

_BYSTANDER = (0, 0, 0)  # what the row reads that is idle from then on; every vocabulary has this token


@contextmanager
def engine_errors(case: str) -> Iterator[None]:
    """The engine's errors as those of a verification.

    Args:
        case: What is compared.

    Raises:
        ExportError: The engine fails.
    """
    try:
        yield
    except ServingError as error:
        raise ExportError(f"{error} ({case})") from error


class AdaptersAsTaken(Adapters):
    """The adapters of an export in the types that a session takes, such as one over a float32 copy."""

    def __init__(self, directory: Path, manifest: Manifest, session: Any) -> None:
        """Start with none loaded.

        Args:
            directory: The export directory.
            manifest: Its manifest.
            session: The session over its rows' graph.
        """
        super().__init__(directory, manifest)
        self._types = {value.name: value.type for value in session.get_inputs()}

    def stack_of(self, used: Sequence[LoadedAdapter]) -> Stack:
        """As of `Adapters`, converted."""
        stack = super().stack_of(used)
        values = {name: as_value(as_tensor(value), self._types[name]) for name, value in stack.values.items()}
        return dataclasses.replace(stack, values=values)


@dataclasses.dataclass(frozen=True)
class ExportedRows:
    """The graph of an export whose rows have lengths and adapters of their own.

    Attributes:
        session: A session over it.
        adapters: The export's adapters.
        name: The adapter of the rows that are compared; None for the base.
        others: What the rows beside them have.
    """

    session: Any
    adapters: Adapters
    name: str | None = None
    others: Sequence[str | None] = (None,)

    def steps(self, prompts: Prompts) -> RowSteps:
        """Rows that have read nothing, with room for prompts and the tokens that follow."""
        return RowSteps(self, prompts)


class RowSteps:
    """The rows of a batch, each beside a copy of itself with another adapter.

    So a row that gets a wrong adapter shows. New tokens are read in steps: some rows read theirs at once, some in two
    chunks, some are idle first. One more row is idle in every step. The cache of a row that is idle has to stay as it
    is, bit for bit.
    """

    def __init__(self, export: ExportedRows, prompts: Prompts) -> None:
        """Open the rows.

        Args:
            export: The graph, and which adapters rows have.
            prompts: What will be read first.

        Raises:
            ExportError: ONNX Runtime fails, or there is no memory for the caches.
        """
        rows, length = prompts.ids.shape[0], prompts.ids.shape[1] + prompts.steps
        limits = DecoderLimits(None, max(length, len(_BYSTANDER)), frozenset())
        self._description = prompts.description
        with engine_errors(self._description):
            self._decoder = RowsDecoder(
                export.session, export.adapters, limits, DecoderSize(2 * rows + 1, chunk=limits.context)
            )
            names = self.adapters(export, rows)
            # the one that rests is between others, since a step gives the graph the rows from the first to the last
            first, self._idle, *others = [self._decoder.open(name) for name in (names[0], export.name, *names[1:])]
            self._rows = [first, *others]
            self._decoder.step({self._idle: _BYSTANDER})

    @staticmethod
    def adapters(export: ExportedRows, rows: int) -> list[str | None]:
        """The adapter of every row and, after it, of its copy: the others in turn."""
        return [name for row in range(rows) for name in (export.name, export.others[row % len(export.others)])]

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens.

        Args:
            ids: `[batch, new]`.
            mask: `[batch, all]`, over those that were read before too; 0 where a position is padding.

        Returns:
            The logits after the last token of each row, `[batch, 1, vocabulary]`.

        Raises:
            ExportError: ONNX Runtime fails, or a step changes the cache of a row that reads nothing.
        """
        is_new = mask[:, -ids.shape[1] :].bool()
        tokens = [row[new].tolist() for row, new in zip(ids, is_new, strict=True)]
        found: dict[int, Any] = {}
        for part in range(2):
            chunks = {row: _chunk(tokens[index // 2], index, part) for index, row in enumerate(self._rows)}
            found |= self._step({row: chunk for row, chunk in chunks.items() if chunk})
        return torch.stack([torch.from_numpy(found[row])[None] for row in self._rows[::2]])

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
    """What a row reads of its new tokens in the first step or the second."""
    first = (len(tokens), len(tokens) // 2, 0)[row % 3]
    return tokens[first:] if part else tokens[:first]
