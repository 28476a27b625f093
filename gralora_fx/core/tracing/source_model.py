"""The class of the traced model: its name, main input, signature and loss."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.format.input_names import LABELS


class Traced(Protocol):
    """The parts of a traced model that a view reads, as described in `TracedModel`."""

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The generation configuration."""

    @property
    def config(self) -> PreTrainedConfig | None:
        """The configuration."""

    @property
    def loss_function(self) -> Callable[..., Tensor] | None:
        """The loss of the model's class."""

    @property
    def shift_labels(self) -> Callable[[Tensor], Tensor] | None:
        """The model's own function from labels to decoder inputs."""

    @property
    def tree(self) -> ModuleTree:
        """Module paths and parameters."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the graph."""

    def can_generate(self) -> bool:
        """Return whether the model can generate."""


def with_signature(function: Callable[..., Any], inputs: Iterable[str], labels: Iterable[str]) -> Callable[..., Any]:
    """Return a method that calls another, with a model's inputs and labels in its signature."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    kinds = inspect.Parameter
    names = [name for name in dict.fromkeys((*inputs, *labels)) if name.isidentifier()]
    forward.__doc__ = function.__doc__
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kinds("self", kinds.POSITIONAL_OR_KEYWORD),
            *(kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=None) for name in names),
            kinds("kwargs", kinds.VAR_KEYWORD),
        ]
    )
    return forward


def class_name(traced: Traced) -> str:
    """Return the name of the source model's class."""
    return traced.tree.types.get("", "Module").rpartition(".")[2]


def source_class(traced: Traced) -> type[Any] | None:
    """Return the source model's class, if it is imported under its name."""
    module, _, name = traced.tree.types.get("", "").rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) else None


def main_input(traced: Traced) -> str:
    """Return the name of a model's main input, such as `input_ids`."""
    name = getattr(source_class(traced), "main_input_name", None)
    return name if name in traced.input_names else next(iter(traced.input_names), "input_ids")


def label_names(loss_function: Callable[..., Tensor] | None) -> tuple[str, ...]:
    """Return the names of the labels that a loss takes."""
    parameters = inspect.signature(loss_function).parameters if loss_function is not None else {}
    return tuple(name for name in LABELS if name in parameters)
