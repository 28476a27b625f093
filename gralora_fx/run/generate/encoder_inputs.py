"""What the encoder of an encoder-decoder reads for an answer, from token ids, features or recordings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, shown
from gralora_fx.format.adapter_inputs import is_adapter_input
from gralora_fx.run.engine.bounded_rows import Source
from gralora_fx.run.engine.limits import DecoderLimits, context_length
from gralora_fx.run.generate.generation_rules import GenerationRules
from gralora_fx.run.generate.prompt_limit import PromptLimit
from gralora_fx.run.generate.recordings import Audio, SpeechReader
from gralora_fx.run.generate.sampling import Sampling
from gralora_fx.run.generate.speech_prompt import SpeechPrompt
from gralora_fx.run.sessions.ort_values import as_array
from gralora_fx.run.sessions.session_views import EncoderDecoderSession

_IDS, _MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class EncoderInput:
    """What an encoder reads for an answer, and what the model's own rules say of it.

    Attributes:
        arrays: What it reads, by name, each `[1, ...]`.
        rules: The rules of the model.
        ids: The tokens that it reads; None for features.
        forced_first: The token that the answer begins with; None for the model's, if it has one.
    """

    arrays: Source
    rules: GenerationRules
    ids: tuple[int, ...] | None = None
    forced_first: int | None = None

    def processors(self, sampling: Sampling, prompt: Sequence[int], new_tokens: int) -> list[Any]:
        """What changes the logits of the answer (see `GenerationRules.processors`)."""
        return self.rules.processors(sampling, prompt, new_tokens, self.ids, self.forced_first)


class EncoderInputs:
    """Reads what the encoder of an export takes.

    Attributes:
        rules: The rules of the model's answers.
        takes_text: Whether its encoder reads tokens, rather than features of sound.
        limit: The most tokens of a source; None for no limit.
        sources: The same, for a check of a source.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        session: EncoderDecoderSession,
        limits: DecoderLimits,
        position_offset: int,
    ) -> None:
        """Read the rules and limits."""
        self._directory, self._vocabulary = directory, config.get("vocab_size")
        taken = session.encoder.get_inputs()
        self._inputs = {value.name: value for value in taken if not is_adapter_input(value.name)}
        self.takes_text = _IDS in self._inputs
        self.rules = GenerationRules.of(directory, config, limits.ends)
        if not self.takes_text:
            SpeechPrompt(self.rules)  # says now what is wrong with its languages and tasks
        limit = context_length(config, _IDS) if self.takes_text else None
        self.limit = None if limit is None else limit - position_offset
        self.sources = PromptLimit.of_source(self.limit)

    @cached_property
    def speech(self) -> SpeechReader:
        """Reads recordings."""
        if self.takes_text:
            raise ServingError(f"{self._directory} reads text, not sound; give it text or token ids")
        return SpeechReader(self._directory, self._inputs)

    def of_ids(self, ids: Sequence[int], forced_first: int | None = None) -> EncoderInput:
        """What the encoder reads of a text."""
        if not self.takes_text:
            raise ServingError(
                f"{self._directory} reads sound, not text; give a recording as an array of floats, or over HTTP to "
                "/v1/audio/transcriptions"
            )
        if not len(ids):
            raise ServingError("the source is empty; give at least one token")
        most = self._vocabulary
        wrong = next((token for token in ids if token < 0 or (isinstance(most, int) and token >= most)), None)
        if wrong is not None:
            raise ServingError(f"the source holds token {shown(wrong)}, outside the vocabulary of {most} tokens")
        self.sources.check_tokens(ids)
        array = np.array([list(ids)], dtype=np.int64)
        known = {_IDS: array, _MASK: np.ones_like(array)}
        return EncoderInput(self._checked(known), self.rules, tuple(int(token) for token in ids), forced_first)

    @staticmethod
    def check_texts(prompts: Any) -> None:
        """Check that no text is empty, to which many tokenizers give an end token all the same."""
        for prompt in [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, (list, tuple)) else ():
            if isinstance(prompt, str) and not prompt.strip():
                raise ServingError("the source is empty; give a text")

    def of_recording(self, audio: Audio) -> EncoderInput:
        """What the encoder reads of a recording."""
        return EncoderInput(self._checked(self.speech.features(audio)), self.rules)

    def of_features(self, values: Mapping[str, Any]) -> list[EncoderInput]:
        """What the encoder reads of features, a row each."""
        unknown = [name for name in values if name not in self._inputs]
        if unknown:
            raise ServingError(f"the encoder of {self._directory} takes {', '.join(self._inputs)}, not {unknown[0]}")
        arrays = {name: as_array(name, value, self._inputs[name]) for name, value in values.items()}
        sizes = {len(array) for array in arrays.values()}
        if len(sizes) != 1:
            raise ServingError(f"{' and '.join(arrays)} have {sorted(sizes)} rows; give as many of each")
        rows = [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(sizes.pop())]
        return [EncoderInput(self._checked(row), self.rules) for row in rows]

    def example(self, ids: Sequence[int]) -> EncoderInput:
        """An input to try the model with."""
        if self.takes_text:
            return self.of_ids(ids)
        silence = np.zeros(self.speech.rate // 10, dtype=np.float32)
        return self.of_recording(Audio(silence, self.speech.rate))

    def _checked(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All inputs of the encoder, in its dtypes."""
        if missing := [name for name in self._inputs if name not in arrays]:
            raise ServingError(f"the encoder of {self._directory} takes {missing[0]} too; give it")
        return {name: as_array(name, arrays[name], value) for name, value in self._inputs.items()}
