"""The engine behind the routes: a decoder with its scheduler, or an encoder with its batches, and the models served."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from gralora_fx.base.amounts import shown_size
from gralora_fx.base.features import parts
from gralora_fx.base.paged_memory import kept_reason
from gralora_fx.core.config.option import declared_options
from gralora_fx.core.config.service_settings import OF_DECODERS, ServiceSettings
from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.core.loading.tokenizers import prompt_ids
from gralora_fx.errors import ServingError, option
from gralora_fx.format.export_directory import PLAIN_KIND
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.format.tasks import generates
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import PromptLimit
from gralora_fx.run.engine.prefix_cache import PrefixCacheError
from gralora_fx.run.generate.answer_row import new_proposer
from gralora_fx.run.generate.constraints import Constraints, compiler_for
from gralora_fx.run.generate.encoder_inputs import EncoderInputs
from gralora_fx.run.generate.prompts import EncoderInput
from gralora_fx.run.model import OrtModel
from gralora_fx.run.sessions.run_options import runtime_of
from gralora_fx.service.adapter_store.adapter_versions import AdapterLimits
from gralora_fx.service.adapter_store.store import AdapterStore, example_prompt, try_decoder
from gralora_fx.service.encoder import Encoder
from gralora_fx.service.example_inputs import try_encoder
from gralora_fx.service.scheduling.continuous import ContinuousScheduler
from gralora_fx.service.scheduling.queue import JobQueue, Observer

_MOST_ADAPTERS = 64  # default limit in memory, unless more are given at the start
_REASONING = ("think", "reasoning")  # as in enable_thinking, </think> and reasoning_content
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """Runs requests."""

    models: AdapterStore  # the models that requests may name
    manifest: Manifest  # the export's manifest
    queue: JobQueue[Any]  # takes requests, or rows of them

    @property
    def context_length(self) -> int | None:
        """Maximum tokens of a text, or of prompt and answer together; None for no limit, or if it takes no texts."""
        return None

    @property
    def takes_chats(self) -> bool:
        """Return whether it answers texts and its tokenizer has a chat template."""
        return False

    @property
    def attached(self) -> tuple[str, ...]:
        """Types of parts of a chat that it reads beside text."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines to log once it is ready."""
        return ()

    def stop(self) -> None:
        """Finish the queued requests, then stop."""
        self.queue.stop()
        self.models.close()


class AttachmentReader(Protocol):
    """Reads what chats hold beside text; features register one at the point "attachments"."""

    kinds: tuple[str, ...]  # types of parts of messages that hold one, by OpenAI's names

    def files(self, attached: Sequence[tuple[str, str]]) -> list[bytes]:
        """Return the bytes of attachments, each given by its field and its URL; it may download them."""

    def opened(self, files: Sequence[bytes], fields: Sequence[str]) -> Sequence[Any]:
        """Decode the files of attachments; errors name their fields."""

    def form(self, prompt: Any) -> Any:
        """Return a prompt without attachments, such as a chat, as it is tokenized; raise if it needs one."""

    def read(
        self,
        chat: Sequence[Mapping[str, Any]],
        described: Sequence[Any],
        opened: Sequence[Any],
        adapter: str | None,
        limit: PromptLimit,
    ) -> tuple[list[int], Source | EncoderInput | None]:
        """Return a chat's tokens, and a source that replaces the placeholder tokens of its attachments.

        For an encoder-decoder, return what the encoder reads; if that has no ids, the tokens begin the answer.
        """


