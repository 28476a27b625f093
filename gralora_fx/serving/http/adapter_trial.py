"""The trial of an adapter: one run of the model, whose outputs must be finite where the base's are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.engine.decoder import Source
from gralora_fx.errors import ServingError, first_line
from gralora_fx.loading.tokenizers import prompt_ids
from gralora_fx.serving.http.encoder import Encoder
from gralora_fx.serving.http.example_inputs import Arrays, example_inputs
from gralora_fx.serving.model import OrtModel

Run = Callable[[str | None], Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class AdapterTrial:
    """Runs a model with an adapter once.

    Attributes:
        run: Runs the model with the adapter of a key, or as the base, and returns its outputs.
    """

    run: Run

    @cached_property
    def _base(self) -> list[NDArray[Any]]:
        """Where the base's outputs are finite."""
        return [np.isfinite(output) for output in self.run(None)]

    def __call__(self, key: str) -> None:
        """Try an adapter that is loaded.

        Raises:
            ServingError: The model does not run with it, or its outputs are not finite.
        """
        try:
            outputs = self.run(key)
        except Exception as error:  # whatever it is, the adapter cannot be served
            raise ServingError(f"the model does not run with the adapter ({first_line(error)})") from error
        if any((is_finite & ~np.isfinite(output)).any() for is_finite, output in zip(self._base, outputs, strict=True)):
            raise ServingError("the model's outputs with the adapter are not finite; train it again, or give another")


def try_decoder(model: OrtModel) -> AdapterTrial:
    """Trials of a decoder, in a row beside those that answer requests."""
    token, source = example_prompt(model)
    decoder = model.decoder(rows=1, capacity=1, chunk=1)

    def run(key: str | None) -> list[NDArray[Any]]:
        row = decoder.open(key, source)
        try:
            return [decoder.step({row: [token]})[row]]
        finally:
            decoder.close(row)

    return AdapterTrial(run)


def example_prompt(model: OrtModel) -> tuple[int, Source | None]:
    """A token that a decoder may read first, and what the encoder of an encoder-decoder may read.

    Raises:
        ServingError: The export holds no tokenizer, or no feature extractor for a model of speech.
    """
    ids = prompt_ids("a", model.tokenizer, ServingError)
    inputs = model.encoder_inputs
    if inputs is None:
        return ids[-1], None  # that of padding may have an embedding of zeros
    return inputs.rules.start, inputs.example(ids).arrays


def try_encoder(encoder: Encoder) -> AdapterTrial:
    """Trials of a model that is run once for each request, with inputs that the base takes."""
    inputs: Arrays = {}

    def run(key: str | None) -> list[NDArray[Any]]:
        if not inputs:
            inputs.update(example_inputs(encoder))
        return list(encoder.model(**inputs, adapter=key).values())

    return AdapterTrial(run)
