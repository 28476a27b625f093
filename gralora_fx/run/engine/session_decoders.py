"""A decoder over a graph of rows with a cache: one run for all rows, each with its adapter and its first inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.paged_memory import kept_reason
from gralora_fx.errors import ServingError, option
from gralora_fx.format.adapter_inputs import ADAPTER_IDS, BASE, FIRST_ADAPTER
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.format.export_directory import (
    ATTENTION_SEQLENS,
    LOGITS_INDICES,
    PAST_SEQLENS,
    QUERY_SEQLENS,
    TEXT_SEQLENS,
)
from gralora_fx.run.engine.adapters import Adapters, LoadedAdapter, Stack
from gralora_fx.run.engine.cache_buffers import BufferedSteps, CacheBuffers
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.sessions.ort_values import optional_arguments
from gralora_fx.run.sessions.session_views import adapter_dtype, gives_all, reads_tokens_apart, text_switch

if TYPE_CHECKING:  # loaded where rows have adapters
    from gralora_fx.run.engine.adapter_slots import RowStacks
    from gralora_fx.run.engine.text_lengths import TextLengths

_MOST_PADDED = 64  # positions of padding that are summed up rather than run the model once more
_STATES = "layers of the model keep states"
_SEVERAL = 2  # from so many tokens of a row on, attention uses its kernel for several
_NO_STACK = Stack({None: BASE}, {})  # of a graph without adapters


class GivenRows:
    """Inputs that replace the first tokens of rows; this base class is for a decoder that takes ids alone.

    A feature's subclass, a part of the point "given rows", is made from the session. Its `prompts_with` takes prompts
    and the embeddings given to `generate`, and returns the prompts with them.
    """

    def begin(self, row: int, source: Mapping[str, Any] | None) -> None:
        """Record that a row is opened, or closed.

        Args:
            row: Its number.
            source: The inputs that replace its first tokens, by name, as `model.onnx` takes them for one row. None for
                a row of text alone.

        Raises:
            ServingError: The model does not take it.
        """
        if source is None:
            return
        from gralora_fx.format.tasks import tasks_beside_ids

        others = [f", or export the model with {option(task=task)}" for task in tasks_beside_ids()]
        raise ServingError("the export takes token ids only; leave inputs_embeds out" + "".join(others))

    def names(self, row: int) -> Mapping[int, int] | None:
        """Return keys, by position, that identify a row's given inputs, as token ids identify the rest.

        Rows share what they read if these are equal. None if nothing identifies the row's beginning.
        """
        return {}

    def joins(self, row: int, stop: int) -> bool:
        """Return whether a row's tokens before and after a position have to be read at once."""
        return False

    def size(self, source: Mapping[str, Any]) -> int:
        """Return the bytes of a row's inputs that count against `max_memory`, as its cache does."""
        return 0

    def run_key(self, row: int) -> int | None:
        """Return a key: only rows with equal keys run together. None for a row that runs with any."""
        return None

    def arrays(
        self, read: Mapping[int, NDArray[np.int64]], before: Mapping[int, int], rows: range, ids: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return a step's inputs beside the ids; for text alone, arrays that stand for any number of tokens.

        Args:
            read: The tokens of each row that reads.
            before: How many it had read before.
            rows: The rows of the step.
            ids: `[rows, length]`, the tokens as the step reads them; those whose embeddings are given become `GIVEN`.
        """
        return {}


def given_rows(session: Any) -> GivenRows:
    """Return the first inputs of a session's rows, as a feature or text alone provides them."""
    taken = [value.name for value in optional_arguments(session)]
    if not taken:
        return GivenRows()
    from gralora_fx.base.features import parts

    (kind,) = parts("given rows", taken)
    rows: GivenRows = kind(session)
    return rows


def texts_of(session: Any) -> TextLengths | None:
    """Return the texts of a session's rows, if its rotary embedding depends on their lengths."""
    if (described := text_switch(session)) is None:
        return None
    from gralora_fx.run.engine.text_lengths import TextLengths

    return TextLengths.of(described)


class RowsDecoder(Decoder):
    """The rows' graph with caches in shared buffers; a step runs all rows from the first to the last that read."""

    unshared = ""

    def __init__(
        self,
        session: Any,
        adapters: Adapters,
        limits: DecoderLimits,
        size: DecoderSize,
        *,
        is_float32: bool = False,
        weights: int = 0,
    ) -> None:
        """Make the caches of the rows."""
        inputs = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        self._pads_attention, self._chooses_logits = ATTENTION_SEQLENS in inputs, LOGITS_INDICES in inputs
        self._omits_base = FIRST_ADAPTER in inputs
        can_verify = self._pads_attention and (self._chooses_logits or gives_all(session))
        problem = None if can_verify else "the graph of its rows gives logits after the last token of each alone"
        slots = past_slots(session.get_inputs())
        self._states = [slot.past for slot in slots if slot.kind.grows is None]
        self._sums_up = any(slot.kind.sums_up for slot in slots)
        if self._states:
            problem = f"{_STATES}, which cannot be set back"
        apart = reads_tokens_apart(session)
        super().__init__(limits, size, gives_all=gives_all(session), verify_problem=problem, is_apart=apart)
        self._adapters, self._given, self._texts = adapters, given_rows(session), texts_of(session)
        self._row_stacks: RowStacks | None = None
        if ADAPTER_IDS in inputs:
            from gralora_fx.run.engine.adapter_slots import RowStacks

            tensors = replace(adapters.inputs().within(inputs), dtype=adapter_dtype(session))
            self._row_stacks = RowStacks(tensors, self.rows, weights)
        self._row_adapters: dict[int, LoadedAdapter | None] = {}
        self._stacks: Sequence[Stack] = ()  # of the rows that are open; none until a step needs them
        self._spare = 0  # bytes that they take beyond these rows' needs
        if size.max_memory is not None and (reason := kept_reason()) is not None:
            raise ServingError(
                f"max_memory cannot be kept to: {reason}; leave it out, and give fewer rows or a smaller capacity"
            )
        # the operator writes a chunk as long as the longest, wherever a row is
        self._widest = max(self.chunk, _SEVERAL)
        try:
            self._buffers = CacheBuffers(session, self.rows, self.capacity + self._widest)
        except (MemoryError, OSError, OverflowError, ValueError) as failure:
            raise ServingError(
                f"there is no memory for the caches of {self.rows} rows of {self.capacity} tokens; give fewer rows, or "
                "a smaller capacity"
            ) from failure
        self._steps = BufferedSteps(session, self._buffers)
        if size.prefix_cache is not None:
            from gralora_fx.run.engine.prefix_cache import PrefixCache, PrefixCacheError
            from gralora_fx.run.engine.shared_rows import SharedRows

            if self.chunk <= 2 and not is_float32:  # the last of three tokens would be read alone
                raise PrefixCacheError(
                    f"prefix_cache has no effect, since steps read {self.chunk} tokens; give a larger chunk"
                )
            caches = dict(self._buffers.arrays)
            states = [caches.pop(name) for name in self._states]
            cache = PrefixCache(size.prefix_cache, [each[0] for each in caches.values()], [each[0] for each in states])
            adapters.tell(cache)
            self.memory.shared = cache
            self._shared = SharedRows(
                cache,
                lambda row: [each[row] for each in caches.values()],
                lambda row: [each[row] for each in states],
                is_float32=is_float32 and not apart,  # apart, an answer's values differ from a prompt's
            )

    def cached(self, row: int) -> dict[str, NDArray[Any]]:
        """Return a row's caches by the names of the inputs, in the row's own memory: keys and values, or states.

        Returns:
            Keys and values are `[heads, positions, size]`, bfloat16 as its bits; contents are undefined at positions
            that the row has not read.
        """
        return {name: array[row] for name, array in self._buffers.arrays.items()}

    def _expect(self, row: int, tokens: int) -> None:
        self._buffers.expect(row, tokens)

    def _row_size(self, tokens: int, count: int) -> int:
        return self._buffers.layout.row_size(tokens + max(count, self._widest))

    def _source_size(self, source: Source | None) -> int:
        return 0 if source is None else self._given.size(source)

    def _copies_size(self, adapter: str | None = None, *, alone: bool = False) -> int:
        if self._row_stacks is None:
            return 0
        more = [] if adapter is None else [self._adapters[adapter]]
        return self._row_stacks.size([*(() if alone else self._row_adapters.values()), *more])

    def _begin(self, row: int, adapter: str | None, source: Source | None) -> LoadedAdapter | None:
        self._given.begin(row, source)
        self._row_adapters[row] = None if adapter is None else self._adapters[adapter]
        for name in self._states:  # states of the row's earlier text
            self._buffers.arrays[name][row] = 0
        self._stacks = ()
        return self._row_adapters[row]

    def _names(self, row: int) -> Mapping[int, int] | None:
        return self._given.names(row)

    def _end(self, row: int) -> None:
        self._given.begin(row, None)
        del self._row_adapters[row]
        self._buffers.give_back(row)
        self._stacks = ()

    def trim(self) -> None:
        """Free the copies of adapters."""
        if self._row_stacks is not None and not self._row_adapters:
            self._free_copies(self._row_stacks)

    def _free_copies(self, stacks: RowStacks) -> None:
        stacks.clear()
        self._steps.forget()
        self._stacks, self._spare = (), 0

    def _stacks_of(self, stacks: RowStacks) -> Sequence[Stack]:
        """Return the adapters of the open rows; if memory is short, free copies that are larger than needed first."""
        used, limit = list(self._row_adapters.values()), self.memory.limit
        if not self._stacks:
            self._spare = 0 if limit is None else stacks.spare(used)
        is_short = limit is not None and self._spare and self.memory.taken + self._spare > limit
        if is_short or (not self._stacks and stacks.is_misfit(used)):
            self._free_copies(stacks)  # bound values would not be freed
        return self._stacks or stacks.of(used)

    def _run(self, read: Mapping[int, NDArray[np.int64]], last: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        self._stacks = [_NO_STACK] if self._row_stacks is None else self._stacks_of(self._row_stacks)
        parts: list[dict[int, NDArray[np.int64]]] = [{} for _ in self._stacks]
        acting = {row: self._acting(row) for row in read}
        for row, adapter in acting.items():
            if adapter is not None:
                parts[next(n for n, stack in enumerate(self._stacks) if adapter in stack.ids)][row] = read[row]
        most = max(parts, key=len)  # rows of the base are in all stacks
        most |= {row: read[row] for row, adapter in acting.items() if adapter is None}
        logits: dict[int, NDArray[Any]] = {}
        before = dict(self._lengths)
        runs = [(run, stack) for part, stack in zip(parts, self._stacks, strict=True) for run in self._runs(part)]
        for run, stack in runs:
            logits |= self._run_together(run, last, stack, before)
            before |= {row: before[row] + len(array) for row, array in run.items()}  # idle from then on
        return logits

    def _acting(self, row: int) -> LoadedAdapter | None:
        """Return the adapter with which a row reads now: the base before its adapter is active."""
        return self._row_adapters[row] if self.acts(row, self._lengths[row]) else None

    def _runs(self, read: Mapping[int, NDArray[np.int64]]) -> list[Mapping[int, NDArray[np.int64]]]:
        """Split rows that read tokens into runs: one for all, or those with several tokens apart if padding costs more.

        Layers that sum up positions take the time of the longest row for every row, also for idle rows between others.
        """
        if not read:
            return []
        keys = {row: key for row in read if (key := self._given.run_key(row)) is not None}
        if len(first := list(dict.fromkeys(keys.values()))) > 1:
            by_key = [{row: read[row] for row in read if keys.get(row, first[0]) == key} for key in first]
            return [run for each in by_key for run in self._runs(each)]
        positions = (max(read) - min(read) + 1) * max(map(len, read.values()))
        if not self._sums_up or positions - sum(map(len, read.values())) <= _MOST_PADDED:
            return [read]
        single = {row: array for row, array in read.items() if len(array) == 1}
        return [*([single] if single else []), *({row: array} for row, array in read.items() if len(array) > 1)]

    def _run_together(
        self, read: Mapping[int, NDArray[np.int64]], last: Mapping[int, int], stack: Stack, lengths: Mapping[int, int]
    ) -> dict[int, NDArray[Any]]:
        """Let rows that choose from one stack read tokens, and set their new lengths."""
        rows = range(min(read), max(read) + 1)  # the others take no time at all
        read, attended = {row: read[row] for row in sorted(read)}, np.zeros(len(rows), dtype=np.int32)
        # attention over one token of each row uses another kernel, whose last digits differ
        ids = np.zeros((len(rows), max(_SEVERAL, *map(len, read.values()))), dtype=np.int64)
        query = np.zeros(len(rows), dtype=np.int32)
        numbers = np.full(len(rows), BASE, dtype=np.int64)
        for row, array in read.items():
            self._buffers.take(row, lengths[row] + len(array))
            numbers[row - rows.start] = stack.ids[self._acting(row)]
            ids[row - rows.start, : len(array)], query[row - rows.start] = array, len(array)
            is_several = row in last and self._lengths[row] + _SEVERAL <= self.capacity
            attended[row - rows.start] = max(len(array), _SEVERAL if is_several else 1)
        before = np.array([lengths.get(row, 0) for row in rows], dtype=np.int32)
        feed: dict[str, NDArray[Any]] = {"input_ids": ids, QUERY_SEQLENS: query, PAST_SEQLENS: before}
        feed |= self._given.arrays(read, lengths, rows, ids)
        values = stack.values
        if self._row_stacks is not None:
            feed[ADAPTER_IDS] = numbers
            if self._omits_base and stack.only is not None and self._reads_alone(numbers, query, stack.only_tokens):
                values, feed[FIRST_ADAPTER] = stack.only, np.array([BASE + 1])
        if self._pads_attention:
            feed[ATTENTION_SEQLENS] = attended
        counts = {row: last.get(row, len(array) if self.gives_all else 1) for row, array in read.items()}
        if self._texts is not None:
            feed[TEXT_SEQLENS] = self._texts.totals(rows, read, lengths)
        if self._chooses_logits:
            ends = dict(zip(read, np.cumsum([*map(len, read.values())]), strict=True))
            feed[LOGITS_INDICES] = np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in read])
        logits = np.asarray(self._steps(feed, values, rows), np.float32)
        if self.gives_all:
            return {row: logits[row - rows.start, len(read[row]) - counts[row] : len(read[row])] for row in read}
        if not self._chooses_logits:
            return {row: logits[row - rows.start, 0] for row in read}
        of_rows = zip(read, np.split(logits[:, 0], np.cumsum(list(counts.values()))[:-1]), strict=True)
        return {row: array if row in last else array[-1] for row, array in of_rows}

    @staticmethod
    def _reads_alone(numbers: NDArray[np.int64], query: NDArray[np.int32], most: int) -> bool:
        """Return whether all rows that read have an adapter, and read few enough tokens to leave the base out."""
        return max(int(query.sum()), _SEVERAL) <= most and bool((numbers[query > 0] > BASE).all())
