"""Text Embeddings Inference's routes: sentence-transformers' and transformers' answers, with an adapter a request."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from peft import PeftModel
from peft_oracle import peft_model
from running_service import running
from sentence_encoders import HIDDEN, TEXTS, save_encoder
from sentence_transformers import CrossEncoder, SentenceTransformer
from served_exports import chat_tokenizer
from starlette.testclient import TestClient
from test_http_rerank import DOCUMENTS, QUERY, pair_tokenizer
from tiny_models import tiny_model
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from gralora_fx import GraloraModel
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.run.model import OrtModel
from gralora_fx.service.app import create_app

NAMES = (None, "small", "wide")
LONG = "A text without end. " * 20
PROMPTS = {"query": "find: ", "passage": ""}
LABELS = {0: "sport", 1: "art", 2: "law"}
Service = tuple[TestClient, dict[str | None, Any]]


def save_adapters(load: Callable[[], Any], folder: Path) -> None:
    for seed, (name, rank) in enumerate((("small", 2), ("wide", 6))):
        fields = {"r": rank, "gralora_k": 2, "alpha": 32, "target_modules": ["query", "value"]}
        peft_model(load(), seed, **fields).save_pretrained(str(folder / name))


def exported(traced: Any, folder: Path, tokenizer: Any) -> Path:
    model = GraloraModel.from_pretrained(traced, folder / "small", adapter_name="small")
    model.load_adapter(folder / "wide", "wide")
    model.set_adapter(["small", "wide"])
    export_onnx(model, folder / "base", adapters="data", tokenizer=tokenizer, verify=False)
    return folder / "base"


def oracles_of(load: Callable[[], Any], folder: Path) -> dict[str | None, Any]:
    oracles = {name: load() for name in NAMES}
    for name, oracle in oracles.items():
        if name is not None:
            PeftModel.from_pretrained(oracle[0].model, str(folder / name))
    return oracles


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    folder = tmp_path_factory.mktemp("tei")
    source = save_encoder("bert", folder, "mean")
    made = SentenceTransformer(str(source), device="cpu", prompts=PROMPTS)
    made.save_pretrained(str(source), create_model_card=False)
    save_adapters(lambda: AutoModel.from_pretrained(source), folder)
    oracles = oracles_of(lambda: SentenceTransformer(str(source), device="cpu"), folder)
    return exported(load_traced(str(source), None, None), folder, source), oracles


@pytest.fixture(scope="module")
def encoder(encoders: tuple[Path, dict[str | None, Any]]) -> Iterator[Service]:
    with TestClient(create_app(ServiceSettings(encoders[0]))) as client:
        yield client, encoders[1]


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("tei-ranks")
    source = str(folder / "cross")
    tiny_model("bert", num_labels=1, pad_token_id=0, max_position_embeddings=96).save_pretrained(source)
    pair_tokenizer().save_pretrained(source)
    CrossEncoder(source, device="cpu", max_length=96).save_pretrained(source)
    save_adapters(lambda: AutoModelForSequenceClassification.from_pretrained(source), folder)
    oracles = oracles_of(lambda: CrossEncoder(source, device="cpu"), folder)
    traced = load_traced(source, None, "text-classification")
    with TestClient(create_app(ServiceSettings(exported(traced, folder, source)))) as client:
        yield client, oracles


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("tei-classes")
    source = str(folder / "classes")
    tiny_model("bert", num_labels=3, id2label=LABELS, pad_token_id=0).save_pretrained(source)
    pair_tokenizer().save_pretrained(source)
    load = functools.partial(AutoModelForSequenceClassification.from_pretrained, source)
    save_adapters(load, folder)
    oracles = {name: load() for name in NAMES}
    for name in NAMES[1:]:
        PeftModel.from_pretrained(oracles[name], str(folder / str(name)))
    traced = load_traced(source, None, "text-classification")
    with TestClient(create_app(ServiceSettings(exported(traced, folder, source)))) as client:
        yield client, oracles


def beside_each_other(ask: Callable[[str | None], Any], monkeypatch: pytest.MonkeyPatch) -> dict[str | None, Any]:
    """Ask with each adapter, so that they share a batch, and return the answers by adapter."""
    run, begun, full = OrtModel.__call__, threading.Event(), threading.Event()
    batches: list[set[Any]] = []

    def wait(model: OrtModel, *args: Any, adapter: Any = None, **inputs: Any) -> Any:
        batches.append(set(adapter))
        begun.set()
        assert full.wait(20)
        return run(model, *args, adapter=adapter, **inputs)

    monkeypatch.setattr(OrtModel, "__call__", wait)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, None)  # while it runs, the others queue up
        assert begun.wait(20)
        waiting = {name: pool.submit(ask, name) for name in NAMES}
        threading.Timer(0.5, full.set).start()
        answers = {name: each.result() for name, each in waiting.items()}
        first.result()
    assert max(map(len, batches)) == len({str(answer) for answer in answers.values()}) == len(NAMES)
    return answers


def ask(client: TestClient, path: str, model: str | None = None, **fields: Any) -> Any:
    named = {} if model is None else {"model": model}
    return client.post(path, json={**fields, **named}).raise_for_status().json()


@pytest.mark.quick
def test_embeddings_are_sentence_transformers_normalized(encoder: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    client, oracles = encoder
    answers = beside_each_other(lambda name: ask(client, "/embed", name, inputs=TEXTS), monkeypatch)
    for name, found in answers.items():
        np.testing.assert_allclose(found, oracles[name].encode(TEXTS, normalize_embeddings=True), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"normalize": False}, {}),
        ({"prompt_name": "query"}, {"prompt_name": "query", "normalize_embeddings": True}),
        ({"dimensions": HIDDEN // 2}, {"truncate_dim": HIDDEN // 2, "normalize_embeddings": True}),
        ({"dimensions": HIDDEN, "normalize": False}, {}),
        ({"truncate": True, "truncation_direction": "Right"}, {"normalize_embeddings": True}),
    ],
)
def test_options_of_embeddings(encoder: Service, fields: dict[str, Any], options: dict[str, Any]) -> None:
    client, oracles = encoder
    texts = [*TEXTS, LONG] if "truncate" in fields else TEXTS
    found = ask(client, "/embed", "wide", inputs=texts, **fields)
    np.testing.assert_allclose(found, oracles["wide"].encode(texts, **options), atol=1e-5)


def test_one_text_and_token_ids_are_lists_of_one(encoder: Service) -> None:
    client, _ = encoder
    (one,) = ask(client, "/embed", inputs="a")
    (ids,) = ask(client, "/embed", inputs=chat_tokenizer()("a")["input_ids"])
    assert one == ids
    assert ask(client, "/embed?model=small", inputs="a") == ask(client, "/embed", "small", inputs="a") != [one]


def test_huggingface_hubs_client_names_an_adapter_in_its_url(
    encoders: tuple[Path, dict[str | None, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which refuses this machine's URLs too
    path, oracles = encoders
    with running(ServiceSettings(path)) as (url, _):
        for name in NAMES:
            query = "" if name is None else f"?model={name}"
            found = InferenceClient(model=f"{url}embed{query}", token="none")
            vectors = found.feature_extraction(TEXTS, normalize=False, truncate=True, encoding_format="float")
            np.testing.assert_allclose(vectors, oracles[name].encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("raw", [False, True])
def test_ranks_are_cross_encoders(ranker: Service, monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    client, oracles = ranker
    fields = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": raw}
    answers = beside_each_other(lambda name: ask(client, "/rerank", name, **fields), monkeypatch)
    for name, found in answers.items():
        function = torch.nn.Identity() if raw else None
        expected = oracles[name].rank(QUERY, DOCUMENTS, activation_fn=function)
        assert [each["index"] for each in found] == [each["corpus_id"] for each in expected]
        np.testing.assert_allclose([each["score"] for each in found], [each["score"] for each in expected], atol=1e-5)
        assert found[0].keys() == {"index", "score"}


def test_ranks_have_texts_and_cut_them_on_demand(ranker: Service) -> None:
    client, oracles = ranker
    texts = [*DOCUMENTS, LONG]
    found = ask(client, "/rerank", "small", query=QUERY, texts=texts, truncate=True, return_text=True)
    expected = oracles["small"].rank(QUERY, texts)
    assert [each["index"] for each in found] == [each["corpus_id"] for each in expected]
    np.testing.assert_allclose([each["score"] for each in found], [each["score"] for each in expected], atol=1e-5)
    assert all(each["text"] == texts[each["index"]] for each in found)


def test_documents_are_ranked_in_coheres_form(ranker: Service) -> None:
    client, _ = ranker
    fields = {"query": QUERY, "model": "wide"}
    ranked = ask(client, "/rerank", **fields, documents=DOCUMENTS)["results"]
    assert ranked == ask(client, "/v1/rerank", **fields, documents=DOCUMENTS)["results"]
    scores = [
        {"index": each["index"], "relevance_score": each["score"]}
        for each in ask(client, "/rerank", **fields, texts=DOCUMENTS)
    ]
    assert ranked == scores
    refused = client.post("/rerank", json={**fields, "documents": []}).json()["error"]
    assert refused["param"] == "documents"


@pytest.mark.parametrize("raw", [False, True])
def test_classes_are_those_of_the_pipeline(classifier: Service, monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    client, oracles = classifier
    inputs = [["a"], ["A longer text", "and its pair"], ["x y"]]
    given = [{"text": each[0], **({"text_pair": each[1]} if each[1:] else {})} for each in inputs]
    answers = beside_each_other(lambda name: ask(client, "/predict", name, inputs=inputs, raw_scores=raw), monkeypatch)
    for name, found in answers.items():
        classify = pipeline("text-classification", model=oracles[name], tokenizer=pair_tokenizer(), top_k=None)
        expected = [classify(each, function_to_apply="none" if raw else None) for each in given]
        for row, reference in zip(found, expected, strict=True):
            assert [each["label"] for each in row] == [each["label"] for each in reference]
            np.testing.assert_allclose([e["score"] for e in row], [e["score"] for e in reference], atol=1e-5)
        alone = ask(client, "/predict", name, inputs="a", raw_scores=raw)
        np.testing.assert_allclose([each["score"] for each in alone], [each["score"] for each in found[0]], atol=1e-5)


@pytest.mark.parametrize(
    ("path", "fields", "status", "kind", "message"),
    [
        ("/embed", {"inputs": []}, 400, "validation", "input has no texts"),
        ("/embed", {}, 400, "validation", "inputs is missing"),
        ("/embed", {"inputs": LONG}, 400, "validation", "more than the model's"),
        ("/embed", {"inputs": "a", "model": "other"}, 404, "validation", "no model 'other'"),
        (
            "/embed",
            {"inputs": "a", "prompt_name": "other"},
            400,
            "validation",
            "no prompt 'other'; there is 'document', 'passage', 'query'",
        ),
        ("/embed", {"inputs": [5], "prompt_name": "query"}, 400, "validation", "has no effect on token ids"),
        ("/embed", {"inputs": "a", "dimensions": HIDDEN + 1}, 400, "validation", f"embeddings have {HIDDEN}"),
        ("/embed", {"inputs": "a", "truncation_direction": "left"}, 400, "validation", "truncation_direction"),
        ("/embed", {"inputs": "a", "encoding_format": "base64"}, 400, "validation", "encoding_format is not supported"),
        ("/embed?model=small", {"inputs": "a", "model": "wide"}, 400, "validation", "name one"),
        ("/predict", {"inputs": []}, 400, "validation", "input has no texts"),
        ("/predict", {"inputs": ["a", "b", "c"]}, 400, "validation", "inputs has a list of 3 texts"),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 400, "validation", "inputs has a list of 3 texts"),
        ("/predict", {"inputs": "a", "top_k": 2}, 400, "validation", "top_k is not supported"),
        ("/rerank", {"query": "a", "texts": []}, 400, "validation", "texts: List should have at least 1 item"),
        ("/rerank", {"query": "a", "texts": ["b"], "model": "other"}, 404, "validation", "no model 'other'"),
        ("/rerank", {"query": "a", "texts": ["b"], "top_n": 1}, 400, "validation", "top_n is not supported"),
        (
            "/rerank",
            {"query": "a", "texts": ["b"], "documents": ["b"]},
            400,
            "validation",
            "documents is not supported",
        ),
        ("/rerank", {"query": "a", "texts": ["b"] * 73}, 400, "validation", "73 rows are given"),
    ],
)
def test_errors_have_tei_form(
    request: pytest.FixtureRequest, path: str, fields: dict[str, Any], status: int, kind: str, message: str
) -> None:
    service = {"/embed": "encoder", "/predict": "classifier", "/rerank": "ranker"}[path.partition("?")[0]]
    found = request.getfixturevalue(service)[0].post(path, json=fields)
    body = found.json()
    assert (found.status_code, body.keys(), body["error_type"]) == (status, {"error", "error_type"}, kind)
    assert message in body["error"]


def test_the_routes_are_those_of_the_model(encoder: Service, classifier: Service, ranker: Service) -> None:
    there = {
        name: set(each[0].get("/openapi.json").json()["paths"])
        for name, each in {"encoder": encoder, "classifier": classifier, "ranker": ranker}.items()
    }
    tei = {"/embed", "/predict", "/rerank"}
    assert {name: paths & tei for name, paths in there.items()} == {
        "encoder": {"/embed"},
        "classifier": {"/predict"},
        "ranker": {"/predict", "/rerank"},
    }
