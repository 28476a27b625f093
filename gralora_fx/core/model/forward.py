"""The forward of a rewritten model: its inputs in the form that the graph takes, the graph, and the loss of labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.errors import RewriteError
from gralora_fx.format.input_names import ADAPTER_NAMES, ITEM_COUNT, PACKING, PAST, split_labels

if TYPE_CHECKING:
    from gralora_fx.core.adapters.run_forms import RunForm


class Model(Protocol):
    """What a forward needs of a `GraloraModel`."""

    _state: AdapterGraph
    training: bool

    @property
    def config(self) -> Any:
        """The base model's transformers configuration, or None."""


def compute(model: Model, *args: Any, by_adapter: bool = False, **kwargs: Any) -> Any:
    """Run the graph, and compute the loss of labels, or that of each adapter's rows."""
    names = kwargs.get(ADAPTER_NAMES)
    if by_adapter and model.training and torch.is_grad_enabled():
        from gralora_fx.core.adapters.adapter_rows import check_trained

        check_trained(names, model._state.__getitem__)
    outputs, labels, item_count = _outputs(model, args, kwargs)
    if by_adapter:
        from gralora_fx.core.adapters.adapter_rows import loss_of_rows

        return loss_of_rows(outputs, labels, names, functools.partial(_loss, model, item_count=item_count))
    if not labels:
        return outputs
    loss = _loss(model, outputs, labels, item_count)
    return type(outputs)(**{"loss": loss, **{k: v for k, v in outputs.items() if k != "loss"}})


def _loss(model: Model, outputs: Any, labels: Mapping[str, Any], item_count: Any) -> Tensor:
    from gralora_fx.core.tracing.losses import model_loss

    return model_loss(outputs, labels, model._state.base.traced.loss_function, model.config, item_count)


def _outputs(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """Run the graph, and return its outputs, the labels, and by what their loss is divided."""
    traced = model._state.base.traced
    inputs, labels = split_labels(kwargs, traced.input_names)
    item_count = inputs.pop(ITEM_COUNT, None)
    form = None
    if PAST in traced.input_names or not PACKING.isdisjoint(inputs):
        from gralora_fx.core.adapters.run_forms import form_of

        form = form_of(traced, inputs, keeps_cache=not (labels and model.training))
    if "decoder_input_ids" in traced.input_names and inputs.get("decoder_input_ids") is None and "labels" in labels:
        from gralora_fx.core.tracing.losses import decoder_inputs

        inputs["decoder_input_ids"] = decoder_inputs(labels["labels"], model.config, traced.shift_labels)
    return _run(model, args, inputs, form), labels, item_count


def run_to_head(model: Model, *args: Any, **kwargs: Any) -> Any:
    """Run the graph up to the language model's head, and return the head's input."""
    from gralora_fx.core.adapters.run_forms import check_head, form_of

    state, inputs = model._state, dict(kwargs)
    if inputs.get(ADAPTER_NAMES) is not None:
        raise RewriteError("adapter_names needs the logits of each row, which a loss from the head's input skips")
    head = check_head(state.base.traced, [state[name] for name in state.state.active])
    form = form_of(state.base.traced, inputs, keeps_cache=False, ends_at=head)
    return _run(model, args, inputs, form)


def _run(model: Model, args: tuple[Any, ...], inputs: dict[str, Any], form: RunForm | None) -> Any:
    if hasattr(model, "reshard"):  # FSDP2's
        model._state.check_precision()
    names = inputs.pop(ADAPTER_NAMES, None)
    traced = model._state.base.traced
    bound = traced.bind(args, inputs)
    if names is None:
        return model._state.run(bound, form)
    from gralora_fx.core.adapters.adapter_rows import rows_of_call

    rows = rows_of_call(names, bound[traced.main_input_name], model._state.__getitem__)
    return model._state.run(bound, form, rows)
