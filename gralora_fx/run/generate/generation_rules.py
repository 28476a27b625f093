"""Rules for every answer from a model's `generation_config.json`, applied as by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gralora_fx.base.sources.model_files import GENERATION_CONFIG, read_json_object
from gralora_fx.errors import ServingError, first_line, option, warn_caller
from gralora_fx.run.generate.answer_options import Sampling
from gralora_fx.run.generate.logit_rules import (
    Forced,
    Longing,
    NoRepeats,
    Repetition,
    Rule,
    SequenceBias,
    Suppressed,
    finite,
    token_ids,
)

# fields that choose a search, with the only supported values; sampling is set by a request's options
_SEARCH: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prompt_lookup_num_tokens": (None,),
    "watermarking_config": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
}


@dataclass(frozen=True)
class GenerationRules:
    """A model's rules for its answers."""

    directory: Path  # the export directory, for messages
    config: Mapping[str, Any]  # its `generation_config.json`, with what `config.json` names beside it
    ends: frozenset[int]  # ids of the tokens that end an answer
    uncounted: int = 0  # number of tokens before an answer that `max_length` does not count

    @classmethod
    def of(
        cls,
        directory: Path,
        model_config: Mapping[str, Any],
        ends: frozenset[int],
        *,
        reads_ids: bool = False,
        uncounted: int = 0,
        more_search: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> GenerationRules:
        """Read an export's rules."""
        path = directory / GENERATION_CONFIG
        fields = read_json_object(path, ServingError) if path.is_file() else {}
        names = ("decoder_start_token_id", "bos_token_id", "forced_decoder_ids")
        named = {name: model_config[name] for name in names if model_config.get(name) is not None}
        try:
            rules = cls(directory, {**named, **fields}, ends, uncounted)
            rules.processors(Sampling(), [rules.start], 1, [rules.start] if reads_ids else None)
        except ServingError:
            raise
        except Exception as error:  # values of wrong types raise anything
            raise ServingError(
                f"{path if path.is_file() else directory / 'config.json'} cannot be followed ({first_line(error)}); "
                "repair it, or export the model again"
            ) from error
        rules.warn_of_search({**_SEARCH, **(more_search or {})})
        return rules

    @property
    def start(self) -> int:
        """The decoder's start token."""
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = self.config.get(name)
            if type(found) is int and found >= 0:
                return found
        raise ServingError(
            f"{GENERATION_CONFIG} of {self.directory} names no decoder_start_token_id; export a model whose does"
        )

    def new_tokens(self, prompt_length: int) -> int | None:
        """Return the model's maximum tokens of an answer; None if it sets none."""
        if (most := self.config.get("max_new_tokens")) is not None:
            return int(most)
        most = self.config.get("max_length")
        return None if most is None else max(int(most) - max(prompt_length - self.uncounted, 0), 1)

    def processors(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        new_tokens: int,
        source: Sequence[int] | None = None,
        forced_first: int | None = None,
    ) -> list[Rule]:
        """Return the model's rules for logits, in the order of transformers' processors; they run before sampling."""
        ends = sorted(self.ends if sampling.ends is None else sampling.ends)
        return [
            *self._of_repetition(sampling, source, ends),
            *self._of_length(sampling, len(prompt), ends),
            *self._of_places(len(prompt), new_tokens, ends, forced_first),
        ]

    def _of_repetition(self, sampling: Sampling, source: Sequence[int] | None, ends: list[int]) -> Iterator[Rule]:
        """Yield rules against repetition and bad words."""
        field: Callable[[str], Any] = self.config.get
        if field("sequence_bias") is not None:
            yield SequenceBias.of(field("sequence_bias"))
        if source is not None and _is_set(field("encoder_repetition_penalty"), 1):
            yield Repetition(1 / float(field("encoder_repetition_penalty")), source)
        if _is_set(field("repetition_penalty"), 1) and sampling.repetition_penalty == 1:
            yield Repetition(float(field("repetition_penalty")))
        if _is_set(field("no_repeat_ngram_size"), 0):
            yield NoRepeats(field("no_repeat_ngram_size"))
        if source is not None and _is_set(field("encoder_no_repeat_ngram_size"), 0):
            yield NoRepeats(field("encoder_no_repeat_ngram_size"), source)
        if field("bad_words_ids") is not None:
            yield SequenceBias.against(field("bad_words_ids"), ends)

    def _of_length(self, sampling: Sampling, length: int, ends: list[int]) -> Iterator[Rule]:
        """Yield rules that delay the end of an answer."""
        field: Callable[[str], Any] = self.config.get
        if not ends or sampling.min_new_tokens:
            return
        if _is_set(field("min_new_tokens"), 0):
            yield Suppressed(ends, below=length + int(field("min_new_tokens")))
        elif _is_set(field("min_length"), 0):
            yield Suppressed(ends, below=int(field("min_length")))

    def _of_places(self, length: int, new_tokens: int, ends: list[int], forced_first: int | None) -> Iterator[Rule]:
        """Yield rules for the beginning and the end of an answer."""
        field: Callable[[str], Any] = self.config.get
        first = field("forced_bos_token_id") if forced_first is None else forced_first
        if first is not None:
            yield Forced(token_ids(first), at=1)
        if field("forced_eos_token_id") is not None:
            yield Forced(token_ids(field("forced_eos_token_id")), at=length + new_tokens - 1)
        if field("remove_invalid_values"):
            yield finite
        if field("exponential_decay_length_penalty") is not None and ends:
            start, factor = field("exponential_decay_length_penalty")
            yield Longing(length + int(start), float(factor), ends)
        if field("suppress_tokens"):
            yield Suppressed(token_ids(field("suppress_tokens")))
        if field("begin_suppress_tokens"):
            begin = length if length > 1 or first is None else length + 1
            yield Suppressed(token_ids(field("begin_suppress_tokens")), at=begin)

    def warn_of_search(self, fields: Mapping[str, tuple[Any, ...]]) -> None:
        """Warn of fields that choose a search other than those supported."""
        others = [
            f"{name}={value}" for name, followed in fields.items() if (value := self.config.get(name)) not in followed
        ]
        if others:
            warn_caller(
                f"{GENERATION_CONFIG} of {self.directory} asks for {', '.join(others)}, which is not supported: each "
                f"token is the likeliest, or drawn with {option(do_sample=True)}"
            )


def _is_set(value: Any, idle: float) -> bool:
    return value is not None and value != idle
