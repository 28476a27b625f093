"""Adapters as data, served: an adapter by name for each row, rows that come and go, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft_oracle import peft_model
from tiny_models import text_batch, tiny_model

from gralora_fx import GraloraModel, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

ADAPTERS = ("small", "wide")


def exported(name: str, folder: Path, task: str | None = None, **options: Any) -> tuple[Path, dict[str | None, Any]]:
    """Return an export with two adapters of PEFT's, of other ranks, and PEFT's models by adapter."""
    oracles: dict[str | None, Any] = {None: tiny_model(name)}
    model: GraloraModel | None = None
    for seed, (adapter, rank) in enumerate(zip(ADAPTERS, (2, 6), strict=True)):
        fields = {"r": rank, "gralora_k": 2, "alpha": 8, "target_modules": "all-linear"}
        oracles[adapter] = peft_model(tiny_model(name), seed + 1, **fields)
        oracles[adapter].save_pretrained(str(folder / adapter))
        if model is None:
            model = GraloraModel.from_pretrained(
                trace(tiny_model(name), task=task), folder / adapter, adapter_name=adapter
            )
        else:
            model.load_adapter(folder / adapter, adapter)
    assert model is not None
    model.set_adapter(list(ADAPTERS))
    export_onnx(model, folder / "onnx", adapters="data", verify=False, **options)
    return folder / "onnx", oracles


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    return exported("bert", tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    return exported("llama", tmp_path_factory.mktemp("decoder"), "text-generation-with-past")


def expected(oracle: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Return the last logits of a text that is read alone."""
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = oracle(torch.tensor([tokens])).logits[0, -1].numpy()
    return logits


