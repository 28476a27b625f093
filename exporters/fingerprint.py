"""A short name for a base model's weights, to tell an adapter of another base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from gralora_fx.deferred import raw_values_of

_SAMPLES = 64


def base_fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and a sample of the values of every parameter.

    Args:
        parameters: Parameters by name; tied ones may repeat.

    Raises:
        ExportError: A parameter stands on the meta device and has no source.

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
