"""The class of a rewritten model: its `forward` signature lists the inputs, and it is a `PeftModel`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn

from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.tracing.source_model import class_name, label_names, with_signature
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import RewriteError
from gralora_fx.format.input_names import ADAPTER_NAMES

_Model = TypeVar("_Model", bound=nn.Module)

_is_for_trainer = ContextVar("_is_for_trainer", default=True)

# PEFT's methods that need nothing but attributes of a GraloraModel
_SHARED = {
    "push_to_hub",
    "create_or_update_model_card",
    "active_peft_config",
    "base_model_torch_dtype",
    "modules_to_save",
}


@contextmanager
def without_trainer() -> Iterator[None]:
    """Create models within the block without PEFT as a base class, which only Trainer needs."""
    token = _is_for_trainer.set(False)
    try:
        yield
    finally:
        _is_for_trainer.reset(token)


def _peft_model() -> type[nn.Module] | None:
    """Return PEFT's class, the only one whose adapter files Trainer handles; None without Trainer or accelerate."""
    if not _is_for_trainer.get():
        return None
    from gralora_fx.base.compat.packages import missing_packages

    return None if missing_packages("train") else _imported_peft_model()


@functools.cache
def _imported_peft_model() -> type[nn.Module] | None:
    with quiet():  # PEFT's imports, such as bitsandbytes, log which of their kernels are not installed
        from transformers import trainer_utils
    return getattr(trainer_utils, "PeftModel", None)


def class_for(base: type[_Model], traced: TracedModel) -> type[_Model]:
    """Create the class of a trace's rewritten model, whose `forward` lists the traced inputs and the labels.

    If PEFT is installed it is a `PeftModel` too: transformers' Trainer checks that before it writes adapter files
    instead of a state dict. Methods of PEFT's class that this one does not support raise.
    """
    source = class_name(traced) if traced.config is not None else ""
    return _class(base, source, traced.input_names, label_names(traced.loss_function))


def restored(base: type[_Model], *description: Any) -> _Model:
    """Return an uninitialized model of such a class, for `pickle` and `copy` to fill."""
    model: _Model = object.__new__(_class(base, *description))
    return model


def _class(base: type[_Model], source: str, inputs: tuple[str, ...], labels: tuple[str, ...]) -> type[_Model]:
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": lambda self, _: (restored, (base, source, inputs, labels), self.__getstate__()),
        "__getattr__": base.__getattr__,  # PEFT's asks the base model for everything else
        "forward": with_signature(base.forward, inputs, (*labels, ADAPTER_NAMES)),
    }
    peft_model = _peft_model()
    if peft_model is None:
        return type(f"{base.__name__}{source}", (base,), members)
    refused = {
        name: _refusal(name)
        if inspect.isfunction(value)
        else property()  # a property without a getter raises AttributeError
        for name, value in vars(peft_model).items()
        if not name.startswith("_") and not hasattr(base, name) and name not in _SHARED
    }
    return type(f"{base.__name__}{source}", (base, peft_model), {**refused, **members})


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise RewriteError(f"a GraloraModel has no {name}: PEFT's works on the modules that a graph does not have")

    return refuse
