"""Training and evaluation mode of a traced graph: annotates and switches the arguments that a trace bakes in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gralora_fx.base.compat.torch_graphs import schema_of
from gralora_fx.core.graph.kept_calls import averaging_norm
from gralora_fx.core.graph.module_tree import module_stack
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.operators import COMPUTING, DROPOUTS, TRAIN_FLAGS

MODES = "modes are annotated"
INLINED = "subgraphs that run once are inlined"
UNGUARDED = "there are no guards"
_KEY = "gralora_mode"
_aten = torch.ops.aten

# PyTorch's operators: position of the `train` flag
_FLAGS: dict[Any, int] = {
    _aten.dropout.default: 2,
    _aten.feature_dropout.default: 2,
    _aten.alpha_dropout.default: 2,
    _aten.feature_alpha_dropout.default: 2,
    _aten.dropout_.default: 2,
    _aten.native_dropout.default: 2,
    _aten.rrelu.default: 3,
    _aten.batch_norm.default: 5,
    _aten.instance_norm.default: 5,
    averaging_norm: 6,
    _aten.lstm.input: 6,
    _aten.gru.input: 6,
    _aten.rnn_tanh.input: 6,
    _aten.rnn_relu.input: 6,
}
# PyTorch's operators: position of the dropout probability, which evaluation sets to zero
_PROBABILITIES: dict[Any, int] = {_aten.scaled_dot_product_attention.default: 4}
# norms whose fourth argument are running statistics; without, those of the batch are used in both modes
_NORMS = {_aten.batch_norm.default, _aten.instance_norm.default}
_FUNCTIONAL = {
    torch.nn.functional.dropout,
    torch.nn.functional.alpha_dropout,
    torch.nn.functional.batch_norm,
    torch.nn.functional.rrelu,
}


@contract(needs={COMPUTING}, leaves={MODES})
@dataclass(frozen=True)
class AnnotateModes:
    """Annotate every node that depends on the mode with its argument in training and in evaluation.

    The annotation is in `node.meta["custom"]`, which copies and re-exports keep. A trace in evaluation mode has lost
    the dropout of attention.
    """

    # The mode that the model was traced in. An argument that is on in an evaluation trace, such as a dropout that
    # ignores the mode, is on in both and not annotated; one that is off in a training trace is off in both. None if
    # unknown.
    in_training: bool | None = None
    # paths of modules that are in evaluation mode in this trace alone, and of those that are in training too
    evaluated: Collection[str] = ()
    kept: Collection[str] = ()
    known: Collection[str] = ()  # names of nodes that were annotated before, or do not depend on the mode

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Annotate the nodes."""
        changed = 0
        for node in graph.nodes:
            switch = None if node.name in self.known else _mode_argument_values(node)
            if switch is not None and not self._is_constant(node, *switch):
                argument, trained, evaluated = switch
                note = {"argument": argument, "train": trained, "eval": evaluated}
                node.meta.setdefault("custom", {})[_KEY] = note
                changed += 1
        return PassResult(changed)

    def _is_constant(self, node: fx.Node, argument: int | str, trained: Any, evaluated: Any) -> bool:
        """Return whether an argument is the same in both modes."""
        path = next((path for path, _ in reversed(list(module_stack(node)))), "")
        if self.in_training and path not in self.evaluated:
            return bool(_read(node, argument) == evaluated)
        return path in self.kept or (self.in_training is False and bool(_read(node, argument) == trained))


def is_in_training(graph: fx.Graph) -> bool:
    """Return whether a graph is in training mode, by its annotated nodes."""
    switches = ((node, node.meta.get("custom", {}).get(_KEY)) for node in graph.nodes)
    return any(switch is not None and _read(node, switch["argument"]) == switch["train"] for node, switch in switches)


def find_rng_op(graph: fx.Graph) -> str | None:
    """Return an operator that draws random numbers in evaluation too, with the line of its call, or None."""
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
        if torch.Tag.nondeterministic_seeded in tags and _KEY not in node.meta.get("custom", {}) and _is_on(node):
            from gralora_fx.core.tracing.failures import call_named

            return call_named(node)
    return None


def _is_on(node: fx.Node) -> bool:
    """Return whether an operator that may draw random numbers does so with its current arguments."""
    argument = mode_argument(node)
    return argument is None or bool(_read(node, argument))


