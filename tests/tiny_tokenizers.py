"""A tiny tokenizer, as transformers loads one from files."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")


def tiny_tokenizer(others: Mapping[int, str] | None = None) -> PreTrainedTokenizerFast:
    """Text as UTF-8 bytes: 3 special tokens, the 94 visible letters of ASCII, a space, and two bytes that make an é.

    Args:
        others: Special tokens in the place of letters, by their ids.
    """
    alphabet = [chr(code) for code in range(33, 127)] + ["\u0120", "\u00c3", "\u00a9"]  # as byte-level BPE writes them
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    letters = {index: token for token, index in vocabulary.items()} | dict(others or {})
    tokenizer = Tokenizer(models.BPE({token: index for index, token in letters.items()}, []))
    tokenizer.add_special_tokens(list((others or {}).values()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, start, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end)
