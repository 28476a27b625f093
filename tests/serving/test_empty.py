"""Inputs without rows or positions are refused by name, whatever kind of export: some would end the process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from traces import fresh_trace

from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import OrtModel, load

KINDS = {
    "encoder": ("bert", "text-classification"),
    "decoder": ("mistral", "text-generation-with-past"),
    "encoder-decoder": ("t5", "text2text-generation-with-past"),
    "vision": ("vit", "image-classification"),
}
SIZES = {"batch_size": 1, "sequence_length": 3, "decoder_sequence_length": 2}


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    name, task = KINDS[request.param]
    path = tmp_path_factory.mktemp(name) / "onnx"
    sizes = {"decoder_start_token_id": 0, "num_layers": 1} if name == "t5" else {}
    export_onnx(fresh_trace(name, task=task, **sizes), path, verify=False)
    return load(path)


def arrays(served: OrtModel) -> dict[str, Any]:
    """Return a valid call without a past."""
    result = {}
    for value in served.session.get_inputs():
        shape = [SIZES.get(axis, axis) if isinstance(axis, str) else axis for axis in value.shape]
        if not value.name.startswith("past"):
            shape = [3 if isinstance(axis, str) else axis for axis in shape]
            result[value.name] = np.ones(shape, np.int64 if value.type == "tensor(int64)" else np.float32)
    return result


def test_no_empty_axis_reaches_the_runtime(served: OrtModel) -> None:
    valid = arrays(served)
    assert served(**valid)
    for name, array in valid.items():
        for axis in range(array.ndim):
            empty = np.take(array, [], axis=axis)
            with pytest.raises(ServingError, match=f"input '{name}' (is empty, of shape|has shape)"):
                served(**{**valid, name: empty})


def test_a_batch_of_no_rows_is_refused(served: OrtModel) -> None:
    none = {name: array[:0] for name, array in arrays(served).items()}
    first = next(iter(none))
    with pytest.raises(ServingError, match=f"input '{first}' is empty, of shape .0, .*give at least one of"):
        served(**none)
    with pytest.raises(ServingError, match=f"input '{first}' is empty"):
        served(**{first: none[first]})  # the rest left out


def test_an_empty_past_is_a_first_step(served: OrtModel) -> None:
    pasts = [value for value in served.session.get_inputs() if value.name.startswith("past")]
    past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in pasts}
    without = served(**arrays(served))
    assert np.array_equal(served(**arrays(served), **past)[0], without[0])
    if pasts:
        past[pasts[0].name] = past[pasts[0].name][:0]
        with pytest.raises(ServingError, match=f"input '{pasts[0].name}' is empty"):
            served(**arrays(served), **past)


@pytest.mark.parametrize("prompts", [[], (), [[]], [[5], []], np.zeros((0, 3), int), np.zeros((1, 0), int)])
def test_generation_from_nothing_is_refused(served: OrtModel, prompts: Any) -> None:
    with pytest.raises(ServingError, match=r"no prompt; give at least one|is empty; give at least one|has no cache"):
        served.generate(prompts)