def gap(actual: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    assert actual.shape == reference.shape
    return float(np.abs(actual - reference).max())


def test_rows_name_their_adapters(encoder: tuple[Path, dict[str | None, Any]]) -> None:
    path, oracles = encoder
    model, inputs = load(path), text_batch(4, 7)
    names = ["wide", None, "small", "wide"]
    logits = model(**inputs, adapter=names).logits
    for row, name in enumerate(names):
        with torch.no_grad():
            reference = oracles[name](**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]
        assert gap(logits[row].numpy(), reference.numpy()) <= 1e-4
    alone = model(**inputs, adapter=["wide"] * 4).logits
    assert torch.equal(alone[0], logits[0])  # whatever adapters run beside it
    assert torch.equal(model(**inputs).logits[1], logits[1])
    assert gap(model(**inputs, adapter="wide").logits[0].numpy(), logits[0].numpy()) <= 1e-5


def test_adapters_come_and_go_without_a_new_session(
    encoder: tuple[Path, dict[str | None, Any]], tmp_path: Path
) -> None:
    path, _ = encoder
    model, inputs = load(path), text_batch(2, 5)
    session = model.rows_session
    before = model(**inputs, adapter=["small", "wide"]).logits
    model.load_adapter("again", path / "adapters" / "wide.onnx_adapter")
    assert torch.equal(model(**inputs, adapter=["small", "again"]).logits, before)
    model.unload_adapter("again")
    with pytest.raises(ServingError, match="no adapter 'again'; there is small, wide"):
        model(**inputs, adapter=["small", "again"])
    assert model.rows_session is session


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("none", "no adapter 'none'; there is small, wide: load it with load_adapter"),
        (["small"], "adapter has 1 names for 3 rows"),
        ([None, 2, None], "2 is not the name of an adapter"),
        (7, "7 is not the name of an adapter"),
    ],
)
def test_bad_adapters_of_calls(encoder: tuple[Path, dict[str | None, Any]], adapter: Any, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        load(encoder[0])(**text_batch(3, 5), adapter=adapter)


def test_ids_are_chosen_by_names_alone(encoder: tuple[Path, dict[str | None, Any]]) -> None:
    with pytest.raises(ServingError, match="unknown input adapter_ids"):
        load(encoder[0])(**text_batch(2, 5), adapter_ids=[9, -1])


def test_files_that_are_no_adapters(encoder: tuple[Path, dict[str | None, Any]], tmp_path: Path) -> None:
    model = load(encoder[0])
    (tmp_path / "x.onnx_adapter").write_bytes(b"x")
    with pytest.raises(ServingError, match=r"no x\.json beside"):
        model.load_adapter("x", tmp_path / "x.onnx_adapter")
    with pytest.raises(ServingError, match=r"is not an \.onnx_adapter file"):
        model.load_adapter("x", tmp_path)
    with pytest.raises(ServingError, match="is not a name for an adapter"):
        model.load_adapter("../x", encoder[0] / "adapters" / "wide.onnx_adapter")


def test_an_export_without_rows_takes_no_adapter_by_row(tmp_path: Path) -> None:
    export_onnx(trace(tiny_model("bert")), tmp_path / "onnx", verify=False)
    with pytest.raises(ServingError, match="takes no adapters"):
        load(tmp_path / "onnx")(**text_batch(2, 5), adapter=["a", None])
    with pytest.raises(ServingError, match="has no cache, so it cannot generate"):
        load(tmp_path / "onnx").decoder()


def cached(model: Any, row: int) -> NDArray[Any]:
    """Return a copy of all keys and values of a row."""
    return np.stack(list(model.cached(row).values()))


@pytest.mark.quick
def test_a_row_reads_while_another_decodes_and_a_third_is_idle(decoder: tuple[Path, dict[str | None, Any]]) -> None:
    path, oracles = decoder
    model = load(path).decoder(rows=3, capacity=32, chunk=8)
    texts: dict[int, list[int]] = {}
    names = {model.open(name): name for name in ("wide", None, "small")}
    generator = np.random.default_rng(0)
    idle = next(row for row, name in names.items() if name == "small")
    reading, decoding, _ = names
    # a short prompt, then a long one in chunks beside it, the third row idle between its own prompt and the end
    steps = [{decoding: 3, idle: 5}, {decoding: 1, reading: 8}, {decoding: 1, reading: 8}, {reading: 2}]
    steps += [{reading: 1, decoding: 1, idle: 1}]
    for counts in steps:
        tokens = {row: generator.integers(3, 100, count).tolist() for row, count in counts.items()}
        before = {row: cached(model, row) for row in names if row not in counts}
        logits = model.step(tokens)
        assert set(logits) == set(counts)
        for row, own in before.items():
            assert np.array_equal(cached(model, row), own)
        for row, new in tokens.items():
            texts[row] = [*texts.get(row, []), *new]
            assert model.length(row) == len(texts[row])
            assert gap(logits[row], expected(oracles[names[row]], texts[row])) <= 1e-4


@pytest.mark.parametrize(
    "reads",
    [
        pytest.param([("small", 12), ("small", 3), ("small", 1)], id="one adapter"),
        pytest.param([(None, 12), (None, 1)], id="none"),
        pytest.param([("small", 1), ("wide", 1), (None, 1), ("small", 1), ("wide", 2)], id="few tokens each"),
        pytest.param([("wide", 20), ("small", 1), (None, 1), (None, 9)], id="chunks"),
        pytest.param([("wide", 8)] * 2 + [("small", 8)] * 2, id="as many as a tile"),
        pytest.param([("small", 1)], id="one token"),
        pytest.param([(None, 11), ("wide", 1)], id="the base beside one"),
    ],
)
@pytest.mark.parametrize("resting", [0, 2])
def test_rows_of_every_kind_of_step_are_those_of_their_adapter(
    decoder: tuple[Path, dict[str | None, Any]], reads: list[tuple[str | None, int]], resting: int
) -> None:
    """Some rows rest between the others."""
    path, oracles = decoder
    served = load(path)
    for name in ("small", "wide"):
        served.load_adapter(name, path / "adapters" / f"{name}.onnx_adapter")
    model = served.decoder(rows=16, capacity=32, chunk=20)
    generator = np.random.default_rng(0)
    texts: dict[int, list[int]] = {}
    for name, _ in reads:
        row = model.open(name)
        for _ in range(resting):
            model.step({model.open("wide"): [7, 8]})
        texts[row] = generator.integers(3, 100, 3).tolist()
    first = dict(zip(texts, reads, strict=True))
    model.step(texts)
    tokens = {row: generator.integers(3, 100, count).tolist() for row, (_, count) in first.items()}
    logits = model.step(tokens)
    for row, (name, _) in first.items():
        assert gap(logits[row], expected(oracles[name], [*texts[row], *tokens[row]])) <= 1e-4


def test_rows_are_opened_close_together(decoder: tuple[Path, dict[str | None, Any]]) -> None:
    model = load(decoder[0]).decoder(rows=6, capacity=8, chunk=4)
    rows = [model.open() for _ in range(6)]
    assert rows == [0, 1, 2, 3, 4, 5]
    for row in (0, 1, 2, 4, 5):
        model.close(row)
    assert [model.open(), model.open(), model.open()] == [2, 1, 0]
    model.close(1)
    assert model.open() == 1


def test_rows_and_adapters_are_used_again(decoder: tuple[Path, dict[str | None, Any]]) -> None:
    """A row keeps the adapter that it was opened with, whatever is loaded and unloaded meanwhile."""
    path, oracles = decoder
    served = load(path)
    model = served.decoder(rows=2, capacity=16, chunk=8)
    first, second = model.open("small"), model.open("wide")
    model.step({first: [5, 6, 7], second: [8, 9]})
    served.unload_adapter("wide")
    served.unload_adapter("small")
    served.load_adapter("wide", path / "adapters" / "small.onnx_adapter")  # another of the name
    model.close(first)
    assert gap(model.step({second: [10]})[second], expected(oracles["wide"], [8, 9, 10])) <= 1e-4
    third = model.open("wide")
    assert third == first
    logits = model.step({third: [11, 12], second: [11]})  # each its own of that name
    assert gap(logits[third], expected(oracles["small"], [11, 12])) <= 1e-4
    assert gap(logits[second], expected(oracles["wide"], [8, 9, 10, 11])) <= 1e-4


def test_logits_of_every_token(tmp_path: Path) -> None:
    path, oracles = exported("llama", tmp_path, "text-generation-with-past", logits="all")
    model = load(path).decoder(rows=2, capacity=16, chunk=8)
    first, second = model.open("small"), model.open()
    logits = model.step({first: [5], second: [6, 7, 8]})
    assert logits[first].shape == (1, 101)
    for length in (1, 2, 3):
        assert gap(logits[second][length - 1], expected(oracles[None], [6, 7, 8][:length])) <= 1e-4


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({1: [5]}, "row 1 is not open"),
        ({0: []}, "row 0 is given 0 tokens, and reads 1 to 8 in a step"),
        ({0: [5] * 9}, "row 0 is given 9 tokens, and reads 1 to 8 in a step"),
        ({0: [101]}, "row 0 is given token 101, outside the vocabulary of 101 tokens"),
        ({0: [-1]}, "row 0 is given token -1"),
        ({0: [0.5]}, "give a list of token ids"),
        ({0: [[5]]}, "give a list of token ids"),
    ],
)
def test_bad_tokens(decoder: tuple[Path, dict[str | None, Any]], tokens: Any, message: str) -> None:
    model = load(decoder[0]).decoder(rows=2, capacity=8, chunk=4)
    row = model.open()
    model.step({row: [5, 6]})
    before = cached(model, row)
    with pytest.raises(ServingError, match=message):
        model.step(tokens)
    assert model.length(row) == 2
    assert np.array_equal(cached(model, row), before)


