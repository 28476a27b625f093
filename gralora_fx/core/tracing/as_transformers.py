"""A traced graph as a transformers model, with the class's name, its inputs in `forward`, and `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import BaseModelOutput

from gralora_fx.core.config.checks import check_row_names
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.tracing.inputs.cache import cached_length, own_cache
from gralora_fx.core.tracing.inputs.input_trees import batch_of
from gralora_fx.core.tracing.losses import counts_items, decoder_inputs
from gralora_fx.core.tracing.row_arguments import RowNames, RowStarts, spread_over_copies
from gralora_fx.core.tracing.source_model import (
    Traced,
    class_name,
    label_names,
    main_input,
    source_class,
    with_signature,
)
from gralora_fx.errors import TraceError, an, option, warn_caller
from gralora_fx.format.input_names import ADAPTER_NAMES, IDS, PAST, STARTS

# A class that overrides one of these methods customises generation. The cache is excluded, since a trace creates its
# own; Phi-3 only overrides how a new cache is started where its long positions begin.
_HOOKS = {name for name, value in vars(GenerationMixin).items() if inspect.isfunction(value)}
_HOOKS -= {"_prepare_cache_for_generation"}
_ALIKE = {"Phi3ForCausalLM", "PhimoeForCausalLM"}
_UNSUPPORTED = ("assistant_model", "prompt_lookup_num_tokens", "cache_implementation", "prefill_chunk_size")


@dataclass(frozen=True)
class Viewed:
    """The callbacks of a view, over a traced model or one with adapters."""

    traced: Callable[[], Traced]  # returns the traced model
    run: Callable[..., Any]  # runs the graph; called like the model
    # returns the parameters that `run` reads, by the names of the source model
    parameters: Callable[[], Mapping[str, nn.Parameter]]
    # receives a generation configuration that is assigned to the view
    assign: Callable[[GenerationConfig], None] | None = None
    # runs the graph up to the language model's head, and returns the head's input as `last_hidden_state`
    run_to_head: Callable[..., Any] | None = None
    # receives a function that is assigned to the view's `forward`, to run in its place
    replace_forward: Callable[[Callable[..., Any]], None] | None = None
    # returns the column of each prompt from which adapters act, given the prompts' ids and the adapter of each row, for
    # all steps of `generate`; None for adapters that act on all tokens
    starts: Callable[[Tensor, object], Mapping[str, Tensor] | None] | None = None


class _ToHead(nn.Module):
    """The model without its head, as a transformers model's `base_model`."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


