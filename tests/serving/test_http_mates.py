"""Requests that wait together are answered each by itself, whatever the others are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from served_exports import adapted, chat_tokenizer

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app


def test_a_request_without_rows_leaves_its_mates(tmp_path: Path) -> None:
    model, _ = adapted("bert", tmp_path, targets=["query"], num_labels=3, pad_token_id=0)
    export_onnx(model, tmp_path / "base", adapters="data", verify=False, tokenizer=chat_tokenizer())
    encoder = create_app(ServiceSettings(tmp_path / "base")).state.engine.encoder
    inputs = [np.full(shape, token) for shape, token in (((2, 3), 5), ((0, 3), 6), ((2, 3), 7))]

    async def answers() -> list[Any]:
        asked = [asyncio.ensure_future(encoder.tensors({"input_ids": array}, None)) for array in inputs]
        await asyncio.sleep(0)  # all of them wait before the first one runs
        encoder.batches.start()
        return await asyncio.gather(*asked, return_exceptions=True)

    first, empty, last = asyncio.run(answers())
    encoder.batches.stop()
    assert isinstance(empty, ServingError)
    assert "is empty" in str(empty)
    for array, found in ((inputs[0], first), (inputs[2], last)):
        assert np.allclose(found["logits"], encoder.model(input_ids=array)["logits"], atol=1e-5)
