"""ONNX models written to an export directory, with their weights in files beside them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from gralora_fx.base.progress.stages import counting
from gralora_fx.exporters.artifact.staging import require_space

_WRITERS, _IN_FLIGHT = 2, 2**28  # threads that write weights, and the most bytes they hold at once
_INLINE = 1024  # bytes of the largest tensor that is written into the model itself


def save_models(
    onnx_models: Mapping[str, ir.Model], stage: Path, output_dir: str | Path, *, shared: bool = False
) -> None:
    """Write models, if there is room for them."""
    tensors = [tensor for model in onnx_models.values() for _, tensor in _weights(model)]
    if shared:
        tensors = list({_identity(tensor): tensor for tensor in tensors}.values())
    require_space(output_dir, sum(tensor.nbytes for tensor in tensors))
    written: dict[Hashable, ir.ExternalTensor] = {}
    for name, model in onnx_models.items():
        _save(model, stage, name, written)
        if not shared:
            written.clear()


def _save(model: ir.Model, stage: Path, name: str, written: dict[Hashable, ir.ExternalTensor]) -> None:
    """Write a model, and those of its weights that are not written yet, which are noted; the model stays as it is."""
    weights = list(_weights(model))
    identities = {id(tensor): _identity(tensor) for _, tensor in weights if tensor.nbytes > _INLINE}
    try:
        for value, tensor in weights:
            if identities.get(id(tensor)) in written:
                value.const_value = None  # which is passed over
        if not written or any(value.const_value is not None and id(tensor) in identities for value, tensor in weights):
            new = sum(value.const_value is not None and id(tensor) in identities for value, tensor in weights)
            done = itertools.count(1)
            with counting("writing weights", new, "tensors") as count:
                ir.external_data.unload_from_model(
                    model,
                    stage,
                    f"{name}.onnx_data",
                    size_threshold_bytes=_INLINE,
                    callback=lambda *_: count(next(done)),
                    max_workers=_WRITERS,
                    max_in_flight_bytes=_IN_FLIGHT,
                )
        for value, tensor in weights:
            identity = identities.get(id(tensor))
            if value.const_value is None:
                value.const_value = written[identity]
            elif isinstance(value.const_value, ir.ExternalTensor):
                written[identity] = value.const_value
        ir.save(model, stage / f"{name}.onnx")
    finally:
        for value, tensor in weights:
            value.const_value = tensor


def _weights(model: ir.Model) -> Iterable[tuple[ir.Value, ir.TensorProtocol]]:
    """The initializers of a model with their tensors, those of branches too."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value


def _identity(tensor: ir.TensorProtocol) -> Hashable:
    """What tells whether two tensors are the same: the object, or the values of a constant that a pass made."""
    if type(tensor) is ir.Tensor:
        return tensor.dtype, tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest()
    return id(tensor)
