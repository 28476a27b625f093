"""`load`: open an export directory as a callable model on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError, first_line
from gralora_fx.loading.tokenizers import load_tokenizer
from gralora_fx.runtime.adapter_inputs import BATCHED, is_adapter_input
from gralora_fx.runtime.encoder_decoder_session import EncoderDecoderSession
from gralora_fx.runtime.export_files import check_files
from gralora_fx.runtime.manifest import read_manifest
from gralora_fx.runtime.names import QUERY_SEQLENS
from gralora_fx.runtime.options import ProviderOptions, Providers, runtime_of
from gralora_fx.runtime.placement import (
    Placement,
    describe_placement,
    describe_providers,
    placement_of,
    warn_of_idle,
)
from gralora_fx.runtime.requirements import check_requirements
from gralora_fx.runtime.session import Runtime, open_session, quiet_run
from gralora_fx.serving.adapters import Adapters
from gralora_fx.serving.answers import Answers
from gralora_fx.serving.batched_generation import BatchedPrompts
from gralora_fx.serving.decoder import Decoder
from gralora_fx.serving.feed import Feed
from gralora_fx.serving.generation import Generator
from gralora_fx.serving.opening import check_outside_files, check_unchanged, directory_of, read_config
from gralora_fx.serving.outputs import Outputs
from gralora_fx.serving.prompts import given_prompts, stop_strings
from gralora_fx.serving.row_adapters import RowAdapters, rows_feed
from gralora_fx.serving.sampling import Sampling


def load(
    export_dir: str | Path,
    providers: Providers | None = None,
    *,
    provider_options: ProviderOptions | None = None,
    session_options: onnxruntime.SessionOptions | Mapping[str, Any] | None = None,
    threads: int | None = None,
    check: bool = False,
    max_rank: int | None = None,
) -> OrtModel:
    """Open an export on ONNX Runtime.

    The sizes of files are always compared with the manifest.

    Args:
        export_dir: A directory that `export_onnx` wrote.
        providers: Execution providers in order of preference: names, or a name and a dict of options as a tuple; a
            single one needs no list. None for the CPU.
        provider_options: Options of each provider, if they are not given beside its name.
        session_options: An `onnxruntime.SessionOptions`, used as it is, or a dict of its fields.
        threads: Threads of an operator, in calls and in `generate`; None for one on each core that the process may use.
        check: Whether to read every file and compare its SHA-256 with the manifest's.
        max_rank: The largest rank of an adapter that `load_adapter` takes; None for no limit.

    Returns:
        The model, ready to be called.

    Raises:
        ServingError: The directory is not an export, a file is missing, was changed or is outside it, a provider is not
            installed, or an option is unknown or of another type.
    """
    runtime, count = runtime_of(providers, provider_options, session_options, threads)
    if not (max_rank is None or (type(max_rank) is int and max_rank > 0)):
        raise ServingError(f"max_rank must be a positive integer or None, but got {max_rank!r:.80}")
    return OrtModel(export_dir, runtime, threads=count, check=check, max_rank=max_rank)


class OrtModel:
    """An exported model, called with arrays or tensors by the names of the PyTorch model's inputs.

    Attributes:
        directory: The export directory.
        manifest: What `gralora_export.json` says, typed.
        config: The model's `config.json`; empty if there is none.
        input_names: Inputs of the graph.
        output_names: Outputs of the graph.
    """

    def __init__(
        self,
        export_dir: str | Path,
        runtime: Runtime | None = None,
        *,
        threads: int | None = None,
        check: bool = False,
        max_rank: int | None = None,
    ) -> None:
        """Open an export; use `load`."""
        self.directory = directory_of(export_dir)
        self.manifest = read_manifest(self.directory, ServingError)
        check_files(self.directory, self.manifest, digests=check, error=ServingError)
        check_requirements(self.directory, self.manifest, ServingError)
        check_outside_files(self.directory)
        self.config = read_config(self.directory)
        self._runtime, self._threads = runtime or Runtime(), threads
        self.session = open_session(self.directory, self._runtime, error=ServingError)
        self._rows = RowAdapters(self.directory, self.manifest, max_rank) if self._is_batched else None
        self._adapters = Adapters(self.directory, self.manifest, self.session, max_rank)
        taken = self._adapters.base_session.get_inputs()
        inputs = {value.name: value for value in taken if not is_adapter_input(value.name)}
        is_pair = isinstance(self.session, EncoderDecoderSession)
        self._feed = Feed(inputs, self.config, is_pair, self.manifest.position_offset, self.manifest.image_sizes)
        self.input_names = tuple(inputs)
        self.output_names = tuple(value.name for value in self.session.get_outputs())
        warn_of_idle(self._runtime, self.placement)

    @cached_property
    def placement(self) -> Placement | None:
        """How many nodes of each operator every provider runs; None where the CPU is alone (see `placement_of`)."""
        return placement_of(self.session)

    def describe(self) -> str:
        """What is loaded and where it runs: task, precision, providers with version and device, threads, and nodes."""
        kinds = [] if self.manifest.quantization is None else [self.manifest.quantization.kind]
        lines = [f"{self.directory}: {self.task or 'no task'}, {', else '.join([*kinds, self.manifest.precision])}"]
        lines += [
            f"runs on {text}" for text in describe_providers(self._runtime, self.session, is_quantized=bool(kinds))
        ]
        lines += [] if self._threads is None else [f"threads: {self._threads}"]
        lines += [] if self.placement is None else [f"nodes: {describe_placement(self.placement)}"]
        return "\n".join(lines)

    @property
    def task(self) -> str | None:
        """The task the model was exported for."""
        return self.manifest.task

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved beside the model.

        Raises:
            ServingError: There is none.
        """
        tokenizer = self._tokenizer_or_none
        if tokenizer is None:
            raise ServingError(f"{self.directory} holds no tokenizer; export with tokenizer=..., or tokenize yourself")
        return tokenizer

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter, so that calls, or rows of them, can name it.

        An adapter in the export's own `adapters/` needs no loading: it is loaded when a call first names it.

        Args:
            name: The name to give it.
            path: An `.onnx_adapter` file that `export_adapter` or `export_onnx` wrote, its record beside it.

        Raises:
            ServingError: The export takes no adapters, the name is taken, or the file is damaged, incomplete, or of
                another base, rank or gralora_k than the export takes; nothing changes then.
        """
        self._known.load(name, path)

    def mix_adapters(self, name: str, weights: Mapping[str, float]) -> None:
        """Load the weighted sum of adapters as one more, exactly: its rank is the sum of theirs.

        Args:
            name: The name to give it.
            weights: A weight for each adapter, by name: `{"summaries": 0.7, "german": 0.3}`.

        Raises:
            ServingError: The name is taken, there is no such adapter, a weight is not a finite number, or rows of the
                export have an adapter each.
        """
        self._adapters.mix(name, weights)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; calls that run with it end undisturbed.

        Raises:
            ServingError: It is not loaded.
        """
        unloaded = self._known.unload(name)
        decoder = vars(self).get("decoder")
        if unloaded is not None and isinstance(decoder, Generator):  # onnxruntime-genai may have a copy of its own
            decoder.copies.forget(unloaded.record.file_sha256)

    def bind_adapter(self, binding: Any, adapter: str | None) -> None:
        """Bind an adapter's tensors in an `onnxruntime.IOBinding` of `session`, for the runs that use the binding.

        ONNX Runtime ignores active adapters of `RunOptions` there.

        Args:
            binding: The result of `session.io_binding()`.
            adapter: Name of the adapter; None for the base.

        Raises:
            ServingError: There is no such adapter, or rows of the export have an adapter each.
        """
        for name, value in self._adapters.to_bind(adapter).items():
            binding.bind_ortvalue_input(name, value)

    @property
    def adapters(self) -> Adapters | RowAdapters:
        """The adapters that are loaded, by name."""
        return self._known

    @property
    def _known(self) -> Adapters | RowAdapters:
        return self._adapters if self._rows is None else self._rows

    @property
    def _is_batched(self) -> bool:
        return self.manifest.adapters_mode == BATCHED

    def __call__(self, *args: Any, adapter: str | Sequence[str | None] | None = None, **inputs: Any) -> Outputs:
        """Run the model once.

        Args:
            *args: Not accepted: inputs are given by name.
            adapter: Name of the adapter to run with, None for the base; of a batched export also one for each row.
            **inputs: Arrays, tensors or nested lists by name; a mask that is left out is all ones, token types zeros,
                a cache empty. A list or dict of tensors is given by its name, or its parts by theirs (`images.0`).
                Integers and floats are cast to the graph's dtypes.

        Returns:
            Outputs by name or index: tensors if any input was a tensor, else arrays.

        Raises:
            ServingError: An input is missing, unknown, empty, too long, of the wrong dtype or shape, or holds ids out
                of range.
        """
        self._check_has_no_rows()
        if args:
            raise ServingError("inputs are given by name: model(input_ids=...), or model(**tokenizer(...))")
        parts = self._feed.parts({name: value for name, value in inputs.items() if value is not None})
        gives_tensors = any(isinstance(value, torch.Tensor) for value in parts.values())
        feed = self._feed.arrays(parts)
        session, values = self._with_adapter(adapter, feed)
        try:
            results = session.run(None, {**feed, **values}, quiet_run())
        except Exception as error:  # ONNX Runtime raises types of its own, without a common base
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise ServingError(f"ONNX Runtime refuses {shapes}: {first_line(error)}") from error
        pairs = zip(self.output_names, results, strict=True)
        return Outputs({name: torch.from_numpy(array) if gives_tensors else array for name, array in pairs})

    def _with_adapter(self, adapter: Any, feed: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """The session that runs a call with an adapter, or one for each row, and what to feed it besides."""
        if self._rows is None:
            return self._adapters.session(adapter), {}
        return self.session, rows_feed(self._rows, adapter, feed)

    def generate(
        self,
        prompts: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        stop: str | Sequence[str] = (),
        stream: bool = False,
        adapter: str | Sequence[str | None] | None = None,
        **sampling: Any,
    ) -> Any:
        """Answer prompts; onnxruntime-genai keeps the cache, of a batched export this package.

        Args:
            prompts: A text, a chat as a list of messages (`{"role": ..., "content": ...}`, by the tokenizer's
                template), a list of token ids, or a list of any of them, which run together.
            input_ids: Instead of prompts, a tokenizer's result: `generate(**tokenizer(texts, padding=True))`.
            attention_mask: 1 for ids that are not padding, 0 for padding on either side; None without padding.
            stop: Strings that end an answer; they are not part of it.
            stream: Whether to return an iterator over pieces of text (of token ids, for prompts of ids).
            adapter: Name of the adapter to answer with, None for the base; of a batched export also one for each.
            **sampling: The fields of `Sampling`: `max_new_tokens`, `do_sample` and, to draw, `top_k`, `top_p`, `min_p`,
                `temperature`, `seed`; `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias`,
                `min_new_tokens`, `eos_token_id` and `logprobs`.

        Returns:
            The answer to one prompt, a list for a list of prompts: texts, or the new token ids for prompts of ids. With
            `stream` an iterator over pieces, of lists of pieces for a list of prompts. With `logprobs` each answer or
            piece is a `Scored`: the content, and the scores of its tokens.

        Raises:
            ServingError: The export has no cache, onnxruntime-genai is not installed, a prompt is empty, too long or
                holds ids out of range, or an option is unknown, invalid or without effect.
        """
        self._check_generates()  # first: of an export that does not, no option is of use
        chosen = Sampling.of(sampling)
        if not isinstance(stream, bool):
            raise ServingError(f"stream must be True or False, but got {stream!r:.80}")
        tokenizer = self._tokenizer_or_none
        stops = stop_strings(stop, tokenizer)
        parsed = given_prompts(prompts, input_ids, attention_mask, tokenizer)
        answers = Answers(self.decoder, parsed, tokenizer, chosen, stops, adapter)
        return answers if stream else answers.result()

    @cached_property
    def decoder(self) -> Decoder:
        """The model as a decoder of prompts, which `generate` and schedulers drive.

        Raises:
            ServingError: It has no cache, onnxruntime-genai is needed and cannot load it, or the configuration names no
                context.
        """
        self._check_generates()
        check_unchanged(self.directory, self.manifest)
        if self._rows is not None:
            return BatchedPrompts(self.session, self._rows, self.directory, self.config, self.manifest.position_offset)
        assert isinstance(self._adapters, Adapters)
        return Generator(self.directory, self._runtime, self._adapters, self._threads)

    def _check_has_no_rows(self) -> None:
        """Check that the export is not a batched decoder, whose caches are buffers and whose rows have lengths.

        Raises:
            ServingError: It is one.
        """
        if QUERY_SEQLENS in self.input_names:
            raise ServingError(
                f"{self.directory} is a batched decoder, whose rows have caches that single calls do not keep; call "
                "generate, or open it as gralora_fx.serving.BatchedDecoder"
            )

    def _check_generates(self) -> None:
        if not any(name.startswith("past_key_values.") for name in self.input_names):
            raise ServingError(
                f"this export (task {self.task!r}) has no cache, so it cannot generate; "
                "export the model for a task with one, such as text-generation-with-past"
            )
        if isinstance(self.session, EncoderDecoderSession):
            raise ServingError(
                "onnxruntime-genai does not run an encoder-decoder in this layout; generate with optimum's "
                "ORTModelForSeq2SeqLM or ORTModelForSpeechSeq2Seq, or with transformers.js: they read this directory"
            )

    @cached_property
    def _tokenizer_or_none(self) -> PreTrainedTokenizerBase | None:
        check_unchanged(self.directory, self.manifest)
        return load_tokenizer(self.directory, ServingError)
