"""Generation with an exported decoder: onnxruntime-genai keeps the cache and samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError, first_line
from gralora_fx.runtime.genai_schema import read_genai_config
from gralora_fx.runtime.session import CPU, FATAL, Runtime
from gralora_fx.serving.adapters import LoadedAdapter
from gralora_fx.serving.answer import Answer
from gralora_fx.serving.genai_adapters import GenaiAdapters
from gralora_fx.serving.prompts import Prompts
from gralora_fx.serving.sampling import Sampling

_GENAI_NAMES = {"CUDAExecutionProvider": "cuda"}  # onnxruntime-genai's names of execution providers


class Generator:
    """A decoder of an export directory, run by onnxruntime-genai.

    Attributes:
        ends: Ids of the tokens that end a text.
        adapters: The adapters that onnxruntime-genai holds.
    """

    def __init__(self, directory: Path, runtime: Runtime, threads: int | None = None) -> None:
        """Load the model.

        Args:
            directory: An export with a cache.
            runtime: The execution providers to run on.
            threads: Threads of an operator; None for onnxruntime-genai's choice.

        Raises:
            ServingError: onnxruntime-genai is not installed, cannot load the model or does not support a provider, or
                `genai_config.json` is not as an export writes it.
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
        self.adapters = GenaiAdapters(onnxruntime_genai.Adapters(self._model))
        ends = fields["eos_token_id"]
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._padding, self._vocabulary, self._context = (
            fields[name] for name in ("pad_token_id", "vocab_size", "context_length")
        )

    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        adapter: LoadedAdapter | None = None,
        required: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> Iterator[list[int]]:
        """Generate one new token for each row in every step, until every row has ended or is full.

        Rows of unequal length are padded on the right, as onnxruntime-genai expects, and run as a batch.

        Args:
            prompts: Token ids by row, checked.
            sampling: How tokens are chosen.
            adapter: The adapter to run with; None for the base.
            required: Its tensors, of an export that requires them as inputs, rather than that they may be overridden.

        Raises:
            ServingError: onnxruntime-genai fails, or an adapter's file was changed since it was loaded.
        """
        longest = max(len(row) for row in prompts)
        rows = np.full((len(prompts), longest), self._padding, dtype=np.int32)
        for index, row in enumerate(prompts):
            rows[index, : len(row)] = row
        parameters = self._genai.GeneratorParams(self._model)
        generator = None
        try:
            parameters.set_search_options(**sampling.options(longest, len(prompts), self._context))
            generator = self._genai.Generator(self._model, parameters)
            for name, value in required.items():
                generator.set_model_input(name, value)
            if adapter is not None and not required:
                self.adapters.activate(generator, adapter)
            generator.append_tokens(rows)
            while not generator.is_done():
                generator.generate_next_token()
                yield [int(token) for token in generator.get_next_tokens()]
        except Exception as error:  # onnxruntime-genai raises types of its own
            raise ServingError(f"onnxruntime-genai fails: {first_line(error)}") from error
        finally:
            generator = None  # the last of its adapter's generators lets the adapter go
            self.adapters.sweep()

    def check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Check that the model can take prompts.

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
            request = "" if new is None else f" and max_new_tokens={new}"
            raise ServingError(
                f"prompt {longest} has {length} tokens{request}, more than the context of {self._context}; shorten it"
            )


class Answers(Iterator[Any]):
    """The answers to prompts, piece by piece, or all at once."""

    def __init__(
        self,
        generator: Generator,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase | None,
        sampling: Sampling,
        stop: Sequence[str],
        adapter: LoadedAdapter | None = None,
        required: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> None:
        """Check the prompts and start.

        Args:
            generator: The model.
            prompts: The prompts to answer.
            tokenizer: For texts, and for stop strings.
            sampling: How tokens are chosen.
            stop: Strings that end an answer.
            adapter: The adapter to answer with; None for the base.
            required: Its tensors, of an export that requires them as inputs.

        Raises:
            ServingError: A prompt cannot be taken.
        """
        generator.check(prompts.rows, sampling)
        self._prompts = prompts
        reader = tokenizer if prompts.gives_text or stop else None
        self._answers = [Answer(reader, generator.ends, stop) for _ in prompts.rows]
        self._steps = generator.tokens(prompts.rows, sampling, adapter, required)

    def __next__(self) -> Any:
        """What the next step adds: a text or ids, or a list of them for a list of prompts."""
        if all(answer.has_ended for answer in self._answers):
            raise StopIteration
        tokens = next(self._steps, None)
        pieces: list[Any] = []
        for index, answer in enumerate(self._answers):
            before = len(answer.ids)
            text = answer.finish() if tokens is None else answer.take(tokens[index])
            pieces.append(text if self._prompts.gives_text else answer.ids[before:])
        if tokens is None and not any(pieces):  # every row is full, and no text was held back
            raise StopIteration
        return pieces[0] if self._prompts.is_single else pieces

    def result(self) -> Any:
        """The whole answers."""
        for _ in self:
            pass
        answers = [answer.text if self._prompts.gives_text else answer.ids for answer in self._answers]
        return answers[0] if self._prompts.is_single else answers


def _session_options(threads: int | None) -> dict[str, int]:
    """Session options that override those of `genai_config.json`, by onnxruntime-genai's names."""
    return {"log_severity_level": FATAL} | ({} if threads is None else {"intra_op_num_threads": threads})


def _genai_providers(runtime: Runtime) -> dict[str, Mapping[str, Any]]:
    """Execution providers with their options by onnxruntime-genai's names, the CPU left out.

    Raises:
        ServingError: A provider is not supported.
    """
    others = [name for name, _ in runtime.providers if name not in (CPU, *_GENAI_NAMES)]
    if others or not runtime.providers:
        raise ServingError(
            f"generate runs on {' or '.join((CPU, *_GENAI_NAMES))}, not on "
            f"{', '.join(others) or 'the providers of given SessionOptions'}; load the export with those providers"
        )
    return {_GENAI_NAMES[name]: options for name, options in runtime.providers if name != CPU}
