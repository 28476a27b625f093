"""The page's files and the facts it reads, without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.service_routes import PAGE_PATHS


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "net"
    export_onnx(trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),)), path, verify=False)
    return path


class References(HTMLParser):
    """Collects what a page loads, and what its policy would not let run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: set[str] = set()
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "src" or (tag == "link" and name == "href"):
                self.loaded.add(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(name)
        if tag == "style" or (tag == "script" and "src" not in dict(attributes)):
            self.inline.append(tag)


def test_every_file_is_open_and_the_data_is_not(net: Path) -> None:
    with TestClient(create_app(ServiceSettings(net, api_key="secret"))) as client:
        pages = [References(client.get(path).text) for path in ("/", "/docs")]
        assert not any(references.inline for references in pages)
        scripts = {path for path in PAGE_PATHS if path.endswith(".js")}
        imported = {
            name
            for path in scripts
            if "swagger" not in path
            for name in re.findall(r'from "\./([\w.]+)"', client.get(path).raise_for_status().text)
        }
        loaded = {f"/{path}" for references in pages for path in references.loaded}
        assert {f"/page/{name}" for name in imported} | loaded | {"/", "/docs"} == set(PAGE_PATHS)
        types = {"": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
        for path in PAGE_PATHS:
            found = client.get(path)
            assert found.status_code == client.head(path).status_code == 200
            assert found.headers["content-type"].split(";")[0] == types[Path(path).suffix]
            policy = found.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy
            assert found.headers["x-content-type-options"] == "nosniff"
            assert "swagger" in path or "secret" not in found.text  # which is a word of OAuth, too
            assert "net" not in re.findall(r"\w+", client.get("/").text)
        for path in ("/info", "/metrics", "/page", "/page/", "/page/../settings.py", "/page/index.html"):
            assert client.get(path).status_code == 401
        description = client.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json()
        assert not {"/", "/docs"} & set(description["paths"])
        (scheme,) = description["components"]["securitySchemes"]
        assert description["components"]["securitySchemes"][scheme] == {"type": "http", "scheme": "bearer"}
        asked = {
            path: operations["get"]["security"]
            for path, operations in description["paths"].items()
            if "get" in operations
        }
        assert asked["/health"] == asked["/v2/health/live"] == asked["/v2/health/ready"] == []
        assert asked["/info"] == asked["/v1/models"] == [{scheme: []}]


def test_facts_of_a_model_of_tensors(net: Path) -> None:
    with TestClient(create_app(ServiceSettings(net, max_queue=7))) as client:
        facts: dict[str, Any] = client.get("/info").raise_for_status().json()
        assert facts.pop("version")
        assert facts == {
            "model": "net",
            "task": None,
            "precision": "fp32",
            "quantization": None,
            "adapters_mode": "merged",
            "context_length": None,
            "chat_template": False,
            "attachments": [],
            "max_queue": 7,
        }
        assert client.get("/page/index.html").status_code == 404


def test_facts_of_a_quantized_model(tmp_path: Path) -> None:
    export_onnx(trace(torch.nn.Linear(64, 64), (torch.randn(2, 64),)), tmp_path / "net", verify=False, quantize="int8")
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        facts = client.get("/info").json()
        assert (facts["precision"], facts["quantization"]) == ("fp32", "int8")
        assert 'quantization="int8"' in client.get("/metrics").text
