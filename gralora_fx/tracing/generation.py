"""Checks of what transformers' generation supports over a trace."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from gralora_fx.errors import TraceError

# A class that overrides one of these methods customises generation. The cache is excluded, since a trace creates its
# own; Phi-3 only overrides how a new cache is started where its long positions begin.
_HOOKS = {name for name, value in vars(GenerationMixin).items() if inspect.isfunction(value)}
_HOOKS -= {"_prepare_cache_for_generation"}
_ALIKE = {"Phi3ForCausalLM", "PhimoeForCausalLM"}
_UNSUPPORTED = ("assistant_model", "prompt_lookup_num_tokens", "cache_implementation", "prefill_chunk_size")


def check_generation(name: str, source: type[Any] | None, options: Mapping[str, Any]) -> None:
    """Check that transformers' generation loop can run over a trace.

    Args:
        name: Name of the class that was traced.
        source: The class itself, if it is known.
        options: Keyword arguments of `generate`.

    Raises:
        TraceError: The class customises generation, or an option is not supported over a trace.
    """
    if source is not None and name not in _ALIKE:
        overridden = sorted(
            hook for hook in _HOOKS if getattr(source, hook, None) not in (None, getattr(GenerationMixin, hook))
        )
        if overridden:
            raise TraceError(
                f"{name} customises generation ({', '.join(overridden)}), which a trace does not support; generate "
                "with "
                "the source model"
            )
    config = options.get("generation_config")
    for option in _UNSUPPORTED:
        value = options.get(option, getattr(config, option, None))
        if value is not None and value != "dynamic":
            raise TraceError(f"generate over a trace does not support {option}; leave it out")
    cache = options.get("past_key_values", options.get("cache"))
    if cache is not None and not isinstance(cache, (DynamicCache, EncoderDecoderCache)):
        raise TraceError(
            f"generate over a trace takes a DynamicCache, but got a {type(cache).__name__}; give the cache that the "
            "model returned"
        )
