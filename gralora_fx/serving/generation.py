"""Generation with an exported decoder: onnxruntime-genai keeps the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, first_line
from gralora_fx.runtime.genai_schema import read_genai_config
from gralora_fx.runtime.session import CPU, FATAL, Runtime
from gralora_fx.serving.adapters import Adapters, LoadedAdapter
from gralora_fx.serving.decoder_limits import DecoderLimits
from gralora_fx.serving.genai_adapters import GenaiAdapters
from gralora_fx.serving.token_choice import Choice, TokenChooser

CHUNK = 256  # positions of a prompt per chunk, since attention computes all pairs, masked or not
_GENAI_NAMES = {"CUDAExecutionProvider": "cuda"}  # onnxruntime-genai's names of execution providers


class Generator:
    """A decoder of an export directory, run by onnxruntime-genai.

    Attributes:
        limits: What it can take. onnxruntime-genai ends a row at the end tokens by itself.
        copies: The adapters that onnxruntime-genai holds.
    """

    def __init__(self, directory: Path, runtime: Runtime, adapters: Adapters, threads: int | None = None) -> None:
        """Load the model.

        Args:
            directory: An export with a cache.
            runtime: The execution providers to run on.
            adapters: The adapters to run with, by name.
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
        self._adapters = adapters
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
        self.copies = GenaiAdapters(onnxruntime_genai.Adapters(self._model))
        given = fields["eos_token_id"]
        ends = frozenset(given if isinstance(given, list) else [given])
        self._padding = fields["pad_token_id"]
        self.limits = DecoderLimits(fields["vocab_size"], fields["context_length"], ends, fixed_ends=ends)

    def rows(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        adapter: str | Sequence[str | None] | None = None,
    ) -> GenaiRows:
        """Read prompts, as a batch in which all have the same adapter.

        Rows of unequal length are padded on the right, as onnxruntime-genai expects.

        Args:
            prompts: Token ids by row, within the limits.
            new_tokens: The most tokens that a row may add.
            adapter: The adapter to run with; None for the base.

        Raises:
            ServingError: There is no such adapter, its file was changed, or onnxruntime-genai fails.
        """
        if not (adapter is None or isinstance(adapter, str)):
            raise ServingError(
                "rows of this export have no adapter each; give one name, or export the model with adapters='batched'"
            )
        active = None if adapter is None else self._adapters[adapter]
        required = self._adapters.required(adapter)
        longest = max(len(row) for row in prompts)
        ids = np.full((len(prompts), longest), self._padding, dtype=np.int32)
        for index, row in enumerate(prompts):
            ids[index, : len(row)] = row
        options: dict[str, Any] = {"max_length": longest + new_tokens, "batch_size": len(prompts), "do_sample": False}
        if len(prompts) == 1 and longest > CHUNK:  # with several rows the runtime does not support chunks
            options["chunk_size"] = CHUNK
        parameters = self._genai.GeneratorParams(self._model)
        try:
            parameters.set_search_options(**options)
            generator = self._genai.Generator(self._model, parameters)
        except Exception as error:  # onnxruntime-genai raises types of its own
            raise ServingError(f"onnxruntime-genai fails: {first_line(error)}") from error
        result = GenaiRows(generator, len(prompts), min(self.limits.fixed_ends), self.copies)
        del generator  # the rows have it, and let it go
        result.read(ids, required, None if required else active)
        return result


class GenaiRows:
    """Prompts that onnxruntime-genai runs as one batch; a row that is over runs on with it, unread."""

    def __init__(self, generator: Any, rows: int, end: int, copies: GenaiAdapters) -> None:
        """Take over a generator.

        Args:
            generator: The generator.
            rows: How many rows it has.
            end: A token that ends a row.
            copies: The adapters that onnxruntime-genai holds.
        """
        self._generator, self._count, self._end, self._copies = generator, rows, end, copies

    def __del__(self) -> None:
        """Free what was to be freed, and waited for this generator to go."""
        self._generator = None
        self._copies.sweep()

    def read(self, ids: NDArray[np.int32], inputs: Mapping[str, Any], adapter: LoadedAdapter | None) -> None:
        """Read the prompts.

        Args:
            ids: `[rows, tokens]`.
            inputs: What the model requires besides.
            adapter: The adapter to run with; None for the base, or if it is among the inputs.

        Raises:
            ServingError: onnxruntime-genai fails, or the adapter's file was changed since it was loaded.
        """
        try:
            for name, value in inputs.items():
                self._generator.set_model_input(name, value)
            if adapter is not None:
                self._copies.activate(self._generator, adapter)
            self._generator.append_tokens(ids)
        except ServingError:
            raise
        except Exception as error:  # onnxruntime-genai raises types of its own
            raise ServingError(f"onnxruntime-genai fails: {first_line(error)}") from error

    def step(self, choosers: Mapping[int, TokenChooser]) -> dict[int, Choice]:
        """Choose the next token of some rows.

        Args:
            choosers: Of each row that goes on, what chooses its tokens. A row that is left out is over.

        Raises:
            ServingError: onnxruntime-genai fails.
        """
        try:
            if all(chooser.takes_likeliest for chooser in choosers.values()):
                self._generator.generate_next_token()
                tokens = self._generator.get_next_tokens()
                return {row: Choice(int(tokens[row])) for row in choosers}
            logits = self._generator.get_logits()
        except Exception as error:  # onnxruntime-genai raises types of its own
            raise ServingError(f"onnxruntime-genai fails: {first_line(error)}") from error
        last = logits.reshape(self._count, -1, logits.shape[-1])[:, -1]
        choices = {row: choose(last[row]) for row, choose in choosers.items()}
        self._append([choices[row].token if row in choices else self._end for row in range(self._count)], logits)
        return choices

    def _append(self, tokens: Sequence[int], like: NDArray[Any]) -> None:
        """Let each row add a token: the only one that the logits leave possible."""
        forced = np.full((self._count, like.shape[-1]), np.finfo(np.float32).min, dtype=np.float32)
        forced[np.arange(self._count), tokens] = 0
        try:
            self._generator.set_logits(forced.reshape(like.shape))
            self._generator.generate_next_token()
        except Exception as error:
            raise ServingError(f"onnxruntime-genai fails: {first_line(error)}") from error


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
