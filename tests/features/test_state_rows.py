"""Rows of models that keep states: long prompts, single tokens and idle rows in one step, each as it is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gralora_fx import GraloraConfig, LoraConfig, rewrite, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine import session_decoders
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import part_length
from gralora_fx.serving import OrtModel, load
from tests.architectures.tiny_decoders import tiny_decoder

HYBRIDS: dict[str, dict[str, Any]] = {
    "Lfm2ForCausalLM": {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "max_position_embeddings": 256,
    },
    "Mamba2ForCausalLM": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1, "num_hidden_layers": 2},
    "Qwen3NextForCausalLM": {"max_position_embeddings": 256},
}
TARGETS = {"Lfm2ForCausalLM": ["in_proj", "q_proj", "w1"]}
NAMES = ("gralora", None, "lora")
COUNTS = ((6, 1, 0, 2), (1, 3, 5, 0), (1, 1, 1, 1), (0, 6, 1, 0), (1, 0, 1, 6))  # tokens of each row in each step


@pytest.fixture(scope="module", params=HYBRIDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    folder = tmp_path_factory.mktemp("states") / request.param
    source = tiny_decoder(request.param, eos_token_id=None, **HYBRIDS[request.param])
    targets = TARGETS.get(request.param, ["in_proj", "in_proj_qkvz", "out_proj", "q_proj"])
    traced = trace(source, task="text-generation-with-past")
    found = sorted({site.path for site in traced.sites if site.path.split(".")[-1] in targets})
    torch.manual_seed(5)
    config = GraloraConfig(r=4, gralora_k=2, target_modules=found, init_weights=False)
    adapted = rewrite(traced, config, adapter_name="gralora")
    adapted.add_adapter("lora", LoraConfig(r=2, target_modules=found[:2], init_lora_weights=False))
    adapted.set_adapter(["gralora", "lora"])
    export_onnx(adapted, folder, adapters="data", verify=False)
    return load(folder, threads=1)


def texts(generator: np.random.Generator) -> list[list[int]]:
    return [generator.integers(3, 90, sum(step[row] for step in COUNTS)).tolist() for row in range(4)]


def alone(model: OrtModel, adapter: str | None, text: list[int], parts: list[int]) -> list[Any]:
    """Compute what a row gives for the parts of a text, as the only row of a decoder."""
    decoder = model.decoder(rows=1, capacity=32, chunk=8)
    row, at, given = decoder.open(adapter), 0, []
    for part in parts:
        given.append(decoder.step({row: text[at : at + part]})[row].copy())
        at += part
    return given


@pytest.mark.parametrize("most_padded", [64, 0])
def test_rows_side_by_side_are_each_as_alone(
    model: OrtModel, most_padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one run, or with rows of several tokens apart; of rows that were closed and opened again before."""
    monkeypatch.setattr(session_decoders, "_MOST_PADDED", most_padded)
    decoder: Any = model.decoder(rows=4, capacity=32, chunk=8)
    for row in [decoder.open() for _ in range(4)]:
        decoder.step({row: [7, 8, 9]})
        decoder.close(row)
    adapters = [*NAMES, "gralora"]
    rows = [decoder.open(name) for name in adapters]
    text, at = texts(np.random.default_rng(2)), [0] * 4
    given: list[list[Any]] = [[] for _ in rows]
    for counts in COUNTS:
        before = [{name: array.copy() for name, array in decoder.cached(row).items()} for row in rows]
        read = {row: text[n][at[n] : at[n] + counts[n]] for n, row in enumerate(rows) if counts[n]}
        logits = decoder.step(read)
        for n, row in enumerate(rows):
            if counts[n]:
                given[n].append(logits[row].copy())
            else:
                now = decoder.cached(row)
                assert all(np.array_equal(now[name], array) for name, array in before[n].items())
            at[n] += counts[n]
    for n, adapter in enumerate(adapters):
        parts = [step[n] for step in COUNTS if step[n]]
        for own, single in zip(given[n], alone(model, adapter, text[n], parts), strict=True):
            assert np.allclose(own, single, rtol=1e-4, atol=1e-5)
            assert own.argmax() == single.argmax()


def test_a_row_begins_anew_while_others_go_on(model: OrtModel) -> None:
    numbers, decoder = np.random.default_rng(8), model.decoder(rows=2, capacity=32, chunk=8)
    going, other = decoder.open("gralora"), decoder.open("lora")
    text, before, after = (numbers.integers(3, 90, 8).tolist() for _ in range(3))
    given = [decoder.step({going: text[:6], other: before})[going].copy()]
    decoder.close(other)
    other = decoder.open("lora")
    logits = decoder.step({going: text[6:7], other: after[:5]})
    given.append(logits[going].copy())
    logits = decoder.step({going: text[7:], other: after[5:]})
    pairs = zip([*given, logits[going]], alone(model, "gralora", text, [6, 1, 1]), strict=True)
    for own, single in [*pairs, (logits[other], alone(model, "lora", after, [5, 3])[-1])]:
        assert np.allclose(own, single, rtol=1e-4, atol=1e-5)


