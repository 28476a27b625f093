"""Text from an exported decoder: onnxruntime-genai keeps the cache, samples and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError, first_line
from gralora_fx.exporters.genai_schema import read_genai_config
from gralora_fx.exporters.session import CPU, FATAL, Runtime
from gralora_fx.serving.answer import Answer
from gralora_fx.tokenizers import is_chat, prompt_ids

CHUNK = 256  # positions of a prompt read at once: attention computes all of them by all, seen or not
_NEW_TOKENS = 64
_GENAI_NAMES = {"CUDAExecutionProvider": "cuda"}  # providers by the names that onnxruntime-genai has for them


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: How many tokens to add at most; None for 64, or fewer where the context ends before.
        do_sample: Whether to draw; False takes the likeliest.
        top_k: How many of the likeliest to draw from; 0 for all.
        top_p: Share of the probability to draw from, in `(0, 1]`.
        temperature: Divisor of the logits, above 0.
        seed: Seed of the draws; None for another one in every call.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    top_k: int = 50
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        whole = [
            ("max_new_tokens", 1 if self.max_new_tokens is None else self.max_new_tokens, 1),
            ("top_k", self.top_k, 0),
        ]
        for name, value, least in whole:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ServingError(f"{name} must be a whole number from {least} on, but got {value!r}")
        if not 0 < self.top_p <= 1:
            raise ServingError(f"top_p must be in (0, 1], but got {self.top_p!r}; take 1 for no limit")
        if not self.temperature > 0:
            raise ServingError(f"temperature must be above 0, but got {self.temperature!r}; take do_sample=False")

    def options(self, length: int, batch: int, context: int) -> dict[str, Any]:
        """onnxruntime-genai's search options for prompts of a length."""
        new = min(_NEW_TOKENS, context - length) if self.max_new_tokens is None else self.max_new_tokens
        options: dict[str, Any] = {"max_length": length + new, "batch_size": batch}
        options["do_sample"] = self.do_sample
        if self.do_sample:
            options |= {"top_k": self.top_k, "top_p": self.top_p, "temperature": self.temperature}
            if self.seed is not None:
                options["random_seed"] = self.seed
        if batch == 1 and length > CHUNK:  # with several rows the runtime takes no prompt after a past
            options["chunk_size"] = CHUNK
        return options


