"""The engine of encoder-decoders: each row's tokens are those of `generate`, whatever its neighbours do."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from damaged_exports import forget_digests
from numpy.typing import NDArray
from tiny_models import WIDE
from tiny_tokenizers import tiny_tokenizer
from traces import fresh
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, LoraConfig, rewrite
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.generate.answer_options import AnswerOptions, Sampling
from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.run.generate.generation_rules import GenerationRules
from gralora_fx.run.generate.token_choice import TokenChooser
from gralora_fx.run.model import OrtModel
from gralora_fx.service.scheduling.continuous import ContinuousScheduler
from gralora_fx.serving import load

pytestmark = pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone

NAMES = ("t5", "bart", "marian", "whisper")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
RULES: dict[str, dict[str, Any]] = {
    "t5": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "forced_bos_token_id": 7},
    "bart": {
        "forced_bos_token_id": 5,
        "forced_eos_token_id": 2,
        "no_repeat_ngram_size": 3,
        "min_length": 6,
        "begin_suppress_tokens": [9, 10],
        "exponential_decay_length_penalty": [3, 1.2],
    },
    "marian": {
        "bad_words_ids": [[0], [11, 12]],
        "encoder_repetition_penalty": 1.4,
        "encoder_no_repeat_ngram_size": 2,
        "sequence_bias": [[[8], 1.5]],
        "min_new_tokens": 4,
    },
    "whisper": {"suppress_tokens": [3, 4, 5, 17], "begin_suppress_tokens": [2, 40], "remove_invalid_values": True},
}


class Pair:
    """A model of transformers and its export."""

    def __init__(self, name: str, source: PreTrainedModel, path: Path) -> None:
        self.name, self.source, self.path = name, source, path
        self.model: OrtModel = load(path)

    def rows(self, rows: int = 3, chunk: int = 8) -> Decoder:
        return self.model.decoder(rows=rows, capacity=32, chunk=chunk)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return functools.cache(lambda name: exported(name, tmp_path_factory.mktemp(name) / "onnx"))


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest, pair_of: Callable[[str], Pair]) -> Pair:
    return pair_of(request.param)


def exported(name: str, path: Path) -> Pair:
    task = ("automatic-speech-recognition" if name == "whisper" else "text2text-generation") + "-with-past"
    layers = {"t5": {"num_layers": 1}, "marian": {}}.get(name, {"encoder_layers": 1, "decoder_layers": 1})
    sizes = {**SPECIAL, **WIDE[name], **layers}
    model, traced = fresh(name, task=task, **sizes)
    for field, value in RULES[name].items():
        setattr(model.generation_config, field, value)
    export_onnx(traced, path, verify=False)
    model.generation_config.save_pretrained(path)
    return Pair(name, model, path)


def sources(name: str) -> list[Source]:
    """Three sources of unequal lengths, or of speech."""
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return [{"input_features": torch.randn(1, 8, 40, generator=generator).numpy()} for _ in range(3)]
    rows = [torch.randint(3, 100, (1, length), generator=generator).numpy() for length in (9, 4, 6)]
    return [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in rows]


def expected(pair: Pair, source: Source, new_tokens: int = 10, **options: Any) -> list[int]:
    tensors = {key: torch.from_numpy(value) for key, value in source.items()}
    tokens = pair.source.generate(**tensors, max_new_tokens=new_tokens, num_beams=1, **options)[0].tolist()
    return tokens[1:] if pair.name != "whisper" else tokens


def rules_of(pair: Pair) -> GenerationRules:
    return GenerationRules.of(pair.path, pair.model.config, pair.model.limits.ends)


def chooser(pair: Pair, source: Source, sampling: Sampling, new_tokens: int) -> TokenChooser:
    rules = rules_of(pair)
    read = source["input_ids"][0].tolist() if "input_ids" in source else None
    return TokenChooser(
        sampling, [rules.start], rules.ends, rules.processors(sampling, [rules.start], new_tokens, read)
    )


def answer(engine: Decoder, row: int, choose: TokenChooser, first: Sequence[int], new_tokens: int) -> list[int]:
    tokens, given = [], list(first)
    for _ in range(new_tokens):
        tokens.append(choose(engine.step({row: given})[row]).token)
        given = tokens[-1:]
        if tokens[-1] in engine.limits.ends:
            break
    return tokens


def without_end(tokens: Sequence[int]) -> list[int]:
    """Tokens up to the end token, which Whisper's `generate` leaves out."""
    return list(tokens[: tokens.index(2)]) if 2 in tokens else list(tokens)


@pytest.mark.quick
def test_greedy_tokens_of_one_row(pair_of: Callable[[str], Pair]) -> None:
    pair, source = pair_of("bart"), sources("bart")[0]
    engine = pair.rows()
    found = answer(engine, engine.open(None, source), chooser(pair, source, Sampling(), 8), [1], 8)
    assert found == expected(pair, source, 8)[: len(found)]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4, "top_k": 1, "temperature": 1.3}])
