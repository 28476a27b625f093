"""Recomputation of activations (gradient checkpointing): what transformers and PEFT ask a model about it."""

from __future__ import annotations

from typing import Any

from gralora_fx.errors import RewriteError


def refuse(self: Any, *_: Any, **__: Any) -> None:
    """Not supported: a graph has no blocks to recompute.

    Raises:
        RewriteError: Always.
    """
    raise RewriteError(
        "gradient checkpointing is not supported: a graph has no blocks to recompute; leave "
        "gradient_checkpointing=True out, and save memory with a smaller per_device_train_batch_size and more "
        "gradient_accumulation_steps"
    )


def do_nothing(self: Any) -> None:
    """Do nothing: it is never on."""


@property  # type: ignore[misc]  # of the class that takes it over
def is_on(self: Any) -> bool:
    """Never."""
    return False