class TransformersView(GenerationMixin, nn.Module):  # type: ignore[misc]  # transformers has no types
    """A view of a traced graph with the attributes of a transformers model; it owns no parameters."""

    model_tags: list[str] | None = None  # tags for the model's card on the hub
    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    input_modalities = ("text",)

    def __init__(self, viewed: Viewed) -> None:
        """View a traced model; use `view_of`."""
        super().__init__()
        self._viewed = viewed
        self.config = self.traced.config
        self._generation_config: GenerationConfig | None = None  # set if one is assigned to a view of a trace
        self.is_encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        self.main_input_name = main_input(self.traced)
        self._given_cache: Cache | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; assigning `forward` replaces the model's own, as on PEFT's `base_model`."""
        if name == "forward" and self._viewed.replace_forward is not None:
            self._viewed.replace_forward(value)
        super().__setattr__(name, value)

    @property
    def traced(self) -> Traced:
        """The traced model."""
        return self._viewed.traced()

    @property
    def base_model(self) -> nn.Module:
        """The model without the language model's head; it returns `last_hidden_state`."""
        if self._viewed.run_to_head is None:
            raise AttributeError(f"a trace of {class_name(self.traced)} has no base_model; rewrite it first")
        return _ToHead(self._viewed.run_to_head)

    @property
    def model(self) -> TransformersView:
        """The view itself, for users of PEFT's `base_model.model`."""
        return self

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The generation configuration; assigning one changes the model's."""
        return self._generation_config or self.traced.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if self._viewed.assign is not None:
            self._viewed.assign(value)
        else:
            self._generation_config = value

    @property
    def loss_type(self) -> str | None:
        """Name of the loss in transformers, if the class is named after it."""
        names = (name for name, loss in LOSS_MAPPING.items() if loss is self.traced.loss_function)
        return next((name for name in names if name in class_name(self.traced)), None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """True if the loss takes `num_items_in_batch`."""
        return counts_items(self.traced.loss_function)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next((parameter.device for parameter in self._viewed.parameters().values()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        types = (parameter.dtype for parameter in self._viewed.parameters().values() if parameter.is_floating_point())
        return next(types, torch.get_default_dtype())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph with the inputs of a step of `generate`."""
        keeps_cache = kwargs.pop("use_cache", None) is not False
        kwargs.pop("return_dict", None)
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None) and name not in self.traced.input_names:
                raise TraceError(f"{name} was not part of the trace; trace the model with it among the example inputs")
        spread_over_copies(args, kwargs)
        source = kwargs.pop("encoder_outputs", None)
        if source is not None:  # passed through by _Source
            kwargs[self.main_input_name] = source.last_hidden_state
        cache = kwargs.pop("cache", None)
        if isinstance(cache, (DynamicCache, EncoderDecoderCache)) and cached_length(cache) != 0:
            kwargs[PAST] = (
                own_cache(cache) if cache is self._given_cache else cache
            )  # the loop has marked the user's cache
        else:
            self._check_positions(kwargs.get("attention_mask"))
        outputs = self._viewed.run(*args, **kwargs)
        if keeps_cache or "cache" not in outputs:
            return outputs
        return type(outputs)(**{name: value for name, value in outputs.items() if name != "cache"})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with transformers' own loop (see `GraloraModel.generate`)."""
        name = class_name(self.traced)
        if not self.traced.can_generate():
            raise TraceError(f"{name} does not generate; trace a model with a language-model head")
        check_generation(name, source_class(self.traced), kwargs)
        if kwargs.get(ADAPTER_NAMES) is not None:
            rows = batch_of((*args, *(kwargs.get(n) for n in ("inputs", "inputs_embeds", self.main_input_name))))
            kwargs[ADAPTER_NAMES] = RowNames(check_row_names(kwargs[ADAPTER_NAMES], rows))
            if _option(self, kwargs, "guidance_scale") not in (None, 1, 1.0):
                raise TraceError(
                    "generate cannot take guidance_scale beside adapter_names: its second pass has no names"
                )
        ids = next((each for each in (*args[:1], kwargs.get("inputs"), kwargs.get(IDS)) if each is not None), None)
        if self._viewed.starts is not None and ids is not None and kwargs.get(STARTS) is None:
            starts = self._viewed.starts(ids, kwargs.get(ADAPTER_NAMES))
            kwargs |= {} if starts is None else {STARTS: RowStarts(starts)}
        self._given_cache = kwargs.get(PAST, kwargs.get("cache"))
        if PAST not in self.traced.input_names:
            if _option(self, kwargs, "use_cache") is not False:
                task = "text2text-generation" if self.is_encoder_decoder else "text-generation"
                warn_caller(
                    "the model was traced without a cache, so every new token computes all positions again; "
                    f"trace it with {option(task=f'{task}-with-past')} to generate faster"
                )
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings as a module over the parameter that the graph reads."""
        path = self.traced.tree.input_embedding
        if path is None:
            raise TraceError(f"the class {class_name(self.traced)} names no input embeddings")
        return _module_at(self.traced.tree, path, self._viewed.parameters())

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language model's head as a module over the parameters that the graph reads; None without one."""
        path = self.traced.tree.output_embedding
        return None if path is None else _module_at(self.traced.tree, path, self._viewed.parameters())

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        """Return an encoder that passes its input through, since the graph contains the encoder."""
        return _Source(self.main_input_name)

    def is_remote_code(self) -> bool:
        """Return False: the graph is the code."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Experts are part of the graph, so there is nothing to switch."""
        return {}

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels `[batch, length]` right, for collators that make an encoder-decoder's decoder inputs."""
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
                f"{option(task='text-generation-with-past')}, or generate row by row without padding"
            )


class _Source(nn.Module):
    """A stub encoder that returns its input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=kwargs[self.name])


def view_of(viewed: Viewed, *, labels: bool) -> TransformersView:
    """Return a traced model as a transformers model."""
    traced = viewed.traced()
    inputs = ["cache" if name == PAST else name for name in traced.input_names]
    if getattr(traced.config, "is_encoder_decoder", False):
        inputs.append("encoder_outputs")
    beside = (*label_names(traced.loss_function), ADAPTER_NAMES, STARTS) if labels else ()
    forward = with_signature(TransformersView.forward, inputs, beside)
    cls = type(class_name(traced), (TransformersView,), {"forward": forward, "__module__": __name__})
    view: TransformersView = cls(viewed)
    return view


def _option(view: TransformersView, options: dict[str, Any], name: str) -> Any:
    config = options.get("generation_config") or view.generation_config
    return options.get(name, getattr(config, name, None))


def check_generation(name: str, source: type[Any] | None, options: Mapping[str, Any]) -> None:
    """Raise if transformers' generation loop cannot run over a trace."""
    if source is not None and name not in _ALIKE:
        overridden = sorted(
            hook for hook in _HOOKS if getattr(source, hook, None) not in (None, getattr(GenerationMixin, hook))
        )
        if overridden:
            raise TraceError(
                f"{name} customises generation ({', '.join(overridden)}), which a trace does not support; generate "
                "with the source model"
            )
    config = options.get("generation_config")
    for name in _UNSUPPORTED:
        value = options.get(name, getattr(config, name, None))
        if value is not None and value != "dynamic":
            raise TraceError(f"generate over a trace does not support {name}; leave it out")
    cache = options.get("past_key_values", options.get("cache"))
    if cache is not None and not isinstance(cache, (DynamicCache, EncoderDecoderCache)):
        raise TraceError(
            f"generate over a trace takes a DynamicCache, but got {an(type(cache).__name__)}; give the cache that the "
            "model returned"
        )


class _NotCalled(nn.Module):
    """A module over a graph's parameters that the graph does not call."""

    def register_forward_hook(self, *_: Any, **__: Any) -> NoReturn:
        """Raise, since the hook would never run."""
        raise TraceError(
            "the graph does not call this module, so a hook on it would never run; leave out what needs one "
            "(neftune_noise_alpha, for example), or edit the graph with add_pass"
        )

    register_forward_pre_hook = register_full_backward_hook = register_full_backward_pre_hook = register_forward_hook


class EmbeddingTable(_NotCalled, nn.Embedding):
    """An embedding over the parameter that a graph reads."""


class OutputHead(_NotCalled, nn.Linear):
    """A linear layer over the parameters that a graph reads."""


def _module_at(tree: ModuleTree, path: str, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Return a module over the parameters that the graph reads at a path."""
    kind = tree.types[path]
    weight, bias = parameters.get(f"{path}.weight"), parameters.get(f"{path}.bias")
    if kind == "torch.nn.modules.sparse.Embedding" and weight is not None:
        module: nn.Module = EmbeddingTable(weight.shape[0], weight.shape[1], device="meta")
    elif kind == "torch.nn.modules.linear.Linear" and weight is not None:
        module = OutputHead(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        raise TraceError(
            f"{path} is {an(kind.rpartition('.')[2])}, which computes more than a plain table or layer; its parameters "
            f"are those of traced.tree.parameters that begin with '{path}.'"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            module.register_parameter(name, parameter)
    return module
