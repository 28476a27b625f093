"""The trial of an adapter: one run of the model, whose outputs must be finite where the base's are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.core.loading.tokenizers import prompt_ids
from gralora_fx.errors import ServingError, first_line
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.model import OrtModel


@dataclass(frozen=True)
class AdapterTrial:
    """Runs a model with an adapter once; a file that passed is not tried again.

    Attributes:
        run: Runs the model with the adapter of a key, or as the base, and returns its outputs.
        model: Holds the adapters.
        by_requests: Whether the first request with an adapter that is loaded for it tries it: its outputs are checked
            (see `AdapterStore.check_outputs`).
    """

    run: Callable[[str | None], Sequence[NDArray[Any]]]
    model: OrtModel
    by_requests: bool = False
    _passed: set[str] = field(default_factory=set, init=False)

    @cached_property
    def _base(self) -> list[NDArray[Any]]:
        """Where the base's outputs are finite."""
        return [np.isfinite(output) for output in self.run(None)]

    def __call__(self, key: str) -> None:
        """Try an adapter that is loaded."""
        digest = self.model.adapters[key].record.file_sha256
        if digest in self._passed:
            return
        try:
            outputs = self.run(key)
        except Exception as error:  # whatever it is, the adapter cannot be served
            raise ServingError(f"the model does not run with the adapter ({first_line(error)})") from error
        if any((is_finite & ~np.isfinite(output)).any() for is_finite, output in zip(self._base, outputs, strict=True)):
            raise ServingError("the model's outputs with the adapter are not finite; train it again, or give another")
        if digest:
            self._passed.add(digest)


def try_decoder(model: OrtModel) -> AdapterTrial:
    """Make trials of a decoder, in a row beside those that answer requests."""
    token, source = example_prompt(model)
    decoder = model.decoder(rows=1, capacity=1, chunk=1)

    def run(key: str | None) -> list[NDArray[Any]]:
        row = decoder.open(key, source)
        try:
            return [decoder.step({row: [token]})[row]]
        finally:
            decoder.close(row)

    return AdapterTrial(run, model, by_requests=True)


def example_prompt(model: OrtModel) -> tuple[int, Source | None]:
    """Return a token that a decoder may read first, and what the encoder of an encoder-decoder may read."""
    ids = prompt_ids("a", model.tokenizer, ServingError)
    inputs = model.encoder_inputs
    if inputs is None:
        return ids[-1], None  # that of padding may have an embedding of zeros
    return inputs.rules.start, inputs.example(ids).arrays
