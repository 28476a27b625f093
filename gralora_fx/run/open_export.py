"""An open export directory: its checked files, its adapters, a session over each graph, and its generation.

A `Reading` says how a kind of export is opened and generates; `gralora_fx.exporters.kinds` says how it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gralora_fx.base.sources.model_files import read_json_object, usable_path
from gralora_fx.core.loading.tokenizers import load_tokenizer, read_ahead, read_tokenizer
from gralora_fx.errors import ServingError, listed, option, warn_caller
from gralora_fx.format.adapter_inputs import is_adapter_input
from gralora_fx.format.adapter_paths import own_adapters
from gralora_fx.format.export_checks import check_files, check_requirements, weight_files
from gralora_fx.format.export_directory import (
    DECODER_KIND,
    ENCODER_DECODER_KIND,
    MANIFEST_NAME,
    MODEL_NAME,
    PLAIN_KIND,
    ROWS_NAME,
    check_own_file,
)
from gralora_fx.format.input_names import IDS
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.cache_buffers import takes_buffers
from gralora_fx.run.engine.limits import DecoderLimits
from gralora_fx.run.engine.session_decoders import RowsDecoder
from gralora_fx.run.generate.prompt_answers import Generation, GivenPrompts
from gralora_fx.run.sessions.session import CPU, Runtime, open_session
from gralora_fx.run.sessions.session_views import is_current_form, text_switch

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer
    from gralora_fx.run.generate.constraints import Constraints
    from gralora_fx.run.generate.encoder_inputs import EncoderInputs
    from gralora_fx.run.sessions.adapter_file import AdapterInMemory
    from gralora_fx.run.sessions.placement import Placement


@dataclass(frozen=True)
class Reading:
    """Reader of a kind of export."""

    name: str  # the kind, as the manifest has it
    # returns whether an existing `model_rows.onnx` is opened before `model.onnx`, from whether the CPU runs all of it,
    # and whether every call names an adapter for each row
    opens_rows: Callable[[bool, bool], bool]
    calls_rows: bool  # whether calls that name an adapter for each row run `model_rows.onnx`
    # returns the generation of an open export; raises a `ServingError` if it has none
    generation: Callable[[OpenExport], Generation]


class OpenExport:
    """An open export.

    Attributes:
        directory: The export directory, whose path stays valid if the process changes its working directory.
        manifest: The contents of `gralora_export.json`, typed.
        config: The model's `config.json`; empty if there is none.
        adapters: Its adapters, by name; iteration yields those that a call can name.
        reading: How its kind is read.
        first_session: The session of the file that was opened first.
        first_is_rows: Whether that is `model_rows.onnx`.
    """

    def __init__(
        self,
        export_dir: str | Path,
        runtime: Runtime | None = None,
        *,
        check: bool = False,
        max_rank: int | None = None,
        by_row: bool = False,
    ) -> None:
        """Open an export.

        Args:
            export_dir: Its directory.
            runtime: How ONNX Runtime runs it; None for the CPU.
            check: As in `load`.
            max_rank: As in `load`.
            by_row: Whether every call of a model without a cache names rows' adapters.

        Raises:
            ServingError: As in `load`.
        """
        self._runtime = runtime or Runtime()
        self.directory = usable_path(export_dir, ServingError, remedy="give the directory of an export").absolute()
        self.manifest = read_manifest(self.directory, ServingError)
        self._described = (self.directory / MANIFEST_NAME).read_bytes()
        check_files(self.directory, self.manifest, digests=check, error=ServingError)
        check_requirements(self.directory, self.manifest)
        own_adapters(self.directory, ServingError)  # none of them is a link
        check_own_file(self.directory / MODEL_NAME, ServingError)  # which may be opened later
        config = self.directory / "config.json"
        self.config = read_json_object(config, ServingError) if config.is_file() else {}
        self.adapters = Adapters(self.directory, self.manifest, max_rank)
        if self.manifest.flavour not in READINGS:
            raise ServingError(
                f"{self.directory} is an export of the kind {self.manifest.flavour!r:.80}, and this version reads "
                f"{listed(READINGS)}; update gralora-fx, or add the kind to gralora_fx.run.open_export"
            )
        self.reading = READINGS[self.manifest.flavour]
        self._read_tokenizer: Callable[[], TextTokenizer | None] = partial(read_tokenizer, self.directory, ServingError)
        if self.manifest.flavour != PLAIN_KIND:  # the first prompt needs it
            self._read_tokenizer = read_ahead(self.directory, ServingError)
        is_on_cpu = {name for name, _ in self._runtime.providers} == {CPU} and not self._runtime.devices
        self.first_is_rows = self.manifest.has_rows and self.reading.opens_rows(is_on_cpu, by_row)
        self.first_session = self._open(ROWS_NAME if self.first_is_rows else MODEL_NAME)  # errors are raised now
        if not is_on_cpu:
            from gralora_fx.run.sessions.placement import warn_of_idle

            warn_of_idle(self._runtime, self.placement)

    @cached_property
    def session(self) -> Any:
        """The `onnxruntime.InferenceSession` of `model.onnx`, or an `EncoderDecoderSession`, that calls run.

        If a decoder also has `model_rows.onnx`, this session is opened on first use: `generate` does not need it.
        """
        return self._open_later(MODEL_NAME) if self.first_is_rows else self.first_session

    @cached_property
    def rows_session(self) -> Any:
        """The session of `model_rows.onnx`, in which the rows of a batch differ; None if there is none.

        For a model without a cache it is opened when rows first have an adapter each.
        """
        if self.first_is_rows:
            return self.first_session
        return self._open_later(ROWS_NAME) if self.reading.calls_rows and self.manifest.has_rows else None

    def companion_session(self, name: str) -> Any:
        """Open the session of a companion, by its file's name without the suffix."""
        return self._open_later(f"{name}.onnx")

    @cached_property
    def placement(self) -> Placement | None:
        """Nodes of each operator that every provider runs; None with the CPU alone (see `placement_of`)."""
        from gralora_fx.run.sessions.placement import placement_of

        return placement_of(self.first_session)

    def describe(self) -> str:
        """Describe the export and how it runs: task, precision, providers with version and device, threads, nodes."""
        from gralora_fx.run.sessions.placement import describe_placement, describe_providers

        kinds = [] if self.manifest.quantization is None else [self.manifest.quantization.kind]
        lines = [f"{self.directory}: {self.task or 'no task'}, {', else '.join([*kinds, self.manifest.precision])}"]
        lines += [
            f"runs on {text}"
            for text in describe_providers(self._runtime, self.first_session, is_quantized=bool(kinds))
        ]
        lines += [] if self._runtime.threads is None else [f"threads: {self._runtime.threads}"]
        lines += [] if self.placement is None else [f"nodes: {describe_placement(self.placement)}"]
        return "\n".join(lines)

    @property
    def task(self) -> str | None:
        """The task the model was exported for."""
        return self.manifest.task

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer saved beside the model, as transformers loads it; without transformers, a `TextTokenizer`.

        Raises:
            ServingError: There is none.
        """
        self._check_unchanged()
        if find_spec("transformers") is not None:
            tokenizer: Any = load_tokenizer(self.directory, ServingError)
        elif (tokenizer := read_tokenizer(self.directory, ServingError)) is not None:
            taken = {value.name for value in self.first_session.get_inputs()}
            tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
        return tokenizer if tokenizer is not None else self._lacks_tokenizer()

    @cached_property
    def generation(self) -> Generation:
        """Its generation.

        Raises:
            ServingError: It has no cache, or its generation settings cannot be followed.
        """
        self._check_unchanged()
        return self.reading.generation(self)

    @cached_property
    def text_tokenizer(self) -> TextTokenizer | None:
        """The tokenizer of prompts and answers, or None."""
        self._check_unchanged()
        return self._read_tokenizer()

    @cached_property
    def required_tokenizer(self) -> TextTokenizer:
        """The tokenizer of prompts and answers.

        Raises:
            ServingError: There is none.
        """
        return self.text_tokenizer if self.text_tokenizer is not None else self._lacks_tokenizer()

    def _lacks_tokenizer(self) -> NoReturn:
        raise ServingError(
            f"{self.directory} holds no tokenizer; export with {option(tokenizer=...)}, or tokenize yourself"
        )

    @cached_property
    def constraints(self) -> Constraints:
        """Compiles constraints on answers, for the tokenizer beside the model.

        Raises:
            ServingError: It has no cache, its generation settings cannot be followed, or no feature compiles
                constraints.
        """
        from gralora_fx.run.generate.constraints import compiler_for

        compiler = compiler_for(self.text_tokenizer, self.generation.limits)
        if compiler is None:
            raise ServingError(
                "no installed feature can constrain answers; install gralora-fx with all of its features"
            )
        return compiler

    def _open_later(self, name: str) -> Any:
        self._check_unchanged()
        return self._open(name)

    def _open(self, name: str) -> Any:
        weights = weight_files(self.manifest)
        return open_session(self.directory, self._runtime, name=name, weights=weights, error=ServingError)

    def _check_unchanged(self) -> None:
        """Check that the directory was not moved or replaced by another export since it was opened."""
        if not self.directory.is_dir():
            raise ServingError(f"{self.directory} was moved or removed after it was loaded; load it from where it is")
        path = self.directory / MANIFEST_NAME
        is_same = path.is_file() and path.read_bytes() == self._described
        if not is_same and read_manifest(self.directory, ServingError) != self.manifest:
            raise ServingError(f"{self.directory} holds another export than when it was loaded; load it again")


def adapter_as_data(source: Path, onnx_dir: Path, folder: Path, name: str) -> Path:
    """Return an adapter as data of an export: the given file, or one converted from a directory that PEFT saved."""
    if not source.is_dir():
        return source
    from gralora_fx.exporters.adapter_export import convert_adapter  # serving needs no exporter otherwise

    return convert_adapter(source, onnx_dir, folder, name)


def in_memory(source: Path, onnx_dir: Path, name: str, manifest: Manifest) -> AdapterInMemory:
    """Convert a directory that PEFT saved to data of an export, in memory."""
    from gralora_fx.exporters.adapter_export import adapter_in_memory  # as above

    return adapter_in_memory(source, onnx_dir, name, manifest)


def _no_generation(export: OpenExport) -> Generation:
    """Refuse to generate with a model without a cache."""
    raise ServingError(
        f"this export (task {export.manifest.task!r}) has no cache, so it cannot generate; "
        "export the model for a task with one, such as text-generation-with-past"
    )


def _decoder_generation(export: OpenExport) -> Generation:
    """Return the generation of a decoder: rows together in `model_rows.onnx`, or one by one in `model.onnx`."""
    limits, given = _limits(export), _given_prompts(export)
    if "'longrope'" in str(export.config) and text_switch(export.first_session) is None:
        raise ServingError(
            f"{export.directory} takes no lengths of texts, on which its rotary embedding depends (longrope): a prompt "
            f"read in chunks would be wrong; export the model again with this version, with {option(overwrite=True)}"
        )
    if export.first_is_rows:
        manifest = export.manifest
        if not is_current_form(export.first_session):
            warn_caller(
                f"{export.directory / ROWS_NAME} was written by an earlier version: proposed tokens are not verified "
                "by it, and the last digits of an adapter's answer may depend on the rows beside it; export the model "
                "again, with "
                f"{option(overwrite=True)}"
            )
        is_float32 = manifest.precision == "fp32" and manifest.quantization is None
        weights = sum(file.size for name, file in (manifest.files or {}).items() if name.startswith(MODEL_NAME))
        make = partial(RowsDecoder, export.first_session, export.adapters, limits)
        return Generation(limits, partial(make, is_float32=is_float32, weights=weights), given_prompts=given)
    from gralora_fx.run.engine.sequential_decoder import SequentialDecoder

    is_buffer = takes_buffers(export.directory / MODEL_NAME)
    make_one = partial(SequentialDecoder, export.first_session, export.adapters, limits, takes_buffers=is_buffer)
    return Generation(limits, make_one, given_prompts=given)


def _given_prompts(export: OpenExport) -> GivenPrompts | None:
    """Return the reader of prompts with more than text, if companions of the export read them."""
    from gralora_fx.base.features import parts

    kinds = parts("given prompts", export.manifest.companions) if export.manifest.companions else []
    return next((found for kind in kinds if (found := kind.of(export)) is not None), None)


def _encoder_decoder_generation(export: OpenExport) -> Generation:
    """Return the generation of an encoder-decoder, whose rows are opened with the encoder's inputs and run in turn."""
    from gralora_fx.run.engine.encoder_decoder import EncoderDecoder, Encodings

    limits, session = _limits(export), export.first_session
    taken = {value.name: value for value in session.encoder.get_inputs() if not is_adapter_input(value.name)}
    inputs = _reader_of(taken).of(export.directory, export.manifest, export.config, taken, limits)
    make = partial(EncoderDecoder, session, export.adapters, limits, encodings=Encodings())
    return Generation(limits, make, inputs, _given_prompts(export))


def _reader_of(inputs: Mapping[str, Any]) -> type[EncoderInputs]:
    """Return the reader of an encoder's prompts: of texts, a feature's, or of arrays alone."""
    from gralora_fx.run.generate.encoder_inputs import EncoderInputs, TextSources

    if IDS in inputs:
        return TextSources
    from gralora_fx.base.features import parts

    return next((kind for kind in parts("encoder inputs", inputs) if kind.reads(inputs)), EncoderInputs)


def _limits(export: OpenExport) -> DecoderLimits:
    return DecoderLimits.of(export.directory, export.config, export.manifest.position_offset)


READINGS = {
    reading.name: reading
    for reading in (
        Reading(PLAIN_KIND, lambda is_on_cpu, by_row: by_row, calls_rows=True, generation=_no_generation),
        # other providers lack the operators of rows
        Reading(DECODER_KIND, lambda is_on_cpu, by_row: is_on_cpu, calls_rows=False, generation=_decoder_generation),
        Reading(
            ENCODER_DECODER_KIND,
            lambda is_on_cpu, by_row: False,
            calls_rows=False,
            generation=_encoder_decoder_generation,
        ),
    )
}
