"""Fields of OpenAI's protocol that change no answer here: they are accepted, and named in a header.

This is the one list of them. A field that would change the answer elsewhere and cannot here is on none of these tables:
it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

Idle: TypeAlias = Mapping[str, tuple[Any, ...] | None]  # the values that change nothing; None for any

# about the account, who asks, and what is kept: nothing is kept here, all requests are served alike
EVERYWHERE: Idle = {
    "user": None,
    "metadata": None,
    "safety_identifier": None,
    "store": None,
    "service_tier": None,
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
}
# of answers: values that ask for what is done anyway
TEXT: Idle = {
    **EVERYWHERE,
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}
CHAT: Idle = {
    **TEXT,
    "prediction": None,  # a guess of the answer, which makes it faster
    "reasoning_effort": None,
    "verbosity": ("medium",),
}
RESPONSE: Idle = {**EVERYWHERE, "background": (False,), "truncation": ("disabled",)}
# of a model that reasons the effort changes the answer, and there it is refused
OF_REASONING = ("reasoning_effort", "reasoning.effort")

REASONING: Idle = {"effort": None, "summary": None, "generate_summary": None}
TEXT_OPTIONS: Idle = {"verbosity": ("medium",)}  # another would be a shorter or longer answer
STREAM_OPTIONS: Idle = {"include_obfuscation": None}

# what a response is asked to hold of files, searches and reasoning, which no request here has
IdleInclude: TypeAlias = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]

# parts of a history, as answers hold them and clients send them back
TEXT_PART: Idle = {"prompt_cache_breakpoint": None}
MESSAGE: Idle = {"annotations": ([],)}
INPUT_TEXT: Idle = {"annotations": ([],), "logprobs": None, **TEXT_PART}
INPUT_ITEM: Idle = {"id": None, "status": None, "phase": None}
