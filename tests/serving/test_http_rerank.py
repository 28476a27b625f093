"""`/v1/rerank` compared with sentence-transformers' CrossEncoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder
from starlette.testclient import TestClient
from tiny_models import tiny_model
from tiny_tokenizers import SPECIAL, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.protocols.openai.encoders import relevance_of

QUERY = "where is it"
DOCUMENTS = ["here", "A rather longer text, with which others are padded", "no", "over there, I think"]


def pair_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tiny tokenizer with the pairs and token types of BERT's."""
    tokenizer = tiny_tokenizer()
    _, start, end = SPECIAL
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B:1 {end}:1", special_tokens=[(start, 1), (end, 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # else they are not saved
    return tokenizer


Service = tuple[TestClient, CrossEncoder]


@pytest.fixture(scope="module", params=[torch.nn.Sigmoid, torch.nn.Identity])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("rerank")
    tiny_model("bert", num_labels=1, pad_token_id=0, max_position_embeddings=96).save_pretrained(folder / "bert")
    pair_tokenizer().save_pretrained(folder / "bert")
    oracle = CrossEncoder(str(folder / "bert"), device="cpu", activation_fn=request.param())
    oracle.save_pretrained(str(folder / "cross"))
    traced = load_traced(str(folder / "cross"), None, "text-classification")
    export_onnx(traced, folder / "onnx", tokenizer=str(folder / "cross"), verify=False)
    with TestClient(create_app(ServiceSettings(folder / "onnx"))) as client:
        yield client, CrossEncoder(str(folder / "cross"), device="cpu")


def test_scores_are_cross_encoders(service: Service) -> None:
    client, oracle = service
    expected = oracle.predict([(QUERY, document) for document in DOCUMENTS])
    body: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS}
    found = client.post("/v1/rerank", json=body).raise_for_status().json()
    assert {entry["index"]: entry["relevance_score"] for entry in found["results"]} == pytest.approx(
        dict(enumerate(expected.tolist())), abs=1e-5
    )
    scores = [entry["relevance_score"] for entry in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert found["results"][0].keys() == {"index", "relevance_score"}
    assert found["usage"]["prompt_tokens"] == sum(len(QUERY) + len(document) + 3 for document in DOCUMENTS)
    options = {"top_n": 2, "return_documents": True, "model": "onnx"}
    first = client.post("/rerank", json={**body, **options, "documents": [{"text": text} for text in DOCUMENTS]})
    results = first.raise_for_status().json()["results"]
    assert [entry["index"] for entry in results] == [entry["index"] for entry in found["results"]][:2]
    assert [entry["document"]["text"] for entry in results] == [DOCUMENTS[entry["index"]] for entry in results]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"documents": []}, 400, "at least 1 item"),
        ({"documents": ["a" * 96]}, 400, "more than the model's 96"),
        ({"documents": ["a", 5]}, 400, "documents"),
        ({"query": "\ud800"}, 400, "not Unicode"),
        ({"top_n": 0}, 400, "greater than or equal to 1"),
        ({"model": "other"}, 404, "no model 'other'"),
        ({"max_chunks_per_doc": 1}, 400, "max_chunks_per_doc is not supported"),
        ({"documents": ["a"] * 73}, 400, "73 rows are given, and there is room for 72"),
    ],
)
def test_bad_requests(service: Service, change: dict[str, Any], status: int, message: str) -> None:
    body = json.dumps({"query": QUERY, "documents": DOCUMENTS, **change})
    found = service[0].post("/v1/rerank", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == status
    assert message in found.json()["error"]["message"]


def test_classes_stay(service: Service) -> None:
    (entry,) = service[0].post("/classify", json={"input": "a"}).raise_for_status().json()["data"]
    assert entry["num_classes"] == 1


def test_functions_of_scores() -> None:
    assert relevance_of({})(0.0) == 0.5
    assert relevance_of({})(-1e4) == 0.0
    assert relevance_of({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"})(3.0) == 3.0
    with pytest.raises(ServingError, match="there are Sigmoid and Identity"):
        relevance_of({"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}})
