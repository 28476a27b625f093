"""What a decoder of speech begins with: language, task and earlier text, as in transformers' `generate` of Whisper."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from gralora_fx.base.sources.model_files import GENERATION_CONFIG
from gralora_fx.core.loading.token_bounds import TokenBound
from gralora_fx.errors import ServingError, first_line, listed, shown
from gralora_fx.run.generate.generation_rules import GenerationRules

TRANSCRIBE, TRANSLATE = "transcribe", "translate"
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
_REPAIR = f"repair {GENERATION_CONFIG}, or export the model again"


@dataclass(frozen=True)
class SpeechPrompt:
    """The tokens before an answer, by the fields of `generation_config.json` that Whisper has.

    A model without these fields begins with its start token alone.

    Attributes:
        rules: The model's rules.
        language: The language that is spoken; None for the model's default, or that which it detects.
        task: `"transcribe"`, or `"translate"` into English; None for the model's default.
        earlier: Token ids of text before the recording, as `earlier_text` gives them.
    """

    rules: GenerationRules
    language: str | None = None
    task: str | None = None
    earlier: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check language and task."""
        for name, known in (("language", "lang_to_id"), ("task", "task_to_id")):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str):
                raise ServingError(f"{name} must be a text, but got {shown(value)}")
            if self._field("is_multilingual") is False:
                raise ServingError(f"{name}={shown(value)} has no effect: the model knows English alone; leave it out")
            if not self._ids(known):
                raise ServingError(
                    f"{name}={shown(value)} has no effect: {GENERATION_CONFIG} of {self.rules.directory} has no "
                    f"{known}; leave it out"
                )
        self.tokens(next(iter(self._ids("lang_to_id").values()), None))

    @property
    def languages(self) -> list[int]:
        """Token ids of the languages to choose among by what is heard, after the start token; none if it is known."""
        forced = self._forced()
        is_known = self._language is not None or (bool(forced) and forced[0] is not None)
        return [] if is_known else sorted(self._ids("lang_to_id").values())

    def tokens(self, heard: int | None = None) -> list[int]:
        """The tokens before the answer."""
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
        return getattr(self.rules.config, name, None)

    def _ids(self, name: str) -> Mapping[str, int]:
        """Token ids by name, as a field has them; none where it is not there."""
        found = self._field(name) or {}
        if not isinstance(found, Mapping) or not all(type(token) is int and token >= 0 for token in found.values()):
            raise ServingError(f"{name} of {self.rules.directory} is {shown(found)}, not ids of tokens; {_REPAIR}")
        return found

    def _forced(self) -> list[int | None]:
        """Tokens that old checkpoints force after the start token, where nobody says a language or a task."""
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


def earlier_text(tokenizer: PreTrainedTokenizerBase, text: str, positions: int) -> tuple[int, ...]:
    """Text before a recording as the tokens that Whisper's decoder takes for it, the last of them if they are many."""
    read, most = getattr(tokenizer, "get_prompt_ids", None), max(positions // 2 - 1, 1)
    if read is None:
        raise ServingError("prompt has no effect: the model's tokenizer takes no earlier text; leave it out")
    try:
        first, *others = (int(token) for token in read(_end(text, most, tokenizer), return_tensors="np"))
    except Exception as error:  # transformers and tokenizers raise types of their own
        raise ServingError(f"the tokenizer does not take the prompt ({first_line(error)})") from error
    return (first, *others[-most:])


def _end(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of a text that has some tokens at least, cut between two words, where no token goes across."""
    bound = TokenBound.of(tokenizer)
    least = sys.maxsize if bound is None else tokens * bound.longest
    found = (
        None if len(text) <= least else _BETWEEN_WORDS.search(text, max(len(text) - 2 * least, 0), len(text) - least)
    )
    return text if found is None else text[found.end() :]