def set_mode(graph: fx.Graph, training: bool, *, drops: bool = True) -> bool:
    """Set every annotated argument to its value in a mode; without `drops`, training has no dropout.

    Before (training):  `dropout(x, 0.1, True)`
    After (evaluation): `dropout(x, 0.1, False)`
    """
    has_changed = False
    for node in graph.nodes:
        switch = node.meta.get("custom", {}).get(_KEY)
        if switch is not None:
            value = switch["train" if training and (drops or not _is_dropout(node)) else "eval"]
            if _read(node, switch["argument"]) != value:
                _write(node, switch["argument"], value)
                has_changed = True
    return has_changed


def dropouts(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes of a graph that zero values at random in training."""
    return [node for node in graph.nodes if _KEY in node.meta.get("custom", {}) and _is_dropout(node)]


def switches_more_than_dropout(graph: fx.Graph) -> bool:
    """Return whether training differs from evaluation by more than dropout."""
    return any(_KEY in node.meta.get("custom", {}) and not _is_dropout(node) for node in graph.nodes)


def trained_probability(node: fx.Node) -> float:
    """Return the probability with which a dropout zeroes values in training."""
    position = _probability(node.target)
    if position is not None:
        return float(node.meta["custom"][_KEY]["train"])
    return float(node.args[1] if len(node.args) > 1 else node.kwargs["p"])  # type: ignore[arg-type]


def _is_dropout(node: fx.Node) -> bool:
    return _probability(node.target) is not None or "dropout" in getattr(node.target, "__name__", "")


@contract(needs={MODES})
def evaluate(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Put a graph into evaluation mode, in which it is compared with its model."""
    return PassResult(int(set_mode(graph, False)))


def mode_argument(node: fx.Node) -> int | str | None:
    """Return the position or keyword of a node's mode-dependent argument, whatever its value; None if it has none."""
    if node.op == "call_function" and (position := _probability(node.target)) is not None:
        return position
    switch = _mode_argument_values(node)
    return None if switch is None else switch[0]


def updated_buffers(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Return names of buffers that a graph updates in either mode; batch norm's change only in training."""
    names = set(dict(graph_module.named_buffers(remove_duplicate=False)))
    updated = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or mode_argument(node) is not None or (schema := schema_of(node.target)) is None:
            continue
        values = [*node.args, *(node.kwargs.get(argument.name) for argument in schema.arguments[len(node.args) :])]
        for argument, value in zip(schema.arguments, values, strict=True):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, fx.Node) and value.op == "get_attr" and str(value.target) in names:
                updated.append(str(value.target))
    return tuple(dict.fromkeys(updated))


def trained_buffers(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return the buffers that a graph updates in training, such as those of batch norms, by name."""
    switched = (node for node in graph_module.graph.nodes if _KEY in node.meta.get("custom", {}))
    names = {str(source.target) for node in switched for source in node.all_input_nodes if source.op == "get_attr"}
    names.update(updated_buffers(graph_module))
    buffers = graph_module.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in buffers if name in names}


def _mode_argument_values(node: fx.Node) -> tuple[int | str, Any, Any] | None:
    """Return a node's mode-dependent argument with its values in training and in evaluation; None if it has none."""
    if node.op != "call_function":
        return None
    if (flag := _FLAGS.get(node.target, TRAIN_FLAGS.get(node.target))) is not None:
        of_batch = node.target in _NORMS and node.args[3] is None
        return None if of_batch else (flag, True, False)
    if node.target in _FUNCTIONAL and "training" in node.kwargs:
        return "training", True, False
    if (position := _probability(node.target)) is not None:
        probability = _read(node, position)
        return (position, probability, 0.0) if probability else None
    counter: Any = node
    while isinstance(counter, fx.Node) and counter.target is _aten.add_.Tensor:  # of a norm that is called again too
        counter = counter.args[0]
    if counter is not node and isinstance(counter, fx.Node) and counter.op == "get_attr":
        # BatchNorm counts its training batches in place
        return (1, 1, 0) if str(counter.target).endswith("num_batches_tracked") else None
    return None


def _probability(target: Any) -> int | None:
    """Return the position of an operator's dropout probability, or None."""
    return _PROBABILITIES.get(target, DROPOUTS.get(target))


def _read(node: fx.Node, argument: int | str) -> Any:
    if isinstance(argument, str):
        return node.kwargs.get(argument)
    return node.args[argument] if argument < len(node.args) else node.kwargs.get("dropout_p")


def _write(node: fx.Node, argument: int | str, value: Any) -> None:
    if isinstance(argument, str):
        node.update_kwarg(argument, value)
    elif argument < len(node.args):
        node.update_arg(argument, value)
    else:
        node.update_kwarg("dropout_p", value)
