"""The call signature of a traced graph: its inputs, the source model's defaults, and copies of inputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from gralora_fx.base.compat.torch_graphs import tree_map_only
from gralora_fx.core.tracing.inputs.arguments import rest_name
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout, FixedAxes, cache_layout
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS, PAST

if TYPE_CHECKING:  # only for a model whose inputs features know
    from gralora_fx.format.input_names import InputFacts
    from gralora_fx.format.size_limits import SizeLimit

_RULES = ("attention_mask", "decoder_attention_mask", "token_type_ids", "position_ids")


@dataclasses.dataclass(frozen=True)
class CallSignature:
    """The source model's forward signature, and what became of each argument in the graph."""

    inputs: tuple[str, ...]  # arguments that the graph takes, in its order
    positional: tuple[str, ...]  # arguments that the source takes by position, in its order
    # the value of every other argument while tracing, which is part of the graph
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the source's default of each argument
    # arguments for which None means the default, though the default is another value
    nullable: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()  # inputs for which the graph has a default itself; left out if not given
    takes_any: bool = False  # whether the source accepts arbitrary keyword arguments
    # inputs that may be left out, since `default_input` returns the source's default
    fillable: frozenset[str] = frozenset()
    counts_padding: bool = False  # whether default positions count the padding before them
    fixed: FixedAxes = dataclasses.field(default_factory=dict)  # sizes of input tensors to which the trace is fixed
    dynamic: bool = True  # whether the trace was made for other sizes than the example's too
    has_form: bool = True  # whether inputs must have the structure of the examples, as for an exported graph
    # features' records of inputs, by their names in manifests
    facts: Mapping[str, InputFacts] = dataclasses.field(default_factory=dict)
    limits: tuple[SizeLimit, ...] = ()  # conditions on sizes, beyond which the graph is not the model's

    @property
    def image_sizes(self) -> Any:
        """The heights and widths that the trace takes; None if it takes no images."""
        return self.facts.get("image_sizes")

    @property
    def may_be_left_out(self) -> tuple[str, ...]:
        """Optional inputs of the source that have a default rule."""
        return tuple(name for name in _RULES if name in self.inputs and name in self.defaults)


def signature_of(
    model: nn.Module, inputs: Collection[str], constants: Mapping[str, Any], *, has_cache: bool
) -> CallSignature:
    """Return the call signature of a model's trace."""
    from transformers import PreTrainedModel  # imports much that serving does not need

    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = [p for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    defaults = {p.name: p.default for p in named if p.default is not p.empty}
    config = getattr(model, "config", None) if isinstance(model, PreTrainedModel) else None
    answered = {} if config is None else {**_answered_by_config(config, defaults), "use_cache": has_cache}
    defaults |= answered
    if PAST in inputs:
        named = [p.replace(name=PAST) if p.name == "cache" else p for p in named]  # transformers' newer name for it
    items = [p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL]
    taken = {*inputs, *constants}
    rest = [name for of in items for i in range(len(taken)) if (name := rest_name(of, i)) in taken]
    others = {name: value for name, value in defaults.items() if name not in inputs}
    return CallSignature(
        inputs=tuple(inputs),
        positional=(*(p.name for p in named if p.kind is not p.KEYWORD_ONLY), *rest),
        values={**others, **constants},
        defaults=defaults,
        nullable=frozenset(answered),
        takes_any=takes_any,
    )


def _answered_by_config(config: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments whose defaults are in the configuration: `return_dict` and the `output_...` flags."""
    names = {name for name, default in defaults.items() if default is None}
    names |= {"return_dict", *(name for name in dir(config) if name.startswith("output_"))}
    answers = {name: getattr(config, name, None) for name in sorted(names)}
    return {name: value for name, value in answers.items() if isinstance(value, (bool, int, float, str))}


def default_input(name: str, inputs: Mapping[str, Any], *, counts_padding: bool = False) -> torch.Tensor | None:
    """Return an input's default value, or None if it is required."""
    if name == IDS and isinstance(inputs.get(EMBEDS), torch.Tensor):  # all of them are given
        return torch.full(inputs[EMBEDS].shape[:2], GIVEN, device=inputs[EMBEDS].device)
    ids = inputs.get("decoder_input_ids" if name.startswith("decoder_") else "input_ids")
    if not isinstance(ids, torch.Tensor):
        return None
    if cache_layout(inputs) is CacheLayout.DECODER:
        from gralora_fx.core.tracing.inputs.cache import default_of_step

        return default_of_step(name, ids, inputs, counts_padding=counts_padding)
    if name in ("attention_mask", "decoder_attention_mask"):
        return torch.ones_like(ids)
    if name == "token_type_ids":
        return torch.zeros_like(ids)
    if name == "position_ids":
        return torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    return None


def own_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the inputs for a run that may modify them, as a model appends to its cache."""
    own = {
        name: value if isinstance(value, Cache) else tree_map_only(Tensor, torch.clone, value)
        for name, value in inputs.items()
    }
    if isinstance(cache := own.get(PAST), Cache):
        from gralora_fx.core.tracing.inputs.cache import own_cache

        own[PAST] = own_cache(cache)
    return own
