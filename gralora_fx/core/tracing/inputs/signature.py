"""The call signature of a traced graph: inputs by name or position, with the source model's defaults; their copies."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from gralora_fx.base.compat.torch_graphs import tree_map_only
from gralora_fx.core.tracing.inputs.input_trees import (
    CacheLayout,
    FixedAxes,
    cache_layout,
    check_form,
    check_tensor,
    same_value,
    shown,
)
from gralora_fx.errors import TraceError, option
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS, PAST, beside_ids, takes_embeddings

if TYPE_CHECKING:  # of a model whose inputs features know alone
    from gralora_fx.format.input_names import InputFacts

_RULES = ("attention_mask", "decoder_attention_mask", "token_type_ids", "position_ids")


@dataclasses.dataclass(frozen=True)
class CallSignature:
    """The signature of the source model's forward, and what became of each argument in the graph.

    Attributes:
        inputs: Arguments that the graph takes, in its order.
        positional: Arguments that the source takes by position, in its order.
        values: The value of every other argument while tracing, which is part of the graph.
        defaults: The source's default of each argument.
        nullable: Arguments for which None means the default, though the default is another value.
        optional: Inputs for which the graph has a default itself; left out if not given.
        takes_any: Whether the source accepts arbitrary keyword arguments.
        fillable: Inputs that may be left out, since `default_input` gives the source's default.
        counts_padding: Whether default positions count the padding before them.
        fixed: Sizes of input tensors to which the trace is fixed.
        dynamic: Whether the trace was made for other sizes than the example's too.
        has_form: Whether inputs must have the structure of the examples, as for an exported graph.
        facts: What features know of inputs, by the names of manifests.
    """

    inputs: tuple[str, ...]
    positional: tuple[str, ...]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nullable: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    takes_any: bool = False
    fillable: frozenset[str] = frozenset()
    counts_padding: bool = False
    fixed: FixedAxes = dataclasses.field(default_factory=dict)
    dynamic: bool = True
    has_form: bool = True
    facts: Mapping[str, InputFacts] = dataclasses.field(default_factory=dict)

    @property
    def image_sizes(self) -> Any:
        """Heights and widths of images that the trace takes; None if it takes no images."""
        return self.facts.get("image_sizes")

    @property
    def may_be_left_out(self) -> tuple[str, ...]:
        """Optional inputs of the source for which there is a default rule."""
        return tuple(name for name in _RULES if name in self.inputs and name in self.defaults)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], examples: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of one call by name, in the graph's order.

        A mask that was traced but not given is all ones, token types are zeros, and positions count from zero, or go on
        after a cache, if these are the source's defaults.
        """
        arguments = self._by_name(args, kwargs)
        for name, value in arguments.items():
            if name not in self.inputs:
                self._check_constant(name, value, by_position=name not in kwargs, count=len(args))
        for name in self.values:
            if arguments.get(name) is None:
                self._check_left_out(name, arguments)
        inputs = {name: arguments.get(name) for name in self.inputs if name in arguments or name not in self.optional}
        for name in inputs:
            if inputs[name] is None and not (name in examples and examples[name] is None):
                inputs[name] = self._filled(name, inputs, examples)
            if self.facts:
                self._check_facts(name, inputs[name])
            if self.has_form and name in self.fixed:  # a tensor: torch.compile would guard the example's shape
                check_tensor(name, inputs[name], self.fixed[name])
            elif self.has_form and name in examples:
                check_form(name, examples[name], inputs[name], self.fixed)
        return inputs

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.positional):
            raise TraceError(
                f"the trace takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), but got {len(args)} by position"
            )
        arguments = dict(zip(self.positional, args, strict=False))
        twice = [name for name in kwargs if name in arguments]
        if twice:
            raise TraceError(f"input {twice[0]!r} was given twice, by position and by name")
        return {**arguments, **kwargs}

    def _check_constant(self, name: str, value: Any, *, by_position: bool, count: int) -> None:
        """Check an argument that is not an input of the graph: it must have the value that is part of the graph."""
        if value is None and (name in self.nullable or (name not in self.values and self.takes_any)):
            return
        traced = self.values.get(name)
        if name in self.values and same_value(traced, value):
            return
        if traced is None:
            names = ", ".join(self.inputs)
            if by_position:
                raise TraceError(
                    f"the trace takes {len(self.inputs)} inputs ({names}), but got {count}: {name!r} was not part of "
                    "it; trace again with it among the example inputs"
                )
            raise TraceError(
                f"input {name!r} was not part of the trace, which takes {names}; "
                "trace again with it among the example inputs"
            )
        if name == "use_cache" and value is True:
            remedy = f"trace again for a task with a cache, such as {option(task='text-generation-with-past')}"
        else:
            remedy = "trace again with that value among the example inputs"
        raise TraceError(
            f"input {name!r} was {traced!r} when the model was traced and is part of the graph, so it cannot be "
            f"{shown(value)}; {remedy}"
        )

    def _check_left_out(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Check an argument that is left out: its default must be the value that is part of the graph."""
        if name in arguments and name not in self.nullable:
            return
        if name not in self.defaults:
            raise TraceError(f"input {name!r} is missing; it was {self.values[name]!r} when the model was traced")
        if not same_value(self.defaults[name], self.values[name]):
            raise TraceError(
                f"input {name!r} was {self.values[name]!r} when the model was traced and is part of the graph; left "
                f"out, the model takes {shown(self.defaults[name])}: give {name}={self.values[name]!r}, or trace again "
                "without it"
            )

    def _check_facts(self, name: str, value: Any) -> None:
        """Check what features know of an input: the graph's own error would be obscure, or there would be none."""
        for facts in self.facts.values() if isinstance(value, torch.Tensor) else ():
            if facts.input == name and (problem := facts.problem(value.shape, self.fixed.get(name, ()))):
                raise TraceError(f"input {name!r} {problem}")

    def _filled(self, name: str, inputs: Mapping[str, Any], examples: Mapping[str, Any]) -> torch.Tensor:
        known = {other: value for other, value in inputs.items() if value is not None}
        value = None
        if IDS in known and (beside := beside_ids(examples).get(name)) is not None:
            left_out: torch.Tensor = beside.of_text(examples[name], known)
            return left_out
        if name in self.fillable or (name == IDS and takes_embeddings(examples)):
            value = default_input(name, known, counts_padding=self.counts_padding)
        if value is None:
            default_note = (
                f"; the model's own default, {shown(self.defaults[name])}, is not" if name in self.defaults else ""
            )
            remedy = ": give it, or trace again without it" if default_note else ""
            raise TraceError(f"input {name!r} is missing; it was part of the trace{default_note}{remedy}")
        return value


def signature_of(
    model: nn.Module, inputs: Collection[str], constants: Mapping[str, Any], *, has_cache: bool
) -> CallSignature:
    """The call signature of a trace of a model."""
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
    others = {name: value for name, value in defaults.items() if name not in inputs}
    return CallSignature(
        inputs=tuple(inputs),
        positional=tuple(p.name for p in named if p.kind is not p.KEYWORD_ONLY),
        values={**others, **constants},
        defaults=defaults,
        nullable=frozenset(answered),
        takes_any=takes_any,
    )


def _answered_by_config(config: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a transformers model that default to its configuration.

    Decorators in transformers accept `return_dict` and the `output_...` flags for any forward.
    """
    names = {name for name, default in defaults.items() if default is None}
    names |= {"return_dict", *(name for name in dir(config) if name.startswith("output_"))}
    answers = {name: getattr(config, name, None) for name in sorted(names)}
    return {name: value for name, value in answers.items() if isinstance(value, (bool, int, float, str))}


def with_cache_name(names: Sequence[str], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename `cache`, transformers' newer name, to the trace's name for it."""
    if "cache" not in kwargs or PAST not in names or "cache" in names:
        return kwargs
    if kwargs.get(PAST) is not None:
        raise TraceError(f"cache and {PAST} are one input; give one of them")
    return {**{name: value for name, value in kwargs.items() if name != "cache"}, PAST: kwargs["cache"]}


def default_input(name: str, inputs: Mapping[str, Any], *, counts_padding: bool = False) -> torch.Tensor | None:
    """The default value of an input, or None if it is required."""
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
    """Copy the inputs for a run that may modify them: a model appends to the cache it gets."""
    own = {
        name: value if isinstance(value, Cache) else tree_map_only(Tensor, torch.clone, value)
        for name, value in inputs.items()
    }
    if isinstance(cache := own.get(PAST), Cache):
        from gralora_fx.core.tracing.inputs.cache import own_cache

        own[PAST] = own_cache(cache)
    return own
