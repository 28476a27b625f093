"""Batched runs of an encoder over texts, tokenized here, or tensors."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.core.loading.tokenizers import is_ids
from gralora_fx.errors import ServingError, first_line, shown
from gralora_fx.run.engine.limits import PromptLimit, context_length
from gralora_fx.run.model import OrtModel
from gralora_fx.service.adapter_store.store import AdapterStore
from gralora_fx.service.scheduling.queue import Observer
from gralora_fx.service.scheduling.row_batches import RowBatches, RowJob

_IDS, _TYPES, _ATTENTION_MASK = "input_ids", "token_type_ids", "attention_mask"


@dataclass(frozen=True)
class Tokens:
    """A tokenized text or text pair."""

    ids: Sequence[int]  # token ids
    types: Sequence[int] | None = None  # token type ids; None if all are 0


class TextReader:
    """Tokenizes texts for an encoder; `limit` is the smaller of the model's and the tokenizer's."""

    def __init__(
        self, tokenizer: TextTokenizer, config: Mapping[str, Any], position_offset: int, inputs: Collection[str]
    ) -> None:
        """Determine the limits."""
        self._tokenizer, self._inputs = tokenizer, inputs
        context = context_length(config)
        most = tokenizer.model_max_length
        self.limit = most if context is None else min(most, context - position_offset)
        self._lengths = PromptLimit(self.limit, "a text", f"more than the model's {self.limit}")
        self._vocabulary = config.get("vocab_size")
        self._cutting = threading.Lock()

    @property
    def pads(self) -> bool:
        """Return whether the tokenizer has a padding token."""
        return self._tokenizer.pad_token_id is not None

    def texts(self, texts: Sequence[str | Sequence[int]], *, truncate: bool = False) -> list[Tokens]:
        """Tokenize texts, cut to the limit with `truncate`; lists of ids are kept."""
        if all(isinstance(text, str) for text in texts):
            return self._encoded(texts, None, truncate)
        return [self._one(text, truncate) for text in texts]

    def pairs(self, first: str, seconds: Sequence[str], *, truncate: bool = False) -> list[Tokens]:
        """Tokenize a text paired with each of several others; `truncate` cuts the longer of a pair first."""
        return self._encoded([first] * len(seconds), seconds, truncate)

    def padded(self, rows: Sequence[Tokens]) -> dict[str, NDArray[Any]]:
        """Return the model's inputs `[rows, longest]`, padded on the tokenizer's padding side."""
        lengths = [len(row.ids) for row in rows]
        width = max(lengths)
        padding = self._tokenizer.pad_token_id if self.pads else 0
        ids = np.full((len(rows), width), padding, np.int64)
        types = np.full((len(rows), width), self._tokenizer.pad_token_type_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        is_left = self._tokenizer.padding_side == "left"
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            columns = slice(width - length, width) if is_left else slice(length)
            ids[index, columns], mask[index, columns] = row.ids, 1
            types[index, columns] = 0 if row.types is None else row.types
        arrays = {_IDS: ids, _TYPES: types, _ATTENTION_MASK: mask}
        return {name: array for name, array in arrays.items() if name in self._inputs}

    def _one(self, text: str | Sequence[int], truncate: bool) -> Tokens:
        if not isinstance(text, str) and is_ids(text):
            return self._checked(Tokens(text))
        return self._encoded([text], None, truncate)[0]

    def _encoded(self, firsts: Sequence[Any], seconds: Sequence[str] | None, truncate: bool) -> list[Tokens]:
        for text in (*firsts[:1], *(seconds or firsts)):
            _check_text(text)
            if not truncate:
                self._lengths.check_text(text, self._tokenizer)
        texts = list(firsts), None if seconds is None else list(seconds)
        try:
            encoding = self._tokenizer(*texts)
            if truncate and max(map(len, encoding[_IDS]), default=0) > self.limit:
                with self._cutting:
                    encoding = self._cutter(*texts, truncation=True, max_length=self.limit)
        except Exception as error:  # tokenizers raise types of their own
            raise ServingError(f"the tokenizer does not take the texts ({first_line(error)})") from error
        types = encoding.get(_TYPES) or [None] * len(firsts)
        return [self._checked(Tokens(*row)) for row in zip(encoding[_IDS], types, strict=True)]

    @cached_property
    def _cutter(self) -> Any:
        """A tokenizer that may truncate: transformers' keep that as state, which other threads would see."""
        return self._tokenizer if isinstance(self._tokenizer, TextTokenizer) else copy.deepcopy(self._tokenizer)

    def _checked(self, tokens: Tokens) -> Tokens:
        ids = tokens.ids
        if not ids:
            raise ServingError("a text has no tokens; give at least one")
        self._lengths.check_tokens(ids)
        if min(ids) < 0 or (self._vocabulary is not None and max(ids) >= self._vocabulary):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ServingError(f"a text holds token {wrong}, outside the vocabulary of {self._vocabulary} tokens")
        return tokens


