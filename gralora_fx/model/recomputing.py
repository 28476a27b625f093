"""Recomputation of activations (gradient checkpointing), for which transformers and PEFT ask a model by these verbs."""

from __future__ import annotations

from typing import Any

from gralora_fx.errors import RewriteError


def refuse(_: Any, *__: Any, **___: Any) -> None:
    """Not supported: a graph has no blocks to recompute.

    Raises:
        RewriteError: Always.
    """
    raise RewriteError(
        "gradient checkpointing is not supported: a graph has no blocks to recompute; leave "
        "gradient_checkpointing=True out, and save memory with a smaller per_device_train_batch_size and more "
        "gradient_accumulation_steps"
    )


def do_nothing(_: Any) -> None:
    """Do nothing: it is never on."""
