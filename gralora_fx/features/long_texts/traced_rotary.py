"""Rotary embeddings that depend on a text's length, in a form that a trace can follow."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from gralora_fx.base.compat.transformers_models import ROPE_INIT_FUNCTIONS
from gralora_fx.core.tracing.known_code import same_code
from gralora_fx.features.long_texts.operators import TextLength


def switched(module: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute LongRoPE: one set of frequencies for texts up to a length, and one for longer ones."""
    switch = int(module.config.rope_parameters["original_max_position_embeddings"])
    length = TextLength.compute(positions=position_ids, switch=switch, rereads=_rereads(module))
    of_long_texts, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, x.device, seq_len=switch + 1)
    is_long = (length > switch).unsqueeze(-1)
    return _rotation(module, x, position_ids, torch.where(is_long, of_long_texts, module.original_inv_freq))


def unscaled(module: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute dynamic NTK scaling within the model's context, where it scales nothing."""
    return _rotation(module, x, position_ids, module.original_inv_freq)


def _rotation(module: Any, x: Tensor, position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    half = position_ids.unsqueeze(-1).float() * frequencies.float()
    angles = torch.cat([half, half], dim=-1)
    cos, sin = (part * module.attention_scaling for part in (angles.cos(), angles.sin()))
    return cos.to(x.dtype), sin.to(x.dtype)


def _rereads(module: Any) -> bool:
    """Return whether the model's generation computes its cache anew where a text grows longer than the switch."""
    from transformers import Phi3ForCausalLM, PhimoeForCausalLM

    name = "prepare_inputs_for_generation"
    known = [getattr(kind, name) for kind in (Phi3ForCausalLM, PhimoeForCausalLM)]
    own = [
        vars(kind).get(name) for kind in vars(sys.modules[type(module).__module__]).values() if inspect.isclass(kind)
    ]
    return any(same_code(method, other) for method in own for other in known)
