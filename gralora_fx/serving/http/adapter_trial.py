"""The trial of an adapter: one run of the model, whose outputs must be finite where the base's are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, first_line
from gralora_fx.loading.tokenizers import prompt_ids
from gralora_fx.runtime.adapter_stack import row_ids
from gralora_fx.runtime.batched_steps import BatchedSteps
from gralora_fx.serving.batched_decoder import BatchedDecoder
from gralora_fx.serving.http.encoder import Encoder
from gralora_fx.serving.model import OrtModel
from gralora_fx.serving.row_adapters import RowAdapters
from gralora_fx.tracing.inputs.image_sizes import IMAGES

_SIZES = (1, 16, 256, 4096, 65536)  # of axes that may have any size, tried in this order
_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}

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


def try_rows(decoder: BatchedDecoder) -> AdapterTrial:
    """Trials beside a batched decoder's rows, in a cache of their own."""
    model = decoder.model
    assert isinstance(model.adapters, RowAdapters)
    adapters = model.adapters
    steps = BatchedSteps(model.session, rows=1, capacity=1, chunk=1)
    ids, query, past = np.array([[_token(model)]]), np.ones(1, np.int32), np.zeros(1, np.int32)

    def run(key: str | None) -> list[NDArray[Any]]:
        stack = adapters.stack([key])
        return [steps(ids, query, past, row_ids(stack, key, 1), stack.values).float().numpy()]

    return AdapterTrial(run)


def try_decoder(model: OrtModel) -> AdapterTrial:
    """Trials of a decoder that has one adapter in a run; onnxruntime-genai reads the adapter, too."""
    token = _token(model)

    def run(key: str | None) -> list[NDArray[Any]]:
        model.generate([token], max_new_tokens=1, adapter=key)
        return [np.asarray(model(input_ids=[[token]], adapter=key)["logits"])]

    return AdapterTrial(run)


def _token(model: OrtModel) -> int:
    """A token of a text; that of padding may have an embedding of zeros, which no adapter changes."""
    return prompt_ids("a", model.tokenizer, ServingError)[-1]


def try_encoder(encoder: Encoder) -> AdapterTrial:
    """Trials of a model that is run once for each request: of a text, else of ones of the smallest size it takes."""

    def run(key: str | None) -> list[NDArray[Any]]:
        if encoder.takes_texts:
            return list(encoder.run_text("a", key).values())
        return list(encoder.model(**_ones(encoder), adapter=key).values())

    return AdapterTrial(run)


def _ones(encoder: Encoder) -> dict[str, Any]:
    """Inputs of ones that the base takes."""
    problem: ServingError | None = None
    for size in _SIZES:
        inputs: dict[str, Any] = {
            name: np.ones(_shape(encoder, value, size), _dtype(value)) for name, value in encoder.inputs.items()
        }
        try:
            encoder.model(**inputs)
        except ServingError as error:
            problem = error
        else:
            return inputs
    raise ServingError(f"no inputs are known that the model could be tried with ({problem})") from problem


def _shape(encoder: Encoder, value: Any, size: int) -> list[int]:
    sizes = encoder.model.manifest.image_sizes
    shape = [axis if isinstance(axis, int) else (size if index else 1) for index, axis in enumerate(value.shape)]
    if value.name == IMAGES and sizes is not None:
        shape[2:] = sizes.fitting((1, 1))
    return shape


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value.type, np.float32)