def test_a_prompt_in_pieces_of_any_length_is_the_prompt_at_once(model: OrtModel) -> None:
    text = np.random.default_rng(3).integers(3, 90, 8).tolist()
    (whole,) = alone(model, "gralora", text, [8])
    for parts in ([1, 7], [3, 5], [1] * 8, [6, 1, 1]):
        assert np.allclose(alone(model, "gralora", text, parts)[-1], whole, rtol=1e-4, atol=1e-5)


def test_such_rows_are_not_set_back(model: OrtModel) -> None:
    decoder = model.decoder(rows=2, capacity=16)
    row = decoder.open()
    decoder.step({row: [4, 5, 6]})
    with pytest.raises(ServingError, match="cannot be set back: layers of the model keep states"):
        decoder.rewind(row, 1)
    with pytest.raises(ServingError, match="layers of the model keep states, which cannot be set back"):
        decoder.step({row: [7, 8]}, last={row: 2})
    decoder.rewind(row, 3)


def read(decoder: Decoder, row: int, prompt: list[int]) -> tuple[Any, int]:
    """Return the logits after a prompt, and how many of its tokens were taken over."""
    filled = at = decoder.fill(row, prompt)
    logits: Any = None
    while at < len(prompt):
        count = part_length(len(prompt) - at, decoder.chunk)
        logits = decoder.step({row: prompt[at : at + count]})[row].copy()
        at += count
    return logits, filled


def ask(decoder: Decoder, prompt: list[int], adapter: str | None, count: int = 1) -> tuple[list[Any], int]:
    """Return the logits after each token of an answer in a row of its own, and how many tokens were taken over."""
    row = decoder.open(adapter)
    logits, filled = read(decoder, row, prompt)
    given = [logits]
    while len(given) < count:
        given.append(decoder.step({row: [int(given[-1].argmax())]})[row].copy())
    decoder.close(row)
    return given, filled


def are_equal(found: list[Any], expected: list[Any]) -> bool:
    """Bit by bit."""
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_texts_go_on_from_snapshots(model: OrtModel) -> None:
    """From where a step ended, then from where the second prompt parts from the first."""
    numbers = np.random.default_rng(6)
    cold, decoder = (model.decoder(rows=1, capacity=250, chunk=16, prefix_cache=size) for size in (None, 2**24))
    shared = numbers.integers(3, 90, 120).tolist()
    for adapter in NAMES:
        for expected in (0, 96, 120, 120):
            prompt = shared + numbers.integers(3, 90, 21).tolist()
            given, filled = ask(decoder, prompt, adapter, 3)
            assert filled == expected
            assert are_equal(given, ask(cold, prompt, adapter, 3)[0])


def test_a_chat_reads_each_token_once(model: OrtModel) -> None:
    cold, decoder = (model.decoder(rows=1, capacity=250, chunk=16, prefix_cache=size) for size in (None, 2**24))
    text: list[int] = []
    for turn in range(10):
        said = len(text) - 1  # the last token of an answer is read with what follows
        text += np.random.default_rng(turn).integers(3, 90, 14).tolist()
        given, filled = ask(decoder, text, "gralora", 8)
        assert filled == max(said, 0)
        for one, other in zip(given, ask(cold, text, "gralora", 8)[0], strict=True):
            assert np.allclose(one, other, rtol=1e-4, atol=1e-5)
            assert one.argmax() == other.argmax()
        text += [int(logits.argmax()) for logits in given]
    assert decoder.prefix_cache is not None
    assert decoder.prefix_cache.evictions == 0