def test_tokens_are_those_of_generate_by_the_models_own_rules(pair: Pair, options: dict[str, Any]) -> None:
    engine, sampling = pair.rows(), Sampling(**options)
    theirs = {name: value for name, value in options.items() if name != "seed"}
    for source in sources(pair.name):
        torch.manual_seed(options.get("seed", 0))
        want = expected(pair, source, **theirs)
        row = engine.open(None, source)
        found = answer(engine, row, chooser(pair, source, sampling, 10), [1], 10)
        engine.close(row)
        assert without_end(found) == without_end(want)
        assert found


def test_rows_that_join_and_leave_do_not_change_one_another(pair: Pair) -> None:
    alone = []
    for source in sources(pair.name):
        engine = pair.rows(1)
        row = engine.open(None, source)
        alone.append([engine.step({row: ids})[row] for ids in ([1, 7], [9], [12, 13], [5])])
    engine, parts = pair.rows(3), ([1, 7], [9], [12, 13], [5])
    rows = [engine.open(None, source) for source in sources(pair.name)]
    assert not engine.free
    first = engine.step({rows[0]: parts[0]})
    together = engine.step({rows[0]: parts[1], rows[1]: parts[0]})
    later = engine.step({rows[0]: parts[2], rows[1]: parts[1], rows[2]: parts[0]})
    engine.close(rows[1])
    last = engine.step({rows[0]: parts[3], rows[2]: parts[1]})
    for row, index, found in (
        (0, 0, first),
        (0, 1, together),
        (1, 0, together),
        (0, 2, later),
        (1, 1, later),
        (2, 0, later),
        (0, 3, last),
        (2, 1, last),
    ):
        assert np.array_equal(found[rows[row]], alone[row][index])
    assert engine.free == 1