def test_rows_that_are_full_and_adapters_in_use(decoder: tuple[Path, dict[str | None, Any]]) -> None:
    path, oracles = decoder
    model = load(path).decoder(rows=1, capacity=4, chunk=4)
    assert model.step({}) == {}
    row = model.open("small")
    logits = model.step({row: [5, 6, 7, 8]})
    assert gap(logits[row], expected(oracles["small"], [5, 6, 7, 8])) <= 1e-4  # to the brim
    with pytest.raises(ServingError, match="more than its capacity of 4"):
        model.step({row: [9]})
    with pytest.raises(ServingError, match="all 1 rows are in use"):
        model.open()
    model.close(row)
    with pytest.raises(ServingError, match="row 0 is not open"):
        model.close(row)
    with pytest.raises(ServingError, match="no adapter 'none'"):
        model.open("none")
    assert model.free == 1


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"capacity": 65}, {"chunk": 1.5}])
def test_bad_sizes(decoder: tuple[Path, dict[str | None, Any]], sizes: Any) -> None:
    with pytest.raises(ServingError, match=r"is not a count|above the model's context of 64"):
        load(decoder[0]).decoder(**sizes)


def test_calls_of_a_decoder_have_one_adapter(decoder: tuple[Path, dict[str | None, Any]]) -> None:
    path, oracles = decoder
    model = load(path)
    logits = model(input_ids=[[5, 6]], adapter="wide").logits
    assert gap(np.asarray(logits)[0, -1], expected(oracles["wide"], [5, 6])) <= 1e-4
    with pytest.raises(ServingError, match=r"adapter must be one name or None, but got \['wide', None\]"):
        model(input_ids=[[5, 6], [7, 8]], adapter=["wide", None])
