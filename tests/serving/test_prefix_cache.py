"""The prefix cache: it finds what was read, stays within its bound, and no answer differs from a cold one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from prefix_interleavings import CONTEXT, SIZES, Interleavings, made
from prometheus_client.parser import text_string_to_metric_families
from running_service import running
from same_rows import same_rows
from served_exports import CACHED, chat_tokenizer
from starlette.testclient import TestClient
from tiny_models import tiny_model

from gralora_fx import GraloraModel, trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ConfigError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import part_length
from gralora_fx.run.engine.prefix_cache import PrefixCache, PrefixCacheError
from gralora_fx.service.app import create_app
from gralora_fx.serving import OrtModel, load

Made = tuple[Path, list[list[Path]]]
LONG = "You are a helpful assistant, who answers in one sentence and never tells what the time is. "  # 91 tokens


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("prefixes"))


class Text:
    """A text as a row would have it: keys and values that say all tokens up to each position."""

    def __init__(self, tokens: list[int]) -> None:
        sums = np.array([hash(tuple(tokens[: end + 1])) % 2**20 for end in range(len(tokens))], np.float32)
        key = np.broadcast_to(sums[None, :, None], (2, len(tokens), 3))
        self.tokens, self.row = tokens, [key, (key[:1, :, :1] / 2**20).astype(np.float16)]

    @property
    def states(self) -> list[NDArray[Any]]:
        """States that say all tokens."""
        return [self.row[0][0, -1].repeat(400), self.row[1][:, -1:]]


class Version:
    """A version of an adapter."""


@pytest.mark.quick
@pytest.mark.parametrize("has_states", [False, True])
def test_what_is_found_is_what_was_stored_within_the_bound(*, has_states: bool) -> None:
    numbers = random.Random(0)
    like = Text([1]).row
    cache = PrefixCache(*((800_000, like, Text([1]).states) if has_states else (60_000, like)))
    versions: list[Any] = [None, Version(), Version()]
    texts = [[numbers.randrange(3) for _ in range(numbers.randrange(1, 200))] for _ in range(8)]
    kept: dict[Any, list[list[int]]] = {}
    found = 0
    for _ in range(1000):
        text = numbers.choice(texts)[: numbers.randrange(1, 200)] + [numbers.randrange(3)] * numbers.randrange(3)
        root = numbers.choice(versions), numbers.choice([None, "salt"])
        if numbers.random() < 0.02 and root[0] is not None:
            cache.drop(root[0])
            cache.store(root, text, Text(text).row, Text(text).states)  # of a row that was open
            versions[versions.index(root[0])] = Version()
            continue
        start = numbers.randrange(0, len(text))
        row = [np.full((t.shape[0], 256, t.shape[2]), -1, t.dtype) for t in like]
        states = [np.full_like(array, -1) for array in Text(text).states]
        count = cache.fill(root, text, start, row, states)
        if has_states:
            expected = Text(text[:count]).states if count > start else [np.full_like(each, -1) for each in states]
            assert all(np.array_equal(own, known) for own, known in zip(states, expected, strict=True))
            assert count == start or cache.known(root, text) >= count
        common = max((_common(text, other) for other in kept.get(root, [])), default=0)
        assert start <= count <= max(common, start)
        for own, known in zip(row, Text(text).row, strict=True):
            assert np.array_equal(own[:, start:count], known[:, start:count])
            assert bool((own[:, count:] == -1).all())
            assert bool((own[:, :start] == -1).all())
        found += count > start
        cache.store(root, text, Text(text).row, Text(text).states, is_chance=numbers.random() < 0.3)
        kept.setdefault(root, []).append(text)
        assert 0 <= cache.size <= cache.limit
    assert found > 100
    assert cache.evictions > 100
    for version in versions[1:]:
        cache.drop(version)
    assert {root[0] for root in cache._roots} <= {None}
    blocks = [block for top in cache._roots.values() for block in top.below.values()]
    for block in blocks:
        blocks += block.below.values()  # while they are walked through
    assert (len(cache), cache.size) == (len(blocks), sum(block.size for block in blocks))
    if has_states:
        assert cache.snapshots == sum(block.states is not None for block in blocks) > 0
        assert all(block.below or block.states is not None for block in blocks)


def _common(one: list[int], other: list[int]) -> int:
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def test_a_bound_below_one_block_is_refused() -> None:
    with pytest.raises(PrefixCacheError, match=r"prefix_cache=5000 has no room for a block of 64 tokens, which takes"):
        PrefixCache(5000, Text([1]).row)


@pytest.mark.parametrize("most", [3, 4, 16, 64])
def test_no_token_of_a_prompt_is_read_alone(most: int) -> None:
    for length in range(2, 5 * most):
        parts, left = [], length
        while left:
            parts.append(part_length(left, most))
            left -= parts[-1]
        assert all(1 < part <= most and (part % 16 != 1 or most < 16) for part in parts)
    assert part_length(1, most) == 1


def test_answers_are_those_of_each_prompt_alone(export: Made) -> None:
    """A short one of what `python -m benchmarks prefix-cache` runs a thousand times."""
    found = Interleavings(*export, seed=3)
    for _ in range(20):
        found.run()
    found.check(answers=50)


def read(decoder: Decoder, row: int, prompt: list[int], chunk: int) -> tuple[Any, int]:
    """Return the logits after a prompt, and how many of its tokens were taken over."""
    filled = at = decoder.fill(row, prompt)
    logits: Any = None
    while at < len(prompt):
        count = part_length(len(prompt) - at, chunk)
        logits = decoder.step({row: prompt[at : at + count]})[row].copy()
        at += count
    return logits, filled


def chat(decoder: Decoder, turns: int, chunk: int) -> tuple[list[Any], list[int]]:
    """Return the logits after each token of a chat's answers, and how many tokens of each prompt were taken over."""
    numbers, text, found, filled = random.Random(1), [5, 6], [], []
    for _ in range(turns):
        text += [numbers.randrange(3, 90) for _ in range(18)]
        row = decoder.open()
        logits, count = read(decoder, row, text, chunk)
        filled.append(count)
        for _ in range(6):
            found.append(logits)
            text.append(int(logits.argmax()))
            logits = decoder.step({row: text[-1:]})[row].copy()
        decoder.close(row)
    return found, filled


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OrtModel]:
    """Return exports of one model with numbers of other kinds."""
    folder, traced = tmp_path_factory.mktemp("kinds"), trace(tiny_model("llama", **SIZES), task=CACHED)
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("llama", **SIZES), config).save_pretrained(str(folder / "adapter"))
    window = trace(tiny_model("mistral", **SIZES, sliding_window=8), task=CACHED)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "fp32": (traced, {}),
        "fp16": (traced, {"precision": "fp16"}),
        "int4": (traced, {"quantize": "int4"}),
        "int8-dynamic": (traced, {"quantize": "int8-dynamic"}),
        "window": (window, {"precision": "fp16"}),
        "dora": (GraloraModel.from_pretrained(traced, folder / "adapter"), {"quantize": "int8"}),
    }
    for name, (model, options) in kinds.items():
        export_onnx(model, folder / name, verify=False, tokenizer=chat_tokenizer(), **options)
    return {name: load(folder / name, threads=1) for name in kinds}


