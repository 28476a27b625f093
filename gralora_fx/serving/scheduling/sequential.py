"""Requests for text one after the other, for exports whose runs have one adapter each."""

from __future__ import annotations

import dataclasses
import logging
import time

from transformers import PreTrainedTokenizerBase

from gralora_fx.serving.adapter_versions import AdapterVersions
from gralora_fx.serving.model import OrtModel
from gralora_fx.serving.scheduling.observer import Observer
from gralora_fx.serving.scheduling.text_jobs import Limits, TextJob
from gralora_fx.serving.scheduling.text_queue import TextQueue, failure

_logger = logging.getLogger(__name__)


class SequentialScheduler(TextQueue):
    """Answers requests one after the other by `OrtModel.generate`."""

    def __init__(
        self,
        model: OrtModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        observer: Observer,
        *,
        max_queue: int,
        versions: AdapterVersions | None = None,
    ) -> None:
        """Make a scheduler without requests.

        Args:
            model: A decoder.
            tokenizer: Decodes answers.
            limits: What the model can take.
            observer: Is told what runs.
            max_queue: The most requests that may wait.
            versions: As of `TextQueue`.
        """
        # onnxruntime-genai knows the tokens that end an answer, and `generate` does not give them
        super().__init__(tokenizer, frozenset(), limits, observer, room=1 + max_queue, versions=versions)
        self._model = model
        self._current: TextJob | None = None

    @property
    def running(self) -> int:
        """Whether a request runs, as a count."""
        return int(self._current is not None)

    def _turn(self) -> None:
        self._current = self._next()
        if self._current is None:
            return
        try:
            self._answer(self._current)
        except Exception as error:
            _logger.exception("a request failed")
            self._observer.failed()
            self._current.fail(failure(error))
        finally:
            self._left(self._current)
            self._current = None

    def _answer(self, job: TextJob) -> None:
        request = job.request
        sampling = dataclasses.replace(request.sampling, max_new_tokens=request.max_new_tokens)
        started = time.perf_counter()
        pieces = self._model.generate(
            list(request.prompt), stream=True, adapter=request.adapter, **dataclasses.asdict(sampling)
        )
        for ids in pieces:
            for token in ids:
                if not job.is_done:
                    job.take(token)
            if job.is_done or job.is_cancelled:
                break
        else:
            job.finish("stop")  # by an end token: an answer that is full is done by its last token
        self._observer.ran(time.perf_counter() - started, 1)
        self._observer.read(len(request.prompt))
        self._observer.generated(len(job.answer.ids))