@dataclass(frozen=True)
class TextEngine(Engine):
    """A decoder that continues prompts, or an encoder-decoder that answers what its encoder reads."""

    queue: ContinuousScheduler
    tokenizer: TextTokenizer  # the tokenizer beside the model
    constraints: Constraints | None  # compiles constraints on answers; None without a feature that does
    templates: Mapping[type, Any]  # what features found in the tokenizer's chat template, by class
    reasons: bool  # whether the template makes the model reason before it answers
    inputs: EncoderInputs | None = None  # reads encoder inputs of an encoder-decoder; None for a decoder
    attachments: AttachmentReader | None = None  # reads what chats hold beside text; None for a text-only model

    @property
    def takes_text(self) -> bool:
        """Return whether prompts are text, rather than other encoder inputs."""
        return self.inputs is None or self.inputs.takes_text

    @property
    def context_length(self) -> int | None:
        """Tokens of a decoder's prompt and its answer, or of an encoder-decoder's source."""
        return self.queue.limits.context if self.inputs is None else self.inputs.limit

    @property
    def takes_chats(self) -> bool:
        """Return whether it answers texts and its tokenizer has a chat template."""
        return self.takes_text and bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def attached(self) -> tuple[str, ...]:
        """Types of parts of a chat that it reads beside text."""
        return () if self.attachments is None else self.attachments.kinds

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines that features log about the chat template."""
        return tuple(map(str, self.templates.values())) if self.takes_chats else ()


@dataclass(frozen=True)
class EncoderEngine(Engine):
    """A model that runs once per request."""

    encoder: Encoder  # runs rows in batches

    @property
    def context_length(self) -> int | None:
        """Tokens of a text; None if it takes none."""
        return self.encoder.reader.limit if self.encoder.takes_texts else None


def open_engine(settings: ServiceSettings, observer: Observer) -> Engine:
    """Open the export and its own adapters, and run it once as a warm-up."""
    is_generating = generates(read_manifest(settings.directory, ServingError).task)
    # an arena would permanently keep what the longest prompt took
    options = {"enable_cpu_mem_arena": False} if is_generating else None
    runtime = runtime_of(None, None, options, settings.threads)
    model = OrtModel(settings.directory, runtime, by_row=True, max_rank=settings.max_adapter_rank)
    manifest = model.manifest
    attachments = _attachment_reader(settings, model) if is_generating else None
    if attachments is None:
        _check_left_out(settings, model)
    if is_generating:
        return _text_engine(settings, model, observer, attachments)
    if manifest.flavour != PLAIN_KIND:
        raise ServingError(f"{settings.directory} was exported for {manifest.task}, which is not served yet")
    for name in OF_DECODERS:
        if getattr(settings, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ServingError(f"{name} has no effect for the task {manifest.task}; leave {option} out")
    models = _open_adapters(settings, model)
    encoder = Encoder(
        model, model.text_tokenizer, observer, max_batch=settings.rows, max_queue=settings.max_queue, models=models
    )
    encoder.warm_up()
    models.trial = try_encoder(encoder)
    return EncoderEngine(models, manifest, encoder.batches, encoder)


def _check_left_out(settings: ServiceSettings, model: OrtModel) -> None:
    """Raise for options that do not apply to this export."""
    for record in settings.more:
        for each in declared_options(type(record)):
            if getattr(record, each.name) != each.default:
                raise ServingError(
                    f"{each.name} has no effect on this export, for {model.task}: it reads text alone; leave "
                    f"{each.flag} out"
                )


def _text_engine(
    settings: ServiceSettings, model: OrtModel, observer: Observer, attachments: AttachmentReader | None
) -> TextEngine:
    if settings.max_context is not None:
        model.limits.within(settings.max_context, "max_context")
    decoder = _decoder(settings, model)
    models, tokenizer = _open_adapters(settings, model), model.required_tokenizer
    if model.encoder_inputs is not None and settings.chunk is not None:
        raise ServingError(f"chunk has no effect for the task {model.task}; leave --chunk out")
    token, source = example_prompt(model)
    _logger.info("room: %s", _described_room(decoder, source))
    row = decoder.open(None, source, max_length=1)
    decoder.step({row: [token]})
    decoder.close(row)
    prompt_ids("a", tokenizer, ServingError)  # a first text may initialise the tokenizer, which is not thread-safe
    _logger.info(new_proposer().note(settings.proposed, decoder.verify_problem))
    queue = ContinuousScheduler(
        decoder, tokenizer, observer, max_queue=settings.max_queue, models=models, most_proposed=settings.proposed
    )
    models.trial = try_decoder(model)
    template = str(getattr(tokenizer, "chat_template", None) or "").lower()
    return TextEngine(
        models,
        model.manifest,
        queue,
        tokenizer,
        compiler_for(tokenizer, model.limits),
        {kind: kind.of(tokenizer) for kind in parts("chat templates")},
        any(mark in template for mark in _REASONING),
        model.encoder_inputs,
        attachments,
    )


def _attachment_reader(settings: ServiceSettings, model: OrtModel) -> AttachmentReader | None:
    """Return the reader of attachments; None if the export reads none or no installed feature can."""
    signs = {*model.manifest.companions, str(model.task)}
    readers = (reader_of(model, settings) for reader_of in parts("attachments", signs))
    return next((reader for reader in readers if reader is not None), None)


def _decoder(settings: ServiceSettings, model: OrtModel) -> Decoder:
    """Open the decoder's rows; without a prefix cache if the model cannot have one and none was requested."""
    open_rows = partial(
        model.decoder,
        rows=settings.decoder_rows,
        capacity=settings.max_context,
        chunk=settings.prompt_tokens,
        max_memory=settings.memory_bytes,
    )
    try:
        decoder = open_rows(prefix_cache=settings.prefix_bytes)
    except PrefixCacheError as error:
        if settings.prefix_cache is not None:
            raise
        _logger.info("no prefix cache: %s", error)
        decoder = open_rows()
    if decoder.prefix_cache is not None:
        _logger.info("prefix cache: at most %s", shown_size(decoder.prefix_cache.limit))
    return decoder


def _described_room(decoder: Decoder, source: Source | None) -> str:
    """Describe how many rows of how many tokens the caches have room for."""
    rows, capacity, limit = decoder.rows, decoder.capacity, decoder.memory.limit
    if limit is None:
        size, reason = shown_size(rows * decoder.row_size(capacity, source)), kept_reason()
        more = " (--max-memory bounds them)" if reason is None else f", and keep it, since {reason}"
        return f"{rows} rows of {capacity} tokens, whose caches take up to {size} as they fill{more}"
    lengths = {count: length for count in range(1, rows + 1) if (length := decoder.room(count, source))}
    if not lengths:
        size = shown_size(decoder.row_size(1, source))
        raise ServingError(
            f"{option(max_memory=limit)} has no room for a row, whose caches take {size} or more of this model; give "
            "more"
        )
    few = max(count for count, length in lengths.items() if length == lengths[1])
    more = "" if few == len(lengths) else f", or {few} of {lengths[1]}"
    return f"{len(lengths)} rows of {lengths[len(lengths)]} tokens{more}, within {shown_size(limit)}"


def _open_adapters(settings: ServiceSettings, model: OrtModel) -> AdapterStore:
    """Load the export's own adapters into memory."""
    adapters = model.adapters
    names = tuple(adapters.available())
    for name in names:
        adapters[name]
    if settings.base_name in names:
        raise ServingError(
            f"an adapter is called {settings.base_name!r} like the export's directory, which names the base; rename one"
        )
    most = settings.max_adapters or max(_MOST_ADAPTERS, len({*names, *settings.adapters}))
    return AdapterStore(settings.base_name, model, AdapterLimits(most, settings.adapter_bytes))
