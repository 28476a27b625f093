"""The class of one rewritten model: `forward` shows its inputs, and callers of PEFT's models take it for one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from transformers import trainer_utils

from gralora_fx.errors import RewriteError
from gralora_fx.losses import label_names
from gralora_fx.tracing.as_transformers import class_name, shown
from gralora_fx.tracing.traced import TracedModel

_Model = TypeVar("_Model", bound=nn.Module)

# transformers' Trainer writes and reads adapter files of this class alone; absent where PEFT is not installed
_PEFT_MODEL: type[nn.Module] | None = getattr(trainer_utils, "PeftModel", None)

# of PEFT's, what needs nothing but the attributes that a GraloraModel has
_SHARED = {
    "push_to_hub",
    "create_or_update_model_card",
    "active_peft_config",
    "base_model_torch_dtype",
    "modules_to_save",
}


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
    if _PEFT_MODEL is None:
        return type(f"{base.__name__}{source}", (base,), members)
    refused = {
        name: _refusal(name) if inspect.isfunction(value) else property()  # none: an AttributeError
        for name, value in vars(_PEFT_MODEL).items()
        if not name.startswith("_") and not hasattr(base, name) and name not in _SHARED
    }
    return type(f"{base.__name__}{source}", (base, _PEFT_MODEL), {**refused, **members})


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise RewriteError(f"a GraloraModel has no {name}: PEFT's works on the modules that a graph does not have")

    return refuse
