"""The decoder protocol: rows (batch slots) open, read tokens in steps and close."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, first_line, option, shown
from gralora_fx.run.engine.cache_memory import BoundedRows, CacheMemory, NoRoomError, Source
from gralora_fx.run.engine.limits import LEAST_CHUNK, DecoderLimits, DecoderSize
from gralora_fx.run.engine.row_starts import GrowingRows, StartedRows

if TYPE_CHECKING:  # loaded where rows share what they read
    from gralora_fx.run.engine.prefix_cache import PrefixCache
    from gralora_fx.run.engine.shared_rows import SharedRows

_ALONE = 256  # tokens: attention also computes masked scores, so that longer pieces take longer again


class Decoder(StartedRows, GrowingRows, BoundedRows):
    """A decoder with a fixed number of rows, the slots of its batch.

    A caller opens a row for each prompt, lets rows read tokens in steps that they share, and closes the row. In one
    step some rows may read a chunk of a prompt while others read the token that was chosen last; rows that are not
    given tokens keep their cache. Every row has an adapter or none. A row's results do not depend on the others.

    Steps of several threads run one after the other.

    Attributes:
        limits: The model's limits.
        rows: The number of rows.
        chunk: The most tokens that a row may read in a step beside others.
        alone: The most tokens that a row may read in a step by itself, when no other row waits.
        chosen: The most tokens of an answer to read in a step, such as those that a constraint forces; 1 if the model
            computes a single token differently from several.
        gives_all: Whether a step returns the logits after each token (`logits="all"`), not only after the last.
        unshared: Why rows cannot share what they have read; empty if they can.
        verify_problem: Why rows cannot verify proposed tokens: a step cannot return the logits after several tokens of
            a row, or a row cannot be set back. None if they can.
    """

    unshared: str = "rows of the export run one after the other, each with a cache of its own"

    def __init__(
        self,
        limits: DecoderLimits,
        size: DecoderSize,
        *,
        gives_all: bool = False,
        verify_problem: str | None = "its rows run one after the other",
        is_apart: bool = False,
    ) -> None:
        """Make room for rows.

        Args:
            limits: The model's limits.
            size: How much room to make.
            gives_all: Whether a step returns the logits after each token.
            verify_problem: Why rows cannot verify proposed tokens; None if they can.
            is_apart: Whether a token read by itself counts as a token of an answer (see `reads_tokens_apart`).

        Raises:
            ServingError: The capacity is above the model's context, or a prompt would be read as an answer is.
            PrefixCacheError: `size` has a prefix cache, but rows cannot share what they read.
        """
        if size.prefix_cache is not None and self.unshared:
            from gralora_fx.run.engine.prefix_cache import PrefixCacheError

            raise PrefixCacheError(f"prefix_cache has no effect, since {self.unshared}; leave it out")
        self.limits = limits if size.capacity is None else limits.within(size.capacity, "capacity")
        self.rows = size.rows
        self.chunk = min(size.chunk, self.limits.context)  # a row has room for no more
        self.alone = self.chunk if gives_all else min(max(size.chunk, _ALONE), self.limits.context)
        self.chosen = 1 if is_apart else self.chunk
        if is_apart and self.chunk < min(LEAST_CHUNK, self.limits.context):
            raise ServingError(
                f"{option(chunk=size.chunk)} would have a token of a prompt read by itself, which this model computes "
                f"as one of an answer; give at least {LEAST_CHUNK}"
            )
        self.gives_all, self.verify_problem = gives_all, verify_problem
        self._lengths: dict[int, int] = {}  # of the open rows, how many tokens each has read
        self.memory = CacheMemory(size.max_memory)
        self._shared: SharedRows | None = None  # None if rows share nothing
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """The number of tokens for which a row has room."""
        return self.limits.context

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """The cache through which rows share common prefixes of their texts; None if they share nothing."""
        return None if self._shared is None else self._shared.cache

    @property
    def free(self) -> int:
        """The number of free rows."""
        return self.rows - len(self._lengths)

    def length(self, row: int) -> int:
        """Return how many tokens a row has read.

        Args:
            row: Its number, as returned by `open`.

        Raises:
            ServingError: The row is not open.
        """
        self._check_open(row)
        return self._lengths[row]

    def open(
        self,
        adapter: str | None = None,
        source: Source | None = None,
        *,
        salt: str | None = None,
        max_length: int | None = None,
        start: int | None = None,
    ) -> int:
        """Open a free row.

        Args:
            adapter: Its adapter; None for the base.
            source: For an encoder-decoder, the encoder's inputs, by name; for a decoder, embeddings or other inputs
                that replace the row's first tokens (see `GivenRows.begin`), or None.
            salt: Rows share what they read only with rows of the same salt.
            max_length: The most tokens that it reads, for a limit on memory; None for its capacity.
            start: How many of its tokens the base reads before the adapter is active (see `start_of`); None if it is
                always active.

        Returns:
            The row's number.

        Raises:
            ServingError: No row is free, there is no such adapter, `start` is missing for an adapter that certain
                tokens activate, or the model does not take the source.
            NoRoomError: There is no memory for it now.
        """
        with self._lock:
            if not self.free:
                raise ServingError(f"all {self.rows} rows are in use; close one first, or make more with rows=")
            if not self.has_room(max_length, adapter, source):
                raise NoRoomError("max_memory has no room for one more row now; close one first, or give more memory")
            number = self._nearest()
            self._begin_at(number, adapter, start)
            version = self._begin(number, adapter, source)
            self._lengths[number] = 0
            self._take_room(number, max_length, source)
            if self._texts is not None:
                self._texts.begin(number)
            if self._shared is not None:
                names = {} if source is None else self._names(number)
                self._shared.begin(number, version, salt, names, self.start(number))
            return number

    def fill(self, row: int, tokens: Sequence[int]) -> int:
        """Copy cached keys and values, from rows with the same adapter, of tokens that a row would read next.

        Args:
            row: Its number, as returned by `open`.
            tokens: The tokens to read next, such as the rest of its prompt.

        Returns:
            How many of these tokens it need not read: 0 without a prefix cache, and never the last two, whose logits
            are needed.

        Raises:
            ServingError: The row is not open.
        """
        with self._lock:
            self._check_open(row)
            tokens = tokens[: self.capacity - self._lengths[row]]
            self._expect_text(row, len(tokens))
            if not self.reserve(row, len(tokens)):
                return 0
            self._expect(row, self._lengths[row] + len(tokens))
            count = 0 if self._shared is None else self._shared.fill(row, self._lengths[row], tokens)
            self._lengths[row] += count
            if self._texts is not None:
                self._texts.read(row, tokens[:count])
            return count

    def close(self, row: int) -> None:
        """Close a row.

        Args:
            row: Its number, as returned by `open`.

        Raises:
            ServingError: The row is not open.
        """
        with self._lock:
            self._check_open(row)
            length = self._lengths.pop(row)
            if self._shared is not None:
                self._shared.end(row, length)
            self._end(row)
            self.memory.close(row, self._copies_size())

    def rewind(self, row: int, length: int) -> None:
        """Set a row back, so that it continues as if it had not read its last tokens.

        Args:
            row: Its number, as returned by `open`.
            length: How many of the tokens that it has read it keeps.

        Raises:
            ServingError: The row is not open, has read fewer, or cannot be set back.
        """
        with self._lock:
            self._check_open(row)
            if type(length) is not int or not 0 <= length <= self._lengths[row]:
                raise ServingError(
                    f"row {row} has read {self._lengths[row]} tokens and cannot be set back to {shown(length)}"
                )
            if self.verify_problem is not None and length < self._lengths[row]:
                raise ServingError(f"row {row} cannot be set back: {self.verify_problem}")
            self._lengths[row] = length

    def step(
        self, tokens: Mapping[int, Sequence[int]], last: Mapping[int, int] | None = None
    ) -> dict[int, NDArray[Any]]:
        """Let rows read tokens.

        Args:
            tokens: The tokens of each row that reads: a chunk of its prompt, or a chosen token. All other rows are
                idle.
            last: For rows that verify proposed tokens, or may do so, the number of last tokens whose logits are needed.
                Their results for a token are bitwise equal whether they read it alone or with others.

        Returns:
            For each of these rows the logits after its last token, `[vocabulary]`; after each token,
            `[tokens, vocabulary]`, for an export with `logits="all"`; after its last tokens, `[last, vocabulary]`, for
            a row in `last`.

        Raises:
            ServingError: A row is not open, has no tokens, more than `chunk` (`alone` if no other row reads), more than
                it has room for, or ones outside the vocabulary; more logits are requested than it reads tokens; it
                cannot verify tokens; or ONNX Runtime fails. No row has read anything then.
            NoRoomError: There is no memory for the tokens that a row reads (see `reserve`).
        """
        with self._lock:
            if not isinstance(tokens, Mapping):
                raise ServingError(f"tokens must be a list of ids for each row that reads, but got {shown(tokens)}")
            most = self.alone if len(tokens) == 1 else self.chunk
            read = {number: self._tokens(number, given, most) for number, given in tokens.items()}
            if not read:
                return {}
            last = self._last(last or {}, read)
            self._reserve_all(read)
            logits: dict[int, NDArray[Any]] = {}
            while read:
                first = self._cut(read)
                if self._texts is not None:
                    self._grow(self._texts, first)
                wanted = {row: min(count, len(first[row])) for row, count in last.items() if row in first}
                for number, given in self._read(first, wanted).items():
                    if self._texts is not None:
                        self._texts.read(number, first[number].tolist())
                    is_rest = (self.gives_all or number in last) and number in logits
                    logits[number] = np.concatenate([logits[number], given]) if is_rest else given
                read = {n: array[len(first.get(n, ())) :] for n, array in read.items()}
                read = {n: array for n, array in read.items() if len(array)}
        return {row: array[-last[row] :] if row in last else array for row, array in logits.items()}

    def _cut(self, read: Mapping[int, NDArray[np.int64]]) -> Mapping[int, NDArray[np.int64]]:
        """Return the tokens to read first: all, or some rows' up to where other rows or an adapter may continue."""
        read = self._up_to_starts(read, self._lengths)
        read = read if self._texts is None else self._texts.cut(read, self._lengths)
        if self._shared is None or not self._shared.cache.keeps_states:
            return read
        counts = {row: self._shared.cut(row, self._lengths[row], len(array)) for row, array in read.items()}
        return {row: read[row][:count] for row, count in counts.items() if count} or read

    def _read(self, read: Mapping[int, NDArray[np.int64]], last: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        """Let rows read tokens in one run, and record them."""
        try:
            logits = self._run(read, last)
        except Exception as failure:  # ONNX Runtime raises its own types
            if self._shared is not None:
                self._shared.lose(read)
            if isinstance(failure, ServingError):
                raise
            sizes = [len(array) for array in read.values()]
            raise ServingError(f"ONNX Runtime fails on rows of {sizes} tokens: {first_line(failure)}") from failure
        for number, array in read.items():
            if self._shared is not None:
                is_several = len(array) > 1 or number in last
                proposed = last.get(number, 1) - 1
                self._shared.read(number, self._lengths[number], array.tolist(), proposed, is_several=is_several)
            self._lengths[number] += len(array)
        return logits

    def _nearest(self) -> int:
        """Return the free row closest to those in use, so that steps run few rows between them."""
        used = self._lengths or {0: 0}
        free = (number for number in range(self.rows) if number not in self._lengths)
        return min(free, key=lambda number: (max(number, *used) - min(number, *used), number))

    @abstractmethod
    def _begin(self, row: int, adapter: str | None, source: Source | None) -> Any:
        """Prepare a row that is opened; return the version of its adapter, if rows share what they read."""

    def _names(self, row: int) -> Mapping[int, int] | None:
        """Return `GivenRows.names` of a row with a source."""

    @abstractmethod
    def _end(self, row: int) -> None:
        """Release a row's resources."""

    @abstractmethod
    def _run(self, read: Mapping[int, NDArray[np.int64]], last: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        """Let rows read tokens after those they have read; return logits as `step` does."""

    def _last(self, last: Mapping[int, int], read: Mapping[int, NDArray[np.int64]]) -> Mapping[int, int]:
        for row, count in last.items():
            if type(count) is not int or row not in read or not 0 < count <= len(read[row]):
                raise ServingError(f"logits of {shown(count)} tokens of row {shown(row)} are requested; it reads fewer")
        if last and self.verify_problem is not None:
            raise ServingError(f"a row gives the logits after one token: {self.verify_problem}")
        return last

    def _tokens(self, number: int, given: Sequence[int], most: int) -> NDArray[np.int64]:
        self._check_open(number)
        return self.limits.checked(number, given, self._lengths[number], most)

    def _check_open(self, number: object) -> None:
        if not isinstance(number, int) or number not in self._lengths:
            raise ServingError(f"row {shown(number)} is not open; give the number of one that is")
