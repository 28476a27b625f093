"""Limits of a decoder: its vocabulary and context, the room for its rows, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.model_files import GENERATION_CONFIG, read_json_object
from gralora_fx.errors import ServingError, option, shown

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer

_ENDS = "eos_token_id"
UNLIMITED = 2048  # the context assumed where the configuration names none
QUERIES = 16  # ONNX Runtime's attention takes queries in blocks of a multiple of it
LEAST_CHUNK = 3  # least tokens of a step with which no token of a longer prompt is read alone (see `part_length`)
# fields of configurations for the number of positions
CONTEXT_FIELDS = (
    "max_position_embeddings",
    "max_target_positions",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)
_READ_BY = {  # an encoder-decoder's inputs, whose relative positions (T5's `n_positions`) set no limit
    "input_ids": ("max_position_embeddings", "max_encoder_position_embeddings"),
    "decoder_input_ids": ("max_position_embeddings", "max_decoder_position_embeddings", "max_target_positions"),
}


class TooLargeError(ServingError):
    """A request has more tokens, prompts or rows than will ever fit."""


@dataclass(frozen=True)
class DecoderLimits:
    """The limits of a decoder."""

    vocabulary: int | None  # how many tokens there are; None if that is not known
    context: int  # positions of a prompt and its answer together
    ends: frozenset[int]  # ids of the tokens that end an answer, unless a request names others
    is_assumed: bool = False  # whether the configuration names no context, so that `UNLIMITED` is assumed

    @classmethod
    def of(cls, directory: Path, config: Mapping[str, Any], position_offset: int) -> DecoderLimits:
        """Return the limits of an export."""
        text = _text_part(config)
        is_pair = bool(config.get("is_encoder_decoder"))
        vocabulary = text.get("decoder_vocab_size") if is_pair else None
        vocabulary = text.get("vocab_size") if vocabulary is None else vocabulary
        named = context_length(config, "decoder_input_ids" if is_pair else "input_ids")
        context, ends = (named or UNLIMITED) - position_offset, end_tokens(directory, config)
        return cls(vocabulary, context, ends, is_assumed=named is None)

    def within(self, context: int, name: str) -> DecoderLimits:
        """Return limits with a shorter context, or with any context if the configuration names none."""
        if context > self.context and not self.is_assumed:
            given = option(**{name: context})
            raise ServingError(f"{given} is above the model's context of {self.context} tokens; give less")
        return replace(self, context=context, is_assumed=False)

    @property
    def note(self) -> str:
        """A note on the context for messages: empty, or that it is assumed."""
        return ", which is assumed since config.json names none (max_position_embeddings)" if self.is_assumed else ""

    def outside(self, tokens: Sequence[int]) -> int | None:
        """Return the first token that is not in the vocabulary, or None."""
        most = self.vocabulary
        return next((token for token in tokens if token < 0 or (most is not None and token >= most)), None)

    def checked(self, number: int, given: Sequence[int], length: int, most: int) -> NDArray[np.int64]:
        """Return the tokens that a row, which has read `length`, is given for a step of at most `most`.

        Raises:
            ServingError: They are none, too many, or not ids of the vocabulary.
        """
        try:
            array = np.asarray(given)
        except ValueError:
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise ServingError(f"the tokens of row {number} are {shown(given)}; give a list of token ids")
        if not 0 < len(array) <= most:
            raise ServingError(
                f"row {number} is given {len(array)} tokens, and reads 1 to {most} in a step; split them, or "
                "leave an idle row out"
            )
        if length + len(array) > self.context:
            raise ServingError(
                f"row {number} has read {length} tokens and is given {len(array)}, more than its capacity of "
                f"{self.context}; close it, or make room with capacity="
            )
        if (wrong := self.outside(array.tolist())) is not None:
            raise ServingError(
                f"row {number} is given token {wrong}, outside the vocabulary of {self.vocabulary} tokens"
            )
        return array.astype(np.int64)


@dataclass(frozen=True)
class DecoderSize:
    """The room that a decoder has."""

    rows: int = 8  # how many rows
    capacity: int | None = None  # how many tokens of each, prompt and answer; None for the model's context
    # The most tokens that a row may read in a step beside others. A step is as wide as its longest chunk.
    chunk: int = 64
    prefix_cache: int | None = None  # the most bytes of cached tokens that rows share; None for no sharing
    # the most bytes of the caches of rows, copies of their adapters and the prefix cache together; None for no bound
    max_memory: int | None = None

    def __post_init__(self) -> None:
        """Check that each is a count."""
        for name, value in vars(self).items():
            if (type(value) is not int or value < 1) and not (
                name in ("capacity", "prefix_cache", "max_memory") and value is None
            ):
                raise ServingError(f"{name}={shown(value)} is not a count; give a whole number of at least 1")


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration for the model that writes texts."""
    parts = (config.get(name) for name in ("text_config", "decoder"))
    return next((part for part in parts if isinstance(part, Mapping)), config)


