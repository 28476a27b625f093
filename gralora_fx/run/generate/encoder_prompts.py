"""The prompts of an encoder-decoder: what its encoder reads, and what its answers begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError, shown
from gralora_fx.run.engine.adapters import names_of_rows
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.generate.encoder_inputs import EncoderInput, EncoderInputs
from gralora_fx.run.generate.prompts import GenerateInputs, Prompts
from gralora_fx.run.generate.recordings import is_recording, recording
from gralora_fx.run.generate.speech_prompt import SpeechPrompt

Adapter: TypeAlias = str | Sequence[str | None] | None
_FEATURES, _MASK = "input_features", "attention_mask"


@dataclass(frozen=True)
class AnswerStart:
    """Options of an encoder-decoder: what its answers begin with.

    Attributes:
        language: The language of recordings; None for the model's default, or that which it hears.
        task: What is done with recordings; None for the model's default.
        forced_bos_token_id: The token that the answer to a text begins with; None for the model's.
    """

    language: str | None = None
    task: str | None = None
    forced_bos_token_id: int | None = None

    def check_unused(self, reason: str, *names: str) -> None:
        """Raise a `ServingError` with a reason if one of some options is given, which have no effect."""
        if unused := [name for name in names if getattr(self, name) is not None]:
            raise ServingError(f"{unused[0]} has no effect: {reason}; leave it out")


@dataclass(frozen=True)
class EncoderPrompts:
    """Reads the prompts of an encoder-decoder.

    Attributes:
        reader: Reads what its encoder takes.
        limits: What a row of its decoder can take.
        open_decoder: Opens the decoder, which detects the language of recordings.
    """

    reader: EncoderInputs
    limits: DecoderLimits
    open_decoder: Callable[[DecoderSize], Decoder]

    def read(
        self,
        inputs: GenerateInputs,
        start: AnswerStart,
        adapter: Adapter,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Prompts:
        """Read what `generate` was given (see `Generation.read`)."""
        if self.reader.takes_text:
            return self._of_texts(inputs, start, tokenizer)
        return self._of_speech(inputs, start, adapter, tokenizer)

    def _of_texts(
        self, inputs: GenerateInputs, start: AnswerStart, tokenizer: PreTrainedTokenizerBase | None
    ) -> Prompts:
        start.check_unused("the model reads text", "language", "task")
        inputs.check_unused("the model reads text", _FEATURES)
        first = start.forced_bos_token_id
        if first is not None and (isinstance(first, bool) or not isinstance(first, (int, np.integer))):
            raise ServingError(f"forced_bos_token_id must be the id of a token, but got {shown(first)}")
        if first is not None and self.limits.outside([int(first)]) is not None:
            raise ServingError(
                f"forced_bos_token_id={first} is outside the vocabulary of {self.limits.vocabulary} tokens"
            )
        if is_recording(inputs.prompts):
            raise ServingError("the model reads text, not sound; give a text or token ids")
        self.reader.check_texts(inputs.prompts)
        texts = inputs.read(tokenizer, self.reader.sources)
        if not texts.rows:
            raise ServingError("there is no prompt; give at least one")
        sources = [self.reader.of_ids(row, None if first is None else int(first)) for row in texts.rows]
        return Prompts([[self.reader.rules.start] for _ in sources], texts.is_single, texts.gives_text, sources)

    def _of_speech(
        self,
        inputs: GenerateInputs,
        start: AnswerStart,
        adapter: Adapter,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Prompts:
        start.check_unused("an answer to a recording begins with its language and task", "forced_bos_token_id")
        speech = SpeechPrompt(self.reader.rules, start.language, start.task)
        is_single, gives_text, sources = _recordings(self.reader, inputs)
        if gives_text and tokenizer is None:
            raise ServingError(
                "the export holds no tokenizer to write text with; give input_features, or export with tokenizer=..."
            )
        languages = [None] * len(sources) if not speech.languages else self._detected(speech, sources, adapter)
        return Prompts([speech.tokens(language) for language in languages], is_single, gives_text, sources)

    def _detected(self, speech: SpeechPrompt, sources: Sequence[EncoderInput], adapter: Adapter) -> list[int]:
        """The language of each recording: the likeliest token after the start token."""
        names = names_of_rows(adapter, len(sources))
        decoder = self.open_decoder(DecoderSize(rows=1, capacity=1, chunk=1))
        detected = []
        for source, name in zip(sources, names, strict=True):
            row = decoder.open(name, source.arrays)
            logits = decoder.step({row: [speech.rules.start]})[row]
            decoder.close(row)
            detected.append(max(speech.languages, key=lambda token: float(logits[token])))
        return detected


def _recordings(reader: EncoderInputs, inputs: GenerateInputs) -> tuple[bool, bool, list[EncoderInput]]:
    """Whether a single recording was given and whether as samples, and what the encoder reads of each."""
    mask, features = inputs.attention_mask, inputs.input_features
    if inputs.input_ids is not None:
        reader.of_ids([0])  # says that the model reads no text
    if (features is None) == (inputs.prompts is None):
        raise ServingError(f"give either recordings, as arrays of samples, or {_FEATURES}")
    if features is not None:
        return False, False, reader.of_features({_FEATURES: features} | ({} if mask is None else {_MASK: mask}))
    if mask is not None:
        raise ServingError(f"{_MASK} is given without {_FEATURES}; leave it out")
    is_single = is_recording(inputs.prompts)
    items = [inputs.prompts] if is_single else _rows(inputs.prompts)
    if not items:
        raise ServingError("there is no recording; give at least one")
    if any(not is_recording(item) for item in items):
        reader.of_ids([0])  # says what the model reads
    rate = reader.speech.rate
    return is_single, True, [reader.of_recording(recording(item, rate)) for item in items]


def _rows(prompts: Any) -> list[Any]:
    """The recordings of a list, or of an array of several."""
    if isinstance(prompts, (torch.Tensor, np.ndarray)) and prompts.ndim == 2:
        if prompts.shape[0] > prompts.shape[1]:
            raise ServingError(
                f"the audio has shape {list(prompts.shape)}; give the samples of one channel, of one axis, or a list "
                "of such recordings"
            )
        return list(prompts)
    return list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
