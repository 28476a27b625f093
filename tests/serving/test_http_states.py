"""A service over a hybrid of attention and states: 16 requests at once, 8 adapters, each answered as it is alone."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prefix_interleavings import HYBRID_ADAPTERS, Interleavings, hybrid_files, made_hybrid
from running_service import post, running
from served_exports import chat_tokenizer

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ServingError
from gralora_fx.service.app import create_app
from gralora_fx.serving import load

ADAPTERS = HYBRID_ADAPTERS
PROMPTS = [[5 + (7 * n + 3 * place) % 80 for place in range(1 + 5 * n % 23)] for n in range(16)]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_hybrid(tmp_path_factory.mktemp("hybrid"))[0]


def test_each_answer_is_that_of_its_own_single_run(export: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load(export, threads=1), chat_tokenizer()
    names = [[None, *ADAPTERS][n % 9] for n in range(16)]
    pairs = zip(PROMPTS, names, strict=True)
    answers = [model.generate(prompt, max_new_tokens=8, adapter=name) for prompt, name in pairs]
    alone = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    assert len(set(alone)) > 4
    with caplog.at_level(logging.INFO), running(ServiceSettings(export, max_batch=6, chunk=5)) as (url, _):

        def answer(number: int) -> str:
            body = {"model": names[number] or "onnx", "prompt": PROMPTS[number], "max_tokens": 8, "temperature": 0}
            text: str = post(f"{url}v1/completions", body)["choices"][0]["text"]
            return text

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(answer, range(16))) == alone
    assert "prefix cache: at most 512.0 MiB" in caplog.text
    assert "no speculation: layers of the model keep states, which cannot be set back" in caplog.text


def test_prompts_that_begin_alike_read_their_beginning_once(export: Path) -> None:
    """The second of two prompts finds a snapshot that a step left in the first, the third one where the two part."""
    settings = ServiceSettings(export, max_batch=6, chunk=32, prefix_cache="64MiB")
    shared = [5 + (3 * place) % 80 for place in range(90)]
    with running(settings) as (url, _):

        def complete(prompt: list[int], **fields: Any) -> tuple[list[str], int]:
            body = {"model": "adapter1", "prompt": prompt, "max_tokens": 6, "temperature": 0, **fields}
            answer = post(f"{url}v1/completions", body)
            return (
                [choice["text"] for choice in answer["choices"]],
                answer["usage"]["prompt_tokens_details"]["cached_tokens"],
            )

        found = [complete([*shared, 7 + number, *range(30, 40)]) for number in range(3)]
        assert [cached for _, cached in found] == [0, 64, 90]
        for salt, expected in (("a", 0), ("a", 64)):
            assert complete([*shared, 7, 8], cache_salt=salt)[1] == expected
        assert complete([*shared, 7, 8], model="adapter2")[1] == 0
        several, cached = complete(shared[::-1], n=4)
        assert (len(set(several)), cached) == (1, 0)
        with urlopen(f"{url}metrics") as response:
            measured = response.read().decode()
    assert re.search(r"^gralora_fx_prefix_cache_snapshots 1\d\.0$", measured, re.MULTILINE)
    read = int(float(re.findall(r'^gralora_fx_tokens_total{kind="prompt"} (\S+)$', measured, re.MULTILINE)[0]))
    # a prompt each, without what was found; of four answers the others read two tokens of theirs
    assert read == 3 * 101 - 64 - 90 + 2 * 92 - 64 + 92 + 90 + 3 * 2
    model = load(export, threads=1)
    for number, (texts, _) in enumerate(found):
        answer = model.generate([*shared, 7 + number, *range(30, 40)], max_new_tokens=6, adapter="adapter1")
        assert texts == [chat_tokenizer().decode(answer, skip_special_tokens=True)]


def test_interleavings_with_snapshots_are_each_as_alone(export: Path) -> None:
    """Adapters are replaced meanwhile, requests given up, and the bound is too small for all snapshots."""
    found = Interleavings(export, hybrid_files(export), seed=4, limit=100_000)
    for _ in range(12):
        found.run()
    found.check(answers=30)


def test_what_such_a_model_cannot_do_is_refused_where_it_is_asked_for(export: Path) -> None:
    with pytest.raises(ServingError, match="speculative_tokens has no effect: layers of the model keep states"):
        create_app(ServiceSettings(export, speculative_tokens=4))
