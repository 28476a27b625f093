"""Recordings as inputs of a speech model's encoder, and the tokens that begin its answers."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from gralora_fx.base.sources.model_files import GENERATION_CONFIG
from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.core.loading.token_bounds import TokenBound
from gralora_fx.errors import ServingError, first_line, listed, shown
from gralora_fx.features.speech.recordings import Audio, SpeechReader, recording
from gralora_fx.run.engine.adapters import names_of_rows
from gralora_fx.run.engine.limits import DecoderSize
from gralora_fx.run.generate.encoder_inputs import EncoderInputs
from gralora_fx.run.generate.generation_rules import GenerationRules
from gralora_fx.run.generate.prompts import AnswerCall, EncoderInput, GenerateInputs, Prompts, is_signal

TRANSCRIBE, TRANSLATE = "transcribe", "translate"
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
_REPAIR = f"repair {GENERATION_CONFIG}, or export the model again"


@dataclass(frozen=True)
class SpeechPrompt:
    """The tokens before an answer, by Whisper's fields of `generation_config.json`.

    A model without these fields begins with its start token alone.
    """

    rules: GenerationRules  # the model's rules
    language: str | None = None  # the spoken language; None for the model's default, or to detect it
    task: str | None = None  # `"transcribe"`, or `"translate"` into English; None for the model's default
    earlier: tuple[int, ...] = ()  # token ids of text before the recording, from `earlier_text`

    def __post_init__(self) -> None:
        """Check language and task."""
        for name, known in (("language", "lang_to_id"), ("task", "task_to_id")):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str):
                raise ServingError(f"{name} must be a text, but got {shown(value)}")
            if self._field("is_multilingual") is False:
                raise ServingError(f"{name}={shown(value)} has no effect: the model knows only English; leave it out")
            if not self._ids(known):
                raise ServingError(
                    f"{name}={shown(value)} has no effect: {GENERATION_CONFIG} of {self.rules.directory} has no "
                    f"{known}; leave it out"
                )
        self.tokens(next(iter(self._ids("lang_to_id").values()), None))

    @property
    def languages(self) -> list[int]:
        """Language token ids to choose among after the start token; empty if the language is known."""
        forced = self._forced()
        is_known = self._language is not None or (bool(forced) and forced[0] is not None)
        return [] if is_known else sorted(self._ids("lang_to_id").values())

    def tokens(self, heard: int | None = None) -> list[int]:
        """Return the tokens before the answer; `heard` is a detected language's id."""
        tokens: list[int | None] = [self.rules.start, *self._forced()]
        language = heard if self._language is None else self._language_id(self._language)
        if language is not None:
            tokens[1:2] = [language]
        tasks, task = self._ids("task_to_id"), self._task
        if task is None and self._language is not None and tasks and not set(tokens) & set(tasks.values()):
            task = TRANSCRIBE
        if task is not None and task not in tasks:
            raise ServingError(f"no task {shown(task)}; there is {listed(tasks) or 'none'}")
        if task is not None:
            tokens.append(tasks[task])
        silent = self._field("no_timestamps_token_id")
        if silent is not None and tokens[-1] != silent:
            tokens.append(silent)
        return [*self.earlier, *(token for token in tokens if token is not None)]

    @property
    def _language(self) -> str | None:
        found: str | None = self._field("language") if self.language is None else self.language
        return found

    @property
    def _task(self) -> str | None:
        found: str | None = self._field("task") if self.task is None else self.task
        return found

    def _field(self, name: str) -> Any:
        return self.rules.config.get(name)

    def _ids(self, name: str) -> Mapping[str, int]:
        """Return a field's token ids by name; empty without the field."""
        found = self._field(name) or {}
        if not isinstance(found, Mapping) or not all(type(token) is int and token >= 0 for token in found.values()):
            raise ServingError(f"{name} of {self.rules.directory} is {shown(found)}, not ids of tokens; {_REPAIR}")
        return found

    def _forced(self) -> list[int | None]:
        """Return the tokens that old checkpoints force after the start token if no language or task is given."""
        value = self._field("forced_decoder_ids")
        if not value or self._language is not None or self._task is not None:
            return []
        pairs = [pair for pair in value if isinstance(pair, (list, tuple)) and len(pair) == 2]
        tokens = [token for _, token in pairs]
        is_right = len(pairs) == len(value) and all(token is None or type(token) is int for token in tokens)
        if not is_right or [place for place, _ in pairs] != list(range(1, len(pairs) + 1)):
            raise ServingError(
                f"forced_decoder_ids of {self.rules.directory} is {shown(value)}, not the tokens of places 1, 2 and so "
                f"on; {_REPAIR}"
            )
        return tokens

    def _language_id(self, language: str) -> int:
        known = self._ids("lang_to_id")
        name = str(language).lower()
        for token in (name, f"<|{TO_LANGUAGE_CODE.get(name, name)}|>"):
            if token in known:
                return known[token]
        codes = listed(token.strip("<|>") for token in known)
        raise ServingError(f"no language {shown(language)}; there is {codes or 'none'}")


