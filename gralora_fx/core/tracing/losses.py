"""The loss of a transformers model called with labels, computed outside the graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import ForQuestionAnsweringLoss, ForSequenceClassificationLoss, ForTokenClassification

from gralora_fx.errors import RewriteError
from gralora_fx.format.input_names import ITEM_COUNT

# These pass the count on to the cross entropy through their keyword arguments.
_COUNTING = (ForQuestionAnsweringLoss, ForSequenceClassificationLoss, ForTokenClassification)


def counts_items(loss_function: Callable[..., Tensor] | None) -> bool:
    """Return whether a loss takes `num_items_in_batch`, so that accumulated batches count like one large batch."""
    if loss_function is None:
        return False
    return loss_function in _COUNTING or ITEM_COUNT in inspect.signature(loss_function).parameters


def decoder_inputs(labels: Tensor, config: PreTrainedConfig, shift: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return labels `[batch, length]` shifted right by `shift`, the model's own function, or after the start token."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(config, "bos_token_id", None)
    if start is None:
        raise RewriteError(
            f"{type(config).__name__} has no decoder_start_token_id, so give decoder_input_ids beside the labels"
        )
    if shift is not None:
        return shift(labels)
    shifted = labels.new_full(labels.shape, int(start))
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == -100, int(config.pad_token_id or 0))


def model_loss(
    outputs: Any,
    labels: Mapping[str, Tensor],
    loss_function: Callable[..., Tensor] | None,
    config: PreTrainedConfig | None,
    item_count: Tensor | int | None = None,
) -> Tensor:
    """Compute the loss of a model's outputs with transformers' loss function for the model's class."""
    if loss_function is None or config is None:
        raise RewriteError("labels were given, but the traced model has no loss function; compute the loss outside")
    if getattr(config, "output_router_logits", False):
        raise RewriteError("the router's auxiliary loss is not part of the trace; compute the loss outside")
    if item_count is not None and not counts_items(loss_function):
        raise RewriteError(
            f"the loss {getattr(loss_function, '__name__', loss_function)} takes no {ITEM_COUNT}; leave it out and "
            "divide by the number of accumulated batches"
        )
    try:
        return _loss(outputs, labels, loss_function, config, item_count)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, RewriteError):
            raise
        wrong = _out_of_range(labels.get("labels"), getattr(outputs, "logits", None)) or str(error)
        raise RewriteError(f"the loss cannot be computed from these labels and outputs: {wrong}") from error


def _loss(
    outputs: Any,
    labels: Mapping[str, Tensor],
    loss_function: Callable[..., Tensor],
    config: PreTrainedConfig,
    item_count: Tensor | int | None,
) -> Tensor:
    is_generation = hasattr(outputs, "logits") and outputs.logits.ndim == 3
    if config.is_encoder_decoder and is_generation:
        # encoder-decoders do not shift the labels: the decoder's inputs are shifted instead
        logits = outputs.logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels["labels"].reshape(-1),
            ignore_index=-100,
            reduction="mean" if item_count is None else "sum",
        )
        return loss if item_count is None else loss / item_count
    arguments = _arguments(outputs, labels, loss_function, config)
    if item_count is not None:
        arguments[ITEM_COUNT] = item_count
    loss = loss_function(**arguments)
    if item_count is not None and loss_function is ForSequenceClassificationLoss:
        if config.problem_type != "single_label_classification":  # the others are means, regardless of the count
            loss = loss * labels["labels"].ne(-100).sum() / item_count
    return loss


def _out_of_range(labels: Tensor | None, logits: Tensor | None) -> str | None:
    """Describe the first label that is not one of the outputs' classes; None if all are."""
    if labels is None or logits is None or labels.is_floating_point():
        return None
    wrong = ((labels < 0) & (labels != -100)) | (labels >= logits.shape[-1])
    if not bool(wrong.any()):
        return None
    place = wrong.nonzero()[0].tolist()
    return (
        f"the label {int(labels[tuple(place)])} at {place} is none of the {logits.shape[-1]} classes; labels are from "
        f"0 to {logits.shape[-1] - 1}, or -100 where there is no loss"
    )


def _arguments(
    outputs: Any, labels: Mapping[str, Tensor], loss_function: Callable[..., Tensor], config: PreTrainedConfig
) -> dict[str, Any]:
    """Return the arguments of a loss function from outputs, labels and configuration."""
    logits = getattr(outputs, "logits", None)
    offered = {
        **labels,
        "logits": logits,
        "pooled_logits": logits,
        "start_logits": getattr(outputs, "start_logits", None),
        "end_logits": getattr(outputs, "end_logits", None),
        "config": config,
        "vocab_size": getattr(config.get_text_config(), "vocab_size", None),
    }
    parameters = inspect.signature(loss_function).parameters
    arguments = {name: value for name, value in offered.items() if name in parameters and value is not None}
    absent = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in arguments
    ]
    if absent:
        raise RewriteError(
            f"the loss {getattr(loss_function, '__name__', loss_function)} needs {', '.join(absent)}, which neither "
            f"the labels ({', '.join(labels)}) nor the outputs give; compute the loss outside"
        )
    return arguments
