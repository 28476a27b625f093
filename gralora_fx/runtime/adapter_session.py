"""Sessions that run with an adapter: its tensors are fed beside the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gralora_fx.runtime.adapter_arrays import as_ort_value, cast
from gralora_fx.runtime.adapter_inputs import AdapterInputs, is_adapter_tensor
from gralora_fx.runtime.encoder_decoder_session import EncoderDecoderSession

Values = Mapping[str, Any]  # tensors of an adapter as `OrtValue`s, by name


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
    """A session, or an `EncoderDecoderSession`, that runs with an adapter.

    Args:
        session: The session over an export.
        values: The adapter's tensors; of none, the session itself is returned.
    """
    if not values:
        return session
    if isinstance(session, EncoderDecoderSession):
        return EncoderDecoderSession(AdapterSession(session.encoder, values), AdapterSession(session.decoder, values))
    return AdapterSession(session, values)


def adapter_values(values: Values, inputs: AdapterInputs, session: Any) -> dict[str, Any]:
    """The tensors of an adapter as a session takes them, for layers that it does not adapt too where that is required.

    Args:
        values: The adapter's tensors by name; empty for the base.
        inputs: The adapter tensors of the export.
        session: The session. Overridable initializers that are left out keep their default; inputs have none.
    """
    taken = [value for part in _parts(session) for value in part.get_inputs()]
    is_required = any(is_adapter_tensor(value.name) for value in taken)
    return {**(empty_adapter(inputs) if is_required else {}), **values}


def _parts(session: Any) -> list[Any]:
    return [session.encoder, session.decoder] if isinstance(session, EncoderDecoderSession) else [session]


def adapter_dtype(session: Any) -> str:
    """The dtype of the adapter tensors that a session takes."""
    values = [v for part in _parts(session) for v in (*part.get_inputs(), *part.get_overridable_initializers())]
    kind = next(value.type for value in values if is_adapter_tensor(value.name))
    return {"tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}.get(kind, "float32")


def empty_adapter(inputs: AdapterInputs) -> dict[str, Any]:
    """Tensors of rank 0 at every layer: the base."""
    shapes = [item for site in inputs.sites for item in site.shapes(inputs.k, 0, 0).items()]
    return {name: as_ort_value(cast(np.zeros([int(n) for n in shape]), inputs.dtype)) for name, shape in shapes}
