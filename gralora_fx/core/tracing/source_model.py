"""The class of the model that was traced: its name, main input, signature and loss, and its embeddings as modules."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.errors import TraceError
from gralora_fx.format.input_names import LABELS


class Traced(Protocol):
    """What a view reads of a traced model; each is described there (`TracedModel`)."""

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
        """Whether the model generates."""


def with_signature(function: Callable[..., Any], inputs: Iterable[str], labels: Iterable[str]) -> Callable[..., Any]:
    """A method that calls another, with a model's inputs and labels in its signature."""

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
    """Name of the class of the source model."""
    return traced.tree.types.get("", "Module").rpartition(".")[2]


def source_class(traced: Traced) -> type[Any] | None:
    """The class of the source model, if it is imported under its name."""
    module, _, name = traced.tree.types.get("", "").rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) else None


def main_input(traced: Traced) -> str:
    """Name of a model's main input, such as that of token ids."""
    name = getattr(source_class(traced), "main_input_name", None)
    return name if name in traced.input_names else next(iter(traced.input_names), "input_ids")


class _NotCalled(nn.Module):
    """A module over parameters of a graph, which the graph does not call."""

    def register_forward_hook(self, *_: Any, **__: Any) -> NoReturn:
        """Not supported: a hook would never run."""
        raise TraceError(
            "the graph does not call this module, so a hook on it would never run; leave out what needs one "
            "(neftune_noise_alpha, for example), or edit the graph with add_pass"
        )

    register_forward_pre_hook = register_full_backward_hook = register_full_backward_pre_hook = register_forward_hook


class EmbeddingTable(_NotCalled, nn.Embedding):
    """An embedding over the parameter that a graph reads."""


class OutputHead(_NotCalled, nn.Linear):
    """A linear layer over the parameters that a graph reads."""


def module_at(tree: ModuleTree, path: str, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module over the parameters at a path, which are those that the graph reads."""
    kind = tree.types[path]
    weight, bias = parameters.get(f"{path}.weight"), parameters.get(f"{path}.bias")
    if kind == "torch.nn.modules.sparse.Embedding" and weight is not None:
        module: nn.Module = EmbeddingTable(weight.shape[0], weight.shape[1], device="meta")
    elif kind == "torch.nn.modules.linear.Linear" and weight is not None:
        module = OutputHead(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        raise TraceError(
            f"{path} is a {kind.rpartition('.')[2]}, which computes more than a plain table or layer; its parameters "
            f"are those of traced.tree.parameters that begin with '{path}.'"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            module.register_parameter(name, parameter)
    return module


def loss_function_of(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """Return the loss function that transformers has for a model; None where it has none."""
    with quiet():  # of a class that is not named after its loss, transformers logs that its configuration names none
        found: Callable[..., Tensor] | None = getattr(model, "loss_function", None)
    return found


def label_names(loss_function: Callable[..., Tensor] | None) -> tuple[str, ...]:
    """Return the labels that a loss takes."""
    parameters = inspect.signature(loss_function).parameters if loss_function is not None else {}
    return tuple(name for name in LABELS if name in parameters)