@pytest.mark.parametrize("kind", ["fp16", "int4", "int8-dynamic", "window", "dora"])
def test_where_numbers_are_rounded_every_logit_is_the_cold_one_bit_for_bit(
    merged: dict[str, OrtModel], kind: str
) -> None:
    model = merged[kind]
    cold, _ = chat(model.decoder(rows=1, chunk=32), 6, 32)
    for chunk in (32, 7):
        found, filled = chat(model.decoder(rows=1, chunk=chunk, prefix_cache=10**6), 6, chunk)
        assert all(np.array_equal(one, other) for one, other in zip(found, cold, strict=True))
        assert filled == [0, *(20 + 24 * turn for turn in range(5))]  # the prompts of the turns before


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int4", "int8-dynamic"])
def test_the_pieces_of_a_prompt_do_not_change_a_bit(merged: dict[str, OrtModel], kind: str) -> None:
    model, numbers = merged[kind], random.Random(2)
    decoder = model.decoder(rows=2, chunk=16)
    prompt = [numbers.randrange(3, 90) for _ in range(decoder.alone)]

    def logits(most: int, length: int) -> Any:
        row = decoder.open()
        found, _ = read(decoder, row, prompt[:length], most)
        cached = [array[:, :length].copy() for array in decoder.cached(row).values()]  # type: ignore[attr-defined]
        decoder.close(row)
        return [found, *cached]

    for length in (17, 33, 50, 65, decoder.alone - 2):
        once = logits(decoder.alone, length)
        for most in (16, 40):
            assert all(np.array_equal(one, other) for one, other in zip(logits(most, length), once, strict=True))


