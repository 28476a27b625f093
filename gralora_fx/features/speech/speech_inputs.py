"""Recordings that the encoder of a model of speech reads, and what its answers begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError, option
from gralora_fx.features.speech.recordings import Audio, SpeechReader, recording
from gralora_fx.features.speech.speech_prompt import SpeechPrompt
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.engine.adapters import AdapterNames, names_of_rows
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.generate.answer_options import AnswerStart
from gralora_fx.run.generate.encoder_inputs import EncoderInputs
from gralora_fx.run.generate.generation_rules import GenerationRules
from gralora_fx.run.generate.prompts import EncoderInput, GenerateInputs, Prompts, is_signal

_FEATURES, _MASK = "input_features", "attention_mask"
# fields of generation_config.json that are not followed, with the values that ask for nothing
_SEARCH: Mapping[str, tuple[Any, ...]] = {
    "return_timestamps": (None, False),
    "logprob_threshold": (None,),
    "compression_ratio_threshold": (None,),
    "no_speech_threshold": (None,),
}


class SpeechInputs(EncoderInputs):
    """Reads the recordings that an encoder takes as samples or as features of a spectrogram."""

    @classmethod
    def of(
        cls,
        directory: Path,
        manifest: Manifest,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        limits: DecoderLimits,
    ) -> SpeechInputs:
        """Read the rules of an export, and check those of languages and tasks (see `EncoderInputs.of`)."""
        positions = config.get("max_target_positions") if config.get("model_type") == "whisper" else None
        uncounted = positions // 2 - 1 if isinstance(positions, int) else 0
        rules = GenerationRules.of(directory, config, limits.ends, uncounted=uncounted, more_search=_SEARCH)
        SpeechPrompt(rules)  # says now what is wrong with its languages and tasks
        return cls(directory, manifest.task, inputs, limits, rules)

    @classmethod
    def reads(cls, inputs: Mapping[str, Any]) -> bool:
        """Return whether an encoder takes samples or features."""
        return not {_FEATURES, "input_values"}.isdisjoint(inputs)

    @cached_property
    def speech(self) -> SpeechReader:
        """Reads recordings."""
        return SpeechReader(self.directory, self.inputs)

    def of_recording(self, audio: Audio) -> EncoderInput:
        """Read a recording."""
        return EncoderInput(self.checked(self.speech.features(audio)), self.rules)

    def example(self, ids: Sequence[int]) -> EncoderInput:
        """Return an input to try the model with: silence."""
        silence = np.zeros(self.speech.rate // 10, dtype=np.float32)
        return self.of_recording(Audio(silence, self.speech.rate))

    def refuse(self) -> NoReturn:
        """Raise a `ServingError`: texts are not read."""
        raise ServingError(
            f"{self.directory} reads sound, not text; give a recording as an array of floats, or over HTTP to "
            "/v1/audio/transcriptions"
        )

    def read(
        self,
        inputs: GenerateInputs,
        start: AnswerStart,
        adapter: AdapterNames,
        tokenizer: PreTrainedTokenizerBase | None,
        open_decoder: Callable[[DecoderSize], Decoder],
    ) -> Prompts:
        """Read what `generate` was given (see `Generation.read`)."""
        start.check_unused("an answer to a recording begins with its language and task", "forced_bos_token_id")
        prompt = SpeechPrompt(self.rules, start.language, start.task)
        is_single, gives_text, sources = self._recordings(inputs)
        if gives_text and tokenizer is None:
            raise ServingError(
                "the export holds no tokenizer to write text with; give input_features, or export with "
                f"{option(tokenizer=...)}"
            )
        languages: Sequence[int | None] = [None] * len(sources)
        if prompt.languages:
            languages = _detected(prompt, sources, adapter, open_decoder)
        return Prompts([prompt.tokens(language) for language in languages], is_single, gives_text, sources)

    def _recordings(self, inputs: GenerateInputs) -> tuple[bool, bool, list[EncoderInput]]:
        """Return whether a single recording was given and whether as samples, and what the encoder reads of each."""
        mask, features = inputs.attention_mask, inputs.input_features
        if inputs.input_ids is not None:
            self.refuse()
        if (features is None) == (inputs.prompts is None):
            raise ServingError(f"give either recordings, as arrays of samples, or {_FEATURES}")
        if features is not None:
            return False, False, self.of_features({_FEATURES: features} | ({} if mask is None else {_MASK: mask}))
        if mask is not None:
            raise ServingError(f"{_MASK} is given without {_FEATURES}; leave it out")
        is_single = is_signal(inputs.prompts)
        items = [inputs.prompts] if is_single else _rows(inputs.prompts)
        if not items:
            raise ServingError("there is no recording; give at least one")
        if any(not is_signal(item) for item in items):
            self.refuse()
        rate = self.speech.rate
        return is_single, True, [self.of_recording(recording(item, rate)) for item in items]


def _detected(
    prompt: SpeechPrompt,
    sources: Sequence[EncoderInput],
    adapter: AdapterNames,
    open_decoder: Callable[[DecoderSize], Decoder],
) -> list[int]:
    """Return the language of each recording: the likeliest token after the start token."""
    names = names_of_rows(adapter, len(sources))
    decoder = open_decoder(DecoderSize(rows=1, capacity=1, chunk=1))
    detected = []
    for source, name in zip(sources, names, strict=True):
        row = decoder.open(name, source.arrays)
        logits = decoder.step({row: [prompt.rules.start]})[row]
        decoder.close(row)
        detected.append(max(prompt.languages, key=lambda token: float(logits[token])))
    return detected


def _rows(prompts: Any) -> list[Any]:
    """Return the recordings of a list, or of an array of several."""
    if isinstance(prompts, (torch.Tensor, np.ndarray)) and prompts.ndim == 2:
        if prompts.shape[0] > prompts.shape[1]:
            raise ServingError(
                f"the audio has shape {list(prompts.shape)}; give the samples of one channel, of one axis, or a list "
                "of such recordings"
            )
        return list(prompts)
    return list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
