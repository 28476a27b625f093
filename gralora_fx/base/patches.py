"""Patches that other threads do not notice, while a model is traced."""

from __future__ import annotations

import builtins
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

# Held while a model is traced or anything is patched: patches of two threads would undo each other.
ONE_TRACE = threading.RLock()
_BEFORE = "gralora_before_patch"  # a patched function's attribute


@contextmanager
def patched_here(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a function, method or class method for this thread's calls within the block.

    Other threads call the original, through a function that asks which thread calls.
    """
    with ONE_TRACE:
        builtin = vars(builtins).get(name)  # as a module's own `print`
        original = inspect.getattr_static(owner, name, builtin)
        of_class = isinstance(original, classmethod)
        before: Any = original.__func__ if of_class else getattr(owner, name, builtin)
        is_here: ContextVar[bool] = ContextVar(name, default=False)

        def chosen(*args: Any, **kwargs: Any) -> Any:
            return (replacement if is_here.get() else before)(*args, **kwargs)

        functools.update_wrapper(chosen, before)
        vars(chosen)[_BEFORE] = before
        token = is_here.set(True)
        try:
            with patch.object(owner, name, classmethod(chosen) if of_class else chosen):
                yield
        finally:
            is_here.reset(token)


def unpatched(function: Any) -> Any:
    """Return the function that `patched_here` has replaced, where it has."""
    while (before := getattr(function, _BEFORE, None)) is not None:
        function = before
    return function
