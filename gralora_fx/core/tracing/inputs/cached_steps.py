"""Example inputs of a model with a cache: one decoder step, with ids, mask, positions and cache.

For an encoder-decoder they include the encoder's inputs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from gralora_fx.base.features import parts
from gralora_fx.base.progress.stages import quiet
from gralora_fx.base.sources.lazy_tensors import reading
from gralora_fx.core.tracing.inputs.arguments import widen
from gralora_fx.core.tracing.inputs.cache import (
    attributes_of,
    empty_cache,
    fresh_layer,
    keeps_more,
    own_cache,
    positions,
    returned_cache,
    tensors_of,
    with_tensors,
)
from gralora_fx.core.tracing.inputs.input_trees import by_own_names
from gralora_fx.errors import TraceError, an, first_line, option
from gralora_fx.format.input_names import DECODER_INPUTS, EMBEDS, IDS, PAST, beside_ids
from gralora_fx.format.tasks import tasks_beside_ids

if TYPE_CHECKING:  # imports much that serving does not need
    from transformers import PreTrainedModel

_WITHOUT = f"{option(task='text-generation')} traces it without a cache"
_ONE_LENGTH = f"{option(task='text-generation')} traces it for texts of one length, from Python with dynamic=False"
_NOTHING = "no task traces it"
# by the configuration's `model_type`: why, and what to do
_REFUSED = {
    "blt": ("it reads byte patches whose lengths another model's entropies decide", _NOTHING),
    "cpmant": ("every step takes the whole text, after a prompt of the model's own", _NOTHING),
    "deepseek_v4": ("its layers keep averages of windows of tokens, and an incomplete last window", "use transformers"),
    "gemma4_assistant": ("it reads the keys and values of the model that it drafts for, and keeps none", _NOTHING),
    "gemma4_unified_assistant": ("it reads the keys and values of the model that it drafts for", _NOTHING),
    "musicgen_decoder": ("each text is several rows of sound codes, which are embedded as one", _NOTHING),
    "musicgen_melody_decoder": ("each text is several rows of sound codes, embedded as one", _NOTHING),
    "openai-gpt": ("its forward takes no cache, so that every step reads the whole text", _WITHOUT),
    "prophetnet": ("with a cache it reads one token at a time, and computes it differently from a prompt", _WITHOUT),
    "recurrent_gemma": ("its states are kept in its modules, and prompts are computed differently", _ONE_LENGTH),
    "reformer": ("it caches hidden states, which random hashes sort into buckets", _NOTHING),
    "rwkv": ("its states are a list of its own, and its forward loops over tokens", _ONE_LENGTH),
    "xlm": ("it generates at a mask token behind the text, and returns no cache", _WITHOUT),
    "xlstm": ("its states are in a cache of its own, which it overwrites, and it reads prompts in chunks", _NOTHING),
    "xlnet": ("it generates at a mask token behind the text, and its memory is hidden states (mems)", _WITHOUT),
}


class NoStepError(TraceError):
    """A decoder has no step that a graph can hold; the message says how to trace it, if that is possible."""


def check_has_step(model: PreTrainedModel) -> None:
    """Check that a decoder's step takes new tokens and a cache, and returns logits and the next cache."""
    refused = _REFUSED.get(model.config.model_type)
    if getattr(model.config.get_text_config(), "ple_layer_ids", None):
        refused = "its embeddings of n-grams (ple_layer_ids) begin with end tokens, and states with zeros", _NOTHING
    if refused is not None:
        why, remedy = refused
        raise NoStepError(f"{type(model).__name__} has no step with a cache that a graph can hold: {why}; {remedy}")


_BATCH, _PAST, _LENGTH = 2, 6, 3