class Generator:
    """A decoder of an export directory, run by onnxruntime-genai.

    Attributes:
        ends: Ids of the tokens that end a text.
    """

    def __init__(self, directory: Path, runtime: Runtime, threads: int | None = None) -> None:
        """Load the model.

        Args:
            directory: An export with a cache.
            runtime: The execution providers to run on.
            threads: Threads of an operator; None for onnxruntime-genai's choice.

        Raises:
            ServingError: onnxruntime-genai is not installed, cannot load the model or does not run on a provider, or
                `genai_config.json` has what no export writes.
        """
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise ServingError(
                f"generation needs onnxruntime-genai ({error}); pip install 'gralora-fx[genai]'"
            ) from error
        self._genai: Any = onnxruntime_genai
        fields = read_genai_config(directory, ServingError)["model"]
        providers = _genai_providers(runtime)
        try:
            config = onnxruntime_genai.Config(str(directory))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": _session_options(threads)}}}))
            for name, options in providers.items():
                config.append_provider(name)
                for key, value in options.items():
                    config.set_provider_option(name, key, str(value))
            self._model = onnxruntime_genai.Model(config)
        except Exception as error:  # onnxruntime-genai raises types of its own
            raise ServingError(f"onnxruntime-genai cannot load {directory} ({first_line(error)})") from error
        ends = fields["eos_token_id"]
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._padding, self._vocabulary, self._context = (
            fields[name] for name in ("pad_token_id", "vocab_size", "context_length")
        )

    def tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        """One new token a row in every step, until every row has ended or is full.

        Rows of unequal length are padded on the right, as onnxruntime-genai takes them, and run together.

        Args:
            prompts: Token ids by row, checked.
            sampling: How tokens are chosen.

        Raises:
            ServingError: onnxruntime-genai fails.
        """
        longest = max(len(row) for row in prompts)
        rows = np.full((len(prompts), longest), self._padding, dtype=np.int32)
        for index, row in enumerate(prompts):
            rows[index, : len(row)] = row
        parameters = self._genai.GeneratorParams(self._model)
        try:
            parameters.set_search_options(**sampling.options(longest, len(prompts), self._context))
            generator = self._genai.Generator(self._model, parameters)
            generator.append_tokens(rows)
            while not generator.is_done():
                generator.generate_next_token()
                yield [int(token) for token in generator.get_next_tokens()]
        except Exception as error:  # onnxruntime-genai raises types of its own
            raise ServingError(f"onnxruntime-genai fails: {first_line(error)}") from error

    def check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Refuse prompts that the model cannot take.

        Raises:
            ServingError: A prompt is empty, too long, or holds ids out of range.
        """
        if not prompts:
            raise ServingError("there is no prompt; give at least one")
        for index, row in enumerate(prompts):
            if len(row) == 0:
                raise ServingError(f"prompt {index} is empty; give at least one token")
            wrong = [token for token in row if not 0 <= token < self._vocabulary]
            if wrong:
                raise ServingError(
                    f"prompt {index} holds token {wrong[0]}, outside the vocabulary of {self._vocabulary} tokens"
                )
        longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
        length, new = len(prompts[longest]), sampling.max_new_tokens
        if length + (new or 1) > self._context:
            asked = "" if new is None else f" and max_new_tokens={new}"
            raise ServingError(
                f"prompt {longest} has {length} tokens{asked}, more than the context of {self._context}; shorten it"
            )


class Answers(Iterator[Any]):
    """The answers to prompts, piece by piece, or all at once."""

    def __init__(
        self,
        generator: Generator,
        prompts: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        sampling: Sampling,
        stop: str | Sequence[str],
    ) -> None:
        """Check the prompts and begin.

        Args:
            generator: The model.
            prompts: One prompt, or a list of them, as `prompt_ids` takes them.
            tokenizer: For texts and chats.
            sampling: How tokens are chosen.
            stop: Strings that end an answer.

        Raises:
            ServingError: A prompt cannot be taken, a stop string is empty, or there is no tokenizer for them.
        """
        self._is_single = _is_one(prompts)
        given = [prompts] if self._is_single else list(prompts)
        rows = [prompt_ids(prompt, tokenizer, ServingError) for prompt in given]
        generator.check(rows, sampling)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and tokenizer is None:
            raise ServingError("stop strings need a tokenizer, and the export holds none; export with tokenizer=...")
        if "" in stops:
            raise ServingError("a stop string is empty, and would end every answer at once; leave it out")
        self._gives_text = not any(_is_ids(prompt) for prompt in given)
        self._answers = [Answer(tokenizer, generator.ends, stops) for _ in rows]
        self._steps = generator.tokens(rows, sampling)

    def __next__(self) -> Any:
        """What the next step adds: a text or ids, for a list of prompts a list of them."""
        if all(answer.has_ended for answer in self._answers):
            raise StopIteration
        tokens = next(self._steps, None)
        found: list[Any] = []
        for index, answer in enumerate(self._answers):
            before = len(answer.ids)
            text = answer.finish() if tokens is None else answer.take(tokens[index])
            found.append(text if self._gives_text else answer.ids[before:])
        if tokens is None and not any(found):  # every row is full, and no text was held back
            raise StopIteration
        return found[0] if self._is_single else found

    def result(self) -> Any:
        """The whole answers."""
        for _ in self:
            pass
        whole = [answer.text if self._gives_text else answer.ids for answer in self._answers]
        return whole[0] if self._is_single else whole


def _session_options(threads: int | None) -> dict[str, int]:
    """Session options that are laid over those of `genai_config.json`, as onnxruntime-genai spells them."""
    return {"log_severity_level": FATAL} | ({} if threads is None else {"intra_op_num_threads": threads})


def _genai_providers(runtime: Runtime) -> dict[str, Mapping[str, Any]]:
    """Execution providers with their options by onnxruntime-genai's names, the CPU left out.

    Raises:
        ServingError: There is one that it is not told to run on.
    """
    others = [name for name, _ in runtime.providers if name not in (CPU, *_GENAI_NAMES)]
    if others or not runtime.providers:
        raise ServingError(
            f"generate runs on {' or '.join((CPU, *_GENAI_NAMES))}, not on "
            f"{', '.join(others) or 'the providers of given SessionOptions'}; load the export with those providers"
        )
    return {_GENAI_NAMES[name]: options for name, options in runtime.providers if name != CPU}


def _is_ids(prompt: Any) -> bool:
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        return prompt.ndim == 1
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(token, int) for token in prompt)


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str) or is_chat(prompts) or _is_ids(prompts)
