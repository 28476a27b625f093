"""Sessions seen as others: the two of an encoder-decoder as one model, and a session that runs with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from gralora_fx.format.adapter_inputs import AdapterInputs, is_adapter_tensor
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.format.export_directory import FLAG, ROWS_FORM, TOKENS_APART, TRANSPOSED_STATES
from gralora_fx.format.input_names import PAST_PREFIX, PRESENT_PREFIX

Arrays = Mapping[str, NDArray[Any]]
Values = Mapping[str, Any]  # tensors of an adapter as `OrtValue`s, by name
PAST, PRESENT = PAST_PREFIX, PRESENT_PREFIX


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
    """

    def __init__(self, encoder: Any, decoder: Any) -> None:
        """Take the two opened sessions."""
        self.encoder, self.decoder = encoder, decoder
        self._past_inputs = [value for value in decoder.get_inputs() if value.name.startswith(PAST)]
        self._decoder_names = {value.name for value in decoder.get_inputs()}

    def get_inputs(self) -> list[Any]:
        """The inputs of the whole model."""
        ids = next(value for value in self.decoder.get_inputs() if value.name == "input_ids")
        shape = [ids.shape[0], "decoder_sequence_length"]
        pasts = [value for value in self._past_inputs if ".decoder." in value.name]
        return [*self.encoder.get_inputs(), Argument("decoder_input_ids", shape, ids.type), *pasts]

    def get_outputs(self) -> list[Any]:
        """`logits`, the keys and values, and `encoder_last_hidden_state`."""
        (hidden,) = self.encoder.get_outputs()
        return [*self.decoder.get_outputs(), Argument("encoder_last_hidden_state", hidden.shape, hidden.type)]

    def get_providers(self) -> list[str]:
        """The execution providers that both sessions run on."""
        return [name for name in self.encoder.get_providers() if name in self.decoder.get_providers()]

    def run(self, names: Sequence[str] | None, feed: Arrays, options: Any = None) -> list[NDArray[Any]]:
        """One call of the whole model."""
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
        """The same with `OrtValue`s in and out."""
        results = self.run(names, {name: value.numpy() for name, value in feed.items()})
        return [OrtValue.ortvalue_from_numpy(np.ascontiguousarray(result)) for result in results]

    def encode(self, feed: Arrays, options: Any = None) -> NDArray[Any]:
        """The encoder's output `[batch, length, size]` for its inputs, by name."""
        names = [value.name for value in self.encoder.get_inputs()]
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
        """One step of the decoder.

        Args:
            ids: `[batch, length]`, the new tokens.
            hidden: The encoder's output.
            mask: `[batch, encoder length]`, 0 where a position of the encoder is padding.
            past: Keys and values by the names of the inputs; None for the first step.
            options: An `onnxruntime.RunOptions`.
        """
        feed: dict[str, NDArray[Any]] = {"input_ids": ids, "encoder_hidden_states": hidden}
        if mask is not None:
            feed["encoder_attention_mask"] = mask
        feed[FLAG] = np.array([past is not None])
        feed |= past if past is not None else empty_past(self._past_inputs, ids.shape[0])
        inputs = {name: value for name, value in feed.items() if name in self._decoder_names}
        results = self.decoder.run(None, inputs, options)
        return {value.name: result for value, result in zip(self.decoder.get_outputs(), results, strict=True)}


