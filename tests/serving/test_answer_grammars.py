"""Answers in a form: schemas that are followed or refused, rows beside each other, and options within a grammar."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from peft_oracle import peft_model
from served_exports import CACHED, adapted, chat_tokenizer
from tiny_models import tiny_model
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.features.structured_outputs.answer_form import AnswerForm
from gralora_fx.features.structured_outputs.grammars import Grammars
from gralora_fx.run.engine.limits import DecoderLimits
from gralora_fx.run.generate.answer_options import Sampling
from gralora_fx.run.generate.request_errors import DeadEndError, WrongFieldError
from gralora_fx.run.generate.token_choice import TokenChooser, distribution
from gralora_fx.serving import Decoder, load

SIZES: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 1024}
WORD = {"type": "string", "maxLength": 6}
PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "email": WORD},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_BRANCHES = {"left": {"$ref": "#/$defs/tree"}, "value": {"enum": [1, 2]}}
TREE = {
    "$defs": {"tree": {"type": "object", "properties": _BRANCHES, "additionalProperties": False}},
    "$ref": "#/$defs/tree",
}


def _union(*tags: str | None) -> dict[str, Any]:
    """Return a schema as pydantic writes one of a discriminated union, some of whose tags may be missing."""
    kinds: list[Any] = [{"type": "string"} if tag is None else {"const": tag, "default": tag} for tag in tags]
    defs = {
        f"d{n}": {"type": "object", "properties": {"kind": kind, "x": {"enum": [n]}}, "additionalProperties": False}
        for n, kind in enumerate(kinds)
    }
    references = [{"$ref": f"#/$defs/{name}"} for name in defs]
    return {"$defs": defs, "discriminator": {"propertyName": "kind"}, "oneOf": references}


SCHEMAS: dict[str, Any] = {
    "union": _union("a", "b", "c"),
    "notes": {
        "enum": ["ab", "c"],
        "type": "string",
        "format": "binary",
        "example": "ab",
        "propertyNames": {"type": "string"},
        "uniqueItems": False,
        "contentEncoding": "base64",
        "contentSchema": {},
    },
    "int32": {"type": "integer", "format": "int32", "minimum": 0, "maximum": 9},
    "person": PERSON,
    "list": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3},
    "enum": {"enum": ["red", 1, None, True, {"a": [1.5]}]},
    "const": {"const": {"a": ["b", {"c": None}]}},
    "any": {"anyOf": [{"type": "integer", "maximum": 3, "minimum": 0}, {"type": "boolean"}, WORD]},
    "all": {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 40}]},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-\\d{3}$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "number": {"type": "number", "minimum": -2, "maximum": 2, "multipleOf": 0.25},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    "map": {
        "type": "object",
        "patternProperties": {"^[a-c]{1,2}$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "tree": TREE,
    "either": {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
    "one": {"oneOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
    "draft 4": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"a": WORD},
        "$ref": "#/definitions/a",
    },
}
ENDLESS = ("tree", "map")  # whose answers may be of any length
REFUSED: dict[str, tuple[Any, str]] = {
    "unknown keyword": ({"requried": ["a"]}, "the keyword 'requried' of the schema is not supported; leave it out"),
    "unsupported keyword": ({"type": "array", "uniqueItems": True}, "the keyword 'uniqueItems'"),
    "keyword within": ({"properties": {"a": {"anyOf": [{"not": {}}]}}}, "the keyword 'not'"),
    "options of llguidance": ({"x-guidance": {"lenient": True}, "type": "object"}, "the keyword 'x-guidance'"),
    "remote": (
        {"$ref": "https://example.org/a.json"},
        "refers to 'https://example.org/a.json'; only what is within it",
    ),
    "a file": ({"items": {"$ref": "file:///etc/passwd"}}, "only what is within it"),
    "nothing": ({"$ref": "#/$defs/a"}, "there is no such part of it"),
    "itself": ({"$ref": "#"}, "refers to itself without end"),
    "two in a ring": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "refers to itself without end",
    ),
    "a member of itself": ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "without end"),
    "an item of itself": ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "without end"),
    "every choice of itself": ({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}, "without end"),
    "large": ({"description": "x" * 10_000_000}, "it is larger than 64 KiB"),
    "deep": (json.loads("[" * 400 + "]" * 400), "a schema is an object of keywords"),
    "nested": (json.loads('{"items":' * 300 + "{}" + "}" * 300), "cannot be compiled"),
    "type": ({"type": "text"}, "it cannot be compiled (Invalid type: text)"),
    "types": ({"type": [{}]}, "it cannot be compiled"),
    "no format": ({"type": "string", "format": 3}, "cannot be compiled"),
    "names": ({"type": "object", "propertyNames": {"maxLength": 2}}, "the keyword 'propertyNames'"),
    "properties": ({"properties": {f"a{n}": {} for n in range(1001)}}, "more than 1000 properties"),
    "a discriminator alone": ({"type": "object", "discriminator": {}}, "the keyword 'discriminator'"),
    "tags that are the same": (_union("a", "a"), "a discriminator needs another const as 'kind' in each choice"),
    "a tag of any value": (_union("a", None), "a discriminator needs another const as 'kind' in each choice"),
    "nothing meets it": ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater than maximum (2)"),
    "pattern": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "no JSON": ("{", "the schema is not JSON"),
    "no schema": ([1], "a schema is an object of keywords, but got [1]"),
    "no schema within": ({"properties": {"a": 3}}, "but got 3 within it"),
    "a control character": ({"enum": ["a", {"b": "\x01"}]}, "enum of the schema has a control character"),
    "not a number": ({"const": float("nan")}, "cannot be written as JSON"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with exports of a tiny Llama, and adapters of two more methods for them."""
    made = tmp_path_factory.mktemp("grammars")
    model, _ = adapted("llama", made, CACHED, **SIZES)
    export_onnx(model, made / "data", adapters="data", verify=False, tokenizer=chat_tokenizer())
    for name, fields in {"lora": {}, "rslora": {"use_rslora": True}}.items():
        options = {"r": 3, "lora_alpha": 48, "target_modules": "all-linear", **fields}
        peft_model(tiny_model("llama", **SIZES), 5, method="LORA", **options).save_pretrained(made / name)
        export_adapter(made / name, made / "data", name)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder / "data")


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(chat_tokenizer())


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_of_a_random_model_meets_its_schema(model: Any, name: str) -> None:
    schema = SCHEMAS[name]
    options: Any = {"max_new_tokens": 900, "do_sample": True, "top_k": 0, "temperature": 1.5, "json_schema": schema}
    for seed in range(6):
        answers = model.generate(["a", "bc", "d"], adapter=["small", None, "lora"], seed=seed, **options)
        for answer in (*answers, model.generate("e", json_schema=json.dumps(schema), max_new_tokens=900)):
            if name in ENDLESS and len(answer.encode()) == 900:
                continue  # it is cut
            value = json.loads(answer)
            jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
            assert answer == json.dumps(value, ensure_ascii=False) or any(letter in answer for letter in "\\.e")


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_followed_is_refused_by_name(grammars: Grammars, name: str) -> None:
    schema, message = REFUSED[name]
    with pytest.raises(WrongFieldError, match=f"^here: .*{re.escape(message)}") as error:
        grammars.of({"here": ("json", schema)})
    assert error.value.field == "here"


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "", "no token of the model can begin such an answer"),
        ("regex", r"[^\x00-\U0010FFFF]", "no token continues the answer's grammar"),
        ("regex", "a" * 70_000, "larger than 64 KiB"),
        ("regex", "\ud800", "a lone surrogate"),
        ("regex", 3, "a text is needed, but got 3"),
        ("choice", [], "there are 0 choices; give 1 to 1024"),
        ("choice", [""], "no token of the model can begin such an answer"),
        ("choice", "ab", "a list of texts is needed, but got 'ab'"),
        ("grammar", "start: other", 'unknown name: "other"'),
        ("grammar", "start: start", "no token continues"),
        ("grammar", 'start: "x" start', "Too many items"),
        ("grammar", "start: <|unknown|>", "unknown special token"),
        ("grammar", "words", "cannot be compiled"),
        ("grammar", 'start: "a"' + "\na: start" * 2000, "more than 2000 rules"),
        ("grammar", 'start: "%json" // %json\ns: %json {"maxLenght": 2}', "the keyword 'maxLenght' of the schema"),
        (
            "grammar",
            'start: "a" s\ns: %lark {\n start: %json {"$ref": "http://a"}\n}',
            "the schema refers to 'http://a'",
        ),
        ("grammar", 'start: %json {"$ref": "#"}', "refers to itself without end"),
        ("grammar", "start: %json {", "the schema after %json is not JSON"),
        ("grammar", ' {"grammars": [{"json_schema": {"maxLenght": 2}}]}', "it is JSON; give rules"),
        ("grammar", "start[temperature=0.5]: /a/", "a rule's temperature is not supported"),
        ("regex", "a{1000000}", "too many expressions"),
        ("regex", r"\ba", "lookarounds not supported"),
        ("grammar", r"root ::= [\d]", "Invalid escape sequence"),
    ],
)
def test_so_is_any_other_form(grammars: Grammars, kind: Any, value: Any, message: str) -> None:
    with pytest.raises(WrongFieldError, match=re.escape(message)):
        grammars.of({"here": (kind, value)})


