"""Tokenizers beside models."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
