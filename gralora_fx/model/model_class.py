"""The class of one rewritten model: `forward` shows its inputs, and callers of PEFT's models take it for one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn

from gralora_fx.errors import RewriteError
from gralora_fx.tracing.as_transformers import class_name, shown
from gralora_fx.tracing.losses import label_names
from gralora_fx.tracing.traced_model import TracedModel

_Model = TypeVar("_Model", bound=nn.Module)

_is_for_trainer = ContextVar("_is_for_trainer", default=True)

# of PEFT's, what needs nothing but the attributes that a GraloraModel has
_SHARED = {
    "push_to_hub",
    "create_or_update_model_card",
    "active_peft_config",
    "base_model_torch_dtype",
    "modules_to_save",
}


@contextmanager
def without_trainer() -> Iterator[None]:
    """Let the models that are made in the block be ones that transformers' Trainer does not know: PEFT stays out.

    For a process that exports, and would import it for nothing.
    """
    token = _is_for_trainer.set(False)
    try:
        yield
    finally:
        _is_for_trainer.reset(token)


def _peft_model() -> type[nn.Module] | None:
    """PEFT's class of models, of which alone Trainer writes and reads adapter files; None where it is not installed."""
    if not _is_for_trainer.get():
        return None
    from transformers import trainer_utils

    return getattr(trainer_utils, "PeftModel", None)


def class_for(base: type[_Model], traced: TracedModel) -> type[_Model]:
    """The class of the rewritten model of a trace.

    Its `forward` shows the traced inputs and the labels. Where PEFT is installed it is a `PeftModel` too, for that is
    what transformers' Trainer asks before it writes an adapter's files instead of a state dict. What PEFT's class can
    do and this one cannot is refused by name.

    Args:
        base: `GraloraModel`, or a class of the user derived from it.
        traced: The traced model.
    """
    source = class_name(traced) if traced.config is not None else ""
    return _class(base, source, traced.input_names, label_names(traced.loss_function))


def restored(base: type[_Model], *description: Any) -> _Model:
    """An empty model of such a class, for `pickle` and `copy` to fill."""
    model: _Model = object.__new__(_class(base, *description))
    return model


def _class(base: type[_Model], source: str, inputs: tuple[str, ...], labels: tuple[str, ...]) -> type[_Model]:
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": lambda self, _: (restored, (base, source, inputs, labels), self.__getstate__()),
        "__getattr__": base.__getattr__,  # PEFT's asks the base model for everything else
        "forward": shown(base.forward, inputs, labels),
    }
    peft_model = _peft_model()
    if peft_model is None:
        return type(f"{base.__name__}{source}", (base,), members)
    refused = {
        name: _refusal(name) if inspect.isfunction(value) else property()  # none: an AttributeError
        for name, value in vars(peft_model).items()
        if not name.startswith("_") and not hasattr(base, name) and name not in _SHARED
    }
    return type(f"{base.__name__}{source}", (base, peft_model), {**refused, **members})


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise RewriteError(f"a GraloraModel has no {name}: PEFT's works on the modules that a graph does not have")

    return refuse
