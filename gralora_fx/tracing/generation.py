"""What transformers' generation can do over a trace, and what it cannot."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from gralora_fx.errors import TraceError

# A class that replaces another of these generates in a way of its own. The cache is not among them, since a trace makes
# its own; Phi-3 only replaces what begins a new cache where its long positions begin.
_HOOKS = {name for name, value in vars(GenerationMixin).items() if inspect.isfunction(value)}
_HOOKS -= {"_prepare_cache_for_generation"}
_ALIKE = {"Phi3ForCausalLM", "PhimoeForCausalLM"}
_UNSUPPORTED = ("assistant_model", "prompt_lookup_num_tokens", "cache_implementation", "prefill_chunk_size")


def check_generation(name: str, source: type[Any] | None, options: Mapping[str, Any]) -> None:
    """Refuse what transformers' loop cannot do over a trace.

    Args:
        name: Name of the class that was traced.
        source: The class itself, where it is known.
        options: Keyword arguments of `generate`.

    Raises:
        TraceError: The class generates in a way of its own, or an option needs what a trace does not have.
    """
    if source is not None and name not in _ALIKE:
        own = sorted(
            hook for hook in _HOOKS if getattr(source, hook, None) not in (None, getattr(GenerationMixin, hook))
        )
        if own:
            raise TraceError(
                f"{name} generates in a way of its own ({', '.join(own)}), which a trace does not have; generate with "
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
