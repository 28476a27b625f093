"""Inputs and outputs of a session: its cache, form and adapter; and a session that runs with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.format.adapter_inputs import AdapterInputs, is_adapter_tensor
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.format.export_directory import ROWS_FORM, TEXT_SWITCH, TOKENS_APART, TRANSPOSED_STATES
from gralora_fx.format.input_names import PAST_PREFIX, PRESENT_PREFIX

Values = Mapping[str, Any]  # tensors of an adapter as `OrtValue`s, by name
PAST, PRESENT = PAST_PREFIX, PRESENT_PREFIX


def as_past(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a step's returned cache to the input names of the next step."""
    return {name.replace(PRESENT, PAST, 1): value for name, value in outputs.items() if name.startswith(PRESENT)}


def empty_past(inputs: Sequence[Any], batch: int) -> dict[str, NDArray[Any]]:
    """Return an empty cache for a session's past inputs: no positions, and states of zeros."""
    dtypes = {"tensor(float16)": np.float16}
    return {
        value.name: np.zeros(slot.kind.shape(value.shape, batch, 0), dtypes.get(value.type, np.float32))
        for slot, value in past_slots(inputs).items()
    }


def transposed_states(session: Any) -> frozenset[str]:
    """Return names, inputs and outputs, of the states that a session keeps with the last two axes swapped."""
    places = _metadata(session).get(TRANSPOSED_STATES, "").split()
    return frozenset(prefix + place for place in places for prefix in (PAST, PRESENT))


def reads_tokens_apart(session: Any) -> bool:
    """Return whether a model computes a single token after others differently from the same token among several."""
    return TOKENS_APART in _metadata(session)


def text_switch(session: Any) -> str | None:
    """Return how a model depends on the lengths of its texts (see `text_lengths`); None if it does not."""
    return _metadata(session).get(TEXT_SWITCH)


def is_current_form(session: Any) -> bool:
    """Return whether a graph of rows has this version's form (see `batch_continuously`)."""
    return _metadata(session).get(ROWS_FORM) == "2"


def gives_all(session: Any) -> bool:
    """Return whether a graph returns the logits of every position, not only of the last."""
    logits = next(value for value in session.get_outputs() if value.name == "logits")
    return bool(logits.shape[1] != 1)


def _metadata(session: Any) -> Mapping[str, str]:
    while isinstance(session, SessionView):
        session = session.session
    if len(parts_of(session)) > 1:
        return {}
    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return metadata


class SessionView:
    """A session with different inputs; outputs and providers are the session's."""

    def __init__(self, session: Any) -> None:
        """Set the session."""
        self.session = session

    def get_outputs(self) -> list[Any]:
        """Return the session's outputs."""
        outputs: list[Any] = self.session.get_outputs()
        return outputs

    def get_overridable_initializers(self) -> list[Any]:
        """Return the optional inputs, without those for an adapter."""
        return [value for value in self.session.get_overridable_initializers() if not is_adapter_tensor(value.name)]

    def get_providers(self) -> list[str]:
        """Return the session's execution providers."""
        providers: list[str] = self.session.get_providers()
        return providers


class AdapterSession(SessionView):
    """An ONNX Runtime session with an adapter; its interface has no adapter inputs.

    ONNX Runtime's `RunOptions.add_active_adapter` silently overrides fed inputs and is ignored with I/O binding;
    feeding the tensors computes the same and has neither fault.
    """

    def __init__(self, session: Any, values: Values) -> None:
        """Keep the tensors that the session has inputs for."""
        super().__init__(session)
        taken = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        self.values = {name: value for name, value in values.items() if name in taken}

    def get_inputs(self) -> list[Any]:
        """Return the inputs without those for an adapter."""
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
    """Return a session, or an `EncoderDecoderSession`, that runs with an adapter."""
    if not values:
        return session
    adapted = [AdapterSession(part, values) for part in parts_of(session)]
    return type(session)(*adapted) if len(adapted) > 1 else adapted[0]


def adapter_values(values: Values, inputs: AdapterInputs, session: Any) -> dict[str, Any]:
    """Return the adapter tensors that a session takes, with empty ones for missing layers if it requires all."""
    is_required = any(is_adapter_tensor(value.name) for part in parts_of(session) for value in part.get_inputs())
    taken = {value.name for part in parts_of(session) for value in optional_or_required(part)}
    given = {**(empty_adapter(inputs) if is_required else {}), **values}
    return {name: value for name, value in given.items() if name in taken}


def parts_of(session: Any) -> Sequence[Any]:
    """Return the sessions of a pair, or the session itself."""
    parts: Sequence[Any] = getattr(session, "parts", (session,))
    return parts


def takes_adapters(session: Any) -> bool:
    """Return whether a session has adapter inputs."""
    return any(is_adapter_tensor(v.name) for part in parts_of(session) for v in optional_or_required(part))


def optional_or_required(session: Any) -> list[Any]:
    """Return all inputs of a session, including optional ones."""
    return [*session.get_inputs(), *session.get_overridable_initializers()]


def adapter_dtype(session: Any) -> str:
    """Return the dtype of a session's adapter inputs."""
    values = [value for part in parts_of(session) for value in optional_or_required(part)]
    kind = next(value.type for value in values if is_adapter_tensor(value.name))
    return {"tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}.get(kind, "float32")


def empty_adapter(inputs: AdapterInputs) -> dict[str, Any]:
    """Return tensors of rank 0 at every layer: the base."""
    from gralora_fx.run.sessions.adapter_arrays import as_ort_value, cast

    shapes = [item for site in inputs.sites for item in site.shapes(inputs.k, 0, 0).items()]
    return {name: as_ort_value(cast(np.zeros([int(n) for n in shape]), inputs.dtype)) for name, shape in shapes}