def test_expressions_choices_and_grammars(model: Any) -> None:
    options: Any = {"max_new_tokens": 40, "do_sample": True, "top_k": 0}
    for seed in range(8):
        expression = r"[A-F]{2}-\d{2,3}(kg)?"
        assert re.fullmatch(expression, model.generate("a", regex=expression, seed=seed, **options))
        choices = ["yes", "yes, but", 'no "/" \\ or é']
        assert model.generate("a", choice=choices, seed=seed, **options) in choices
        assert re.fullmatch("x+y", model.generate("a", grammar='start: "x"~1..9 "y"', seed=seed, **options))
        schema = '{"x-guidance": {"item_separator": ","}, "enum": [[1, 2], "%json {"]} /[{]/'
        assert {*model.generate("a", grammar="start[max_tokens=9]: /x*/", seed=seed, **options)} <= {"x"}
        answer = model.generate("a", grammar=f'start: "a: " %json {schema}', seed=seed, **options)
        assert answer in ("a: [1,2]{", 'a: "%json {"{')
        assert re.fullmatch("(ab){1,9}c", model.generate("a", grammar='root ::= ("ab"){1,9} "c"', seed=seed, **options))


def test_an_answer_that_is_cut_is_the_beginning_of_one(model: Any) -> None:
    assert model.generate("a", choice=["abcdefghij"], max_new_tokens=4) == "abcd"
    assert model.generate("a", choice=["abcdefghij"], max_new_tokens=40, stop="gh") == "abcdef"


