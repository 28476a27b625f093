"""Without a feature's folder everything else works: a decoder is exported and served from a copy of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from pruned_tree import copy_without, run_on

from gralora_fx.base.features import Feature, features

PROGRAM = """
from pathlib import Path

from starlette.testclient import TestClient
from served_exports import chat_tokenizer
from tiny_models import tiny_model
import gralora_fx
from gralora_fx import GraloraConfig, merge, rewrite, trace
from gralora_fx.base.features import features
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app

model = rewrite(trace(tiny_model("llama"), task="text-generation-with-past"), GraloraConfig(r=4, gralora_k=2))
export_onnx(merge(model), Path("onnx"), tokenizer=chat_tokenizer())
with TestClient(create_app(ServiceSettings(Path("onnx")))) as client:
    asked = {"model": "onnx", "prompt": "a b", "max_tokens": 3, "ignore_eos": True}
    answer = client.post("/v1/completions", json=asked).raise_for_status().json()
    path = client.post("/v1/audio/transcriptions").status_code
print(gralora_fx.__file__, [feature.name for feature in features()], answer["usage"]["completion_tokens"], path)
"""


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_a_decoder_is_exported_and_served_without_it(feature: Feature, tmp_path: Path) -> None:
    tree = copy_without(tmp_path, feature.name)
    printed = run_on(tree, PROGRAM)
    others = [other.name for other in features() if other != feature]
    assert printed.splitlines()[-1] == f"{tree / 'gralora_fx' / '__init__.py'} {others} 3 404"
