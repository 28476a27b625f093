"""`load`: open an export directory as a callable model on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from gralora_fx.base.tensors import is_tensor
from gralora_fx.errors import ServingError, first_line, shown
from gralora_fx.format.adapter_inputs import is_adapter_input
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.generate.answer_options import AnswerOptions, AnswerStart, Sampling, stop_strings
from gralora_fx.run.generate.prompt_answers import Completions
from gralora_fx.run.generate.prompts import GenerateInputs
from gralora_fx.run.open_export import OpenExport
from gralora_fx.run.sessions.ort_values import optional_arguments
from gralora_fx.run.sessions.run_options import ProviderOptions, Providers, runtime_of
from gralora_fx.run.sessions.session import QUIET_RUN
from gralora_fx.run.sessions.session_views import parts_of, with_adapter

if TYPE_CHECKING:
    from gralora_fx.run.call_arrays import CallInputs, Outputs
    from gralora_fx.run.generate.encoder_inputs import EncoderInputs
    from gralora_fx.run.sessions.adapter_file import AdapterSource


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
    runtime = runtime_of(providers, provider_options, session_options, threads)
    if not (max_rank is None or (type(max_rank) is int and max_rank > 0)):
        raise ServingError(f"max_rank must be a positive integer or None, but got {max_rank!r:.80}")
    return OrtModel(export_dir, runtime, check=check, max_rank=max_rank)


class OrtModel(OpenExport):
    """An exported model, called with arrays or tensors by the names of the PyTorch model's inputs."""

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """Inputs of the graph that calls run, without those for adapters."""
        return tuple(self.call_inputs.inputs)

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """Outputs of the graph that calls run."""
        return tuple(value.name for value in self._called.get_outputs())

    @property
    def _called(self) -> Any:
        """A session whose inputs and outputs are those of calls, adapters aside."""
        return self.first_session if self.reading.calls_rows else self.session

    @cached_property
    def call_inputs(self) -> CallInputs:
        """Converts the arguments of a call to the session's arrays; of use with I/O binding."""
        from gralora_fx.run.call_arrays import CallInputs

        taken = (*self._called.get_inputs(), *optional_arguments(self._called))
        inputs = {value.name: value for value in taken if not is_adapter_input(value.name)}
        is_pair = len(parts_of(self._called)) > 1
        manifest = self.manifest
        return CallInputs(
            inputs, self.config, is_pair, manifest.position_offset, manifest.facts, manifest.limits, manifest.task
        )

    def load_adapter(self, name: str, path: AdapterSource) -> None:
        """Load an adapter, so that calls, or rows of them, can name it.

        An adapter in the export's own `adapters/` needs no loading: it is loaded when a call first names it.

        Args:
            name: The adapter's name in calls.
            path: An `.onnx_adapter` file that `export_adapter` or `export_onnx` wrote, with its record beside it; or
                the contents of both in memory.

        Raises:
            ServingError: The export takes no adapters, the name is taken, or the file is damaged, incomplete, or of
                another base, rank or gralora_k than the export takes; nothing changes then.
        """
        self.adapters.load(name, path)

    def mix_adapters(self, name: str, weights: Mapping[str, float]) -> None:
        """Load the weighted sum of adapters as one more, exactly: its rank is the sum of theirs.

        Args:
            name: The name of the sum.
            weights: A weight for each adapter, by name: `{"summaries": 0.7, "german": 0.3}`.

        Raises:
            ServingError: The name is taken, there is no such adapter, or a weight is not a finite number.
        """
        self.adapters.mix(name, weights)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter; calls that already run with it are not affected.

        Args:
            name: Its name.

        Raises:
            ServingError: It is not loaded.
        """
        self.adapters.unload(name)

    def bind_adapter(self, binding: Any, adapter: str | None) -> None:
        """Bind an adapter's tensors in an `onnxruntime.IOBinding` of `session`, for the runs that use the binding.

        ONNX Runtime ignores active adapters of `RunOptions` there.

        Args:
            binding: The result of `session.io_binding()`.
            adapter: Name of the adapter; None for the base.

        Raises:
            ServingError: There is no such adapter, or rows of the export have an adapter each.
        """
        for name, value in self.adapters.to_bind(adapter).items():
            binding.bind_ortvalue_input(name, value)

    def __call__(self, *args: Any, adapter: str | Sequence[str | None] | None = None, **inputs: Any) -> Outputs:
        """Run the model once."""
        if args:
            raise ServingError("inputs are given by name: model(input_ids=...), or model(**tokenizer(...))")
        parts = self.call_inputs.parts({name: value for name, value in inputs.items() if value is not None})
        gives_tensors = any(map(is_tensor, parts.values()))
        feed = self.call_inputs.arrays(parts)
        session, values = self._with_adapter(adapter, feed)
        try:
            results = session.run(None, {**feed, **values}, QUIET_RUN)
        except Exception as error:  # ONNX Runtime raises types of its own, without a common base
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise ServingError(f"ONNX Runtime refuses {shapes}: {first_line(error)}") from error
        from gralora_fx.run.call_arrays import Outputs

        pairs = zip(self.output_names, results, strict=True)
        if gives_tensors:
            import torch

            return Outputs({name: torch.from_numpy(array) for name, array in pairs})
        return Outputs(pairs)

    def _with_adapter(self, adapter: Any, feed: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """Return the session for a call with an adapter, or one for each row, and its additional inputs."""
        if not (adapter is None or isinstance(adapter, str)):
            return self._rows_for(adapter), self.adapters.rows(adapter, next(iter(feed.values())).shape[0])
        if adapter is not None:
            self.adapters[adapter].check_acts_everywhere("a call (generate finds where it acts)")
        return with_adapter(self.session, self.adapters.tensors_for(adapter, self.session)), {}

    def _rows_for(self, adapter: object) -> Any:
        """Return the session for a call whose rows have an adapter each."""
        self.adapters.inputs()  # raises if the export takes none
        if self.reading.calls_rows and self.manifest.has_rows:
            return self.rows_session
        why = "" if self.manifest.rows is None or self.manifest.has_rows else f" ({self.manifest.rows})"
        raise ServingError(
            f"adapter must be one name or None, but got {shown(adapter)}: one adapter runs in a call{why}"
        )

    def generate(
        self,
        prompts: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        input_features: Any = None,
        pixel_values: Any = None,
        inputs_embeds: Any = None,
        images: Any = None,
        language: str | None = None,
        task: str | None = None,
        forced_bos_token_id: int | None = None,
        stop: str | Sequence[str] = (),
        stream: bool = False,
        adapter: str | Sequence[str | None] | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        prompt_lookup_num_tokens: int | None = None,
        **sampling: Any,
    ) -> Any:
        """Answer prompts, each as if it were alone.

        An encoder-decoder answers its encoder's input by the rules of `generation_config.json` (forced, suppressed and
        repeated tokens, lengths), unless an option overrides them.

        Args:
            prompts: A text, a chat as a list of messages (`{"role": ..., "content": ...}`, by the tokenizer's
                template), a list of token ids, or a list of any of them, which run together. For a speech model, a
                recording: samples of one channel at the feature extractor's rate, or `{"array": samples,
                "sampling_rate": rate}`.
            input_ids: Instead of prompts, a tokenizer's result: `generate(**tokenizer(texts, padding=True))`.
            attention_mask: 1 for ids that are not padding, 0 for padding on either side; None without padding.
            input_features: Instead of prompts, a feature extractor's result.
            pixel_values: Instead of images, what an image processor made, `[batch, channels, height, width]`, for an
                encoder-decoder that reads images.
            inputs_embeds: For an export that takes embeddings beside ids (`task="image-text-to-text-with-past"`):
                embeddings of all tokens of a prompt, `[tokens, hidden]`, with text and images merged as by the model;
                or a dict with them and the model's other inputs, such as `grid_position_ids [3, tokens]`. For a list of
                prompts, a list, with None for text alone. Penalties still read the ids.
            images: For an export that reads images: a prompt's images in order, each a path, bytes, an array
                `[height, width, 3]` or a `PIL.Image.Image`. For a list of prompts, a list for each, None for text
                alone. A text has the placeholders of the model's processor; a chat has parts `{"type": "image"}`, or
                none. None if chats hold the images, as `{"type": "image", "url": ...}` or as in OpenAI's requests. For
                an encoder-decoder that reads pixels, one image, or a list with one for each answer; a prompt then is
                the beginning of the answer.
            language: The language of recordings, as `"en"` or `"English"`; None for the model's default, or to detect
                it.
            task: `"transcribe"`, or `"translate"` into English; None for the model's default.
            forced_bos_token_id: The first token of an encoder-decoder's answer to a text, such as that of the language
                to translate into; None for the model's.
            stop: Strings that end an answer; they are not part of it.
            stream: Whether to return an iterator over pieces of text (of token ids, for prompts of ids).
            adapter: Name of the adapter to answer with, None for the base; or a list of one for each prompt.
            json_schema: A JSON schema that every answer meets: an object, or JSON text.
            regex: A regular expression, in the syntax of Rust's `regex`, that every answer matches as a whole.
            choice: Texts of which every answer is one.
            grammar: A grammar that every answer follows, in llguidance's variant of Lark or in GBNF.
            prompt_lookup_num_tokens: The most tokens that a step proposes and verifies, taken from the text after an
                earlier occurrence of its last tokens; None for as many as save time, 0 for none. The answer is the
                same.
            **sampling: The fields of `Sampling`: `max_new_tokens`, `do_sample` and, to draw, `top_k`, `top_p`, `min_p`,
                `temperature`, `seed`; `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias`,
                `min_new_tokens`, `eos_token_id` and `logprobs`.

        Returns:
            The answer to one prompt, a list for a list of prompts: texts, or the new token ids for ids and features.
            With `stream` an iterator over pieces, of lists of pieces for a list of prompts. With `logprobs` each answer
            or piece is a `Scored`: the content, and the scores of its tokens.

        Raises:
            ServingError: The export has no cache, a prompt is empty, too long, of a kind that the model does not read
                or holds ids out of range, or an option is unknown, invalid or without effect.
            WrongFieldError: The required form of answers is invalid, cannot be compiled, or there are several; or
                llguidance, which enforces it, is not installed.
        """
        generation = self.generation  # before the options: an export that does not generate takes none
        chosen = Sampling.of(sampling)
        if not isinstance(stream, bool):
            raise ServingError(f"stream must be True or False, but got {stream!r:.80}")
        if prompt_lookup_num_tokens is not None:
            generation.proposer.most(prompt_lookup_num_tokens)
        tokenizer = self.text_tokenizer
        options = AnswerOptions(chosen, stop_strings(stop, tokenizer), proposed=prompt_lookup_num_tokens)
        if not (language is None and task is None and forced_bos_token_id is None):
            options = replace(options, start=AnswerStart(language, task, forced_bos_token_id))
        features = {"input_features": input_features, "pixel_values": pixel_values}
        features = {name: value for name, value in features.items() if value is not None}
        inputs = GenerateInputs(prompts, input_ids, attention_mask, features, inputs_embeds, media=images)
        parsed = generation.read(inputs, options, adapter, tokenizer)
        if not (json_schema is None and regex is None and choice is None and grammar is None):
            outputs = {"json": json_schema, "regex": regex, "choice": choice, "grammar": grammar}
            wanted = {"json_schema" if kind == "json" else kind: (kind, value) for kind, value in outputs.items()}
            options = replace(options, constraint=self.constraints.of(wanted))
        completions = Completions(generation, parsed, tokenizer, options, adapter)
        return completions if stream else completions.result()

    def decoder(
        self,
        *,
        rows: int = 8,
        capacity: int | None = None,
        chunk: int = 64,
        prefix_cache: int | None = None,
        max_memory: int | None = None,
    ) -> Decoder:
        """Return a decoder whose rows open, step and close, for a scheduler.

        On the CPU all rows run at once if the export has a graph for it (`model_rows.onnx`), else, and on other
        execution providers, one after the other. A row of an encoder-decoder is opened with its source.

        Args:
            rows: The number of rows to have room for.
            capacity: The most tokens of a row, prompt and answer; None for the model's context.
            chunk: The most tokens that a row may read in a step beside others; by itself it may read 256.
            prefix_cache: The most bytes of cached tokens that rows share through `Decoder.fill`; None for no sharing.
            max_memory: The most bytes of the caches of rows, copies of their adapters and the prefix cache together;
                None for no limit. A row without room waits: see `Decoder.has_room` and `Decoder.reserve`.

        Raises:
            ServingError: The export has no cache, a size is not a count, the capacity is above the model's context, or
                rows cannot share what they read, or `prefix_cache` is too small.
        """
        return self.generation.open_decoder(DecoderSize(rows, capacity, chunk, prefix_cache, max_memory))

    @property
    def limits(self) -> DecoderLimits:
        """The limits of a decoder: its vocabulary, context and end tokens.

        Raises:
            ServingError: The export has no cache, or its end tokens are not ids.
        """
        return self.generation.limits

    @property
    def encoder_inputs(self) -> EncoderInputs | None:
        """Reads an encoder-decoder's encoder inputs; None for a decoder.

        Raises:
            ServingError: The export has no cache, or its `generation_config.json` cannot be followed.
        """
        return self.generation.encoder_inputs
