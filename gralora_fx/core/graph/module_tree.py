"""The modules of a source model by path: configurations name them, and a flat graph no longer has them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class ModuleTree:
    """Module paths and parameters of the model that a graph was traced from."""

    types: Mapping[str, str]  # class of each module by path, in the order of `named_modules()`; the root is `""`
    linear: frozenset[str]  # paths of the modules that are linear layers (`nn.Linear` or `Conv1D`)
    aliases: Mapping[str, str]  # other paths of a module that is registered more than once, to the first one
    parameters: Mapping[str, nn.Parameter]  # parameters by every name that reaches them, aliases included
    output_embedding: str | None = None  # path of the language-model head, if transformers names one
    input_embedding: str | None = None  # path of the token embeddings, if transformers names them
    # paths of the modules that say that they store stacked matrices `[stack, in, out]`
    transposed: frozenset[str] = frozenset()

    @property
    def parameter_count(self) -> int:
        """Number of values in the parameters; tied ones count once."""
        return sum({id(parameter): parameter.numel() for parameter in self.parameters.values()}.values())

    def __repr__(self) -> str:
        return f"ModuleTree({len(self.types)} modules, {len(self.linear)} linear layers)"

    @classmethod
    def of_module(cls, model: nn.Module) -> ModuleTree:
        """Return the tree of a live module."""
        first_path = {id(module): path for path, module in model.named_modules()}
        aliases = {
            path: first_path[id(module)]
            for path, module in model.named_modules(remove_duplicate=False)
            if path != first_path[id(module)]
        }
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        table = _input_embeddings(model)
        return cls(
            types={path: _qualified_name(type(module)) for path, module in model.named_modules()},
            linear=frozenset(path for path, module in model.named_modules() if isinstance(module, LINEAR_TYPES)),
            aliases=aliases,
            parameters=dict(model.named_parameters(remove_duplicate=False)),
            output_embedding=None if head is None else first_path.get(id(head)),
            input_embedding=None if table is None else first_path.get(id(table)),
            transposed=frozenset(p for p, m in model.named_modules() if getattr(m, "is_transposed", False) is True),
        )

    @classmethod
    def of_graph(cls, graph_module: fx.GraphModule) -> ModuleTree:
        """Return the tree recorded in the nodes of an exported graph, as far as it goes."""
        types: dict[str, str] = {"": _qualified_name(type(graph_module))}
        linear: set[str] = set()
        for node in graph_module.graph.nodes:
            for path, kind in module_stack(node):
                if path not in types:
                    types[path] = kind if isinstance(kind, str) else _qualified_name(kind)
                    if _is_linear_type(kind):
                        linear.add(path)
        return cls(
            types=types,
            linear=frozenset(linear),
            aliases={},
            parameters=dict(graph_module.named_parameters(remove_duplicate=False)),
        )

    def canonical(self, path: str) -> str:
        """Return the first path of the module at `path`."""
        return self.aliases.get(path, path)

    def innermost(self, node: fx.Node, default: str) -> str:
        """Return the first path of the innermost module that a node was traced in; the default if none is recorded."""
        stack = [path for path, _ in module_stack(node)]
        return self.canonical(stack[-1]) if stack else default

    def is_again(self, path: str) -> bool:
        """Return whether a path registers a module again, rather than passing through another module that is."""
        first = self.canonical(path)
        places = [(self.canonical(owner), name) for owner, _, name in (path.rpartition("."), first.rpartition("."))]
        return places[0] != places[1]

    def call_within(self, node: fx.Node, path: str) -> str | None:
        """Return the innermost call of the module at `path` that a node was traced in; None if it is outside."""
        return next((call for call, at, _ in reversed([*module_calls(node)]) if self.canonical(at) == path), None)

    def names_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        """Return every name of this parameter in the model."""
        return tuple(name for name, other in self.parameters.items() if other is parameter)


def recorded_path(text: str) -> str:
    """Return the path of a module that torch.export recorded, with the number of its call or without."""
    return text.removeprefix("L['self'].").partition("@")[0]


def module_calls(node: fx.Node) -> Iterator[tuple[str, str, type | str]]:
    """Yield the call, path and class (or its name) of the modules that a node was traced in, outermost first.

    The call is a text that is the same for all nodes of one call of a module, and another for its next call.
    """
    for key, entry in node.meta.get("nn_module_stack", {}).items():
        if isinstance(entry, tuple) and not entry[0].startswith("_empty_nn_module_stack"):
            path, _, number = entry[0].partition("@")  # it is here, or in the key
            path = recorded_path(path)
            yield f"{key}@{number}" if number else str(key), path, entry[1]


def module_stack(node: fx.Node) -> Iterator[tuple[str, type | str]]:
    """Yield path and class (or its qualified name) of the modules that a node was traced in, outermost first."""
    for _, path, kind in module_calls(node):
        yield path, kind


def innermost_path(node: fx.Node) -> str | None:
    """Return the path of the innermost module that a node was traced in; None for the model itself or if unknown."""
    return next((path for path, _ in reversed(list(module_stack(node))) if path), None)


def is_within(path: str, module: str) -> bool:
    """Return whether a path is a module's, or inside it."""
    return path == module or path.startswith(f"{module}.")


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Restore the modes of a module and its submodules when the block ends."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _input_embeddings(model: nn.Module) -> Any:
    """Return a transformers model's input embeddings, or None if it has none."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_linear_type(kind: type | str) -> bool:
    """Return whether a class is a linear layer; a name is looked up in imported modules, else judged as text."""
    if isinstance(kind, str):
        module_name, _, class_name = kind.rpartition(".")
        resolved = getattr(sys.modules.get(module_name), class_name, None)
        if not isinstance(resolved, type):
            return class_name.endswith("Linear") or class_name == "Conv1D"
        kind = resolved
    return issubclass(kind, LINEAR_TYPES)
