"""Activated adapters share the base's prefix cache: a chain of requests reads every token of its context once."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_once import made_once
from served_exports import CACHED, LLAMA, chat_tokenizer
from starlette.testclient import TestClient
from traces import fresh_trace

from gralora_fx import LoraConfig, rewrite, trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import part_length
from gralora_fx.service.app import create_app
from gralora_fx.serving import load
from tests.architectures.tiny_decoders import tiny_decoder

ADAPTERS = {"judge": [90, 91], "guide": [92, 93]}
CONTEXT = [3 + number % 80 for number in range(100)]
LONG: dict[str, Any] = {**LLAMA, "max_position_embeddings": 256}


def make_export(folder: Path, **options: Any) -> None:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
    traced = fresh_trace("llama", task=CACHED, **LONG)
    model = None
    for name, tokens in ADAPTERS.items():
        config = LoraConfig(**fields, alora_invocation_tokens=tokens)
        if model is None:
            model = rewrite(traced, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.add_adapter("plain", LoraConfig(**fields))
    model.set_adapter([*ADAPTERS, "plain"])
    export_onnx(model, folder / "export", adapters="data", verify=False, tokenizer=chat_tokenizer(), **options)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    shutil.copytree(made_once("activated-long", make_export), tmp_path, dirs_exist_ok=True)
    return tmp_path / "export"


def answer(decoder: Decoder, prompt: list[int], adapter: str | None, count: int = 6) -> tuple[list[int], int, Any]:
    """Return a row's greedy answer, how many tokens of its prompt it took over, and the logits after the prompt."""
    start = decoder.start_of(adapter, prompt)
    row = decoder.open(adapter, start=start)
    filled = at = decoder.fill(row, prompt)
    while at < len(prompt):
        part = part_length(len(prompt) - at, decoder.chunk, (start or 0) - at)
        logits = first = decoder.step({row: prompt[at : at + part]})[row].copy()
        at += part
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = decoder.step({row: tokens[-1:]})[row].copy()
    decoder.close(row)
    return tokens, filled, first


def test_a_chain_of_requests_reads_each_token_once_and_answers_as_without_a_cache(export: Path) -> None:
    decoders = [load(export).decoder(rows=2, capacity=200, chunk=32, **more) for more in ({"prefix_cache": 10**7}, {})]
    found: list[list[tuple[list[int], int, Any]]] = [[], []]
    for decoder, answers in zip(decoders, found, strict=True):
        first = answer(decoder, CONTEXT, None)
        text = CONTEXT + first[0]
        answers += [first, *(answer(decoder, text + tokens, name) for name, tokens in ADAPTERS.items())]
        answers += [answer(decoder, text + tokens, name) for name, tokens in ADAPTERS.items()]  # each again
        answers.append(answer(decoder, [*text, 90, 91], None))  # the same tokens, of the base
        answers.append(answer(decoder, [*text, 90, 91], "plain"))
    for one, other in zip(*found, strict=True):
        assert one[0] == other[0]
        assert np.allclose(one[2], other[2], atol=1e-5)
    read = len(CONTEXT) + 6  # all of the base's text, the last token of which was read when it was answered
    assert [filled for _, filled, _ in found[0]] == [0, read, read, read, read, read, 0]
    assert {filled for _, filled, _ in found[1]} == {0}


def test_adapters_find_what_another_has_read_of_the_base_and_nothing_that_it_read_itself(export: Path) -> None:
    decoder = load(export).decoder(rows=2, capacity=200, chunk=64, prefix_cache=10**7)
    assert answer(decoder, [*CONTEXT, 90, 91, 5, 6, 7], "judge")[1] == 0
    assert answer(decoder, [*CONTEXT, 90, 91, 5, 6, 8, 9], "judge")[1] == len(CONTEXT) + 4
    assert answer(decoder, [*CONTEXT, 92, 93], "guide")[1] == len(CONTEXT)
    assert answer(decoder, [*CONTEXT, 90, 91, 5, 6, 7], None)[1] == len(CONTEXT)


def test_an_adapter_that_is_unloaded_takes_its_tokens_along_and_no_others(export: Path) -> None:
    model = load(export)
    decoder = model.decoder(rows=2, capacity=200, chunk=64, prefix_cache=10**7)
    cache = decoder.prefix_cache
    assert cache is not None
    answer(decoder, CONTEXT, None)
    before = len(cache), cache.size
    row = decoder.open("guide", start=0)
    decoder.step({row: CONTEXT[:50]})
    answer(decoder, [*CONTEXT, *range(20, 40), 90, 91, *range(40, 60)], "judge", 1)
    assert len(cache) > before[0]
    model.unload_adapter("judge")
    kept = len(cache), cache.size
    model.unload_adapter("guide")
    decoder.close(row)  # it was open when its adapter went
    assert (len(cache), cache.size) == kept
    assert answer(decoder, CONTEXT, None)[1] == len(CONTEXT) - 2
    assert answer(decoder, [*CONTEXT, *range(20, 40), 90, 91], "judge")[1] >= len(CONTEXT)  # a new version
    blocks = list(cache._roots.values())
    for block in blocks:
        blocks += block.below.values()
    assert len(cache) == len(blocks) - len(cache._roots)
    assert cache.size == sum(block.size for block in blocks if block.above is not None)


