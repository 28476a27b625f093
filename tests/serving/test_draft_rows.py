"""Rows that read draft tokens: what a token gives does not depend on how many are read with it, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from damaged_exports import forget_digests
from numpy.typing import NDArray
from same_rows import same_rows
from served_exports import CACHED, adapted
from traces import fresh_trace

from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.format.export_directory import ROWS_NAME
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.serving import OrtModel, load

PROMPT, TEXT = [5, 9, 33, 71, 8], [12, 40, 3, 3, 88, 61, 5, 9]
KINDS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "float16": {"precision": "fp16"},
    "int4": {"quantize": "int4"},
    "int8-dynamic": {"quantize": "int8-dynamic"},
    "logits of all": {"logits": "all"},
}
pytestmark = pytest.mark.filterwarnings("ignore:AzureExecutionProvider takes no node of this model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    """Two adapters over one base."""
    folder = tmp_path_factory.mktemp("drafts")
    model, _ = adapted("llama", folder, CACHED)
    export_onnx(model, folder / "onnx", adapters="data", verify=False)
    return load(folder / "onnx", threads=1)


def read(decoder: Decoder, row: int, count: int, others: Mapping[int, Sequence[int]] | None = None) -> NDArray[Any]:
    """Return the logits after each token of a text, of which some are read in a step; other rows read with each."""
    decoder.rewind(row, len(PROMPT))
    found = []
    for start in range(0, len(TEXT), count):
        part = TEXT[start : start + count]
        for other in others or ():
            decoder.rewind(other, 0)
        found.append(decoder.step({row: part, **(others or {})}, {row: len(part)})[row].copy())
        assert found[-1].shape[0] == len(part)
    return np.concatenate(found)


def check_bits(decoder: Decoder, adapter: str | None, *others: str | None, quantize: str = "") -> None:
    row, beside = decoder.open(adapter), [decoder.open(other) for other in others]
    decoder.step({row: PROMPT})
    alone = read(decoder, row, 1)
    for count in (2, 3, 5, 8):
        assert same_rows(read(decoder, row, count), alone, quantize=quantize)
    neighbours = {other: [7] * (1 + 3 * index) for index, other in enumerate(beside)}
    for count in (1, 3) if beside else ():
        assert same_rows(read(decoder, row, count, neighbours), alone, quantize=quantize)


@pytest.mark.quick
@pytest.mark.parametrize("name", KINDS)
def test_a_token_gives_the_same_alone_and_among_others(name: str, tmp_path: Path) -> None:
    export_onnx(fresh_trace("llama", task=CACHED), tmp_path / "onnx", verify=False, **KINDS[name])
    decoder = load(tmp_path / "onnx", threads=1).decoder(rows=3, capacity=24, chunk=8)
    assert decoder.verify_problem is None
    check_bits(decoder, None, None, None, quantize=name)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "phi3"])
def test_in_other_architectures(name: str, tmp_path: Path) -> None:
    export_onnx(fresh_trace(name, task=CACHED), tmp_path / "onnx", verify=False)
    check_bits(load(tmp_path / "onnx", threads=1).decoder(rows=3, capacity=24, chunk=8), None, None, None)


def test_with_adapters_beside_others(data: OrtModel) -> None:
    check_bits(data.decoder(rows=3, capacity=24, chunk=8), "wide", "small", None)


def test_a_step_with_an_adapter_gives_the_same_beside_others(data: OrtModel) -> None:
    decoder = data.decoder(rows=5, capacity=48, chunk=16)
    for adapter in (None, "small", "wide"):
        row = decoder.open(adapter)
        decoder.step({row: PROMPT})
        alone = decoder.step({row: [7]})[row].copy()
        for others in (["wide"], ["small", "wide"], [None, "wide", "wide", "small"]):
            for count in (1, 2, 16):
                decoder.rewind(row, len(PROMPT))
                beside = [decoder.open(other) for other in others]
                found = decoder.step({row: [7]} | {other: [9] * count for other in beside})[row]
                assert np.array_equal(found, alone)
                for other in beside:
                    decoder.close(other)
        decoder.close(row)


def test_a_row_that_was_set_back_goes_on_as_if_it_had_not_read_more(data: OrtModel) -> None:
    decoder = data.decoder(rows=2, capacity=24, chunk=8)
    row, other = decoder.open("wide"), decoder.open("small")
    decoder.step({row: PROMPT, other: PROMPT})
    expected = decoder.step({row: [7]})[row].copy()
    decoder.rewind(row, len(PROMPT))
    decoder.step({row: [1, 2, 3, 4], other: [6]})
    decoder.rewind(row, len(PROMPT))
    assert decoder.length(row) == len(PROMPT)
    assert np.array_equal(decoder.step({row: [7]})[row], expected)


def test_the_last_token_that_there_is_room_for_can_be_verified(tmp_path: Path) -> None:
    export_onnx(fresh_trace("gpt2", task=CACHED, n_positions=32), tmp_path / "onnx", verify=False)
    decoder = load(tmp_path / "onnx", threads=1).decoder(rows=1)
    row = decoder.open()
    decoder.step({row: PROMPT * 6})
    for token in (3, 4):
        decoder.step({row: [token]}, {row: 1})
    assert decoder.length(row) == decoder.capacity == 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda decoder, row: decoder.rewind(row, 9), "has read 5 tokens and cannot be set back to 9"),
        (lambda decoder, row: decoder.rewind(row, -1), "cannot be set back to -1"),
        (lambda decoder, row: decoder.rewind(7, 0), "row 7 is not open"),
        (lambda decoder, row: decoder.step({row: [3]}, {row: 2}), "logits of 2 tokens of row 0 are requested"),
        (lambda decoder, row: decoder.step({row: [3]}, {1: 1}), "logits of 1 tokens of row 1 are requested"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_read(data: OrtModel, call: Any, message: str) -> None:
    decoder = data.decoder(rows=2, capacity=24, chunk=8)
    row = decoder.open()
    decoder.step({row: PROMPT})
    with pytest.raises(ServingError, match=message):
        call(decoder, row)
    assert decoder.length(row) == len(PROMPT)


def test_rows_that_run_one_after_the_other_say_so(data: OrtModel) -> None:
    elsewhere = load(data.directory, ["AzureExecutionProvider", "CPUExecutionProvider"], threads=1)
    decoder = elsewhere.decoder(rows=1, capacity=24)
    row = decoder.open()
    decoder.step({row: PROMPT})
    with pytest.raises(ServingError, match="its rows run one after the other"):
        decoder.rewind(row, 2)
    with pytest.raises(ServingError, match="its rows run one after the other"):
        decoder.step({row: [3, 4]}, {row: 2})
    assert decoder.length(row) == len(PROMPT)


def test_a_plain_session_may_leave_the_inputs_of_drafts_out(tmp_path: Path) -> None:
    export_onnx(fresh_trace("llama", task=CACHED), tmp_path / "onnx", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / ROWS_NAME)
    chosen = session.get_overridable_initializers()
    assert sorted((value.name, tuple(value.shape)) for value in chosen) == [
        ("attention_seqlens", ("batch_size",)),
        ("logits_indices", ("num_logits",)),
    ]
    caches = {
        value.name: np.zeros((2, value.shape[1], 16, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    lengths = {"query_seqlens": np.array([3, 5], np.int32), "past_seqlens": np.zeros(2, np.int32)}
    feed = {"input_ids": np.array([[5, 9, 33, 0, 0], [71, 8, 12, 40, 3]]), **lengths, **caches}
    (last,) = session.run(["logits"], feed)
    every = np.arange(8)
    (each,) = session.run(["logits"], {**feed, "logits_indices": every, "attention_seqlens": np.full(2, 2, np.int32)})
    assert last.shape[:2] == (2, 1)
    assert each.shape[:2] == (8, 1)
    assert np.array_equal(last, each[[2, 7]])


def test_a_graph_of_rows_of_an_earlier_version_answers_without_drafts(tmp_path: Path) -> None:
    export_onnx(fresh_trace("llama", task=CACHED), tmp_path / "onnx", verify=False)
    answer = load(tmp_path / "onnx", threads=1).generate(PROMPT, max_new_tokens=9)
    path = tmp_path / "onnx" / ROWS_NAME
    model = onnx.load(path, load_external_data=False)
    for name in ("attention_seqlens", "logits_indices"):
        model.graph.input.remove(next(value for value in model.graph.input if value.name == name))
    model.metadata_props.remove(next(entry for entry in model.metadata_props if entry.key == "gralora_rows_form"))
    path.write_bytes(model.SerializeToString())
    forget_digests(tmp_path / "onnx")
    with pytest.warns(UserWarning, match=r"model_rows.onnx was written by an earlier version: .*overwrite=True"):
        decoder = load(tmp_path / "onnx", threads=1).decoder(rows=1, capacity=24)
    assert decoder.verify_problem == "the graph of its rows gives logits after the last token of each alone"
    with pytest.warns(UserWarning, match="earlier version"):
        assert load(tmp_path / "onnx", threads=1).generate(PROMPT, max_new_tokens=9) == answer
