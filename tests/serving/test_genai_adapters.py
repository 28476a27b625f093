"""onnxruntime-genai's own copies of adapters go when the adapter is unloaded, or when its last answer ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from served_exports import decoders

from gralora_fx.serving import load


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders(tmp_path_factory.mktemp("genai"), "swappable")[0]["swappable"]


def test_an_adapter_goes_with_its_last_answer(exported: Path) -> None:
    model = load(exported)
    options = {"max_new_tokens": 6, "adapter": "wide"}
    whole = model.generate([5, 6], **options)
    held = model.decoder.copies
    assert len(held) == 1
    stream = model.generate([5, 6], stream=True, **options)
    tokens = list(next(stream))
    model.unload_adapter("wide")
    assert len(held) == 1  # the stream has it
    tokens += [token for piece in stream for token in piece]
    assert tokens == whole
    assert len(held) == 0
    assert model.generate([5, 6], **options) == whole  # from the export's own directory again
    model.unload_adapter("wide")
    assert len(held) == 0


def test_a_stream_that_is_given_up_lets_it_go(exported: Path) -> None:
    model = load(exported)
    first, second = (model.generate([5], stream=True, adapter="small", max_new_tokens=9) for _ in range(2))
    next(first)
    next(second)
    model.unload_adapter("small")
    del first
    assert len(model.decoder.copies) == 1
    del second
    assert len(model.decoder.copies) == 0


def test_two_names_of_one_file_share_it(exported: Path) -> None:
    model = load(exported)
    model.load_adapter("again", exported / "adapters" / "wide.onnx_adapter")
    whole = model.generate([5], adapter="wide", max_new_tokens=5)
    assert model.generate([5], adapter="again", max_new_tokens=5) == whole
    assert len(model.decoder.copies) == 1
    model.unload_adapter("again")
    assert model.generate([5], adapter="wide", max_new_tokens=5) == whole
