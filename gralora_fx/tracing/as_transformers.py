"""A traced graph as a transformers model: with its class's name, its inputs in `forward`, and `generate`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import BaseModelOutput

from gralora_fx.errors import TraceError, warn_caller
from gralora_fx.graph.module_tree import ModuleTree
from gralora_fx.tracing.generation import check_generation
from gralora_fx.tracing.inputs.decoder_cache import PAST, own_cache
from gralora_fx.tracing.losses import counts_items, decoder_inputs, label_names
from gralora_fx.tracing.normalize.embeddings import module_at


class Traced(Protocol):
    """What a view reads of a traced model; each is described there (`TracedModel`)."""

    generation_config: GenerationConfig | None
    config: PreTrainedConfig | None
    loss_function: Callable[..., Tensor] | None
    shift_labels: Callable[[Tensor], Tensor] | None
    tree: ModuleTree

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the graph."""

    def can_generate(self) -> bool:
        """Whether the model generates."""


class TransformersView(GenerationMixin, nn.Module):  # type: ignore[misc]  # transformers has no types
    """A view of a traced graph with the attributes of a transformers model; it owns no parameters.

    Args:
        traced: The traced model.
        run: Runs the graph; called like the model.
        parameters: The parameters that `run` reads, by the names of the source model.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    input_modalities = ("text",)

    def __init__(self, traced: Traced, run: Callable[..., Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """View a traced model; use `view_of`."""
        super().__init__()
        self.traced = traced
        self.config = traced.config
        self.is_encoder_decoder = bool(getattr(traced.config, "is_encoder_decoder", False))
        self.main_input_name = main_input(traced)
        self._run = run
        self._read = parameters
        self._given_cache: Cache | None = None

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The generation configuration."""
        return self.traced.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.traced.generation_config = value

    @property
    def model(self) -> TransformersView:
        """The view itself, for users of PEFT's `base_model.model`."""
        return self

    @property
    def loss_type(self) -> str | None:
        """Name of the loss in transformers, if the class is named after it."""
        names = (name for name, loss in LOSS_MAPPING.items() if loss is self.traced.loss_function)
        return next((name for name in names if name in class_name(self.traced)), None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss takes `num_items_in_batch`."""
        return counts_items(self.traced.loss_function)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next((parameter.device for parameter in self._read.values()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        types = (parameter.dtype for parameter in self._read.values() if parameter.is_floating_point())
        return next(types, torch.get_default_dtype())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph with the inputs of a step of `generate`.

        Raises:
            TraceError: An input was not part of the trace.
        """
        keeps_cache = kwargs.pop("use_cache", None) is not False
        kwargs.pop("return_dict", None)
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None) and name not in self.traced.input_names:
                raise TraceError(f"{name} was not part of the trace; trace the model with it among the example inputs")
        source = kwargs.pop("encoder_outputs", None)
        if source is not None:  # passed through by _Source
            kwargs[self.main_input_name] = source.last_hidden_state
        cache = kwargs.pop("cache", None)
        if isinstance(cache, (DynamicCache, EncoderDecoderCache)) and cache.get_seq_length() > 0:
            kwargs[PAST] = (
                own_cache(cache) if cache is self._given_cache else cache
            )  # the loop has marked the user's cache
        else:
            self._check_positions(kwargs.get("attention_mask"))
        outputs = self._run(*args, **kwargs)
        if keeps_cache or "cache" not in outputs:
            return outputs
        return type(outputs)(**{name: value for name, value in outputs.items() if name != "cache"})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate by transformers' own loop, with the active adapters, in the model's current mode.

        Args:
            *args: As of transformers' `generate`: the prompt's token ids `[batch, length]`.
            **kwargs: As of transformers' `generate`: `attention_mask`, `max_new_tokens`, `do_sample`, `num_beams`,
                `streamer`, `generation_config` and the others.

        Returns:
            What transformers' `generate` returns: token ids `[batch, length]`, the prompt included.

        Raises:
            TraceError: The model does not generate, or an option is not supported over a trace.
        """
        name = class_name(self.traced)
        if not self.traced.can_generate():
            raise TraceError(f"{name} does not generate; trace a model with a language-model head")
        check_generation(name, source_class(self.traced), kwargs)
        self._given_cache = kwargs.get(PAST, kwargs.get("cache"))
        if PAST not in self.traced.input_names:
            if _option(self, kwargs, "use_cache") is not False:
                task = "text2text-generation" if self.is_encoder_decoder else "text-generation"
                warn_caller(
                    "the model was traced without a cache, so every new token computes all positions again; "
                    f"trace it with task='{task}-with-past' to generate faster"
                )
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings, as a module over the parameter that the graph reads.

        Raises:
            TraceError: The model has none, or the module is more than a table.
        """
        path = self.traced.tree.input_embedding
        if path is None:
            raise TraceError(f"{class_name(self.traced)} has no input embeddings that its class names")
        return module_at(self.traced.tree, path, self._read)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language-model head, as a module over the parameters that the graph reads; None where there is none.

        Raises:
            TraceError: It is more than a linear layer.
        """
        path = self.traced.tree.output_embedding
        return None if path is None else module_at(self.traced.tree, path, self._read)

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        """An encoder that passes its input through, since the graph contains the encoder."""
        return _Source(self.main_input_name)

    def is_remote_code(self) -> bool:
        """Always False: the graph is the code."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Experts are part of the graph, so there is nothing to switch."""
        return {}

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels shifted right, for collators that feed an encoder-decoder's decoder.

        Args:
            labels: Token ids `[batch, length]`, -100 where the loss leaves one out.
        """
        return decoder_inputs(labels, self.config, self.traced.shift_labels)

    def _check_positions(self, mask: Tensor | None) -> None:
        if mask is None or "position_ids" in self.traced.input_names or self.is_encoder_decoder:
            return
        source = source_class(self.traced)
        if source is None or "position_ids" not in inspect.signature(source.forward).parameters:
            return
        if bool((mask == 0).any()):
            raise TraceError(
                "rows of unequal length need position_ids, which the trace does not take; trace the model with "
                "task='text-generation-with-past', or generate row by row without padding"
            )


class _Source(nn.Module):
    """A stub encoder that returns its input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=kwargs[self.name])


