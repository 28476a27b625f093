"""Requests made from the service's own OpenAPI description, right and wrong, and what is answered to them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from running_service import serving
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from sentence_encoders import save_encoder
from served_exports import adapted, chat_tokenizer, decoders
from tiny_speech import whisper_export

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app

load_all_checks()
# a description doesn't say which tokens a model has, and how many it takes
ACCEPTANCE = CHECKS.get_one("positive_data_acceptance")


def text(folder: Path) -> Path:
    return decoders(folder, "data")[0]["data"]


def classifier(folder: Path) -> Path:
    model, _ = adapted("bert", folder, targets=["query"], num_labels=3, pad_token_id=0)
    export_onnx(model, folder / "classifier", adapters="data", verify=False, tokenizer=chat_tokenizer())
    return folder / "classifier"


def sentences(folder: Path) -> Path:
    encoder = save_encoder("bert", folder, "mean")
    export_onnx(load_traced(str(encoder), None, None), folder / "onnx", tokenizer=str(encoder), verify=False)
    return folder / "onnx"


def speech(folder: Path) -> Path:
    return Path(shutil.copytree(whisper_export(), folder / "speech"))


@pytest.fixture(scope="module", params=[text, classifier, sentences, speech], ids=lambda make: make.__name__)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    app = create_app(ServiceSettings(request.param(tmp_path_factory.mktemp("schema"))))
    with serving(app) as (host, port):
        yield app, f"http://{host}:{port}"


def test_answers_are_as_described(service: tuple[Any, str]) -> None:
    app, url = service
    description = schemathesis.openapi.from_url(f"{url}/openapi.json")
    base = app.state.engine.models.base
    operations = [operation.ok() for operation in description.get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = st.one_of(operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes)

    @settings(
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, is_known=st.booleans())
    def check(case: Case, is_known: bool) -> None:
        if is_known:  # else nearly every name is unknown
            if "name" in case.path_parameters:
                case.path_parameters["name"] = base
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = base
        case.validate_response(case.call(), excluded_checks=[ACCEPTANCE])

    check()