def context_length(config: Mapping[str, Any], name: str = "input_ids") -> int | None:
    """Return the number of positions in a configuration, or None if it names none."""
    fields = _text_part(config)
    names = _READ_BY.get(name, ()) if config.get("is_encoder_decoder") else CONTEXT_FIELDS
    sizes = [size for field in names if type(size := fields.get(field)) is int and size > 0]
    return min(sizes, default=None)


def end_tokens(directory: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids of tokens that end an answer, from `generation_config.json`, else from `config.json`."""
    path = directory / GENERATION_CONFIG
    named = read_json_object(path, ServingError).get(_ENDS) if path.is_file() else None
    if named is None:
        named = config.get(_ENDS, _text_part(config).get(_ENDS))
    ends = named if isinstance(named, list) else [] if named is None else [named]
    if wrong := [end for end in ends if type(end) is not int or end < 0]:
        raise ServingError(
            f"{_ENDS} of {directory} has {shown(wrong[0])}, not an id of a token; export the model again"
        )
    return frozenset(ends)


@dataclass(frozen=True)
class PromptLimit:
    """The limit on a prompt's tokens."""

    most: int | None  # how many; None for any
    what: str  # the name of a prompt in messages
    excess: str  # the error text for a prompt with more tokens

    @classmethod
    def of_context(cls, limits: DecoderLimits) -> PromptLimit:
        """Return the limit of a decoder."""
        return cls(limits.context, "the prompt", f"beyond the context of {limits.context} tokens{limits.note}")

    @classmethod
    def of_source(cls, positions: int | None) -> PromptLimit:
        """Return the limit of an encoder-decoder whose encoder has so many positions; None for any."""
        return cls(positions, "the source", f"more than the encoder's {positions} positions")

    def check_text(self, text: str, tokenizer: TextTokenizer) -> None:
        """Check that a text may fit."""
        if self.most is None or len(text) <= self.most:  # short enough to tokenize
            return
        from gralora_fx.core.loading.token_bounds import surely_exceeds

        if surely_exceeds(text, self.most, tokenizer):
            raise TooLargeError(f"{self.what} has {len(text)} characters, which are {self.excess}; shorten it")

    def check_tokens(self, tokens: Sized) -> None:
        """Check that tokens fit."""
        if self.most is not None and len(tokens) > self.most:
            raise TooLargeError(f"{self.what} has {len(tokens)} tokens, {self.excess}; shorten it")


def part_length(left: int, most: int, before: int = 0) -> int:
    """Return how many of the tokens left of a text to read next, so that none is read alone if possible.

    The tokens that the base reads before an adapter is active, if there are some, are read first.

    A step of one token differs in the last digits from a step of several (see `SharedRows`), and so does attention for
    one token that is alone in a block.
    """
    left = before if 0 < before < left else left
    part = min(left, most)
    while part > 2 and 1 in (left - part, part % QUERIES):
        part -= 1
    return part
