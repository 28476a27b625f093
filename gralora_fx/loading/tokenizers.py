"""Loading of tokenizers, and token ids of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gralora_fx.errors import CheckpointError, GraloraError, first_line
from gralora_fx.loading.pretrained import load_pretrained

_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_FILES = (
    *_JSON[:2],
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_CONFIGS = (*_JSON, "config.json")  # which determine how the other files are read
_MESSAGE_CONTENTS = {"content", "tool_calls"}  # an assistant may call tools and say nothing


def load_tokenizer(name: str | Path, error: type[GraloraError] = CheckpointError) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a local directory or a hub id, or None if it has no tokenizer files.

    Args:
        name: Local directory or hub id. For a directory with only a model, for which transformers would make up an
            empty tokenizer, the result is None.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: the tokenizer's files are damaged or cannot be loaded.
    """
    return load_pretrained(
        AutoTokenizer.from_pretrained,
        name,
        error,
        what="tokenizer",
        files=_FILES,
        configs=_CONFIGS,
        remedy="repair these files, or leave the tokenizer out",
    )


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, error: type[GraloraError]) -> list[int]:
    """The token ids of a prompt: a text, a chat as a list of messages, or ids as they are.

    Args:
        prompt: The prompt.
        tokenizer: For texts and chats, or None.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: it needs a tokenizer and there is none, or it is not a prompt.
    """
    if is_ids(prompt):
        return [int(token) for token in prompt]
    if isinstance(prompt, (list, tuple)) and not prompt:
        return []
    if not (isinstance(prompt, str) or is_chat(prompt)):
        raise error(f"a prompt is text, a list of messages or a list of token ids, but got {prompt!r:.80}")
    for message in () if isinstance(prompt, str) else prompt:
        if "role" not in message or message.keys().isdisjoint(_MESSAGE_CONTENTS):
            raise error(f"a message of a chat has a 'role' and its 'content', but got {message!r:.80}")
    if tokenizer is None:
        raise error("the export holds no tokenizer; give token ids, or export with tokenizer=...")
    if not isinstance(prompt, str) and getattr(tokenizer, "chat_template", "") is None:
        raise error("the tokenizer has no chat template; give the prompt as text, over HTTP to /v1/completions")
    try:
        if isinstance(prompt, str):
            prompt.encode()  # a lone surrogate is not text, which the tokenizers' own error does not say
            return list(tokenizer(prompt)["input_ids"])
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as failure:  # tokenizers and the templates of chats raise types of their own
        raise error(f"the tokenizer does not take the prompt {prompt!r:.80} ({first_line(failure)})") from failure


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(part, dict) for part in prompt)


def is_ids(prompt: Any) -> bool:
    """Whether a prompt is token ids: a list of integers, or a one-dimensional array or tensor of them."""
    if isinstance(prompt, torch.Tensor):
        kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        return prompt.ndim == 1 and prompt.dtype in kinds and not prompt.is_meta
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and prompt.dtype.kind in "iu"
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return all(isinstance(token, (int, np.integer)) and not isinstance(token, bool) for token in prompt)