def test_neighbours_in_a_step_have_the_tokens_that_they_have_alone(model: Any) -> None:
    """Rows of every adapter, each with a grammar of its own or none, stepped together and alone."""
    adapters = [None, "small", "wide", "lora", "rslora"] * 2
    forms = [("json", PERSON), None, ("regex", "[a-z]{3,30}"), None, ("choice", ["a long text", "another"])] * 2
    compiled = [None if form is None else model.constraints.compiled(AnswerForm.of(*form)) for form in forms]  # type: ignore[arg-type]
    prompts = [[5 + row, 9, 40] for row in range(len(adapters))]

    def tokens_of(rows: list[int]) -> dict[int, list[int]]:
        decoder = model.decoder(rows=len(rows), capacity=64, chunk=8)
        numbers = {row: decoder.open(adapters[row]) for row in rows}
        choosers, left, found = {}, {}, {row: list[int]() for row in rows}
        for row in rows:
            grammar = None if compiled[row] is None else compiled[row].begin(frozenset([2]), 40)
            sampling = Sampling(do_sample=True, top_k=0, seed=row)
            choosers[row] = TokenChooser(sampling, prompts[row], frozenset([2]), (), grammar)
            left[row] = prompts[row]
        while left:
            logits = decoder.step({numbers[row]: tokens[:8] for row, tokens in left.items()})
            for row in list(left):
                left[row] = left[row][8:]
                if not left[row]:
                    choice = choosers[row](logits[numbers[row]])
                    found[row] += choice.tokens
                    left[row] = list(choice.tokens)
                    if choice.completes or 2 in choice.tokens or len(found[row]) > 20:
                        del left[row]
        return found

    together = tokens_of(list(range(len(adapters))))
    assert together == {row: tokens_of([row])[row] for row in range(len(adapters))}
    assert len({tuple(tokens) for tokens in together.values()}) > 6


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"top_k": 0, "top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_k": 50, "top_p": 0.9}, [TopKLogitsWarper(50), TopPLogitsWarper(0.9)]),
        ({"top_k": 0, "min_p": 0.2, "temperature": 1.7}, [TemperatureLogitsWarper(1.7), MinPLogitsWarper(0.2)]),
    ],
)
def test_a_draw_has_the_distribution_of_transformers_warpers_over_all_tokens(
    model: Any, options: dict[str, Any], warpers: list[Any]
) -> None:
    decoder = model.decoder(rows=1, capacity=8)
    width = len(decoder.step({decoder.open(): [5]})[0])
    compiled = model.constraints.compiled(AnswerForm.of("regex", "[a-m]{30}"))
    ours, theirs = (compiled.begin(frozenset([2]), 40) for _ in range(2))
    sampling = Sampling(do_sample=True, seed=11, **options)
    chooser, numbers = TokenChooser(sampling, [5], frozenset([2]), (), ours), np.random.default_rng(0)
    for _ in range(20):
        logits = numbers.standard_normal(width).astype(np.float32) * 3
        scores = torch.from_numpy(np.where(theirs.allowed(width), logits, np.float32(-np.inf)))[None]
        expected = LogitsProcessorList(warpers)(torch.tensor([[5]]), scores).softmax(-1)[0].numpy()
        tokens, shares = distribution(scores[0].numpy(), sampling)
        assert np.array_equal(tokens, expected.nonzero()[0])
        assert np.allclose(shares, expected[tokens], rtol=1e-5)
        token = chooser(logits).token
        assert expected[token] > 0
        theirs.take(token)


