"""Rows that open, step and close on every kind of decoder: each gives what the model gives for its text alone."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from served_exports import decoders

from gralora_fx import trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.cache_buffers import takes_buffers
from gralora_fx.run.generate.token_choice import TokenChooser
from gralora_fx.run.sessions.ort_values import empty_values
from gralora_fx.serving import Decoder, OrtModel, load
from tests.architectures.tiny_decoders import tiny_decoder

Exports = tuple[dict[str, Path], dict[str | None, Any]]
MODES = ("data", "inputs")
ELSEWHERE = ["AzureExecutionProvider", "CPUExecutionProvider"]  # for which no graph of rows is known to run
pytestmark = pytest.mark.filterwarnings("ignore:AzureExecutionProvider takes no node of this model")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return decoders(tmp_path_factory.mktemp("rows"), *MODES)


@pytest.fixture(params=[*MODES, "a row at a time"])
def model(request: pytest.FixtureRequest, exports: Exports) -> OrtModel:
    if request.param not in MODES:
        return load(exports[0]["data"], ELSEWHERE, threads=1)
    return load(exports[0][request.param], threads=1)


def gap(logits: Any, oracle: Any, text: Sequence[int]) -> float:
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor([text])).logits[0, -1]
    return float((torch.from_numpy(np.array(logits)) - expected).abs().max() / expected.abs().max())


@pytest.mark.quick
def test_rows_read_and_decode_side_by_side_each_with_its_adapter(model: OrtModel, exports: Exports) -> None:
    decoder = model.decoder(rows=3, capacity=24, chunk=6)
    rows = {decoder.open(name): name for name in ("wide", None, "small")}
    texts: dict[int, list[int]] = {row: [] for row in rows}
    generator = np.random.default_rng(1)
    for counts in ((6, 2, 0), (6, 1, 4), (1, 1, 0), (0, 1, 1), (1, 1, 1)):
        tokens = {row: generator.integers(3, 90, n).tolist() for row, n in zip(rows, counts, strict=True) if n}
        logits = decoder.step(tokens)
        assert set(logits) == set(tokens)
        for row, new in tokens.items():
            texts[row] += new
            assert decoder.length(row) == len(texts[row])
            assert gap(logits[row], exports[1][rows[row]], texts[row]) <= 1e-4


def test_a_row_is_not_changed_by_its_neighbours(model: OrtModel) -> None:
    prompt = [5, 9, 12, 40, 3]
    alone = model.decoder(rows=1, capacity=16, chunk=8)
    row = alone.open("wide")
    first, second = alone.step({row: prompt})[row].copy(), alone.step({row: [7]})[row].copy()
    beside = model.decoder(rows=3, capacity=32, chunk=8)
    other, row, third = beside.open("small"), beside.open("wide"), beside.open()
    beside.step({other: [8] * 8, third: [4]})
    found = beside.step({other: [3], row: prompt, third: [8] * 7})[row].copy()
    assert np.allclose(found, first, atol=1e-5)
    assert np.allclose(beside.step({row: [7], other: [1] * 5})[row], second, atol=1e-5)


def test_rows_of_large_and_small_adapters_run_apart_and_give_the_same(exports: Exports) -> None:
    model = load(exports[0]["data"], threads=1)
    together: Any = model.decoder(rows=4, capacity=16, chunk=8)
    apart: Any = model.decoder(rows=4, capacity=16, chunk=8)
    apart._row_stacks._weights = 0  # so that a second run costs nothing
    logits = []
    for decoder in (together, apart):
        rows = [decoder.open(name) for name in ("wide", "small", None, "wide")]
        steps = [{row: [5, 6 + row] for row in rows}, {row: [7] for row in rows}, {rows[2]: [3], rows[1]: [4]}]
        logits.append([decoder.step(step) for step in steps])
    assert (len(together._stacks), len(apart._stacks)) == (1, 2)
    for step, other in zip(*logits, strict=True):
        assert set(step) == set(other)
        assert all(np.allclose(array, other[row], atol=1e-5) for row, array in step.items())


def test_a_row_keeps_the_adapter_that_it_was_opened_with(model: OrtModel, exports: Exports) -> None:
    decoder = model.decoder(rows=1, capacity=16, chunk=8)
    row = decoder.open("wide")
    decoder.step({row: [5, 6]})
    model.unload_adapter("wide")
    assert gap(decoder.step({row: [7]})[row], exports[1]["wide"], [5, 6, 7]) <= 1e-4
    decoder.close(row)


def test_a_row_runs_with_an_adapter_that_was_unloaded_before_its_first_step(model: OrtModel, exports: Exports) -> None:
    decoder = model.decoder(rows=2, capacity=16, chunk=8)
    row = decoder.open("small")
    model.unload_adapter("small")
    other = decoder.open("wide")
    logits = decoder.step({row: [3, 4], other: [5]})
    assert gap(logits[row], exports[1]["small"], [3, 4]) <= 1e-4
    assert gap(logits[other], exports[1]["wide"], [5]) <= 1e-4
    assert "small" not in list(model.adapters.loaded)


@pytest.mark.usefixtures("own_garbage")
def test_the_memory_of_adapters_that_are_gone_is_freed(exports: Exports) -> None:
    model = load(exports[0]["data"], threads=1)
    decoder: Any = model.decoder(rows=1, capacity=16, chunk=8)
    row = decoder.open("small")
    decoder.step({row: [3]})
    adapter = weakref.ref(model.adapters["small"])
    decoder.close(row)
    model.unload_adapter("small")
    gc.collect()
    assert adapter() is None
    row = decoder.open("wide")
    assert gap(decoder.step({row: [3, 4]})[row], exports[1]["wide"], [3, 4]) <= 1e-4


def test_rooms_for_long_contexts_take_memory_when_they_are_used(exports: Exports) -> None:
    process = psutil.Process()
    model = load(exports[0]["data"], threads=1)
    empty_values(model.session, 1, 8)
    before = process.memory_info().rss
    values = empty_values(model.session, 64, 100_000)  # 800 MB
    assert process.memory_info().rss - before < 50e6
    assert not next(iter(values.values())).numpy()[0].any()


def test_an_answer_that_failed_does_not_go_on(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = load(exports[0]["data"], threads=1).generate([5, 6], max_new_tokens=6, stream=True)
    next(answer)
    monkeypatch.setattr(TokenChooser, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ServingError, match="no token can be chosen"):
        next(answer)
    monkeypatch.undo()
    assert list(answer) == []


def test_a_directory_that_was_moved_is_said(exports: Exports, tmp_path: Path) -> None:
    shutil.copytree(exports[0]["data"], tmp_path / "onnx")
    model = load(tmp_path / "onnx")
    (tmp_path / "onnx").rename(tmp_path / "moved")
    for use in (model.decoder, lambda: model.limits):
        with pytest.raises(ServingError, match="was moved or removed"):
            use()


def check_refusals(decoder: Decoder) -> None:
    row = decoder.open()
    for tokens, message in (
        ([], "row 0 is given 0 tokens, and reads 1 to 8 in a step"),
        ([5] * 9, "row 0 is given 9 tokens"),
        ([1000], "row 0 is given token 1000, outside the vocabulary"),
        ([0.5], "give a list of token ids"),
    ):
        with pytest.raises(ServingError, match=message):
            decoder.step({row: tokens})
    with pytest.raises(ServingError, match="tokens must be a list of ids for each row"):
        decoder.step([1])  # type: ignore[arg-type]
    with pytest.raises(ServingError, match="all 1 rows are in use"):
        decoder.open()
    with pytest.raises(ServingError, match="row 7 is not open"):
        decoder.close(7)
    decoder.close(row)
    with pytest.raises(ServingError, match="the export takes token ids only"):
        decoder.open(source={"input_ids": np.ones((1, 2), np.int64)})
    assert decoder.free == 1


def test_what_rows_refuse(model: OrtModel) -> None:
    check_refusals(model.decoder(rows=1, capacity=8, chunk=4))
    decoder = model.decoder(rows=2, capacity=8, chunk=4)
    one, other = decoder.open(), decoder.open()
    with pytest.raises(ServingError, match="row 0 is given 5 tokens, and reads 1 to 4 in a step"):
        decoder.step({one: [5] * 5, other: [5]})
    with pytest.raises(ServingError, match="no adapter 'none'; there is small, wide"):
        model.decoder(rows=1).open("none")
    for sizes in ({"rows": 0}, {"capacity": 10**6}, {"chunk": 1.5}):
        with pytest.raises(ServingError, match=r"is not a count|above the model's context"):
            model.decoder(**sizes)


@pytest.mark.parametrize(("name", "expected"), [("LlamaForCausalLM", True), ("BartForCausalLM", False)])
def test_a_cache_is_a_buffer_where_attention_alone_reads_it(tmp_path: Path, name: str, expected: bool) -> None:
    export_onnx(trace(tiny_decoder(name), task="text-generation-with-past"), tmp_path / "onnx", verify=False)
    assert takes_buffers(tmp_path / "onnx" / "model.onnx") is expected


def test_a_step_that_fails_changes_no_row(tmp_path: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed step rows are as before, even where each step gives the next cache (attention not fused)."""
    export_onnx(
        trace(tiny_decoder("MptForCausalLM"), task="text-generation-with-past"), tmp_path / "onnx", verify=False
    )
    for path in (tmp_path / "onnx", exports[0]["data"]):
        decoder: Any = load(path, ELSEWHERE, threads=1).decoder(rows=2, capacity=16, chunk=8)
        first, second = decoder.open(), decoder.open()
        decoder.step({first: [5, 6], second: [7]})
        expected = load(path, threads=1).generate([7, 8], max_new_tokens=1, eos_token_id=[])
        run, calls = decoder._step, []

        def fail(*given: Any, run: Any = run, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no memory")
            return run(*given)

        monkeypatch.setattr(decoder, "_step", fail)
        with pytest.raises(ServingError, match=r"ONNX Runtime fails on rows of \[1, 1\] tokens: no memory"):
            decoder.step({first: [9], second: [8]})
        assert (decoder.length(first), decoder.length(second)) == (2, 1)
        assert [int(decoder.step({second: [8]})[second].argmax())] == expected