@pytest.mark.parametrize("chunk", [64, 7])
def test_where_numbers_are_rounded_every_logit_is_the_cold_one_bit_for_bit(tmp_path: Path, chunk: int) -> None:
    made = made_once("activated-int4", partial(make_export, quantize="int4"))
    model = load(made / "export", threads=1)
    warm, cold = (model.decoder(rows=2, capacity=200, chunk=chunk, **more) for more in ({"prefix_cache": 10**7}, {}))
    prompts = [
        (CONTEXT, None),
        ([*CONTEXT, 90, 91], "judge"),
        ([*CONTEXT, 90, 91, 5, 6], "judge"),
        ([*CONTEXT[:41], 92, 93, 7, 8], "guide"),
        ([*CONTEXT[:40], 7, 92, 93, 7, 8], "guide"),  # all but one token before the invocation are known
        ([*CONTEXT, 7, 90, 91, 9], "judge"),
    ]
    filled = []
    for prompt, name in prompts:
        found, expected = (answer(decoder, prompt, name) for decoder in (warm, cold))
        assert np.array_equal(found[2], expected[2])
        assert found[0] == expected[0]
        filled.append(found[1])
    assert filled == [0, 100, 102, 41, 39, 99]


def test_layers_that_keep_states_go_on_from_where_the_base_was(tmp_path: Path) -> None:
    traced = trace(tiny_decoder("Qwen3NextForCausalLM", vocab_size=101, max_position_embeddings=256), task=CACHED)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "out_proj"]}
    config = LoraConfig(**fields, alora_invocation_tokens=[90, 91], init_lora_weights=False)
    model = rewrite(traced, config, adapter_name="judge")
    export_onnx(model, tmp_path / "export", adapters="data", verify=False)
    opened = load(tmp_path / "export", threads=1)
    ids = [*CONTEXT, 90, 91, 5, 6]
    answers = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    assert opened.generate(ids, adapter="judge", max_new_tokens=6) == answers
    decoder = opened.decoder(rows=2, capacity=200, chunk=64, prefix_cache=10**7)
    assert answer(decoder, ids, "judge")[:2] == (answers, 0)
    again = answer(decoder, [*ids, 7, 8], "judge")
    assert again[1] == len(ids)
    assert answer(decoder, [*CONTEXT, 9, 10, 11], None)[1] == len(CONTEXT)  # a snapshot of the base's states


@pytest.fixture
def client(export: Path) -> Iterator[TestClient]:
    with TestClient(create_app(ServiceSettings(export, max_batch=4))) as client:
        yield client


def complete(client: TestClient, model: str, prompt: Any, **more: Any) -> Any:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 6, **more}
    return client.post("/v1/completions", json=body)


def test_requests_name_the_adapter_and_usage_says_what_the_base_has_read(client: TestClient, export: Path) -> None:
    first = complete(client, "export", CONTEXT).json()
    cached = [first["usage"]["prompt_tokens_details"]["cached_tokens"]]
    reference = load(export)
    for name, tokens in itertools.chain(ADAPTERS.items(), ADAPTERS.items()):
        reply = complete(client, name, CONTEXT + tokens).json()
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
        ids = reference.generate(CONTEXT + tokens, adapter=name, max_new_tokens=6)
        assert reply["choices"][0]["text"] == reference.tokenizer.decode(ids)
    assert cached == [0, *[len(CONTEXT)] * 4]


def test_a_prompt_without_the_invocation_is_refused_with_its_text(client: TestClient) -> None:
    for stream in (False, True):
        reply = complete(client, "judge", CONTEXT, stream=stream)
        assert reply.status_code == 400
        error = reply.json()["error"]
        text = chat_tokenizer().decode(ADAPTERS["judge"])
        assert error["message"].startswith(
            f"adapter 'judge' acts from its tokens [90, 91], {text!r} on, and the prompt"
        )
        assert error["param"] == "prompt"
    assert complete(client, "plain", CONTEXT).status_code == 200


def test_an_adapter_that_a_request_loads_is_named_as_the_request_does(export: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for path in (export / "adapters").glob("judge.*"):
        shutil.copy(path, root / path.name.replace("judge", "late"))
    with TestClient(create_app(ServiceSettings(export, adapter_root=root))) as client:
        reply = complete(client, "late", CONTEXT)
        assert reply.json()["error"]["message"].startswith("adapter 'late' acts from its tokens [90, 91], ")
