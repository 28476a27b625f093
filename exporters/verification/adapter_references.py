"""Models that an export is compared with whose adapters are data: with an adapter of the export folded in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gralora_fx.methods import AdapterTensors, Update
from gralora_fx.methods.fold import fold
from gralora_fx.methods.gralora import Factors
from gralora_fx.methods.lora import LoraFactors
from gralora_fx.model.merging import replace_weights, with_parameters
from gralora_fx.runtime.adapter_inputs import AdapterInputs
from gralora_fx.tracing.traced_model import TracedModel


def with_folded(base: TracedModel, tensors: Mapping[str, NDArray[Any]], inputs: AdapterInputs) -> TracedModel:
    """Return a float32 model with an adapter folded into its weights.

    Args:
        base: The model.
        tensors: The adapter's tensors as the export has them, by name.
        inputs: The layers whose adapters are data of the export.
    """
    sites = {site.path: site for site in base.sites}
    weights: dict[str, nn.Parameter] = {}
    biases: dict[int, nn.Parameter] = {}
    for entry in inputs.sites:
        names = [name for name in entry.names(inputs.k) if name in tensors]
        own = {name: torch.from_numpy(tensors[name].astype(np.float32)) for name in names}
        A, B, A_general, B_general, bias = entry.parts(own)
        if A_general is not None and B_general is not None:
            site, general = sites[entry.path], (A_general.t(), B_general.t())
            factors: AdapterTensors = LoraFactors(*general) if A is None or B is None else Factors(A, B, *general)
            folded = fold(site.weight.detach(), [Update(factors, 1.0)], transposed=site.kind == "conv1d")
            weights[entry.path] = nn.Parameter(folded, requires_grad=False)
        if bias is not None:
            before = base.tree.parameters[f"{entry.path}.bias"]
            biases[id(before)] = nn.Parameter(before.detach() + bias, requires_grad=False)
    return with_parameters(replace_weights(base, weights), biases)