def view_of(
    traced: Traced, run: Callable[..., Any], parameters: Mapping[str, nn.Parameter], *, labels: bool
) -> TransformersView:
    """A traced model as a transformers model.

    Args:
        traced: The traced model.
        run: Runs the graph; called like the model.
        parameters: The parameters that `run` reads, by the names of the source model.
        labels: Whether `run` takes labels.
    """
    inputs = ["cache" if name == PAST else name for name in traced.input_names]
    if getattr(traced.config, "is_encoder_decoder", False):
        inputs.append("encoder_outputs")
    forward = with_signature(TransformersView.forward, inputs, label_names(traced.loss_function) if labels else ())
    cls = type(class_name(traced), (TransformersView,), {"forward": forward, "__module__": __name__})
    view: TransformersView = cls(traced, run, parameters)
    return view


def with_signature(function: Callable[..., Any], inputs: Iterable[str], labels: Iterable[str]) -> Callable[..., Any]:
    """A method that calls another, with a model's inputs and labels in its signature.

    Args:
        function: Takes the object, `*args` and `**kwargs`.
        inputs: Names of the inputs, in order.
        labels: Names of the labels.
    """

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
    """Name of a model's main input: token ids, pixels, or sound."""
    name = getattr(source_class(traced), "main_input_name", None)
    return name if name in traced.input_names else next(iter(traced.input_names), "input_ids")


def _option(view: TransformersView, options: dict[str, Any], name: str) -> Any:
    config = options.get("generation_config") or view.generation_config
    return options.get(name, getattr(config, name, None))
