"""What runs behind the routes: a decoder with its scheduler, or an encoder with its batches."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError
from gralora_fx.loading.tokenizers import load_tokenizer, prompt_ids
from gralora_fx.runtime.adapter_inputs import BATCHED
from gralora_fx.runtime.manifest import Manifest, read_manifest
from gralora_fx.serving.adapter_versions import AdapterVersions
from gralora_fx.serving.batched_decoder import BatchedDecoder
from gralora_fx.serving.http.adapter_trial import AdapterTrial, try_decoder, try_encoder, try_rows
from gralora_fx.serving.http.encoder import Encoder
from gralora_fx.serving.http.model_names import ModelNames
from gralora_fx.serving.http.settings import ServiceSettings
from gralora_fx.serving.model import OrtModel, load
from gralora_fx.serving.scheduling.continuous import ContinuousScheduler
from gralora_fx.serving.scheduling.observer import Observer
from gralora_fx.serving.scheduling.static_batches import StaticBatchScheduler
from gralora_fx.serving.scheduling.text_queue import TextQueue

_TEXT = "text-generation-with-past"


@dataclass(frozen=True)
class TextEngine:
    """A decoder that answers prompts.

    Attributes:
        names: The models that requests may name.
        manifest: The export's manifest.
        trial: Tries an adapter that is loaded.
        tokenizer: The tokenizer beside the model.
        queue: Takes requests.
    """

    names: ModelNames
    manifest: Manifest
    trial: AdapterTrial
    tokenizer: PreTrainedTokenizerBase
    queue: TextQueue

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self.queue.waiting

    def start(self) -> None:
        """Begin to work."""
        self.queue.start()

    def stop(self) -> None:
        """Answer what is there, and end."""
        self.queue.stop()
        self.names.versions.close()


@dataclass(frozen=True)
class EncoderEngine:
    """A model that is run once for each request.

    Attributes:
        names: The models that requests may name.
        manifest: The export's manifest.
        trial: Tries an adapter that is loaded.
        encoder: Runs rows in batches.
    """

    names: ModelNames
    manifest: Manifest
    trial: AdapterTrial
    encoder: Encoder

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        return self.encoder.batches.waiting

    def start(self) -> None:
        """Begin to work."""
        self.encoder.batches.start()

    def stop(self) -> None:
        """Run what is there, and end."""
        self.encoder.batches.stop()
        self.names.versions.close()


def open_engine(settings: ServiceSettings, observer: Observer) -> TextEngine | EncoderEngine:
    """Open the export and its adapters, and run it once so that the first request finds it warm.

    Args:
        settings: What to serve.
        observer: Is told what runs.

    Raises:
        ServingError: The export or an adapter cannot be opened, the export has no tokenizer that its texts need, or its
            task is not served.
    """
    manifest = read_manifest(settings.directory, ServingError)
    if manifest.task == _TEXT and manifest.adapters_mode == BATCHED:
        return _continuous(settings, observer)
    model = load(settings.directory, threads=settings.threads)
    if manifest.task == _TEXT:
        return _static(settings, model, observer)
    if any(name.startswith("past_key_values.") for name in model.input_names):
        raise ServingError(f"{settings.directory} was exported for {manifest.task}, which is not served yet")
    for name in ("max_context", "chunk"):
        if getattr(settings, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ServingError(f"{name} has no effect for the task {manifest.task}; leave {option} out")
    names = _open_adapters(settings, model)
    tokenizer = load_tokenizer(model.directory, ServingError)
    encoder = Encoder(
        model, tokenizer, observer, max_batch=settings.rows, max_queue=settings.max_queue, versions=names.versions
    )
    encoder.warm_up()
    return EncoderEngine(names, manifest, try_encoder(encoder), encoder)


def _continuous(settings: ServiceSettings, observer: Observer) -> TextEngine:
    decoder = BatchedDecoder(
        settings.directory,
        rows=settings.rows,
        capacity=settings.max_context,
        chunk=settings.prompt_tokens,
        threads=settings.threads,
    )
    model = decoder.model
    names = _open_adapters(settings, model)
    row = decoder.open()
    decoder.step({row: [0]})
    decoder.close(row)
    queue = ContinuousScheduler(
        decoder, model.tokenizer, observer, max_queue=settings.max_queue, versions=names.versions
    )
    return _text_engine(names, model, try_rows(decoder), queue)


def _static(settings: ServiceSettings, model: OrtModel, observer: Observer) -> TextEngine:
    if settings.chunk is not None:
        raise ServingError(
            f"chunk={settings.chunk} has no effect: onnxruntime-genai reads a prompt at once; leave --chunk out, or "
            "export the model with adapters='batched'"
        )
    names = _open_adapters(settings, model)
    model.generate([0], max_new_tokens=1)
    queue = StaticBatchScheduler(
        model,
        model.tokenizer,
        observer,
        max_batch=settings.rows,
        max_queue=settings.max_queue,
        max_context=settings.max_context,
        versions=names.versions,
    )
    return _text_engine(names, model, try_decoder(model), queue)


def _text_engine(names: ModelNames, model: OrtModel, trial: AdapterTrial, queue: TextQueue) -> TextEngine:
    tokenizer = model.tokenizer
    prompt_ids("a", tokenizer, ServingError)  # a first text may set the tokenizer up, which no two threads may do
    return TextEngine(names, model.manifest, trial, tokenizer, queue)


def _open_adapters(settings: ServiceSettings, model: OrtModel) -> ModelNames:
    """Load the adapters that are given and the export's own, so that requests find them in memory."""
    adapters = model.adapters
    for name, path in settings.adapters.items():
        adapters.load(name, path)
    names = tuple(adapters.available())
    for name in names:
        adapters[name]
    if settings.base_name in names:
        raise ServingError(
            f"an adapter is called {settings.base_name!r} as the export's directory, which names the base; rename one"
        )
    return ModelNames(settings.base_name, AdapterVersions(model))
