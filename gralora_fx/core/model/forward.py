"""The forward of a rewritten model: it binds the inputs, runs the graph, and computes the loss of labels."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.errors import RewriteError
from gralora_fx.format.input_names import ADAPTER_NAMES, ITEM_COUNT, PACKING, PAST, STARTS, split_labels

if TYPE_CHECKING:
    from gralora_fx.core.adapters.run_forms import RunForm


class Model(Protocol):
    """The attributes of a `GraloraModel` that its forward needs."""

    _state: AdapterGraph
    training: bool

    @property
    def config(self) -> Any:
        """The base model's transformers configuration, or None."""


def compute(model: Model, *args: Any, by_adapter: bool = False, **kwargs: Any) -> Any:
    """Run the graph, and compute the loss of labels, or one loss for each adapter's rows."""
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
    """Run the graph; return its outputs, the labels, and the number that their loss is divided by."""
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
    names, starts = inputs.pop(ADAPTER_NAMES, None), inputs.pop(STARTS, None)
    traced = model._state.base.traced
    bound, rows = traced.bind(args, inputs), None
    if names is not None:
        from gralora_fx.core.adapters.adapter_rows import rows_of_call

        rows = rows_of_call(names, bound[traced.main_input_name], model._state.__getitem__)
    if starts is not None and (acting := acting_adapters(model._state, rows)):
        from gralora_fx.core.adapters.acting_tokens import given_starts
        from gralora_fx.core.adapters.run_forms import RunForm

        batch, length = bound[traced.main_input_name].shape
        bound[STARTS] = given_starts(starts, acting, rows, batch, _columns_before(bound, length))
        form = (form or RunForm())._replace(takes_starts=True)
    return model._state.run(bound, form, rows)


def _columns_before(inputs: Mapping[str, Any], length: int) -> int:
    """Return the number of cached columns in a call's rows, before the new ones."""
    if PAST not in inputs:
        return 0
    from gralora_fx.core.tracing.inputs.cache import cached_length

    past = cached_length(inputs[PAST])
    if past is None:  # a cache with only states; the mask covers all columns
        mask = inputs.get("attention_mask")
        past = 0 if mask is None else mask.shape[1] - length
    return past


def acting_adapters(state: AdapterGraph, rows: Iterable[str] | None) -> dict[str, tuple[int, ...]]:
    """Return the adapters of a run that act on some tokens only: of the rows' adapters, or of the active ones."""
    names = state.state.active if rows is None else () if state.is_suspended else rows
    return {name: tokens for name in names if (tokens := state[name].config.acts_from)}


def starts_of_prompts(model: Model, ids: Tensor, adapter_names: object) -> dict[str, Tensor] | None:
    """Return the start column of adapters in each prompt, for the steps of `generate`; None if all act everywhere."""
    rows = None
    if adapter_names is not None:
        from gralora_fx.core.adapters.adapter_rows import rows_of_call

        rows = rows_of_call(adapter_names, ids, model._state.__getitem__)
    acting = acting_adapters(model._state, rows)
    if not acting:
        return None
    from gralora_fx.core.adapters.acting_tokens import starts_in

    return starts_in(ids, acting, rows)