def as_past(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The cache that a step returned, by the input names of the next step."""
    return {name.replace(PRESENT, PAST, 1): value for name, value in outputs.items() if name.startswith(PRESENT)}


def empty_past(inputs: Sequence[Any], batch: int) -> dict[str, NDArray[Any]]:
    """An empty cache for the past inputs of a session: no positions, and states of zeros."""
    dtypes = {"tensor(float16)": np.float16}
    return {
        value.name: np.zeros(slot.kind.shape(value.shape, batch, 0), dtypes.get(value.type, np.float32))
        for slot, value in past_slots(inputs).items()
    }


def transposed_states(session: Any) -> frozenset[str]:
    """Names of the states that a session takes and gives with the last two axes swapped, of inputs and outputs."""
    places = _metadata(session).get(TRANSPOSED_STATES, "").split()
    return frozenset(prefix + place for place in places for prefix in (PAST, PRESENT))


def reads_tokens_apart(session: Any) -> bool:
    """Return whether a model computes a token that it reads by itself, after others, otherwise than one of several."""
    return TOKENS_APART in _metadata(session)


def is_current_form(session: Any) -> bool:
    """Return whether a graph of rows is of the form that this version writes (see `batch_continuously`)."""
    return _metadata(session).get(ROWS_FORM) == "2"


def gives_all(session: Any) -> bool:
    """Return whether a graph gives the logits of every position, not of the last alone."""
    logits = next(value for value in session.get_outputs() if value.name == "logits")
    return bool(logits.shape[1] != 1)


def _metadata(session: Any) -> Mapping[str, str]:
    while isinstance(session, SessionView):
        session = session.session
    if isinstance(session, EncoderDecoderSession):
        return {}
    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return metadata


class SessionView:
    """A session seen with other inputs; its outputs and providers are the session's.

    Attributes:
        session: The `onnxruntime.InferenceSession`.
    """

    def __init__(self, session: Any) -> None:
        """Take the session."""
        self.session = session

    def get_outputs(self) -> list[Any]:
        """The outputs."""
        outputs: list[Any] = self.session.get_outputs()
        return outputs

    def get_overridable_initializers(self) -> list[Any]:
        """The inputs that may be left out, without those for an adapter."""
        return [value for value in self.session.get_overridable_initializers() if not is_adapter_tensor(value.name)]

    def get_providers(self) -> list[str]:
        """The execution providers."""
        providers: list[str] = self.session.get_providers()
        return providers


class AdapterSession(SessionView):
    """An ONNX Runtime session with an adapter, with the interface of a session whose inputs do not include it.

    ONNX Runtime's own way, `RunOptions.add_active_adapter`, overrides what is fed without notice and is ignored with
    I/O binding; feeding the tensors is the same and has neither fault.

    Attributes:
        values: The adapter's tensors that the session takes.
    """

    def __init__(self, session: Any, values: Values) -> None:
        """Take the tensors that the session has inputs for."""
        super().__init__(session)
        taken = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        self.values = {name: value for name, value in values.items() if name in taken}

    def get_inputs(self) -> list[Any]:
        """The inputs without those for an adapter."""
        return [value for value in self.session.get_inputs() if not is_adapter_tensor(value.name)]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Any], options: Any = None) -> list[Any]:
        """Run on arrays."""
        results: list[Any] = self.session.run(names, {**feed, **self.values}, options)
        return results

    def run_with_ort_values(self, names: Sequence[str], feed: Mapping[str, Any], options: Any = None) -> list[Any]:
        """Run on `OrtValue`s."""
        results: list[Any] = self.session.run_with_ort_values(names, {**feed, **self.values}, options)
        return results


def with_adapter(session: Any, values: Values) -> Any:
    """A session, or an `EncoderDecoderSession`, that runs with an adapter."""
    if not values:
        return session
    if isinstance(session, EncoderDecoderSession):
        return EncoderDecoderSession(AdapterSession(session.encoder, values), AdapterSession(session.decoder, values))
    return AdapterSession(session, values)


def adapter_values(values: Values, inputs: AdapterInputs, session: Any) -> dict[str, Any]:
    """Return the tensors of an adapter as a session takes them, for layers that it does not adapt too if need be."""
    taken = [value for part in _parts(session) for value in part.get_inputs()]
    is_required = any(is_adapter_tensor(value.name) for value in taken)
    return {**(empty_adapter(inputs) if is_required else {}), **values}


def _parts(session: Any) -> list[Any]:
    return [session.encoder, session.decoder] if isinstance(session, EncoderDecoderSession) else [session]


def takes_adapters(session: Any) -> bool:
    """Return whether a session takes tensors of adapters."""
    return any(is_adapter_tensor(v.name) for part in _parts(session) for v in optional_or_required(part))


def optional_or_required(session: Any) -> list[Any]:
    """Return all inputs of a session, those that may be left out too."""
    return [*session.get_inputs(), *session.get_overridable_initializers()]


def adapter_dtype(session: Any) -> str:
    """The dtype of the adapter tensors that a session takes."""
    values = [value for part in _parts(session) for value in optional_or_required(part)]
    kind = next(value.type for value in values if is_adapter_tensor(value.name))
    return {"tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}.get(kind, "float32")


def empty_adapter(inputs: AdapterInputs) -> dict[str, Any]:
    """Return tensors of rank 0 at every layer: the base."""
    from gralora_fx.run.sessions.adapter_arrays import as_ort_value, cast

    shapes = [item for site in inputs.sites for item in site.shapes(inputs.k, 0, 0).items()]
    return {name: as_ort_value(cast(np.zeros([int(n) for n in shape]), inputs.dtype)) for name, shape in shapes}
