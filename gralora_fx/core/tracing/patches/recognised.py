"""Code of models that a trace recognises, and replaces by operators or by a form that can be traced.

transformers' models copy functions from each other verbatim. A function with the same code computes the same, so one
replacement serves all of them: the graph is easier to match, and tracing takes half the time. A trace is compared with
the model afterwards, so that a replacement which is no longer right is found.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from torch import nn

_MODELS = "transformers.models"
_PATCHES = "gralora_fx.core.tracing.patches"


@dataclass(frozen=True)
class Recognised:
    """Code of one model, which others may have copied, and what replaces it.

    Attributes:
        place: A method or a function by its path below `transformers.models`, as in
            `"llama.modeling_llama:LlamaRMSNorm.forward"`. It is imported once a model has code of that name.
        replacement: A function by its path below `folder`, as `"other_layers:drop_path"`. It
            takes the same arguments and gives the same results; a method's takes the module first. It is imported once
            a model has the code.
        ending: How the names of the classes end whose method may be it, or several such endings.
        beside: Functions or methods that must be of the same code too, since it calls them.
        fits: Whether a module with the method is one that the replacement is for.
        folder: The package of the replacement.
    """

    place: str
    replacement: str
    ending: str | tuple[str, ...] = ""
    beside: tuple[str, ...] = ()
    fits: Callable[[Any], bool] = lambda _: True
    folder: str = _PATCHES

    @property
    def path(self) -> list[str]:
        """The function's name, after that of its class if it has one."""
        return self.place.partition(":")[2].split(".")

    def is_method_of(self, kind: type[nn.Module]) -> bool:
        """Whether a class has the method, and those beside it."""
        names = (self.path[-1], *self.beside)
        is_one = len(self.path) == 2 and kind.__name__.endswith(self.ending)
        if not is_one or not all(hasattr(kind, name) for name in names):
            return False
        own = getattr(self._module(), self.path[0])
        return all(same_code(getattr(kind, name), getattr(own, name)) for name in names)

    def is_function_of(self, module: ModuleType) -> bool:
        """Whether a Python module has the function, and those beside it."""
        names = (*self.path, *self.beside)
        has_names = len(self.path) == 1 and all(hasattr(module, name) for name in names)
        return has_names and all(same_code(getattr(module, name), getattr(self._module(), name)) for name in names)

    def replaces_in(self, module: nn.Module) -> bool:
        """Whether a module has the method, and is one that the replacement is for."""
        return self.path[-1] not in vars(module) and self.is_method_of(type(module)) and self.fits(module)

    def load(self) -> Callable[..., Any]:
        """Import the replacement."""
        file, _, name = self.replacement.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"{self.folder}.{file}"), name)
        return function

    def replaced_in(self, model: nn.Module, changed: ExitStack) -> None:
        """Replace it wherever a model has it, until the stack is closed."""
        name = self.path[-1]
        for module in model.modules():
            if self.replaces_in(module):
                changed.enter_context(patch.object(module, name, functools.partial(self.load(), module)))
        for owner in sorted({type(module).__module__ for module in model.modules()} & sys.modules.keys()):
            if self.is_function_of(sys.modules[owner]):
                changed.enter_context(patch.object(sys.modules[owner], name, self.load()))

    def _module(self) -> ModuleType:
        return importlib.import_module(f"{_MODELS}.{self.place.partition(':')[0]}")


def same_code(one: Any, other: Callable[..., Any]) -> bool:
    """Whether two functions have the same instructions over the same names, constants and defaults.

    Of a function with decorators it is the function itself that counts: a decorator's code is the same for all.
    """
    one, other = inspect.unwrap(one) if callable(one) else one, inspect.unwrap(other)
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return False
    return _meaning(one.__code__) == _meaning(other.__code__) and one.__defaults__ == other.__defaults__


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """A function's code without its location and docstring, and likewise that of functions within it."""
    constants = [
        _meaning(constant) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
        if not isinstance(constant, str)
    ]
    return code.co_code, code.co_names, code.co_varnames, constants, code.co_freevars


@contextmanager
def replaced(model: nn.Module, table: Sequence[Recognised]) -> Iterator[None]:
    """Let a model call what replaces recognised code, within the block."""
    with ExitStack() as changed:
        for code in table:
            code.replaced_in(model, changed)
        yield
