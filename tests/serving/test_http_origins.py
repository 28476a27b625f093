"""Pages of other origins: what `--allow-origin` tells browsers, beside keys, errors and streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_exports import decoders
from starlette.testclient import TestClient

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ConfigError
from gralora_fx.service.app import create_app

FRIEND, STRANGER = "https://chat.example.org", "https://example.com"
KEY = {"Authorization": "Bearer secret"}
ASKED = {"model": "data", "prompt": "a", "max_tokens": 2, "user": "me"}
QUESTION = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders(tmp_path_factory.mktemp("origins"), "data")[0]["data"]


@pytest.fixture(scope="module")
def client(exported: Path) -> Iterator[TestClient]:
    """Yield a service with a key that two origins may use."""
    origins = (FRIEND, "http://localhost:5173")
    app = create_app(ServiceSettings(exported, api_key="secret", allow_origin=origins))

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError

    with TestClient(app, raise_server_exceptions=False) as made:
        yield made


def told(response: Any) -> dict[str, str]:
    """Return the headers by which an answer admits other origins."""
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


def test_a_browser_may_ask_without_the_key(client: TestClient) -> None:
    response = client.options("/v1/chat/completions", headers={"Origin": FRIEND, **QUESTION})
    assert (response.status_code, response.content) == (204, b"")
    found = told(response)
    assert found["access-control-allow-origin"] == FRIEND
    assert "POST" in found["access-control-allow-methods"]
    assert found["access-control-allow-headers"] == "authorization,content-type"
    assert "Origin" in response.headers["vary"]


@pytest.mark.quick
@pytest.mark.parametrize("streams", [False, True])
def test_answers_and_what_they_ignored_can_be_read(client: TestClient, streams: bool) -> None:
    response = client.post("/v1/completions", json={**ASKED, "stream": streams}, headers={"Origin": FRIEND, **KEY})
    assert response.status_code == 200
    assert told(response)["access-control-allow-origin"] == FRIEND
    assert "X-Ignored-Fields" in told(response)["access-control-expose-headers"]
    assert response.headers["x-ignored-fields"] == "user"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/models", {}, 401),
        ("GET", "/nowhere", KEY, 404),
        ("DELETE", "/v1/completions", KEY, 405),
        ("POST", "/v1/completions", KEY, 400),
        ("POST", "/v1/completions", {**KEY, "Content-Encoding": "br"}, 415),
        ("GET", "/broken", KEY, 500),
    ],
)
def test_so_can_errors(client: TestClient, method: str, path: str, headers: dict[str, str], status: int) -> None:
    response = client.request(method, path, headers={"Origin": FRIEND, **headers})
    assert response.status_code == status
    assert told(response)["access-control-allow-origin"] == FRIEND
    assert response.json()["error"]["code"] == status


def test_other_origins_get_no_header(client: TestClient) -> None:
    for origin in (STRANGER, "null", f"{FRIEND}.evil.org", FRIEND.upper()):
        question = client.options("/v1/completions", headers={"Origin": origin, **QUESTION, **KEY})
        assert (question.status_code, told(question)) == (405, {})
        answer = client.post("/v1/completions", json=ASKED, headers={"Origin": origin, **KEY})
        assert (answer.status_code, told(answer), answer.headers["vary"]) == (200, {}, "Origin")
    assert told(client.get("/v1/models", headers=KEY)) == {}


def test_any_origin_and_none(exported: Path) -> None:
    with TestClient(create_app(ServiceSettings(exported, allow_origin=("*",)))) as client:
        assert told(client.options("/v1/models", headers={"Origin": STRANGER, **QUESTION}))
        answer = client.get("/v1/models", headers={"Origin": STRANGER})
        assert (told(answer)["access-control-allow-origin"], "vary" in answer.headers) == ("*", False)
    with TestClient(create_app(ServiceSettings(exported))) as client:
        assert told(client.get("/v1/models", headers={"Origin": FRIEND})) == {}
        assert told(client.options("/v1/models", headers={"Origin": FRIEND, **QUESTION})) == {}


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://Example.org", "https://a b", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"allow_origin must be \* or an origin as browsers name it"):
        ServiceSettings(Path("onnx"), allow_origin=(FRIEND, origin))