def earlier_text(tokenizer: TextTokenizer, text: str, positions: int) -> tuple[int, ...]:
    """Tokenize text before a recording for Whisper's decoder, keeping its last tokens if there are many."""
    read, most = getattr(tokenizer, "get_prompt_ids", None), max(positions // 2 - 1, 1)
    if read is None:
        raise ServingError("prompt has no effect: the model's tokenizer takes no earlier text; leave it out")
    try:
        first, *others = (int(token) for token in read(_end(text, most, tokenizer), return_tensors="np"))
    except Exception as error:  # transformers and tokenizers raise types of their own
        raise ServingError(f"the tokenizer does not take the prompt ({first_line(error)})") from error
    return (first, *others[-most:])


def _end(text: str, tokens: int, tokenizer: TextTokenizer) -> str:
    """Return the end of a text, of at least some tokens, cut between words where no token spans the cut."""
    bound = TokenBound.of(tokenizer)
    least = sys.maxsize if bound is None else tokens * bound.longest
    found = (
        None if len(text) <= least else _BETWEEN_WORDS.search(text, max(len(text) - 2 * least, 0), len(text) - least)
    )
    return text if found is None else text[found.end() :]


_FEATURES, _MASK = "input_features", "attention_mask"
# fields of generation_config.json that are not supported, with their neutral values
_SEARCH: Mapping[str, tuple[Any, ...]] = {
    "return_timestamps": (None, False),
    "logprob_threshold": (None,),
    "compression_ratio_threshold": (None,),
    "no_speech_threshold": (None,),
}


class SpeechInputs(EncoderInputs):
    """Reads recordings for an encoder that takes samples or spectrogram features."""

    @classmethod
    def rules_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return further arguments of `GenerationRules.of`."""
        positions = config.get("max_target_positions") if config.get("model_type") == "whisper" else None
        return {"uncounted": positions // 2 - 1 if isinstance(positions, int) else 0, "more_search": _SEARCH}

    def check(self) -> None:
        """Check the rules of languages and tasks now, not at the first recording."""
        SpeechPrompt(self.rules)

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
        """Return an example input: silence."""
        silence = np.zeros(self.speech.rate // 10, dtype=np.float32)
        return self.of_recording(Audio(silence, self.speech.rate))

    def refuse(self) -> NoReturn:
        """Raise a `ServingError`, since texts are not read."""
        raise ServingError(
            f"{self.directory} reads sound, not text; give a recording as an array of floats, or over HTTP to "
            "/v1/audio/transcriptions"
        )

    def read(self, inputs: GenerateInputs, call: AnswerCall) -> Prompts:
        """Read the arguments of `generate` (see `Generation.read`)."""
        call.start.check_unused("an answer to a recording begins with its language and task", "forced_bos_token_id")
        prompt = SpeechPrompt(self.rules, call.start.language, call.start.task)
        is_single, gives_text, sources = self._recordings(inputs)
        if gives_text:
            self.check_writes(call.tokenizer, _FEATURES)
        languages: Sequence[int | None] = [None] * len(sources)
        if prompt.languages:
            languages = _detected(prompt, sources, call)
        return Prompts([prompt.tokens(language) for language in languages], is_single, gives_text, sources)

    def _recordings(self, inputs: GenerateInputs) -> tuple[bool, bool, list[EncoderInput]]:
        """Return whether it is a single recording, whether it was given as samples, and the encoder inputs of each."""
        mask, features = inputs.attention_mask, inputs.features
        if inputs.input_ids is not None:
            self.refuse()
        if bool(features) == (inputs.prompts is not None):
            raise ServingError(f"give either recordings, as arrays of samples, or {_FEATURES}")
        if features:
            return False, False, self.of_features({**features} | ({} if mask is None else {_MASK: mask}))
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


def _detected(prompt: SpeechPrompt, sources: Sequence[EncoderInput], call: AnswerCall) -> list[int]:
    """Return the language of each recording: the likeliest token after the start token."""
    names = names_of_rows(call.adapter, len(sources))
    decoder = call.open_decoder(DecoderSize(rows=1, capacity=1, chunk=1))
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
