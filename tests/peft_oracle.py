"""PEFT's own GraLoRA and LoRA, which decide what is right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.gralora.layer import GraloraLayer
from peft.tuners.lora.layer import LoraLayer
from tiny_models import tiny_model
from transformers import PreTrainedModel

from gralora_fx import GraloraModel, trace


def peft_model(model: PreTrainedModel, seed: int = 1, *, method: str = "GRALORA", **fields: Any) -> peft.PeftModel:
    """Return a model that PEFT wrapped in place, its `B` drawn at random so that the adapter does something."""
    config = peft.GraloraConfig if method == "GRALORA" else peft.LoraConfig
    if method == "DORA":
        fields = {"use_dora": True, **fields}
    initial = {"init_weights" if method == "GRALORA" else "init_lora_weights": False}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT corrects by itself
        wrapped = peft.get_peft_model(model, config(**{**initial, **fields}))
    return wrapped.eval()


def saved_by_peft(
    name: str, directory: Path, *, sizes: Mapping[str, Any] | None = None, **fields: Any
) -> peft.PeftModel:
    """Return a tiny model (of other `sizes`) adapted by PEFT, and its checkpoint in `directory`."""
    wrapped = peft_model(tiny_model(name, **(sizes or {})), **fields)
    perturb_saved_modules(wrapped)
    wrapped.save_pretrained(str(directory))
    return wrapped


def perturb_saved_modules(wrapped: peft.PeftModel) -> None:
    """Move the trained copies of `modules_to_save` away from the base, as training does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted_paths(wrapped: peft.PeftModel) -> set[str]:
    """Return module paths that PEFT put an adapter at."""
    paths = {name for name, module in wrapped.named_modules() if isinstance(module, (GraloraLayer, LoraLayer))}
    return {name.removeprefix("base_model.model.") for name in paths}


def trainable_gradients(wrapped: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Gradients of PEFT's adapter tensors by the keys of its checkpoint."""
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in wrapped.named_parameters()
        if "gralora_" in name and parameter.grad is not None
    }


def same_adapter(
    model: PreTrainedModel, directory: Path, *, task: str | None = None, **fields: Any
) -> tuple[GraloraModel, peft.PeftModel]:
    """Return a model of ours and one of PEFT's over copies of one base, with the same adapter."""
    base = copy.deepcopy(model)
    wrapped = peft_model(model, **{"r": 4, "gralora_k": 2, "alpha": 8, "target_modules": "all-linear", **fields})
    wrapped.save_pretrained(str(directory))
    return GraloraModel.from_pretrained(trace(base, task=task), directory), wrapped
