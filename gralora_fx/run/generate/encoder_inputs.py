"""Encoder inputs of an encoder-decoder: token ids, or a feature's conversion of other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, option, shown
from gralora_fx.format.input_names import IDS
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.engine.limits import DecoderLimits, PromptLimit, context_length
from gralora_fx.run.generate.generation_rules import GenerationRules
from gralora_fx.run.generate.prompts import AnswerCall, EncoderInput, GenerateInputs, Prompts, is_signal
from gralora_fx.run.sessions.ort_values import as_array

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer

_MASK = "attention_mask"


@dataclass(frozen=True)
class EncoderInputs:
    """Reads an export's encoder inputs; the base class reads arrays only.

    A feature's subclass reads other prompts: its `reads` says for which encoders, and it overrides `read` and
    `example`, and where its rules or fields are other ones, `rules_of` and `fields_of`.
    """

    directory: Path  # the export directory
    task: str | None  # the task that it was exported for
    inputs: Mapping[str, Any]  # the encoder's inputs, by name, from its session
    limits: DecoderLimits  # limits of a decoder row
    rules: GenerationRules  # the generation rules of the model
    limit: int | None = None  # maximum tokens that it reads; None for no limit

    takes_text: ClassVar[bool] = False  # whether the encoder reads tokens
    reads_media: ClassVar[bool] = False  # whether it reads what `generate` is given beside prompts

    @classmethod
    def of(
        cls,
        directory: Path,
        manifest: Manifest,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        limits: DecoderLimits,
    ) -> Self:
        """Create it, reading the export's rules."""
        rules = GenerationRules.of(directory, config, limits.ends, **cls.rules_of(config))
        read = cls(directory, manifest.task, inputs, limits, rules, **cls.fields_of(manifest, config))
        read.check()
        return read

    @classmethod
    def rules_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return further arguments of `GenerationRules.of`, by the model's configuration."""
        return {}

    @classmethod
    def fields_of(cls, manifest: Manifest, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of further fields."""
        return {}

    def check(self) -> None:  # most have nothing more to check
        """Raise a `ServingError` if the rules are invalid for such an encoder."""

    @classmethod
    def reads(cls, inputs: Mapping[str, Any]) -> bool:
        """Return whether this class reads for an encoder with these inputs, by name."""
        return True

    def read(self, inputs: GenerateInputs, call: AnswerCall) -> Prompts:
        """Read the arguments of `generate` (see `Generation.read`)."""
        self.refuse()

    def example(self, ids: Sequence[int]) -> EncoderInput:
        """Return an example input, of a text's tokens if it reads text."""
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raise a `ServingError`: prompts are not read."""
        raise ServingError(
            f"{self.directory} was exported for the task {self.task}, and no feature that is installed reads prompts "
            f"for it (its encoder takes {', '.join(self.inputs)}); install gralora-fx with all of its features"
        )

    def check_writes(self, tokenizer: TextTokenizer | None, instead: str) -> None:
        """Raise if there is no tokenizer to write answers with, which is not needed for inputs given `instead`."""
        if tokenizer is None:
            raise ServingError(
                f"the export holds no tokenizer to write text with; give {instead}, or export with "
                f"{option(tokenizer=...)}"
            )

    def of_features(self, values: Mapping[str, Any]) -> list[EncoderInput]:
        """Split features, arrays or tensors with the batch as first axis, into an input per row."""
        unknown = [name for name in values if name not in self.inputs]
        if unknown:
            raise ServingError(f"the encoder of {self.directory} takes {', '.join(self.inputs)}, not {unknown[0]}")
        arrays = {name: as_array(name, value, self.inputs[name]) for name, value in values.items()}
        sizes = {len(array) for array in arrays.values()}
        if len(sizes) != 1:
            raise ServingError(f"{' and '.join(arrays)} have {sorted(sizes)} rows; give as many of each")
        rows = [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(sizes.pop())]
        return [EncoderInput(self.checked(row), self.rules) for row in rows]

    def checked(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all inputs of the encoder, cast to its dtypes."""
        if missing := [name for name in self.inputs if name not in arrays]:
            raise ServingError(f"the encoder of {self.directory} takes {missing[0]} too; give it")
        return {name: as_array(name, arrays[name], value) for name, value in self.inputs.items()}


@dataclass(frozen=True)
class TextSources(EncoderInputs):
    """Reads texts for an encoder that takes token ids."""

    vocabulary: int | None = None  # number of tokens; None if unknown

    takes_text: ClassVar[bool] = True

    @classmethod
    def rules_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return further arguments of `GenerationRules.of`."""
        return {"reads_ids": True}

    @classmethod
    def fields_of(cls, manifest: Manifest, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the limit on tokens, and their number."""
        limit, size = context_length(config, IDS), config.get("vocab_size")
        limit = None if limit is None else limit - manifest.position_offset
        return {"limit": limit, "vocabulary": size if isinstance(size, int) else None}

    @property
    def sources(self) -> PromptLimit:
        """The limit on a source's tokens."""
        return PromptLimit.of_source(self.limit)

    def of_ids(self, ids: Sequence[int], forced_first: int | None = None) -> EncoderInput:
        """Check a text's token ids and return the encoder's input."""
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
        """Raise for an empty text, for which many tokenizers produce an end token all the same."""
        for prompt in [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, (list, tuple)) else ():
            if isinstance(prompt, str) and not prompt.strip():
                raise ServingError("the source is empty; give a text")

    def example(self, ids: Sequence[int]) -> EncoderInput:
        """Return an example input: the tokens of a text."""
        return self.of_ids(ids)

    def read(self, inputs: GenerateInputs, call: AnswerCall) -> Prompts:
        """Read the arguments of `generate` (see `Generation.read`)."""
        call.start.check_unused("the model reads text", "language", "task")
        inputs.check_unused("the model reads text", "features")
        first = call.start.forced_bos_token_id
        if first is not None and (isinstance(first, bool) or not isinstance(first, (int, np.integer))):
            raise ServingError(f"forced_bos_token_id must be the id of a token, but got {shown(first)}")
        if first is not None and self.limits.outside([int(first)]) is not None:
            raise ServingError(
                f"forced_bos_token_id={first} is outside the vocabulary of {self.limits.vocabulary} tokens"
            )
        if is_signal(inputs.prompts):
            raise ServingError("the model reads text, not sound; give a text or token ids")
        self.check_texts(inputs.prompts)
        texts = inputs.read(call.tokenizer, self.sources)
        if not texts.rows:
            raise ServingError("there is no prompt; give at least one")
        sources = [self.of_ids(row, None if first is None else int(first)) for row in texts.rows]
        return Prompts([[self.rules.start] for _ in sources], texts.is_single, texts.gives_text, sources)
