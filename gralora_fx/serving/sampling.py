"""Sampling options of `generate`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gralora_fx.errors import ServingError

CHUNK = 256  # positions of a prompt per chunk, since attention computes all pairs, masked or not
_NEW_TOKENS = 64
_LARGEST = 2**31 - 1  # integer that onnxruntime-genai accepts


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Most tokens to add; None for 64, or fewer if the context ends before.
        do_sample: Whether to draw; False takes the likeliest.
        top_k: How many of the likeliest to draw from; 0 for all.
        top_p: Share of the probability to draw from, in `(0, 1]`.
        temperature: Divisor of the logits, above 0.
        seed: Seed of the draws; None for a different one in every call.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    top_k: int = 50
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check every field, and that each has an effect."""
        if not isinstance(self.do_sample, (bool, np.bool_)):
            raise ServingError(f"do_sample must be True or False, but got {self.do_sample!r:.80}")
        if self.max_new_tokens is not None:
            _check_whole("max_new_tokens", self.max_new_tokens, 1)
        _check_whole("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0)
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ServingError(f"top_p must be in (0, 1], but got {self.top_p!r:.80}; take 1 for no limit")
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise ServingError(f"temperature must be above 0, but got {self.temperature!r:.80}; take do_sample=False")
        if not self.do_sample:
            drawing = [field for field in fields(self) if field.name not in ("max_new_tokens", "do_sample")]
            idle = [field.name for field in drawing if getattr(self, field.name) != field.default]
            if idle:
                raise ServingError(
                    f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect where the likeliest token is "
                    f"taken; give do_sample=True, or leave {'it' if len(idle) == 1 else 'them'} out"
                )

    def options(self, length: int, batch: int, context: int) -> dict[str, Any]:
        """onnxruntime-genai's search options for prompts of a length."""
        new = min(_NEW_TOKENS, context - length) if self.max_new_tokens is None else int(self.max_new_tokens)
        options: dict[str, Any] = {"max_length": length + new, "batch_size": batch, "do_sample": bool(self.do_sample)}
        if self.do_sample:
            options |= {
                "top_k": int(self.top_k),
                "top_p": float(self.top_p),
                "temperature": float(self.temperature),
            }
            if self.seed is not None:
                options["random_seed"] = int(self.seed)
        if batch == 1 and length > CHUNK:  # with several rows the runtime does not support chunks
            options["chunk_size"] = CHUNK
        return options


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ServingError(f"{name} must be a whole number from {least} on, but got {value!r:.80}")
    if value > _LARGEST:
        raise ServingError(f"{name} must be {_LARGEST} at most, but is larger")


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]