def test_rows_that_are_open_share_what_the_first_reads(model: OrtModel) -> None:
    numbers = np.random.default_rng(7)
    cold, decoder = (model.decoder(rows=3, capacity=250, chunk=64, prefix_cache=size) for size in (None, 2**24))
    first = numbers.integers(3, 90, 61).tolist()
    other = first[:35] + numbers.integers(3, 90, 9).tolist()
    rows = [decoder.open("lora", salt="a") for _ in range(3)]
    prompts = [first, first, other]
    assert [decoder.fill(row, prompt) for row, prompt in zip(rows, prompts, strict=True)] == [0, 0, 0]
    given = [read(decoder, row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    assert [filled for _, filled in given] == [0, 58, 34]
    for (logits, _), prompt in zip(given, prompts, strict=True):
        assert are_equal([logits], ask(cold, prompt, "lora")[0])


def test_what_a_step_left_that_failed_is_not_shared(model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = model.decoder(rows=1, capacity=64, chunk=16, prefix_cache=2**24)
    row = decoder.open()
    decoder.step({row: [5, 6, 7]})
    monkeypatch.setattr(decoder, "_steps", None)
    with pytest.raises(ServingError, match="ONNX Runtime fails on rows of"):
        decoder.step({row: [8, 9]})
    decoder.close(row)
    assert len(decoder.prefix_cache) == decoder.prefix_cache.snapshots == 0


def test_where_numbers_are_rounded_prompts_alone_are_shared(tmp_path: Path) -> None:
    source = tiny_decoder("Mamba2ForCausalLM", eos_token_id=None, **HYBRIDS["Mamba2ForCausalLM"])
    export_onnx(trace(source, task="text-generation-with-past"), tmp_path / "onnx", quantize="int4", verify=False)
    model = load(tmp_path / "onnx", threads=1)
    cold, decoder = (model.decoder(rows=1, capacity=250, chunk=16, prefix_cache=size) for size in (None, 2**24))
    text, said = np.random.default_rng(1).integers(3, 90, 20).tolist(), 0
    for _ in range(4):
        given, filled = ask(decoder, text, None, 6)
        assert filled == said
        assert are_equal(given, ask(cold, text, None, 6)[0])
        said = len(text)
        text += [*(int(logits.argmax()) for logits in given), 5, 6, 7, 8]


def test_a_bound_below_one_snapshot_is_refused(model: OrtModel) -> None:
    with pytest.raises(ServingError, match="has no room for a block of 64 tokens and the states after it, which takes"):
        model.decoder(prefix_cache=2000)


def test_generation_is_that_of_the_model(model: OrtModel) -> None:
    prompts = [[5, 9, 12, 40, 3], [8, 8], [30]]
    together = model.generate(prompts, max_new_tokens=6, adapter=["gralora", None, "lora"])
    for prompt, name, tokens in zip(prompts, NAMES, together, strict=True):
        assert model.generate(prompt, max_new_tokens=6, adapter=name) == tokens


def test_a_call_takes_and_gives_states(model: OrtModel) -> None:
    ids = np.random.default_rng(4).integers(3, 90, (2, 9))
    whole = model(input_ids=ids)
    first = model(input_ids=ids[:, :8])
    past = {name.replace("present", "past_key_values"): value for name, value in first.items() if name != "logits"}
    states = [name for name in past if "conv" in name or "recurrent" in name]
    second = model(input_ids=ids[:, 8:], **past)
    assert np.allclose(second.logits, whole.logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ServingError, match=rf"input '{states[0]}' has shape \[.*\], but the model takes"):
        model(input_ids=ids[:, 8:], **{**past, states[0]: past[states[0]][..., :1]})
    with pytest.raises(ServingError, match="has batch_size 1, but"):
        model(input_ids=ids[:, 8:], **{**past, states[0]: past[states[0]][:1]})
    with pytest.raises(ServingError, match=f"input '{states[0]}' is missing"):
        model(input_ids=ids[:, 8:], **{name: value for name, value in past.items() if name != states[0]})
    with pytest.raises(ServingError, match=r"unknown input past_key_values\.9\.conv"):  # another model's cache
        model(input_ids=ids[:, 8:], **past, **{"past_key_values.9.conv": past[states[0]]})


def test_a_cache_of_another_dtype_or_with_values_that_are_not_finite_is_refused_by_name(model: OrtModel) -> None:
    ids = np.random.default_rng(4).integers(3, 90, (2, 9))
    first = model(input_ids=ids[:, :8])
    past = {name.replace("present", "past_key_values"): value for name, value in first.items() if name != "logits"}
    for name in {name.rpartition(".")[2]: name for name in past}.values():  # conv, recurrent, key, value
        for given in (past[name].astype(np.float16), torch.from_numpy(past[name]).double()):
            message = f"input '{name}' is float(16|64), but the model keeps its cache in float32; give what a call"
            with pytest.raises(ServingError, match=message):
                model(input_ids=ids[:, 8:], **{**past, name: given})
        for value in (np.nan, np.inf):
            given = past[name].copy()
            given.flat[-1] = value
            with pytest.raises(ServingError, match=f"input '{name}' holds a value that is not finite"):
                model(input_ids=ids[:, 8:], **{**past, name: given})


def test_a_row_of_a_call_begins_anew_with_states_of_zeros(model: OrtModel) -> None:
    ids = np.random.default_rng(9).integers(3, 90, (2, 7))
    first = model(input_ids=ids[:, :6])
    given = {name.replace("present", "past_key_values"): value for name, value in first.items() if name != "logits"}
    for name in given:
        if "conv" in name or "recurrent" in name:
            given[name][1] = 0
    given["attention_mask"] = np.array([[1] * 7, [0] * 6 + [1]])
    if "position_ids" in {value.name for value in model.session.get_inputs()}:
        given["position_ids"] = np.array([[6], [0]])
    second = model(input_ids=ids[:, 6:], **given)
    for row, text in enumerate((ids[:1], ids[1:, 6:])):
        assert np.allclose(second.logits[row, -1], model(input_ids=text).logits[0, -1], rtol=1e-4, atol=1e-5)
