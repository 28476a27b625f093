"""Tokenizers beside models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gralora_fx.errors import GraloraError
from gralora_fx.tracing.quiet import quiet

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a local directory or a hub id, or None where there is none.

    Args:
        name: Local directory or hub id. For a directory with a model alone transformers makes up an empty tokenizer;
            that counts as none.
    """
    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in _FILES):
        return None
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, error: type[GraloraError]) -> list[int]:
    """The token ids of a prompt: a text, a chat as a list of messages, or ids as they are.

    Args:
        prompt: The prompt.
        tokenizer: For texts and chats; None where there is none.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: it needs a tokenizer and there is none, or it is none of these.
    """
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        prompt = prompt.tolist()
    if isinstance(prompt, str) or is_chat(prompt):
        if tokenizer is None:
            raise error("the export holds no tokenizer; give token ids, or export with tokenizer=...")
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if isinstance(prompt, (list, tuple)) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        return list(prompt)
    raise error(f"a prompt is text, a list of messages or a list of token ids, but got {prompt!r:.80}")


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(part, dict) for part in prompt)
