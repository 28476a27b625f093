"""The prompts of `generate` for an encoder-decoder: texts, recordings or features, and what the decoder begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gralora_fx.engine.decoder import Decoder
from gralora_fx.engine.limits import DecoderLimits
from gralora_fx.errors import ServingError, shown
from gralora_fx.runtime.adapter_stack import names_of_rows
from gralora_fx.serving.encoder_inputs import EncoderInput, EncoderInputs
from gralora_fx.serving.prompts import Prompts, given_prompts
from gralora_fx.serving.speech.speech_prompt import SpeechPrompt
from gralora_fx.serving.speech.speech_reader import is_recording, recording

_FEATURES = "input_features"
Adapter: TypeAlias = str | Sequence[str | None] | None


@dataclass(frozen=True)
class SourceOptions:
    """What `generate` takes for an encoder-decoder alone.

    Attributes:
        input_features: Instead of prompts, a feature extractor's result, `[batch, ...]`.
        language: The language of recordings.
        task: What is done with them.
        forced_bos_token_id: The token that an answer to a text begins with.
    """

    input_features: Any = None
    language: str | None = None
    task: str | None = None
    forced_bos_token_id: int | None = None

    def check_unused(self, reason: str, *names: str) -> None:
        """Check that some options are not given.

        Args:
            reason: Why they have no effect.
            names: The options; none for all.

        Raises:
            ServingError: One is given.
        """
        if given := [name for name in names or vars(self) if getattr(self, name) is not None]:
            raise ServingError(f"{given[0]} has no effect: {reason}; leave it out")


class SourcePrompts:
    """Reads the prompts of an encoder-decoder."""

    def __init__(
        self,
        inputs: EncoderInputs,
        limits: DecoderLimits,
        tokenizer: PreTrainedTokenizerBase | None,
        open_decoder: Callable[..., Decoder],
    ) -> None:
        """Take what reads them.

        Args:
            inputs: Reads what the encoder takes.
            limits: What the decoder takes.
            tokenizer: For texts, or None.
            open_decoder: Makes a decoder, which hears the language of recordings.
        """
        self._inputs, self._limits, self._tokenizer, self._open = inputs, limits, tokenizer, open_decoder

    def read(
        self, prompts: Any, input_ids: Any, attention_mask: Any, options: SourceOptions, adapter: Adapter
    ) -> Prompts:
        """What encoder and decoder read of prompts, or of what a tokenizer or a feature extractor made of them.

        Args:
            prompts: A text, a recording, a list of token ids, or a list of any of them; None for the others.
            input_ids: A tokenizer's result, or None.
            attention_mask: The mask of `input_ids` or of features, or None.
            options: The options.
            adapter: The adapter of all, or of each, which hears the language.

        Raises:
            ServingError: They are not what the model reads, or an option has no effect.
        """
        if self._inputs.takes_text:
            return self._of_texts(prompts, input_ids, attention_mask, options)
        options.check_unused("an answer to a recording begins with its language and task", "forced_bos_token_id")
        speech = SpeechPrompt(self._inputs.rules, options.language, options.task)
        is_single, gives_text, sources = self._of_sound(prompts, input_ids, attention_mask, options.input_features)
        if gives_text and self._tokenizer is None:
            raise ServingError(
                "the export holds no tokenizer to write text with; give input_features, or export with tokenizer=..."
            )
        heard = self._heard(speech, sources, adapter) if speech.languages else [None] * len(sources)
        return Prompts([speech.tokens(language) for language in heard], is_single, gives_text, sources)

    def _of_texts(self, prompts: Any, input_ids: Any, attention_mask: Any, options: SourceOptions) -> Prompts:
        options.check_unused("the model reads text", "language", "task", _FEATURES)
        first = options.forced_bos_token_id
        if first is not None and (isinstance(first, bool) or not isinstance(first, (int, np.integer))):
            raise ServingError(f"forced_bos_token_id must be the id of a token, but got {shown(first)}")
        if first is not None and self._limits.outside([int(first)]) is not None:
            raise ServingError(
                f"forced_bos_token_id={first} is outside the vocabulary of {self._limits.vocabulary} tokens"
            )
        if is_recording(prompts):
            raise ServingError("the model reads text, not sound; give a text or token ids")
        self._inputs.check_texts(prompts)
        texts = given_prompts(prompts, input_ids, attention_mask, self._tokenizer)
        if not texts.rows:
            raise ServingError("there is no prompt; give at least one")
        sources = [self._inputs.of_ids(row, None if first is None else int(first)) for row in texts.rows]
        return Prompts([[self._inputs.rules.start] for _ in sources], texts.is_single, texts.gives_text, sources)

    def _of_sound(
        self, prompts: Any, input_ids: Any, attention_mask: Any, features: Any
    ) -> tuple[bool, bool, list[EncoderInput]]:
        """Whether a single recording was given and whether as samples, and what the encoder reads of each."""
        if input_ids is not None:
            self._inputs.of_ids([0])  # says that the model reads no text
        if (features is None) == (prompts is None):
            raise ServingError(f"give either recordings, as arrays of samples, or {_FEATURES}")
        if features is not None:
            named = (
                {_FEATURES: features}
                if attention_mask is None
                else {_FEATURES: features, "attention_mask": attention_mask}
            )
            return False, False, self._inputs.of_features(named)
        if attention_mask is not None:
            raise ServingError(f"attention_mask is given without {_FEATURES}; leave it out")
        is_single = is_recording(prompts)
        items = [prompts] if is_single else _rows(prompts)
        if not items:
            raise ServingError("there is no recording; give at least one")
        if any(not is_recording(item) for item in items):
            self._inputs.of_ids([0])  # says what the model reads
        rate = self._inputs.speech.rate
        return is_single, True, [self._inputs.of_recording(recording(item, rate)) for item in items]

    def _heard(self, speech: SpeechPrompt, sources: Sequence[EncoderInput], adapter: Adapter) -> list[int]:
        """The language of each recording: the likeliest token after the start token."""
        names = names_of_rows(adapter, len(sources))
        decoder = self._open(rows=1, capacity=1, chunk=1)
        heard = []
        for source, name in zip(sources, names, strict=True):
            row = decoder.open(name, source.arrays)
            logits = decoder.step({row: [self._inputs.rules.start]})[row]
            decoder.close(row)
            heard.append(max(speech.languages, key=lambda token: float(logits[token])))
        return heard


def _rows(prompts: Any) -> list[Any]:
    """The recordings of a list, or of an array of several.

    Raises:
        ServingError: The array is one of several channels.
    """
    if isinstance(prompts, (torch.Tensor, np.ndarray)) and prompts.ndim == 2:
        if prompts.shape[0] > prompts.shape[1]:
            raise ServingError(
                f"the audio has shape {list(prompts.shape)}; give the samples of one channel, of one axis, or a list "
                "of such recordings"
            )
        return list(prompts)
    return list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
