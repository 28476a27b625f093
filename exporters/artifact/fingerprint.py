"""A fingerprint of a base model's weights, which tells whether an adapter belongs to another base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.sources.lazy_tensors import raw_values_of
from gralora_fx.tracing.traced_model import TracedModel

_SAMPLES = 64


def base_fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and a sample of the values of every parameter.

    Args:
        parameters: Parameters by name; tied ones may repeat.

    Raises:
        ExportError: A parameter is on the meta device and has no source of values.

    Returns:
        Hexadecimal digest, the same whether the tensors come from a live model or from its files.
    """
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        if tensor.numel():
            flat = raw_values_of(parameters[name], name).reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().to(tensor.dtype)
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(model: TracedModel | GraloraModel) -> str:
    """The fingerprint of a model's base, without the parameters that its active adapters hold copies of.

    What a copy replaces has no meaning for an export, and differs in every run where it is a fresh head.

    Args:
        model: A traced model, or a rewritten one with its active adapters.
    """
    if isinstance(model, TracedModel):
        return base_fingerprint(model.tree.parameters)
    copies = [model.adapter(name).copies for name in model.active_adapters]
    replaced = {base for owners in copies for owned in owners.values() for base in owned}
    parameters = model.traced.tree.parameters
    return base_fingerprint({name: value for name, value in parameters.items() if name not in replaced})
