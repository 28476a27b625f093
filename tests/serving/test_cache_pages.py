"""Pages of caches: rows take those that they fill, and give them back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from served_exports import CACHED
from wide_heads import TOKEN, export_wide_heads, read_prompt

from gralora_fx import trace
from gralora_fx.base import paged_memory
from gralora_fx.base.paged_memory import PAGE, kept_reason
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine import sequential_decoder
from gralora_fx.run.engine.cache_buffers import CacheBuffers
from gralora_fx.service.app import create_app
from gralora_fx.serving import OrtModel, load
from tests.architectures.tiny_decoders import tiny_decoder

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are counted and given back on Linux alone")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_wide_heads(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def model(path: Path) -> OrtModel:
    return load(path, threads=1)


def taken(rows: Any) -> int:
    """Return how many bytes of the buffers of a decoder's rows are in memory."""
    buffers = rows if isinstance(rows, CacheBuffers) else rows._buffers
    mincore, total = ctypes.CDLL(None).mincore, 0
    for memory, _ in buffers._memory:
        pages = np.zeros(-(-memory.array.nbytes // PAGE), np.uint8)
        address = ctypes.c_void_p(memory.array.ctypes.data)
        assert mincore(address, ctypes.c_size_t(memory.array.nbytes), ctypes.c_void_p(pages.ctypes.data)) == 0
        total += int((pages & 1).sum()) * PAGE
    return total


@on_linux
@pytest.mark.quick
def test_rows_take_what_they_hold_and_give_it_back(model: OrtModel) -> None:
    decoder: Any = model.decoder(rows=16)
    assert taken(decoder) == 0
    rows = [decoder.open() for _ in range(4)]
    for row in rows:
        read_prompt(decoder, row, 1000)
    assert 4 * 1000 * TOKEN <= taken(decoder) <= 1.1 * 4 * 1000 * TOKEN
    for _ in range(20):
        decoder.step({row: [5] for row in rows})
    assert 4 * 1020 * TOKEN <= taken(decoder) <= 1.1 * 4 * 1020 * TOKEN
    assert taken(decoder) <= decoder.memory.taken <= taken(decoder) + 4 * 128 * TOKEN
    for row in rows[:2]:
        decoder.close(row)
    assert 2 * 1020 * TOKEN <= taken(decoder) <= 1.1 * 2 * 1020 * TOKEN
    for row in rows[2:]:
        decoder.close(row)
    assert taken(decoder) == decoder.memory.taken == 0
    row = decoder.open()
    read_prompt(decoder, row, 20)
    assert taken(decoder) <= 64 * TOKEN


@on_linux
def test_states_are_given_back_too(tmp_path: Path) -> None:
    tiny = tiny_decoder("FalconH1ForCausalLM", mamba_d_state=64, mamba_d_ssm=256, mamba_n_heads=4, mamba_d_head=64)
    export_onnx(trace(tiny, task=CACHED), tmp_path / "onnx", verify=False)
    decoder: Any = load(tmp_path / "onnx", threads=1).decoder(rows=4, capacity=32, chunk=8)
    rows = [decoder.open() for _ in range(4)]
    first = decoder.step({row: [5, 6, 7] for row in rows})
    held = taken(decoder)
    assert held >= 4 * 2 * 256 * 64 * 4  # layers, width, states, float32
    for row in rows:
        decoder.close(row)
    assert taken(decoder) <= 0.2 * held  # pages that convolutions of two rows share
    again = [decoder.open() for _ in range(4)]
    second = decoder.step({row: [5, 6, 7] for row in again})
    assert all(np.array_equal(first[row], second[row]) for row in rows)


@on_linux
def test_rows_that_run_one_after_the_other_hold_no_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CacheBuffers] = []

    def noted(*call: Any) -> CacheBuffers:
        made.append(CacheBuffers(*call))
        return made[-1]

    monkeypatch.setattr(sequential_decoder, "CacheBuffers", noted)
    with pytest.warns(UserWarning, match="takes no node"):
        elsewhere = load(path, ["AzureExecutionProvider", "CPUExecutionProvider"])
    decoder: Any = elsewhere.decoder(rows=2)
    row = decoder.open()
    decoder.step({row: [5, 6, 7]})
    assert 0 < taken(made[0]) <= 64 * TOKEN


@on_linux
def test_a_prompt_takes_no_more_ahead_than_the_bound_lets_it(model: OrtModel) -> None:
    limit = 2 * 1024 * TOKEN
    decoder: Any = model.decoder(rows=4, max_memory=limit)
    rows = [decoder.open(max_length=600) for _ in range(4)]
    prompt = [3 + token % 90 for token in range(600)]
    for row in rows:
        decoder.fill(row, prompt)
    for part in range(5):
        for row in rows:
            if decoder.reserve(row, 64):
                decoder.step({row: prompt[64 * part : 64 * part + 64]})
            assert taken(decoder) <= decoder.memory.taken <= limit


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Yield a system other than Linux, as far as memory goes."""
    monkeypatch.setattr(paged_memory, "sys", SimpleNamespace(platform="darwin"))
    kept_reason.cache_clear()
    yield
    kept_reason.cache_clear()


@pytest.mark.usefixtures("elsewhere")
def test_a_system_that_takes_no_pages_back_runs_the_same_and_says_so(
    model: OrtModel, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    decoder: Any = model.decoder(rows=2)
    row = decoder.open()
    first = read_prompt(decoder, row, 70)
    decoder.close(row)
    assert np.array_equal(first, read_prompt(decoder, decoder.open(), 70))
    reason = "darwin does not take single pages back"
    with pytest.raises(
        ServingError, match=f"max_memory cannot be kept to: {reason}; leave it out, and give fewer rows"
    ):
        model.decoder(rows=2, max_memory=10**9)
    create_app(ServiceSettings(path, max_batch=4, chunk=16)).state.engine.models.close()
    assert f"whose caches take up to 16.1 MiB as they fill, and keep it, since {reason}" in caplog.text


@on_linux
def test_a_kernel_that_refuses_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_memory.mmap, "MADV_DONTNEED", 9999)
    kept_reason.cache_clear()
    reason = kept_reason()
    kept_reason.cache_clear()
    assert reason == "the kernel does not take single pages back ([Errno 22] Invalid argument)"


def test_windows_keep_no_logits(model: OrtModel) -> None:
    decoder: Any = model.decoder(rows=3)
    rows = [decoder.open() for _ in range(3)]
    for count in (3, 2, 1):
        decoder.step({row: [5, 6] for row in rows[:count]})
    windows = [window for _, windows in decoder._steps._windows for window in windows.values()]
    outputs = [window.binding.get_outputs_as_ortvaluevector() for window in windows]
    assert [each[len(each) - 1].has_value() for each in outputs] == [False] * 3
