"""Example inputs of models that read audio: samples, or spectrogram features."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from gralora_fx.core.graph.module_tree import kept_modes
from gralora_fx.core.tracing.inputs.samples import BATCH, part_with

_FRAMES = 20
_SAMPLES = 4000  # a quarter of a second


def example_of(model: PreTrainedModel, name: str, generator: torch.Generator) -> torch.Tensor | None:
    """Return random audio of the shape that a model takes."""
    sounds = [torch.randn(shape, generator=generator) for shape in _shapes(model.config, name)]
    if not sounds:
        return None
    return next((sound for sound in sounds if len(sounds) > 1 and _runs_on(model, name, sound)), sounds[0])


def _shapes(config: Any, name: str) -> list[tuple[int, ...]]:
    """Return the shapes that a model's audio input may have, most common first; none for other inputs."""
    bins = getattr(part_with(config, "num_mel_bins"), "num_mel_bins", None)
    if name == "input_values":
        if bins and hasattr(config, "max_length"):
            return [(BATCH, config.max_length, bins)]  # a spectrogram
        return [(BATCH, _SAMPLES), (BATCH, 1, _SAMPLES)]  # some take a channel
    if name != "input_features":
        return []
    width = _frame_width(config)
    frames = 2 * getattr(config, "max_source_positions", 64)
    shapes: list[tuple[int, ...]] = [(BATCH, bins, frames), (BATCH, frames, bins)] if bins else []
    return shapes or ([(BATCH, _FRAMES, width)] if width else [])


def _runs_on(model: PreTrainedModel, name: str, value: torch.Tensor) -> bool:
    """Return whether a model, in evaluation mode, runs with this input alone."""
    try:
        with kept_modes(model), torch.no_grad(), torch.random.fork_rng(devices=()):
            model.eval()
            model(**{name: value.to(model.dtype)})
    except Exception:  # noqa: BLE001  # a model raises what it likes where a shape is not its own
        return False
    return True


def _frame_width(config: Any) -> int | None:
    """Return the features per frame of a model that takes `[batch, frames, features]`; None for others."""
    names = ("feature_projection_input_dim", "input_feat_per_channel", "feature_size", "input_dim")
    return next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
