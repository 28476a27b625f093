"""The bound of the memory of caches: what waits, rests, is refused or goes, with the same answers."""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
from running_service import post, running
from served_exports import chat_tokenizer
from wide_heads import TOKEN, export_wide_heads

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ConfigError, ServingError
from gralora_fx.run.engine.cache_memory import CacheMemory, NeverRoomError, NoRoomError, RowMemory
from gralora_fx.run.engine.prefix_cache import PrefixCache
from gralora_fx.run.generate.answer_options import AnswerOptions, Sampling
from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.run.generate.request_errors import RunError
from gralora_fx.service.app import create_app
from gralora_fx.service.scheduling import queue as queues
from gralora_fx.service.scheduling.continuous import ContinuousScheduler
from gralora_fx.service.scheduling.queue import Observer
from gralora_fx.serving import OrtModel, load


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_wide_heads(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def model(path: Path) -> OrtModel:
    return load(path, threads=1)


class Caller:
    """Receives the pieces of one request."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()

    def text(self) -> str:
        """Return the whole answer."""
        text, ending = "", None
        while ending is None:
            piece = self.events.get(timeout=60)
            if isinstance(piece, RunError):
                raise piece
            text, ending = text + piece.text, piece.ending
        return text


def test_rows_grow_only_as_far_as_all_can_end() -> None:
    """No random request ever waits for good, and the bound holds."""
    numbers = random.Random(0)
    rests = 0
    for _ in range(200):
        memory = CacheMemory(100)
        rows: dict[int, list[int]] = {}  # what each holds, and the most
        left = [numbers.randrange(1, 101) for _ in range(12)]
        count = 0
        while left or rows:
            while left and memory.admits(RowMemory(1, left[-1]), 0):
                rows[count] = [1, left.pop()]
                memory.open(count, RowMemory(*rows[count]), 0)
                count += 1
            grown = 0
            for number, row in list(rows.items()):
                size = min(row[0] + numbers.randrange(1, 30), row[1])
                if memory.reserve(number, size):
                    row[0], grown = size, grown + 1
                else:
                    rests += 1
                assert memory.taken == sum(held for held, _ in rows.values()) <= 100
                if row[0] == row[1]:
                    del rows[number]
                    memory.close(number, 0)
            assert grown
    assert rests > 1000


def test_what_rows_share_gives_way_to_them() -> None:
    shared = PrefixCache(80_000, [np.zeros((1, 1, 256), np.float32)])
    memory = CacheMemory(100_000)
    memory.shared = shared
    for number in range(5):
        shared.store((None, None), [number] * 20, [np.zeros((1, 20, 256), np.float32)])
    assert shared.size > 60_000
    memory.open(0, RowMemory(10_000, 90_000), 0)
    assert memory.reserve(0, 80_000)
    memory.shrink_shared()
    assert shared.size <= 20_000
    assert memory.taken <= 100_000
    memory.close(0, 0)
    assert shared.room == shared.limit


@pytest.mark.parametrize("most", [600_000, 1_500_000])
def test_answers_within_a_bound_are_those_without(model: OrtModel, most: int) -> None:
    """Requests wait, rows rest and blocks go, and nothing else differs."""
    numbers = random.Random(1)
    names = [None, "small", "wide"]
    head = [numbers.randrange(3, 90) for _ in range(80)]
    requests = [
        TextRequest(
            (*head[: numbers.choice([0, 40, 80])], *(numbers.randrange(3, 90) for _ in range(30))),
            numbers.randrange(40, 90),
            AnswerOptions(Sampling(eos_token_id=[])),
            adapter=names[number % 3],
        )
        for number in range(10)
    ]
    free, _, _ = answers(model.decoder(rows=4, chunk=16, prefix_cache=10**6), requests)
    bound, held, waited = answers(
        model.decoder(rows=4, chunk=16, prefix_cache=min(10**6, most), max_memory=most), requests
    )
    assert bound == free
    assert max(held) <= most
    if most == 600_000:
        assert waited


def test_copies_of_adapters_beyond_those_of_rows_go_where_room_is_short(model: OrtModel) -> None:
    free: Any = model.decoder(rows=4, chunk=16)
    wide = [model.adapters["wide"]]
    limit = 3 * free.row_size(40) + free._row_stacks.size(wide)
    bound: Any = model.decoder(rows=4, chunk=16, max_memory=limit)
    texts = []
    for decoder in (free, bound):
        rows = [decoder.open(name, max_length=40) for name in ("small", "wide")]
        decoder.step({row: [5, 6, 7] for row in rows})
        decoder.close(rows[0])
        rows = [rows[1], *(decoder.open(max_length=40) for _ in range(2))]
        texts.append([decoder.step({row: [5, 6, 7] for row in rows})[rows[0]].copy() for _ in range(8)])
    assert free._row_stacks.spare(wide) > 0
    assert bound._row_stacks.spare(wide) == 0
    assert bound.memory.taken == limit
    assert np.array_equal(*texts)
    assert len(bound._steps._windows) == 1


def test_a_request_that_is_given_up_leaves_no_shortage(model: OrtModel) -> None:
    scheduler = ContinuousScheduler(
        model.decoder(rows=4, max_memory=330 * TOKEN), chat_tokenizer(), Mock(spec=Observer), max_queue=8
    )
    request = TextRequest((5, 6, 7), 250, AnswerOptions(Sampling(eos_token_id=[])))
    jobs = [scheduler.submit([(request, Caller().events.put)])[0] for _ in range(2)]
    scheduler._turn()
    assert (scheduler.running, scheduler._is_short) == (1, True)
    jobs[1].cancel()
    scheduler._turn()
    assert not scheduler._is_short
    for _ in range(4):  # which wait, though not for memory yet
        scheduler.submit([(request, Caller().events.put)])


def answers(decoder: Any, requests: Sequence[TextRequest]) -> tuple[list[str], list[int], bool]:
    """Return the texts, what caches held at each step, and whether a row was ever free while a request waited."""
    held: list[int] = []
    waited = False
    step = decoder.step

    def noted(*call: Any) -> Any:
        nonlocal waited
        found = step(*call)
        held.append(decoder.memory.taken)
        waited |= bool(scheduler.waiting and decoder.free) or len(call[0]) < decoder.rows - decoder.free
        return found

    decoder.step = noted
    scheduler = ContinuousScheduler(decoder, chat_tokenizer(), Mock(spec=Observer), max_queue=32, most_proposed=4)
    callers = [Caller() for _ in requests]
    scheduler.submit([(request, caller.events.put) for request, caller in zip(requests, callers, strict=True)])
    scheduler.start()
    texts = [caller.text() for caller in callers]
    scheduler.stop()
    return texts, held, waited


def test_a_row_without_room_is_refused_in_python(model: OrtModel) -> None:
    unit = 64 * TOKEN  # which a row takes at once
    decoder = model.decoder(rows=4, chunk=16, max_memory=3 * unit)
    with pytest.raises(NeverRoomError, match=r"may take 4\.\d MiB, and max_memory has room for 393,216 bytes; ask for"):
        decoder.check_room(2000)
    rows = [decoder.open(max_length=most) for most in (100, 16, 170)]
    with pytest.raises(NoRoomError, match="no room for one more row now; close one first, or give more memory"):
        decoder.open(max_length=16)
    decoder.step({row: [5] * 16 for row in rows})
    decoder.step({rows[0]: [5] * 48})
    assert not decoder.reserve(rows[0], 16)
    with pytest.raises(NoRoomError, match="no room for what row 0 would read now; close another row first"):
        decoder.step({rows[0]: [5] * 16})
    decoder.close(rows[1])
    decoder.step({rows[0]: [5] * 16})
    assert decoder.memory.taken == 3 * unit
    with pytest.raises(ServingError, match="max_memory='1GB' is not a count"):
        model.decoder(max_memory="1GB")  # type: ignore[arg-type]


def test_requests_that_cannot_fit_are_answered_with_503(path: Path) -> None:
    settings = ServiceSettings(path, max_batch=4, chunk=16, max_memory="1.5MB", prefix_cache="none")
    body = {"model": "onnx", "prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True}
    with running(settings) as (url, app):
        status, headers, message = refusal(url, {**body, "max_tokens": 1500})
        assert (status, headers["X-Should-Retry"], headers["Retry-After"]) == (503, "false", None)
        assert "may take 3.0 MiB, and max_memory has room for 1.4 MiB; ask for fewer tokens" in message
        scheduler, steps = app.state.engine.queue, threading.Semaphore(0)
        decoder = scheduler._decoder
        step = decoder.step

        def slow(tokens: Any, *call: Any) -> Any:
            if decoder.length(next(iter(tokens))) > 560:
                assert steps.acquire(timeout=60)
            return step(tokens, *call)

        decoder.step = slow
        long = {**body, "max_tokens": 600}  # 1.3 MB
        threads = []
        for number in range(4):
            threads.append(threading.Thread(target=post, args=(f"{url}v1/completions", long)))
            threads[-1].start()
            if number == 0:
                wait_for(lambda: decoder.memory.taken > 1_300_000)
            elif number < 3:
                wait_for(lambda: scheduler.waiting == 1)
                steps.release()
                wait_for(lambda: scheduler.running == 2)
        wait_for(lambda: scheduler._is_short and scheduler.waiting == 2)  # the second has begun, the third has no room
        status, headers, message = refusal(url, long)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "2 requests wait for 2.5 MiB of caches, and max_memory has room for 1.4 MiB at a time" in message
        with urlopen(f"{url}metrics") as answer:
            text = answer.read().decode()
        assert 'gralora_fx_rejections_total{method="POST",reason="no_memory"} 2.0' in text
        assert "gralora_fx_cache_limit_bytes 1.5e+06" in text
        steps.release(10_000)
        for thread in threads:
            thread.join()
        wait_for(lambda: scheduler.memory.taken == 0)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refusal(url: str, body: Any) -> tuple[int, Any, str]:
    with pytest.raises(HTTPError) as caught:
        post(f"{url}v1/completions", body)
    return caught.value.code, caught.value.headers, json.load(caught.value)["error"]["message"]


def test_the_start_says_what_there_is_room_for(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    create_app(ServiceSettings(path, max_batch=4, chunk=16)).state.engine.models.close()
    assert "room: 4 rows of 2048 tokens, whose caches take up to 16.1 MiB as they fill (--max-memory bounds them)" in (
        caplog.text
    )
    create_app(ServiceSettings(path, max_batch=4, chunk=16, max_memory="6MiB")).state.engine.models.close()
    assert "room: 4 rows of 752 tokens, or 1 of 2048, within 6.0 MiB" in caplog.text
    with pytest.raises(ServingError, match=r"max_memory=100000 has no room for a row, whose caches take 262,144 bytes"):
        create_app(ServiceSettings(path, max_memory="100kB"))
    with pytest.raises(ConfigError, match="prefix_cache='2GB' is more than max_memory='1GB', of which it is a part"):
        ServiceSettings(path, prefix_cache="2GB", max_memory="1GB")
    with pytest.raises(ConfigError, match="max_memory must be a number of bytes above 0, such as 512MiB"):
        ServiceSettings(path, max_memory="lots")


def test_a_service_at_rest_keeps_no_copies_of_adapters(model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_IDLE", 0.05)
    given_back: queue.Queue[bool] = queue.Queue()
    monkeypatch.setattr(queues, "trim_heap", lambda: given_back.put(True))
    decoder: Any = model.decoder(rows=2)
    scheduler = ContinuousScheduler(decoder, chat_tokenizer(), Mock(spec=Observer), max_queue=2)
    scheduler.start()
    assert given_back.get(timeout=20)
    for _ in range(2):
        caller = Caller()
        request = TextRequest((5, 6, 7), 3, adapter="wide")
        scheduler.submit([(request, caller.events.put)])
        caller.text()
        assert given_back.get(timeout=20)
        assert not any(slots._arrays for slots in decoder._row_stacks._slots)
        assert not decoder._steps._windows
    scheduler.stop()