def _check_text(text: Any) -> None:
    """Raise for a lone surrogate, which tokenizers reject with an unclear error."""
    if not isinstance(text, str):
        raise ServingError(f"a text is a string or a list of token ids, but got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ServingError(f"the text {shown(text)} is not Unicode ({first_line(error)})") from error


_TEXTS, _MASK = "texts", "attention_mask"
# how much of its largest value a text's outputs may change beside a longer one: by rounding, and no more
_ROUNDING, _COARSE_ROUNDING = 1e-4, 2e-2
_WIDTH = 24  # tokens of the longer text
_logger = logging.getLogger(__name__)


class Encoder:
    """An exported model that runs once per request, batched across requests.

    Texts are batched with those nearest in length, padded to the longest; if padding changes the model's outputs, only
    with texts of the same length. Tensors of several requests are batched if their shapes agree in all axes but the
    first and every input and output has the batch as its first axis. With `model_rows.onnx` each row has its own
    adapter; otherwise a batch has one.

    Attributes:
        model: The model.
        inputs: The session's inputs by name.
        outputs: The session's outputs by name.
        batches: The queue.
    """

    def __init__(
        self,
        model: OrtModel,
        tokenizer: TextTokenizer | None,
        observer: Observer,
        *,
        max_batch: int,
        max_queue: int,
        models: AdapterStore,
    ) -> None:
        """Create the queue."""
        self.model = model
        self._observer = observer
        self._rows_have_adapters = model.manifest.has_rows
        session = model.rows_session if self._rows_have_adapters else model.session
        self.inputs = {value.name: value for value in session.get_inputs() if value.name in model.input_names}
        self.outputs = {value.name: value for value in session.get_outputs()}
        self._reader = None
        if tokenizer is not None:
            self._reader = TextReader(tokenizer, model.config, model.manifest.position_offset, self.inputs)
        first = {(list(value.shape) or [None])[0] for value in (*self.inputs.values(), *self.outputs.values())}
        self._takes_padding = False  # until it is tested
        self._is_batchable = len(first) == 1 and isinstance(next(iter(first)), str)
        self.batches = RowBatches(self._run, observer, max_batch=max_batch, max_queue=max_queue, models=models)

    @property
    def takes_texts(self) -> bool:
        """Return whether texts can be run: there is a tokenizer, and the model takes its ids."""
        return self._reader is not None and "input_ids" in self.inputs and self._is_batchable

    @property
    def reader(self) -> TextReader:
        """The tokenizer wrapper; only for a model that takes texts."""
        assert self._reader is not None
        return self._reader

    def warm_up(self) -> None:
        """Run example texts, if the model takes them, and find out whether padding changes outputs."""
        if not self.takes_texts:
            return
        if _MASK not in self.inputs:
            reason = "%s takes no attention_mask, which says what is padding"
        elif self._ignores_padding():
            self._takes_padding = True
            return
        elif self.reader.pads:
            reason = "padding changes what %s gives for a text"
        else:
            reason = "the tokenizer of %s has no token for padding"
        _logger.warning(f"{reason}, so only texts of one length run together", self.model.directory)

    def _ignores_padding(self) -> bool:
        """Return whether a text has the same outputs alone as padded beside a longer one."""
        short = self.reader.texts(["a"])[0].ids
        fill = short[1:-1] or short
        room = max(min(_WIDTH, self.reader.limit) - len(short), 0)
        long = [*short[:-1], *(list(fill) * room)[:room], *short[-1:]]
        texts = [RowJob(_TEXTS, 1, Tokens(ids)) for ids in (short, long)]
        alone = [self._run([text])[0] for text in texts]
        if not self.reader.pads:
            return False
        quantization = self.model.manifest.quantization
        is_exact = quantization is None and self.model.manifest.precision == "fp32"
        most = _ROUNDING if is_exact else _COARSE_ROUNDING
        return all(
            _gap(array, other) <= most
            for pair in zip(self._run(texts), alone, strict=True)
            for array, other in zip(pair[0].values(), pair[1].values(), strict=True)
            if array.shape == other.shape  # outputs of single tokens have rows of padding
        )

    async def texts(self, rows: Sequence[Tokens], adapter: str | None) -> list[dict[str, NDArray[Any]]]:
        """Run texts, each its own job in whichever batch has room."""
        shared = None if self._rows_have_adapters else adapter
        jobs = [
            RowJob((_TEXTS, shared, 0 if self._takes_padding else len(row.ids)), 1, row, len(row.ids), adapter)
            for row in rows
        ]
        results: list[dict[str, NDArray[Any]]] = await self._wait(jobs)
        self._observer.read(sum(len(row.ids) for row in rows))
        return results

    async def tensors(self, arrays: Mapping[str, NDArray[Any]], adapter: str | None) -> dict[str, NDArray[Any]]:
        """Run tensors as one job."""
        sizes = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
        rows = max(sizes, default=0) or 1  # no rows: refused by the model, and counted while waiting
        shapes = tuple(sorted((name, array.shape[1:]) for name, array in arrays.items()))
        key: Any = (shapes, None if self._rows_have_adapters else adapter)
        if not self._is_batchable or sizes != {rows} or not all(map(_is_finite, arrays.values())):
            key = object()  # runs alone: where activations are quantized, a batch shares their scale
        (result,) = await self._wait([RowJob(key, rows, arrays, adapter=adapter)])
        return dict(result)

    async def _wait(self, jobs: list[RowJob]) -> list[Any]:
        self.batches.put(jobs)
        return await asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs))

    def _run(self, jobs: Sequence[RowJob]) -> list[dict[str, NDArray[Any]]]:
        """Run jobs of one key as a batch; return the outputs of each job."""
        payloads = [job.payload for job in jobs]
        if isinstance(payloads[0], Tokens):
            outputs = self._call(self.reader.padded(payloads), jobs)
            return [{name: array[row] for name, array in outputs.items()} for row in range(len(jobs))]
        if len(jobs) == 1:
            return [self._call(payloads[0], jobs)]
        arrays = {name: np.concatenate([payload[name] for payload in payloads]) for name in payloads[0]}
        cuts = np.cumsum([job.rows for job in jobs])[:-1]
        parts = {name: np.split(array, cuts) for name, array in self._call(arrays, jobs).items()}
        return [{name: split[index] for name, split in parts.items()} for index in range(len(jobs))]

    def _call(self, arrays: Mapping[str, Any], jobs: Sequence[RowJob]) -> dict[str, NDArray[Any]]:
        adapter: Any = jobs[0].adapter
        if self._rows_have_adapters:
            adapter = [job.adapter for job in jobs for _ in range(job.rows)]
        return dict(self.model(**arrays, adapter=adapter))


def _is_finite(array: NDArray[Any]) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _gap(array: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the largest absolute difference, relative to the largest value of `other`."""
    array, other = array.astype(np.float64), other.astype(np.float64)
    return float(np.abs(array - other).max() / max(np.abs(other).max(), np.finfo(np.float64).tiny))
