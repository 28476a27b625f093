"""Texts that the encoder of an encoder-decoder reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError, shown
from gralora_fx.format.input_names import IDS
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.engine.adapters import AdapterNames
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize, PromptLimit, context_length
from gralora_fx.run.generate.answer_options import AnswerStart
from gralora_fx.run.generate.encoder_inputs import EncoderInputs
from gralora_fx.run.generate.generation_rules import GenerationRules
from gralora_fx.run.generate.prompts import EncoderInput, GenerateInputs, Prompts, is_signal

_MASK = "attention_mask"


@dataclass(frozen=True)
class TextSources(EncoderInputs):
    """Reads the texts that an encoder takes as token ids.

    Attributes:
        vocabulary: How many tokens there are; None if that is not known.
    """

    vocabulary: int | None = None

    takes_text: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        directory: Path,
        manifest: Manifest,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        limits: DecoderLimits,
    ) -> TextSources:
        """Read the rules of an export (see `EncoderInputs.of`)."""
        rules = GenerationRules.of(directory, config, limits.ends, reads_ids=True)
        limit, size = context_length(config, IDS), config.get("vocab_size")
        limit = None if limit is None else limit - manifest.position_offset
        return cls(directory, manifest.task, inputs, limits, rules, limit, size if isinstance(size, int) else None)

    @property
    def sources(self) -> PromptLimit:
        """The most tokens of a source, for a check of a source."""
        return PromptLimit.of_source(self.limit)

    def of_ids(self, ids: Sequence[int], forced_first: int | None = None) -> EncoderInput:
        """Read the token ids of a text."""
        if not len(ids):
            raise ServingError("the source is empty; give at least one token")
        most = self.vocabulary
        wrong = next((token for token in ids if token < 0 or (most is not None and token >= most)), None)
        if wrong is not None:
            raise ServingError(f"the source holds token {shown(wrong)}, outside the vocabulary of {most} tokens")
        self.sources.check_tokens(ids)
        array = np.array([list(ids)], dtype=np.int64)
        known = {IDS: array, _MASK: np.ones_like(array)}
        return EncoderInput(self.checked(known), self.rules, tuple(int(token) for token in ids), forced_first)

    @staticmethod
    def check_texts(prompts: Any) -> None:
        """Check that no text is empty, to which many tokenizers give an end token all the same."""
        for prompt in [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, (list, tuple)) else ():
            if isinstance(prompt, str) and not prompt.strip():
                raise ServingError("the source is empty; give a text")

    def example(self, ids: Sequence[int]) -> EncoderInput:
        """Return an input to try the model with: the tokens of a text."""
        return self.of_ids(ids)

    def read(
        self,
        inputs: GenerateInputs,
        start: AnswerStart,
        adapter: AdapterNames,
        tokenizer: PreTrainedTokenizerBase | None,
        open_decoder: Callable[[DecoderSize], Decoder],
    ) -> Prompts:
        """Read what `generate` was given (see `Generation.read`)."""
        start.check_unused("the model reads text", "language", "task")
        inputs.check_unused("the model reads text", "input_features")
        first = start.forced_bos_token_id
        if first is not None and (isinstance(first, bool) or not isinstance(first, (int, np.integer))):
            raise ServingError(f"forced_bos_token_id must be the id of a token, but got {shown(first)}")
        if first is not None and self.limits.outside([int(first)]) is not None:
            raise ServingError(
                f"forced_bos_token_id={first} is outside the vocabulary of {self.limits.vocabulary} tokens"
            )
        if is_signal(inputs.prompts):
            raise ServingError("the model reads text, not sound; give a text or token ids")
        self.check_texts(inputs.prompts)
        texts = inputs.read(tokenizer, self.sources)
        if not texts.rows:
            raise ServingError("there is no prompt; give at least one")
        sources = [self.of_ids(row, None if first is None else int(first)) for row in texts.rows]
        return Prompts([[self.rules.start] for _ in sources], texts.is_single, texts.gives_text, sources)