def cached_inputs(
    model: PreTrainedModel, *, batch: int = _BATCH, past: int = _PAST, length: int = _LENGTH, beside: bool = False
) -> dict[str, Any]:
    """Return the inputs of one step: `length` new positions after `past` cached ones, one row padded on the left.

    They are `input_ids [batch, length]`, `attention_mask [batch, past + length]`, `position_ids [batch, length]` if the
    model takes them, and a `DynamicCache` of keys and values `[batch, key heads, past, size]`, or states. With
    `beside`, also the inputs that features add to the ids (see `beside_ids`).
    """
    check_has_step(model)
    generator = torch.Generator().manual_seed(0)
    size = getattr(model.config.get_text_config(), "vocab_size", 100)
    ids = torch.randint(min(3, size - 1), size, (batch, max(past, 1) + length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1 and past > 1:
        mask[-1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = positions(mask)
    cached = max(past, 1)
    first = {name: value[:, :cached] for name, value in inputs.items()}
    cache = _computed_cache(model, {**first, PAST: _first_cache(model)})
    skip = cached - past  # an empty cache is made from one of one position
    step = {name: value[:, cached:] for name, value in inputs.items()}
    step["attention_mask"] = mask[:, skip:]
    if beside:
        for examples in parts("step examples", (EMBEDS,)):
            step |= examples.examples_beside(model, step["input_ids"], step["attention_mask"])
    return {**step, PAST: own_cache(cache) if past else empty_cache(cache, batch)}


def _first_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache: a plain one that keeps every position, or the model's own class if it has states."""
    kinds = vars(sys.modules[type(model.base_model).__module__]).values()
    caches = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, DynamicCache))
    if (own := next((kind for kind in caches if kind is not DynamicCache), None)) is not None:
        return own()
    try:
        cache = DynamicCache(config=model.config)
    except Exception:  # noqa: BLE001  # a configuration with kinds of layers that transformers' cache does not know
        return DynamicCache()
    if not keeps_more(cache):
        return DynamicCache()
    cache.layers = [fresh_layer(cache, index) for index in range(len(cache.layers))]
    return cache


def _computed_cache(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Cache:
    """Return the cache that a model computes from inputs; of windows of inputs, only what is read again."""
    longer_by_one: set[tuple[int, int]] = set()
    layers = parts("cache layers", attributes_of(inputs[PAST])) if PAST in inputs else []
    try:
        with torch.no_grad(), quiet(), reading(model), ExitStack() as noted:
            for states in layers:
                longer_by_one = noted.enter_context(states.longer_states(model))
            cache: Any = returned_cache(model(**by_own_names(model.forward, inputs), use_cache=True))
        tensors = {} if cache is None else tensors_of(cache)
    except (AttributeError, TypeError) as error:
        raise TraceError(f"{type(model).__name__} keeps no cache of keys and values ({first_line(error)})") from error
    except (LookupError, ValueError, RuntimeError) as error:
        raise TraceError(
            f"{type(model).__name__} itself fails when it is called with a cache ({first_line(error)}); correct "
            "its configuration, or trace it for a task without a cache"
        ) from error
    if cache is None:
        why = "it returns no transformers `Cache`: its states are in a list, or in its modules"
        raise TraceError(f"{type(model).__name__} keeps no cache of keys and values ({why})")
    if not tensors:
        raise TraceError(f"{type(model).__name__} keeps nothing in the cache that it returns")
    windows = {slot: tensor for slot, tensor in tensors.items() if slot.kind.is_window}
    longer = {slot: state[..., 1:] for slot, state in windows.items() if (slot.layer, slot.number) in longer_by_one}
    return with_tensors(cache, {**tensors, **longer}) if longer else cache


def decoder_step(
    model: PreTrainedModel,
    source: Mapping[str, Tensor],
    *,
    past: int = _PAST,
    length: int = _LENGTH,
    beside: bool = False,
) -> dict[str, Any]:
    """Return the inputs of one call: the source, `decoder_input_ids [batch, length]`, and an `EncoderDecoderCache`.

    The cache holds the decoder's own keys and values, `[batch, heads, past, size]`: a trace, which has encoder and
    decoder in one graph, computes those of the encoder's output in every call. With `beside`, the source has the inputs
    that features add to its ids, too.
    """
    generator = torch.Generator().manual_seed(0)
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", 100)
    batch, cached = next(iter(source.values())).shape[0], max(past, 1)
    ids = torch.randint(min(3, size - 1), size, (batch, cached + length), generator=generator)
    cache = _computed_cache(model, {**source, "decoder_input_ids": ids[:, :cached]})
    if not isinstance(cache, EncoderDecoderCache):
        raise TraceError(f"{type(model).__name__} keeps {an(type(cache).__name__)}; an EncoderDecoderCache is needed")
    cut = {slot: tensor[:, :, :past].contiguous() for slot, tensor in tensors_of(cache).items()}
    if beside:
        for examples in parts("step examples", (EMBEDS,)):
            source = {**source, **examples.examples_beside(model, source[IDS], source["attention_mask"])}
    return {**source, "decoder_input_ids": ids[:, cached:], PAST: with_tensors(cache, cut)}


def _source_of(sample: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return an encoder's inputs without those that features add to its ids, and whether there are such."""
    left_out = {*DECODER_INPUTS, PAST, *beside_ids(sample)}
    source = {name: value for name, value in sample.items() if name not in left_out}
    if EMBEDS in left_out:
        source[IDS] = source[IDS].clamp(min=0)
    return source, EMBEDS in left_out


def widened_step(model: PreTrainedModel, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step with the inputs that a user's example has, in sizes that fix no axis.

    For a decoder only the example's names matter: a new step is easier to make than consistent sizes.
    """
    if model.config.is_encoder_decoder:
        source, beside = _source_of(sample)
        return decoder_step(model, widen(model, source), beside=beside)
    step = cached_inputs(model, beside=EMBEDS in sample)
    if others := [name for name in sample if name not in {*step, "attention_mask", "position_ids"}]:
        ways = [f" (what the model makes of them is {EMBEDS} of {option(task=task)})" for task in tasks_beside_ids()]
        raise TraceError(
            f"a step with a cache takes {', '.join(step)} alone, and the example has {', '.join(others)} too; "
            f"trace it without them{''.join(ways)}, or for a task without a cache"
        )
    return step


def other_steps(model: PreTrainedModel, sample: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield steps of other sizes, each with its description: one position after a long past, several after none."""
    if not model.config.is_encoder_decoder:
        beside = EMBEDS in sample
        yield "one row and one position", cached_inputs(model, batch=1, past=9, length=1, beside=beside)
        yield "an empty cache", cached_inputs(model, batch=3, past=0, length=5, beside=beside)
        return
    source, beside = _source_of(sample)
    first = {name: value[:1] for name, value in source.items()}
    yield "one row and one position", decoder_step(model, first, past=9, length=1, beside=beside)
    longer = {
        name: torch.cat([value, value[:, :2]], dim=1) if value.ndim == 2 else value for name, value in source.items()
    }
    more = {name: torch.cat([value, value[:1]]) for name, value in longer.items()}
    yield "an empty cache", decoder_step(model, more, past=0, length=5, beside=beside)


def varying_axes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return which axes of a step's cache and extra inputs may vary, for `torch.export`."""
    auto = torch.export.Dim.AUTO
    varying: dict[str, Any] = {name: dict.fromkeys(each.varying, auto) for name, each in beside_ids(inputs).items()}
    kinds = [slot.kind for slot in tensors_of(inputs[PAST])]
    varying[PAST] = [dict.fromkeys((0, kind.grows) if kind.grows else (0,), auto) for kind in kinds]
    return varying
