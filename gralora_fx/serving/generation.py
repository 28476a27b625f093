"""How an export with a cache generates: what its prompts are for encoder and decoder, and what steps its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gralora_fx.engine.adapters import names_of_rows
from gralora_fx.engine.decoder import Decoder
from gralora_fx.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.errors import ServingError, shown
from gralora_fx.serving.encoder_inputs import EncoderInput, EncoderInputs
from gralora_fx.serving.prompt_limit import PromptLimit
from gralora_fx.serving.prompts import GenerateInputs, Prompts, with_images
from gralora_fx.serving.recordings import is_recording, recording
from gralora_fx.serving.speculation import Speculation
from gralora_fx.serving.speech_prompt import SpeechPrompt
from gralora_fx.tracing.inputs.input_names import EMBEDS

_FEATURES, _MASK = "input_features", "attention_mask"
Adapter: TypeAlias = str | Sequence[str | None] | None


@dataclass(frozen=True)
class Generation:
    """How an export generates.

    Attributes:
        limits: What a row can take.
        open_decoder: Makes the model as rows of a size; errors as of `Decoder`.
        encoder_inputs: Reads what the encoder of an encoder-decoder takes; None for a decoder.
        speculation: Chooses the lengths of drafts, by what calls before have measured.
    """

    limits: DecoderLimits
    open_decoder: Callable[[DecoderSize], Decoder]
    encoder_inputs: EncoderInputs | None = None
    speculation: Speculation = field(default_factory=Speculation)

    def read(self, inputs: GenerateInputs, adapter: Adapter, tokenizer: PreTrainedTokenizerBase | None) -> Prompts:
        """What `generate` was given, as what encoder and decoder read.

        Args:
            inputs: What it was given: prompts are a text, a recording, a list of token ids, or a list of any of them.
            adapter: The adapter of all prompts, or of each, which detects the language of recordings.
            tokenizer: The tokenizer beside the model, or None.

        Raises:
            ServingError: It is not what the model reads, or an option has no effect.
        """
        reader = self.encoder_inputs
        if reader is None:
            reason = "the model is a decoder, without an encoder"
            inputs.check_unused(reason, _FEATURES, "language", "task", "forced_bos_token_id")
            texts = inputs.read(tokenizer, PromptLimit.of_context(self.limits))
            return with_images(texts, inputs.inputs_embeds)
        inputs.check_unused("an encoder-decoder's encoder reads what it answers", EMBEDS)
        return (
            self._of_texts(reader, inputs, tokenizer)
            if reader.takes_text
            else self._of_speech(reader, inputs, adapter, tokenizer)
        )

    def _of_texts(
        self, reader: EncoderInputs, inputs: GenerateInputs, tokenizer: PreTrainedTokenizerBase | None
    ) -> Prompts:
        inputs.check_unused("the model reads text", "language", "task", _FEATURES)
        first = inputs.forced_bos_token_id
        if first is not None and (isinstance(first, bool) or not isinstance(first, (int, np.integer))):
            raise ServingError(f"forced_bos_token_id must be the id of a token, but got {shown(first)}")
        if first is not None and self.limits.outside([int(first)]) is not None:
            raise ServingError(
                f"forced_bos_token_id={first} is outside the vocabulary of {self.limits.vocabulary} tokens"
            )
        if is_recording(inputs.prompts):
            raise ServingError("the model reads text, not sound; give a text or token ids")
        reader.check_texts(inputs.prompts)
        texts = inputs.read(tokenizer, reader.sources)
        if not texts.rows:
            raise ServingError("there is no prompt; give at least one")
        sources = [reader.of_ids(row, None if first is None else int(first)) for row in texts.rows]
        return Prompts([[reader.rules.start] for _ in sources], texts.is_single, texts.gives_text, sources)

    def _of_speech(
        self,
        reader: EncoderInputs,
        inputs: GenerateInputs,
        adapter: Adapter,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Prompts:
        inputs.check_unused("an answer to a recording begins with its language and task", "forced_bos_token_id")
        speech = SpeechPrompt(reader.rules, inputs.language, inputs.task)
        is_single, gives_text, sources = _recordings(reader, inputs)
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
