"""Traceable replacements of gradient checkpoints and inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils import checkpoint


@contextmanager
def traceable_modes() -> Iterator[list[str]]:
    """Within the block, checkpoints call their function directly, and inference mode only turns gradients off.

    A trace would record a reentrant checkpoint as a forward without gradients, and inference mode not at all.

    Yields:
        A list to which each use of a checkpoint adds the name of its function.
    """
    used: list[str] = []
    around = checkpoint._checkpoint_without_reentrant_generator

    def note(function: Any) -> None:
        used.append(getattr(function, "__qualname__", type(function).__qualname__))

    class Direct:
        """Calls a function directly, in place of `CheckpointFunction`."""

        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            note(function)
            return function(*args)

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        note(function)
        return around(function, *args, **kwargs)

    def enter(mode: Any) -> None:
        mode._inference_mode_context = torch.is_grad_enabled()
        torch.set_grad_enabled(not mode.mode)

    def leave(mode: Any, *_: object) -> None:
        torch.set_grad_enabled(mode._inference_mode_context)

    inference = patch.multiple(torch.inference_mode, __enter__=enter, __exit__=leave)
    replaced = patch.multiple(checkpoint, CheckpointFunction=Direct, _checkpoint_without_reentrant_generator=noted)
    with replaced, inference:
        yield used
