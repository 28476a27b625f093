"""Static batching: requests with one adapter start together, for exports whose runs have one adapter each."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from gralora_fx.serving.adapter_versions import AdapterVersions
from gralora_fx.serving.model import OrtModel
from gralora_fx.serving.scheduling.observer import Observer
from gralora_fx.serving.scheduling.text_jobs import TextJob
from gralora_fx.serving.scheduling.text_queue import TextQueue, failure
from gralora_fx.serving.token_choice import TokenChooser

_logger = logging.getLogger(__name__)


class StaticBatchScheduler(TextQueue):
    """Answers requests in batches that onnxruntime-genai runs; it cannot add a row to one that runs.

    The request that has waited longest decides the adapter of the next batch; others with the same adapter join it as
    far as there is room, in the order in which they came. A batch ends with its last answer: rows whose answers have
    ended or were given up run on unread, until no other is left.
    """

    def __init__(
        self,
        model: OrtModel,
        tokenizer: PreTrainedTokenizerBase,
        observer: Observer,
        *,
        max_batch: int,
        max_queue: int,
        max_context: int | None = None,
        versions: AdapterVersions | None = None,
    ) -> None:
        """Make a scheduler without requests.

        Args:
            model: A decoder.
            tokenizer: Decodes answers.
            observer: Is told what runs.
            max_batch: The most rows of a batch.
            max_queue: The most requests that may wait.
            max_context: Positions of a prompt and its answer together; None for as many as the model has.
            versions: As of `TextQueue`.
        """
        limits = model.decoder.limits if max_context is None else model.decoder.limits.within(max_context)
        gives_all = model.manifest.logits == "all"
        room = max_batch + max_queue
        super().__init__(tokenizer, limits, observer, room=room, scores_prompts=gives_all, versions=versions)
        self._model, self._most = model, max_batch
        self._batch: list[TextJob] = []

    @property
    def running(self) -> int:
        """How many requests run."""
        return sum(not (job.is_done or job.is_cancelled) for job in self._batch)

    def _turn(self) -> None:
        with self._condition:
            self._batch = self._next_batch()
        try:
            self._answer(self._batch)
        except Exception as error:
            _logger.exception("a batch of %d requests failed", len(self._batch))
            self._observer.failed()
            for job in self._batch:
                if not job.is_done:
                    job.fail(failure(error))
        finally:
            for job in self._batch:
                self._left(job)
            self._batch = []

    def _next_batch(self) -> list[TextJob]:
        """The request that has waited longest, and others that can run with it; the others keep their order."""
        self._drop_cancelled()
        batch: list[TextJob] = []
        left: deque[TextJob] = deque()
        for job in self._waiting:
            (batch if self._fits(batch, job) else left).append(job)
        self._waiting = left
        return batch

    def _fits(self, batch: Sequence[TextJob], job: TextJob) -> bool:
        """Whether a job can join a batch, whose rows are as long as the longest prompt with the longest answer."""
        if not batch:
            return True
        requests = [other.request for other in (*batch, job)]
        length = max(len(request.prompt) for request in requests) + max(request.max_new_tokens for request in requests)
        same = job.request.adapter == batch[0].request.adapter
        return same and len(batch) < self._most and length <= self.limits.context

    def _answer(self, batch: Sequence[TextJob]) -> None:
        started = time.perf_counter()
        for job in batch:
            self._read_first(job)
            if job.request.scores_prompt:
                self._score_prompt(job)
            if not job.request.max_new_tokens:
                job.finish("length")
        if jobs := [job for job in batch if not job.is_done]:
            self._run(jobs)
        self._observer.ran(time.perf_counter() - started, len(batch))
        self._observer.read(sum(len(job.request.prompt) for job in batch))

    def _score_prompt(self, job: TextJob) -> None:
        request = job.request
        logits = self._model(input_ids=np.array([request.prompt]), adapter=request.adapter)["logits"]
        job.prompt_scores += request.score_prompt(0, logits[0])

    def _run(self, jobs: Sequence[TextJob]) -> None:
        """Run jobs of one adapter until each has ended or was given up."""
        requests = [job.request for job in jobs]
        choosers = {
            row: TokenChooser(job.request.sampling, job.request.prompt, job.ends) for row, job in enumerate(jobs)
        }
        most = max(request.max_new_tokens for request in requests)
        rows = self._model.decoder.rows([request.prompt for request in requests], most, requests[0].adapter)
        while choosers := {row: c for row, c in choosers.items() if not (jobs[row].is_done or jobs[row].is_cancelled)}:
            for row, choice in rows.step(choosers).items():
                self._take(jobs[row], choice)