def test_in_float32_answers_are_taken_over_too(merged: dict[str, OrtModel]) -> None:
    model = merged["fp32"]
    cold, _ = chat(model.decoder(rows=1, chunk=32), 6, 32)
    decoder = model.decoder(rows=1, chunk=32, prefix_cache=10**6)
    found, filled = chat(decoder, 6, 32)
    assert all(np.allclose(one, other, atol=1e-5) for one, other in zip(found, cold, strict=True))
    assert [int(one.argmax()) for one in found] == [int(other.argmax()) for other in cold]
    assert filled == [0, *(24 * turn + 2 for turn in range(1, 6))]


def test_a_step_of_one_token_is_the_same_bits_beside_a_prompt(merged: dict[str, OrtModel]) -> None:
    decoder = merged["int4"].decoder(rows=2, chunk=16)
    alone = decoder.open()
    decoder.step({alone: [5, 6, 7]})
    first = decoder.step({alone: [8]})[alone].copy()
    decoder.close(alone)
    one, other = decoder.open(), decoder.open()
    decoder.step({one: [5, 6, 7]})
    assert same_rows(decoder.step({one: [8], other: [9] * 12})[one], first, quantize="int4")


def test_decoders_that_share_nothing_say_why(merged: dict[str, OrtModel]) -> None:
    with pytest.raises(PrefixCacheError, match="since steps read 2 tokens; give a larger chunk"):
        merged["int4"].decoder(chunk=2, prefix_cache=10**6)
    with pytest.warns(UserWarning, match="takes no node"):
        elsewhere = load(merged["fp32"].directory, ["AzureExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(PrefixCacheError, match="since rows of the export run one after the other"):
        elsewhere.decoder(prefix_cache=10**6)
    decoder = elsewhere.decoder(rows=1)
    assert decoder.fill(decoder.open(), [5, 6, 7]) == 0


@pytest.fixture(scope="module")
def service(export: Made) -> Iterator[tuple[str, TestClient]]:
    """Yield the service's address, and a client."""
    path, files = export
    adapters = {"one": files[0][0], "two": files[1][0]}
    with running(ServiceSettings(path, adapters=adapters, adapter_root=path.parent, max_batch=4)) as (url, _):
        yield url, openai.OpenAI(base_url=f"{url}v1", api_key="none")  # type: ignore[misc]


def cached(usage: Any) -> int:
    return int(usage.prompt_tokens_details.cached_tokens)


def ask(client: Any, prompt: Any, model: str = "one", **options: Any) -> Any:
    return client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=4, **options)


def test_usage_says_what_was_taken_over(service: tuple[str, Any]) -> None:
    client = service[1]
    cold = ask(client, f"{LONG}Hello")
    warm = ask(client, f"{LONG}Hello")
    other = ask(client, f"{LONG}Goodbye")
    assert cold.choices[0].text == warm.choices[0].text
    assert [cached(found.usage) for found in (cold, warm, other)] == [0, len(LONG) + 3, len(LONG)]
    assert cached(ask(client, f"{LONG}Hello", "two").usage) == cached(ask(client, f"{LONG}Hello", "onnx").usage) == 0
    chunks = ask(client, f"{LONG}Hello", stream=True, stream_options={"include_usage": True})
    assert cached([chunk.usage for chunk in chunks][-1]) == len(LONG) + 3
    messages = [{"role": "user", "content": LONG}]
    turns = [client.chat.completions.create(model="one", messages=messages, max_tokens=4) for _ in range(2)]
    assert [cached(turn.usage) for turn in turns] == [0, turns[0].usage.prompt_tokens - 2]


def test_salts_keep_tenants_apart(service: tuple[str, Any]) -> None:
    client, prompt = service[1], LONG[10:]
    for salt, expected in ((None, 0), ("a", 0), ("b", 0), ("a", len(prompt) - 2), (None, len(prompt) - 2)):
        assert cached(ask(client, prompt, extra_body={"cache_salt": salt}).usage) == expected
    for wrong in (5, "", ["a"], "a" * 257):
        with pytest.raises(openai.BadRequestError, match="cache_salt"):
            ask(client, prompt, extra_body={"cache_salt": wrong})


def test_several_answers_read_their_prompt_once(service: tuple[str, Any]) -> None:
    url, client = service
    before = metrics(url)
    found = ask(client, LONG[20:] * 2, n=4)
    assert len({choice.text for choice in found.choices}) == 1
    assert cached(found.usage) == 0  # the first has read it
    read = {name: value - before.get(name, 0) for name, value in metrics(url).items()}
    prompt = found.usage.prompt_tokens
    assert read["vllm:prefix_cache_queries_total"] == read["gralora_fx_prefix_cache_queries_total"] == 4 * prompt
    assert read["vllm:prefix_cache_hits_total"] == read["gralora_fx_prefix_cache_hits_total"] >= 3 * 128
    assert read["gralora_fx_tokens_total prompt"] == 4 * prompt - read["vllm:prefix_cache_hits_total"]
    assert metrics(url)["gralora_fx_prefix_cache_bytes"] <= metrics(url)["gralora_fx_prefix_cache_limit_bytes"] == 2**29


def metrics(url: str) -> dict[str, float]:
    """Return the service's metrics without labels, or by the kind of tokens."""
    with urlopen(f"{url}metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def test_a_version_that_is_replaced_takes_its_blocks_along(export: Made) -> None:
    path, files = export
    app = create_app(ServiceSettings(path, adapters={"one": files[0][0]}, adapter_root=path.parent))
    with TestClient(app) as client:

        def complete() -> tuple[str, int]:
            body = {"model": "one", "prompt": LONG, "temperature": 0, "max_tokens": 4}
            answer = client.post("/v1/completions", json=body).json()
            return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        engine = app.state.engine
        cache = engine.queue.prefix_cache
        first = complete()
        assert (complete()[1], len(cache)) == (len(LONG) - 2, 2)
        body = {"lora_name": "one", "lora_path": f"adapters/{files[0][1].name}", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        engine.models.change(int).result(20)  # after what was to be freed
        assert (len(cache), cache.size) == (0, 0)
        second = complete()
        assert second[1] == 0
        assert second[0] != first[0]


def test_scores_of_a_prompt_and_forms_of_answers(export: Made, tmp_path: Path) -> None:
    traced = trace(tiny_model("llama", **SIZES), task=CACHED)
    export_onnx(traced, tmp_path / "all", logits="all", verify=False, tokenizer=chat_tokenizer())
    answers = []
    for size in ("none", None):
        with TestClient(create_app(ServiceSettings(tmp_path / "all", prefix_cache=size))) as client:
            body = {"model": "all", "prompt": LONG, "temperature": 0, "max_tokens": 8}
            scored = {**body, "echo": True, "logprobs": 1, "max_tokens": 1}
            formed = {**body, "structured_outputs": {"choice": ["yes, it is", "no, it is not"]}}
            found = [
                client.post("/v1/completions", json=each).json() for each in (body, scored, formed, formed, scored)
            ]
            counts = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in found]
            assert counts == ([0] * 5 if size else [0, 0, len(LONG) - 2, len(LONG) - 2, 0])
            answers.append([each["choices"][0]["text"] for each in found])
            scores = found[-1]["choices"][0]["logprobs"]["token_logprobs"]
            assert len(scores) == len(LONG) + 1
            names = {
                name for family in text_string_to_metric_families(client.get("/metrics").text) for name in [family.name]
            }
            assert ("vllm:prefix_cache_hits" in names) == (size is None)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("size", ["much", "-1", "", "12 XB", "1e9", "0.2"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(ConfigError, match=r"prefix_cache must be a number of bytes, such as 512MiB or 2GB, or none"):
        ServiceSettings(Path("onnx"), prefix_cache=size)


def test_a_cache_that_cannot_be_is_an_error_where_it_is_asked_for(export: Made) -> None:
    with pytest.raises(ServingError, match="prefix_cache=1000 has no room for a block"):
        create_app(ServiceSettings(export[0], prefix_cache="1KB"))
    app = create_app(ServiceSettings(export[0], prefix_cache="0"))
    assert app.state.engine.queue.prefix_cache is None
    app.state.engine.models.close()
    assert ServiceSettings(export[0], prefix_cache="1.5 GB").prefix_bytes == 1_500_000_000
    assert CONTEXT > 64
