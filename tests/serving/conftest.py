"""Clients of the service that a module runs: its fixture `service` gives the address and the app."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerFast

from gralora_fx.core.loading.text_tokenizer import TextTokenizer


@pytest.fixture
def http(service: tuple[str, Any]) -> TestClient:
    """Return a client of the app, without a network."""
    return TestClient(service[1])


@pytest.fixture
def client(service: tuple[str, Any]) -> Iterator[openai.OpenAI]:
    """Yield the official client, at the address."""
    with openai.OpenAI(base_url=f"{service[0]}v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the characters that tokenizers are given."""
    sizes: list[int] = []
    for kind in (TextTokenizer, PreTrainedTokenizerFast):

        def counted(self: Any, text: Any = None, pair: Any = None, own: Any = kind.__call__, **options: Any) -> Any:
            sizes.extend(
                len(each) for given in (text, pair) for each in ([given] if isinstance(given, str) else given or ())
            )
            return own(self, text, pair, **options)

        monkeypatch.setattr(kind, "__call__", counted)
    return sizes
