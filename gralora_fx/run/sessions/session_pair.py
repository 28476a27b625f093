"""The two sessions of an encoder-decoder as one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from gralora_fx.format.export_directory import FLAG
from gralora_fx.run.sessions.ort_values import optional_arguments
from gralora_fx.run.sessions.session_views import PAST, as_past, empty_past

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Argument:
    """An input or output of the whole model, like ONNX Runtime's `NodeArg`."""

    name: str
    shape: list[int | str]
    type: str


class EncoderDecoderSession:
    """Encoder and decoder as one model with the interface of an `onnxruntime.InferenceSession`.

    Its inputs are those of the model: the encoder's inputs, `decoder_input_ids`, and the past keys and values of the
    decoder's own positions. With a past, the keys and values of the encoder's output are computed and cached first,
    then read, as in generation.

    Attributes:
        encoder: Session of `encoder_model.onnx`.
        decoder: Session of `decoder_model_merged.onnx`.
        parts: Both.
    """

    def __init__(self, encoder: Any, decoder: Any) -> None:
        """Set the two opened sessions."""
        self.encoder, self.decoder = self.parts = encoder, decoder
        self._past_inputs = [value for value in decoder.get_inputs() if value.name.startswith(PAST)]
        self._decoder_names = {value.name for value in decoder.get_inputs()}

    def get_inputs(self) -> list[Any]:
        """Return the inputs of the whole model."""
        ids = next(value for value in self.decoder.get_inputs() if value.name == "input_ids")
        shape = [ids.shape[0], "decoder_sequence_length"]
        pasts = [value for value in self._past_inputs if ".decoder." in value.name]
        return [*self.encoder.get_inputs(), Argument("decoder_input_ids", shape, ids.type), *pasts]

    def get_overridable_initializers(self) -> list[Any]:
        """Return the encoder's optional inputs."""
        optional: list[Any] = self.encoder.get_overridable_initializers()
        return optional

    def get_outputs(self) -> list[Any]:
        """Return `logits`, the keys and values, and `encoder_last_hidden_state`."""
        (hidden,) = self.encoder.get_outputs()
        return [*self.decoder.get_outputs(), Argument("encoder_last_hidden_state", hidden.shape, hidden.type)]

    def get_providers(self) -> list[str]:
        """Return the execution providers that both sessions run on."""
        return [name for name in self.encoder.get_providers() if name in self.decoder.get_providers()]

    def run(self, names: Sequence[str] | None, feed: Arrays, options: Any = None) -> list[NDArray[Any]]:
        """Run the whole model once."""
        ids, mask = feed["decoder_input_ids"], feed.get("attention_mask")
        past = {name: value for name, value in feed.items() if name.startswith(PAST)}
        hidden = self.encode(feed, options)
        if any(value.shape[2] for value in past.values()):
            first = self.step(ids[:, :1], hidden, mask, options=options)
            outputs = self.step(ids, hidden, mask, {**as_past(first), **past}, options=options)
        else:
            outputs = self.step(ids, hidden, mask, options=options)
        outputs["encoder_last_hidden_state"] = hidden
        return [outputs[name] for name in names or [value.name for value in self.get_outputs()]]

    def run_with_ort_values(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """Run the whole model once, with `OrtValue`s in and out."""
        results = self.run(names, {name: value.numpy() for name, value in feed.items()})
        return [OrtValue.ortvalue_from_numpy(np.ascontiguousarray(result)) for result in results]

    def encode(self, feed: Arrays, options: Any = None) -> NDArray[Any]:
        """Return the encoder's output `[batch, length, size]` for its inputs, by name."""
        names = [value.name for value in self.encoder.get_inputs()]
        names += [value.name for value in optional_arguments(self.encoder) if value.name in feed]
        hidden: NDArray[Any] = self.encoder.run(None, {name: feed[name] for name in names}, options)[0]
        return hidden

    def step(
        self,
        ids: NDArray[Any],
        hidden: NDArray[Any],
        mask: NDArray[Any] | None,
        past: Arrays | None = None,
        *,
        options: Any = None,
    ) -> dict[str, NDArray[Any]]:
        """Run one step of the decoder; `past` has the names of its inputs, None for the first step.

        Shapes: `ids` `[batch, length]`, the new tokens; `mask` `[batch, encoder length]`, 0 at padding.
        """
        feed: dict[str, NDArray[Any]] = {"input_ids": ids, "encoder_hidden_states": hidden}
        if mask is not None:
            feed["encoder_attention_mask"] = mask
        feed[FLAG] = np.array([past is not None])
        feed |= past if past is not None else empty_past(self._past_inputs, ids.shape[0])
        inputs = {name: value for name, value in feed.items() if name in self._decoder_names}
        results = self.decoder.run(None, inputs, options)
        return {value.name: result for value, result in zip(self.decoder.get_outputs(), results, strict=True)}
