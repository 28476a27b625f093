"""An encoder-decoder as rows: each reads its source when it is opened, and then decodes step by step."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from gralora_fx.errors import ServingError, shown
from gralora_fx.format.adapter_inputs import is_adapter_input
from gralora_fx.format.export_directory import FLAG
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.cache_buffers import RowLayout
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.sessions.adapter_file import tensors_sha256
from gralora_fx.run.sessions.ort_values import array_of, as_array, empty_values, optional_arguments, run_values
from gralora_fx.run.sessions.session_pair import EncoderDecoderSession
from gralora_fx.run.sessions.session_views import as_past, with_adapter

_MOST_ENCODINGS = 8  # sources
_PARTS = "decoder", "encoder"  # of a cache, as the names of its tensors have them
_OF_SOURCE = ".encoder."  # in the names of the keys and values of the source


class Encodings:
    """The encoder's outputs for the last sources used, each with an adapter.

    A source is often read more than once: for several answers, or to detect its language first.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._known: OrderedDict[tuple[str | None, str], tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: Source, name: str | None, adapter: Any, encode: Callable[[], Any]) -> Any:
        """Return the encoder's output for a source."""
        key = name, tensors_sha256(source)
        with self._lock:
            ref, output = self._known.get(key, (None, None))
        if output is None or (None if ref is None else ref()) is not adapter:
            ref, output = None if adapter is None else weakref.ref(adapter), encode()
        with self._lock:
            self._known[key] = ref, output
            self._known.move_to_end(key)
            while len(self._known) > _MOST_ENCODINGS:
                self._known.popitem(last=False)
        return output


@dataclass(frozen=True)
class _Row:
    """The state of an open row, for a step."""

    decoder: Any  # the session of the decoder, with the row's adapter
    # a step's inputs from the source: the encoder's output, its mask, and after the first step its keys and values
    fixed: Mapping[str, Any]
    # the keys and values of the decoder's own positions, and before the first step empty ones of the source
    cache: Mapping[str, Any]
    outputs: Sequence[str]  # the outputs that a step requests
    takes_flag: bool  # whether a step says if it has a past


class EncoderDecoder(Decoder):
    """`encoder_model.onnx`, run once for a row, and `decoder_model_merged.onnx`, run for one row after the other.

    The keys and values of a source are computed in a row's first step and then kept.
    """

    unshared = "what the decoder computes depends on what the encoder has read"

    def __init__(
        self,
        session: EncoderDecoderSession,
        adapters: Adapters,
        limits: DecoderLimits,
        size: DecoderSize,
        encodings: Encodings,
    ) -> None:
        """Start without rows."""
        super().__init__(limits, size)
        self._session, self._adapters, self._encodings = session, adapters, encodings
        self._open: dict[int, _Row] = {}
        self._positions = session.encoder.get_outputs()[0].shape[1]  # a number where inputs have one size
        self._of_tokens, self._of_source = (RowLayout(session.decoder.get_inputs(), part) for part in _PARTS)

    def _row_size(self, tokens: int, count: int) -> int:
        return self._of_tokens.row_size(tokens + count)

    def _source_size(self, source: Source | None) -> int:
        count = self._positions
        if not isinstance(count, int):
            count = max((np.shape(value)[-1] for value in (source or {}).values() if np.ndim(value) > 1), default=0)
        return self._of_source.row_size(count)  # tokens or frames, which the encoder may reduce

    def _begin(self, row: int, adapter: str | None, source: Source | None) -> None:
        if not source:
            raise ServingError("an encoder-decoder answers what its encoder reads, and there is no source; give one")
        source = _checked(source, self._session)
        loaded = None if adapter is None else self._adapters[adapter]
        if loaded is not None:
            loaded.check_acts_everywhere("an encoder-decoder")
        session = with_adapter(self._session, self._adapters.tensors_for(adapter, self._session))
        hidden = self._encodings.get(source, adapter, loaded, lambda: _encoded(session.encoder, source))
        fixed = {"encoder_hidden_states": hidden}
        if "attention_mask" in source:
            mask = np.array(source["attention_mask"], order="C")  # the caller's own may change between steps
            fixed["encoder_attention_mask"] = OrtValue.ortvalue_from_numpy(mask)
        decoder, names = session.decoder, {value.name for value in session.decoder.get_inputs()}
        fixed = {name: value for name, value in fixed.items() if name in names}  # it may lack the mask
        outputs = [value.name for value in decoder.get_outputs()]
        self._open[row] = _Row(decoder, fixed, empty_values(decoder, 1), outputs, takes_flag=FLAG in names)

    def _end(self, row: int) -> None:
        del self._open[row]

    def _run(self, read: Mapping[int, NDArray[np.int64]], last: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        stepped = {row: _step(self._open[row], tokens, self._lengths[row]) for row, tokens in read.items()}
        self._open |= {row: after for row, (after, _) in stepped.items()}
        return {row: logits for row, (_, logits) in stepped.items()}


def _checked(source: Source, session: EncoderDecoderSession) -> Source:
    """Return a source as arrays of one row each, checked."""
    if not isinstance(source, Mapping):
        raise ServingError(f"a source must be a dict of the encoder's inputs, but got {shown(source)}")
    inputs = {value.name: value for value in session.encoder.get_inputs() if not is_adapter_input(value.name)}
    if missing := [name for name in inputs if name not in source]:
        raise ServingError(f"the source lacks {', '.join(missing)}, which the encoder reads")
    taken = {**inputs, **{value.name: value for value in optional_arguments(session.encoder)}}
    arrays = {name: as_array(name, value, taken[name]) if name in taken else value for name, value in source.items()}
    if wrong := [name for name in taken if name in arrays and arrays[name].shape[0] != 1]:
        raise ServingError(f"the source's {wrong[0]} has {arrays[wrong[0]].shape[0]} rows; give one for each row")
    return arrays


def _encoded(encoder: Any, source: Source) -> Any:
    taken = (*encoder.get_inputs(), *optional_arguments(encoder))
    feed = {value.name: source[value.name] for value in taken if value.name in source}  # the source may have others
    return run_values(encoder, feed, "the encoder", ["last_hidden_state"], ServingError)["last_hidden_state"]


def _step(row: _Row, tokens: NDArray[np.int64], past: int) -> tuple[_Row, NDArray[Any]]:
    """Return the row after it has read tokens, and the logits `[vocabulary]` after the last."""
    feed = {**row.fixed, **row.cache, "input_ids": tokens[None]}
    if row.takes_flag:
        feed[FLAG] = np.array([past > 0])
    description = f"the decoder, for {len(tokens)} tokens"
    results = run_values(row.decoder, feed, description, row.outputs, ServingError)
    cache = as_past(results)
    of_source = {name: value for name, value in cache.items() if _OF_SOURCE in name}
    after = replace(
        row,
        fixed={**row.fixed, **of_source},
        cache={name: value for name, value in cache.items() if name not in of_source},
        outputs=[name for name in row.outputs if _OF_SOURCE not in name],
    )
    logits = array_of(results["logits"])[0, -1].astype(np.float32)
    return after, logits
