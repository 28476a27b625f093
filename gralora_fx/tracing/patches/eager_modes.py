"""Checkpoints and inference mode of a model that is traced: what they compute, in a form that a graph can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils import checkpoint


@contextmanager
def traceable_modes() -> Iterator[list[str]]:
    """Let checkpoints run what they wrap, and inference mode be a region without gradients, while the block lasts.

    Of a reentrant checkpoint a trace sees a forward without gradients, which it computes again in the backward pass;
    of inference mode it sees nothing.

    Yields:
        A list that names each use of a checkpoint by the function that it ran.
    """
    used: list[str] = []
    around = checkpoint._checkpoint_without_reentrant_generator

    def note(function: Any) -> None:
        used.append(getattr(function, "__qualname__", type(function).__qualname__))

    class Direct:
        """Runs a function where `CheckpointFunction` would run it twice."""

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