def test_forced_tokens_are_read_in_one_step_and_are_those_of_single_steps(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = Decoder.step

    def counted(decoder: Decoder, tokens: Any, *more: Any) -> Any:
        steps.append(max(map(len, tokens.values())))
        return step(decoder, tokens, *more)

    monkeypatch.setattr(Decoder, "step", counted)
    schema = {"type": "object", "properties": {"quite_a_long_name": WORD}, "required": ["quite_a_long_name"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]
    drawn: Any = {"do_sample": True, "seed": 3, "max_new_tokens": 60, "json_schema": schema}
    answer = model.generate("a", **drawn)
    few = len(steps)
    assert max(steps) > 15
    scored = model.generate("a", logprobs=0, **drawn)
    assert scored.content == answer
    assert len(scored.scores) == len(answer.encode()) > few
    assert all(np.isfinite(score.logprob) for score in scored.scores)
    assert "".join(model.generate("a", stream=True, **drawn)) == answer


def test_options_choose_within_the_grammar(model: Any) -> None:
    digit = {str(n): chat_tokenizer().convert_tokens_to_ids(str(n)) for n in range(10)}
    answer = model.generate("a", regex=r"\d{12}", logit_bias={digit["7"]: 50.0}, max_new_tokens=20)
    assert answer == "7" * 12
    banned = dict.fromkeys(digit.values(), -1000.0)
    assert re.fullmatch(r"\d{4}", model.generate("a", regex=r"\d{4}", logit_bias=banned, max_new_tokens=20))
    assert len(set(model.generate("a", regex=r"\d{8}", frequency_penalty=2.0, presence_penalty=2.0))) > 4
    assert len(model.generate("a", regex="b{1,60}", min_new_tokens=30, max_new_tokens=40)) >= 30
    assert model.generate("a", regex="b{1,9}", eos_token_id=[], max_new_tokens=40) == "b" * 9
    for expression in ("x[012]{60}", "x1{6}"):  # a letter that ends an answer ends it wherever it may come
        answer = model.generate(
            "a", regex=expression, eos_token_id=digit["1"], max_new_tokens=70, do_sample=True, seed=1
        )
        assert re.fullmatch("x[02]*", answer)
        assert len(answer) < 60


def test_several_forms_are_one_too_many(model: Any) -> None:
    with pytest.raises(WrongFieldError, match=r"^regex: an answer has one form, and json_schema is given too"):
        model.generate("a", json_schema={}, regex="a")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    model, _ = adapted("llama", tmp_path, CACHED, **SIZES)
    export_onnx(model, tmp_path / "bare", verify=False)
    with pytest.raises(WrongFieldError, match=r"^regex: a grammar needs a tokenizer, and the export holds none"):
        load(tmp_path / "bare").generate([3, 4], regex="a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(WrongFieldError, match=r"needs llguidance .*: pip install 'gralora-fx\[serve\]'"):
        Grammars(chat_tokenizer()).of({"here": ("regex", "a")})


def test_a_tokenizer_of_words_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?")), eos_token="?"
    )
    with pytest.raises(ServingError, match="this model's tokenizer does not support structured outputs"):
        Grammars(words).compiled(AnswerForm.of("regex", "a"))


def test_rules_within_rules_are_compiled_in_a_stack_that_holds_them() -> None:
    """In a process of its own, which a stack that is too small ends."""
    code = """
import llguidance
from tiny_tokenizers import tiny_tokenizer
from gralora_fx.features.structured_outputs import answer_form
from gralora_fx.features.structured_outputs.grammars import Grammars
from gralora_fx.run.generate.request_errors import WrongFieldError
answer_form._MOST_RULES = 10_000
rules = "start: a0\\n" + "".join(f'a{i}: a{i + 1} "a"\\n' for i in range(3500)) + 'a3500: "b"\\n'
terminals = rules.replace("a0", "A0").replace("a1", "A1")
for grammar in (rules, "start: " + "(" * 20_000 + '"a"' + ")" * 20_000):
    try:
        print(Grammars(tiny_tokenizer()).of({"here": ("grammar", grammar)}).begin(frozenset(), 3).forced[0] > 0)
    except WrongFieldError as error:
        print("deep" in str(error))
"""
    paths = os.pathsep.join(str(Path(__file__).parents[level]) for level in (1, 2))
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert (found.returncode, found.stdout.split()) == (0, ["True", "True"]), found.stderr


def test_a_row_that_is_too_complex_spoils_no_other_request(grammars: Grammars) -> None:
    given: Any = {"here": ("regex", "([ab]*a[ab]{900})+")}
    letters = chat_tokenizer().convert_tokens_to_ids(["a", "b"])

    def written(most: int) -> None:
        row = grammars.of(given).begin(frozenset(), 20_000)  # type: ignore[union-attr]
        draws = np.random.default_rng(0).integers(0, 2, most)
        for draw in draws:
            row.take(letters[draw])

    with pytest.raises(DeadEndError, match="too many"):
        written(20_000)
    written(100)


def test_a_model_may_have_fewer_tokens_than_its_tokenizer() -> None:
    tokenizer = chat_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["hello"])
    own, cut = Grammars(tokenizer), Grammars(tokenizer, DecoderLimits(size, 100, frozenset([2])))
    forced = {"here": ("choice", ["x: hello"])}
    assert own.of(forced).begin(frozenset([2]), 9).forced[-1] == size  # type: ignore[arg-type, union-attr]
    with pytest.raises(DeadEndError, match="the model has no token for what comes next"):
        cut.of(forced).begin(frozenset([2]), 9)  # type: ignore[arg-type, union-attr]
    free = AnswerForm.of("regex", "[a-z]{5}")
    for grammars, is_there in ((own, True), (cut, False)):
        allowed = grammars.compiled(free).begin(frozenset([2]), 9).allowed(size + 3)
        assert bool(allowed[size]) is is_there
        assert allowed[:size].sum() == 26
        assert not allowed[size + 1 :].any()


def test_a_tokenizer_without_an_end_takes_those_of_the_model() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ServingError, match="neither the model nor its tokenizer has one; set eos_token"):
        Grammars(tokenizer).compiled(AnswerForm.of("regex", "a"))
    limits = DecoderLimits(len(tokenizer), 100, frozenset([2]))
    row = Grammars(tokenizer, limits).compiled(AnswerForm.of("regex", "[ab]?c?")).begin(frozenset([2]), 9)
    assert row.allowed(len(tokenizer)).nonzero()[0].tolist()[0] == 2
    assert not row.allowed(len(tokenizer))[0]
