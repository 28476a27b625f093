"""A batched decoder step by step: rows with an adapter each that come, read, decode and go."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, shown
from gralora_fx.runtime.adapter_stack import row_ids
from gralora_fx.runtime.batched_steps import BatchedSteps
from gralora_fx.runtime.context_length import context_length
from gralora_fx.runtime.names import QUERY_SEQLENS
from gralora_fx.runtime.options import ProviderOptions, Providers
from gralora_fx.serving.decoder_limits import DecoderLimits
from gralora_fx.serving.end_tokens import end_tokens
from gralora_fx.serving.model import load
from gralora_fx.serving.row_adapters import RowAdapters


@dataclass
class _Row:
    """A row that is in use: its adapter, and how many tokens it has read."""

    adapter: str | None
    length: int = 0


class BatchedDecoder:
    """A decoder that was exported with `adapters="batched"`, with room for some rows.

    A scheduler opens a row for each request, lets rows read tokens in steps that they share, and closes the row. In
    one step some rows may read a chunk of a prompt while others read the token that was chosen last; rows that are not
    given tokens keep their cache. Every row has an adapter or none.

    Steps of several threads run one after the other.

    Attributes:
        rows: How many rows there are.
        capacity: How many tokens a row has room for.
        chunk: The most tokens that a row may read in a step.
        adapters: The adapters that are loaded, their ids by name.
        model: The export, opened: its manifest, configuration and tokenizer.
        limits: What a row can take.
    """

    def __init__(
        self,
        export_dir: str | Path,
        *,
        rows: int = 8,
        capacity: int | None = None,
        chunk: int = 64,
        providers: Providers | None = None,
        provider_options: ProviderOptions | None = None,
        session_options: onnxruntime.SessionOptions | Mapping[str, Any] | None = None,
        threads: int | None = None,
        check: bool = False,
    ) -> None:
        """Open an export and make the caches of its rows.

        Args:
            export_dir: A directory that `export_onnx` wrote.
            rows: How many rows to have room for.
            capacity: How many tokens of each, prompt and answer; None for the model's context.
            chunk: The most tokens that a row may read in a step. A step is as wide as its longest chunk.
            providers: As of `load`.
            provider_options: As of `load`.
            session_options: As of `load`.
            threads: As of `load`.
            check: As of `load`.

        Raises:
            ServingError: It is not such an export, ONNX Runtime is too old, a size is not a count, or the capacity is
                above the model's context; and what `load` raises.
        """
        model = load(
            export_dir,
            providers,
            provider_options=provider_options,
            session_options=session_options,
            threads=threads,
            check=check,
        )
        if QUERY_SEQLENS not in model.input_names:
            raise ServingError(
                f"{model.directory} has no rows of their own lengths; export a model traced with "
                "task='text-generation-with-past' with adapters='batched'"
            )
        limit = context_length(model.config)
        limit = None if limit is None else limit - model.manifest.position_offset
        if capacity is None and limit is None:
            raise ServingError("the model's configuration names no context length; give capacity")
        self.rows, self.capacity, self.chunk = (
            _count(name, value) for name, value in (("rows", rows), ("capacity", capacity or limit), ("chunk", chunk))
        )
        if limit is not None and self.capacity > limit:
            raise ServingError(f"capacity={capacity} is above the model's context of {limit} tokens; give less")
        self.model = model
        assert isinstance(model.adapters, RowAdapters)
        self.adapters = model.adapters
        text = model.config.get("text_config") or model.config
        ends = end_tokens(model.directory, model.config)
        self.limits = DecoderLimits(text.get("vocab_size"), self.capacity, ends)
        self._steps = BatchedSteps(model.session, rows=self.rows, capacity=self.capacity, chunk=self.chunk)
        self._gives_last = model.manifest.logits == "last"
        self._open: dict[int, _Row] = {}
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """How many rows are free."""
        return self.rows - len(self._open)

    def length(self, row: int) -> int:
        """How many tokens a row has read.

        Raises:
            ServingError: The row is not open.
        """
        return self._row(row).length

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Add an adapter; running rows go on. Those in the export's own `adapters/` need no loading.

        Args:
            name: What to call it.
            path: Its `.onnx_adapter` file.

        Raises:
            ServingError: The name is taken or is not one, or the file is damaged or does not fit the export.
        """
        self.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ServingError: There is none of the name, or an open row has it.
        """
        with self._lock:
            users = [number for number, row in self._open.items() if row.adapter == name]
            if users:
                raise ServingError(f"row {users[0]} runs with the adapter {name!r}; close it first")
            self.adapters.unload(name)

    def open(self, adapter: str | None = None) -> int:
        """Take a free row.

        Args:
            adapter: Its adapter; None for the base.

        Returns:
            The row's number.

        Raises:
            ServingError: No row is free, or there is no such adapter.
        """
        with self._lock:
            if not self.free:
                raise ServingError(f"all {self.rows} rows are in use; close one first, or make more with rows=")
            if adapter is not None:
                self.adapters[adapter]
            number = next(number for number in range(self.rows) if number not in self._open)
            self._open[number] = _Row(adapter)
            return number

    def close(self, row: int) -> None:
        """Free a row.

        Raises:
            ServingError: The row is not open.
        """
        with self._lock:
            self._row(row)
            del self._open[row]

    def step(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, NDArray[Any]]:
        """Let rows read tokens.

        Args:
            tokens: The tokens of each row that reads: a chunk of its prompt, or one that was chosen. All other rows
                are idle.

        Returns:
            For each of these rows the logits after its last token, `[vocabulary]`; of an export with `logits="all"`
            those after each, `[tokens, vocabulary]`.

        Raises:
            ServingError: A row is not open, its tokens are none, more than `chunk`, more than it has room for, or
                outside the vocabulary, or ONNX Runtime fails; no row has read anything then.
        """
        with self._lock:
            read = {number: self._tokens(number, given) for number, given in tokens.items()}
            if not read:
                return {}
            logits = self._run(read)
            for number, array in read.items():
                self._open[number].length += len(array)
        return {n: logits[n, 0 if self._gives_last else slice(len(array))].copy() for n, array in read.items()}

    def _run(self, read: Mapping[int, NDArray[np.int64]]) -> NDArray[Any]:
        ids = np.zeros((self.rows, max(map(len, read.values()))), dtype=np.int64)
        query, past = (np.zeros(self.rows, dtype=np.int32) for _ in range(2))
        for number, array in read.items():
            ids[number, : len(array)], query[number] = array, len(array)
        names: list[str | None] = [None] * self.rows
        for number, row in self._open.items():
            names[number], past[number] = row.adapter, row.length
        stack = self.adapters.stack(names)
        logits: NDArray[Any] = self._steps(ids, query, past, row_ids(stack, names, self.rows), stack.values).numpy()
        return logits

    def _tokens(self, number: int, given: Sequence[int]) -> NDArray[np.int64]:
        row = self._row(number)
        try:
            array = np.asarray(given)
        except ValueError:
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise ServingError(f"the tokens of row {number} are {shown(given)}; give a list of token ids")
        if not 0 < len(array) <= self.chunk:
            raise ServingError(
                f"row {number} is given {len(array)} tokens, and reads 1 to {self.chunk} in a step; split them, or "
                "leave an idle row out"
            )
        if row.length + len(array) > self.capacity:
            raise ServingError(
                f"row {number} has read {row.length} tokens and is given {len(array)}, more than its capacity of "
                f"{self.capacity}; close it, or make room with capacity="
            )
        most = self.limits.vocabulary
        if array.min() < 0 or (most is not None and array.max() >= most):
            wrong = array.min() if array.min() < 0 else array.max()
            raise ServingError(f"row {number} is given token {wrong}, outside the vocabulary of {most} tokens")
        return array.astype(np.int64)

    def _row(self, number: object) -> _Row:
        if not isinstance(number, int) or number not in self._open:
            raise ServingError(f"row {shown(number)} is not open; open() gives the number of one")
        return self._open[number]


def _count(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ServingError(f"{name}={shown(value)} is not a count; give a whole number of at least 1")
    return value