def test_a_source_is_encoded_once(pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = load(pair_of("bart").path), sources("bart")[0]
    engine, session = model.decoder(rows=2), model.session
    runs = []
    encoder = session.encoder

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(encoder, name)

        def run_with_ort_values(self, *args: Any) -> Any:
            runs.append(1)
            return encoder.run_with_ort_values(*args)

    monkeypatch.setattr(session, "encoder", Counting())
    first, second = engine.open(None, source), engine.open(None, {name: array.copy() for name, array in source.items()})
    logits = engine.step({first: [1], second: [1]})
    assert np.array_equal(logits[first], logits[second])
    assert len(runs) == 1
    engine.close(first)
    engine.open(None, sources("bart")[1])
    assert len(runs) == 2
    for more in range(1, 9):  # eight are remembered
        model.decoder().open(None, {**source, "input_ids": source["input_ids"] - 3 + more})
    assert len(runs) == 9
    model.decoder().open(None, sources("bart")[1])
    assert len(runs) == 10


@pytest.mark.parametrize(
    "config", [GraloraConfig(r=4, gralora_k=2, init_weights=False), LoraConfig(r=4, init_lora_weights=False)]
)
@pytest.mark.parametrize("mode", ["data", "inputs"])
def test_a_row_runs_with_its_adapter(tmp_path: Path, mode: str, config: Any) -> None:
    _, traced = fresh("t5", task="text2text-generation-with-past", **SPECIAL, **WIDE["t5"], num_layers=1)
    adapted = rewrite(traced, config, adapter_name="tuned")
    export_onnx(adapted, tmp_path / "onnx", adapters=mode, verify=False)
    model = load(tmp_path / "onnx")
    engine = model.decoder(rows=3)
    source = sources("t5")[0]
    rows = {name: engine.open(name, source) for name in ("tuned", None)}
    found = engine.step({row: [1, 5] for row in rows.values()})
    tensors = {key: torch.from_numpy(value) for key, value in source.items()}
    with torch.no_grad():
        wanted = adapted(**tensors, decoder_input_ids=torch.tensor([[1, 5]])).logits[0, -1].numpy()
        with adapted.disable_adapter():
            base = adapted(**tensors, decoder_input_ids=torch.tensor([[1, 5]])).logits[0, -1].numpy()
    assert_close(found[rows["tuned"]], wanted)
    assert_close(found[rows[None]], base)
    assert np.abs(wanted - base).max() > 1e-2


def assert_close(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_half_precision_decodes_too(tmp_path: Path) -> None:
    model, traced = fresh("bart", task="text2text-generation-with-past", **SPECIAL, encoder_layers=1, decoder_layers=1)
    export_onnx(traced, tmp_path / "onnx", precision="fp16", verify=False)
    engine = load(tmp_path / "onnx").decoder()
    source = sources("bart")[0]
    row = engine.open(None, source)
    engine.step({row: [1]})
    found = engine.step({row: [5]})[row]
    tensors = {key: torch.from_numpy(value) for key, value in source.items()}
    with torch.no_grad():
        wanted = model(**tensors, decoder_input_ids=torch.tensor([[1, 5]])).logits[0, -1].numpy()
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda engine, source: engine.open(None, None), "there is no source; give one"),
        (lambda engine, source: [engine.open(None, source) for _ in range(4)], "all 3 rows are in use"),
        (lambda engine, source: engine.open("none", source), "takes no adapters|no adapter"),
        (lambda engine, source: engine.step({5: [1]}), "row 5 is not open"),
        (lambda engine, source: engine.step({engine.open(None, source): []}), "given 0 tokens"),
        (
            lambda engine, source: engine.step({engine.open(None, source): [1] * 33}),
            "given 33 tokens, and reads 1 to 32",
        ),
        (lambda engine, source: engine.step({engine.open(None, source): [101]}), "token 101, outside the vocabulary"),
        (lambda engine, source: engine.close(0), "row 0 is not open"),
    ],
)
def test_what_rows_cannot_do_is_said(pair_of: Callable[[str], Pair], act: Any, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        act(pair_of("bart").rows(), sources("bart")[0])


def test_a_row_has_the_decoders_positions(pair_of: Callable[[str], Pair]) -> None:
    engine = pair_of("bart").model.decoder(capacity=6)
    row = engine.open(None, sources("bart")[0])
    engine.step({row: [1, 2, 3, 4]})
    with pytest.raises(ServingError, match="has read 4 tokens and is given 3, more than its capacity of 6"):
        engine.step({row: [5, 6, 7]})
    assert engine.step({row: [5, 6]})[row].shape == (101,)


def test_beams_are_said_not_to_be_searched(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"num_beams": 4, "decoder_start_token_id": 1}')
    with pytest.warns(UserWarning, match="asks for num_beams=4, which is not supported"):
        GenerationRules.of(tmp_path, {}, frozenset({2}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "names no decoder_start_token_id"),
        ('{"decoder_start_token_id": "x"}', "names no decoder_start_token_id"),
        ('{"decoder_start_token_id": 1, "bad_words_ids": 7}', "cannot be followed"),
        ('{"decoder_start_token_id": 1, "suppress_tokens": "all"}', "cannot be followed"),
        ("[1]", "not a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_rules_that_cannot_be_followed_are_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ServingError, match=message):
        GenerationRules.of(tmp_path, {}, frozenset({2}))


def test_an_encoder_runs_between_two_steps_of_the_rows_that_decode(pair_of: Callable[[str], Pair]) -> None:
    """A scheduler opens a row for one source at a time, so that those that decode do not wait for all of them."""
    pair = pair_of("bart")
    decoder, done = pair.model.decoder(rows=3, capacity=32), threading.Event()
    events: list[str] = []
    opened, stepped = decoder.open, decoder.step
    decoder.open = lambda *given, **more: (events.append("open"), opened(*given, **more))[1]  # type: ignore[method-assign]
    decoder.step = lambda tokens, *_: (events.append(f"step {len(tokens)}"), stepped(tokens))[1]  # type: ignore[method-assign]
    inputs = pair.model.encoder_inputs
    assert inputs is not None
    ids = [source["input_ids"][0].tolist() for source in sources("bart")]
    pieces: list[list[int]] = [[], [], []]

    def sink(index: int) -> Any:
        def told(piece: Any) -> None:
            pieces[index].append(piece.tokens)
            if all(part and part[-1] == 5 for part in pieces):
                done.set()

        return told

    requests = [
        TextRequest(
            (1,),
            5,
            AnswerOptions(Sampling(eos_token_id=[100], min_new_tokens=5, logprobs=0)),
            source=inputs.of_ids(one),
        )
        for one in ids
    ]
    scheduler = ContinuousScheduler(decoder, tiny_tokenizer(), MagicMock(), max_queue=4)
    scheduler.submit([(request, sink(index)) for index, request in enumerate(requests)])
    scheduler.start()
    assert done.wait(30)
    scheduler.stop()
    assert events[:6] == ["open", "step 1", "open", "step 2", "open", "step 3"]
    assert events.count("open") == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a text", "a source must be a dict of the encoder's inputs, but got 'a text'"),
        ({}, "there is no source"),
        ({"attention_mask": np.ones((1, 2), np.int64)}, "the source lacks input_ids"),
        (
            {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1], [1, 1]]},
            "input_ids has 2 rows; give one for each",
        ),
        ({"input_ids": [["a"]], "attention_mask": [[1]]}, "input 'input_ids' is"),
    ],
)
def test_bad_sources(pair_of: Callable[[str], Pair], source: Any, message: str) -> None:
    engine = pair_of("t5").rows(2)
    with pytest.raises(ServingError, match=message):
        engine.open(source=source)
    assert engine.free == 2


def test_rules_that_read_the_source_are_tried_when_they_are_read(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    shutil.copytree(pair_of("t5").path, tmp_path / "onnx")
    path = tmp_path / "onnx" / "generation_config.json"
    fields = json.loads(path.read_text())
    forget_digests(tmp_path / "onnx")
    path.write_text(json.dumps({**fields, "encoder_no_repeat_ngram_size": -1}))
    with pytest.raises(ServingError, match=r"cannot be followed .*; repair it, or export the model again"):
        load(tmp_path / "onnx").generate([5, 6], max_new_tokens=2)
    path.write_text(
        json.dumps({**fields, "encoder_repetition_penalty": 2, "exponential_decay_length_penalty": [0, 1.5]})
    )
    answer = load(tmp_path / "onnx").generate([5, 6], max_new_tokens=4, eos_token_id=[])
    assert len(answer) == 4
