"""Clients of the service that a module runs: its fixture `service` gives the address and the app."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient


@pytest.fixture
def http(service: tuple[str, Any]) -> TestClient:
    """A client of the app, without a network."""
    return TestClient(service[1])


@pytest.fixture
def client(service: tuple[str, Any]) -> Iterator[openai.OpenAI]:
    """The official client, at the address."""
    with openai.OpenAI(base_url=f"{service[0]}v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
