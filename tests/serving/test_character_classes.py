"""Classes of characters in forms of answers: what they let in matches in every dialect of expressions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gralora_fx.features.structured_outputs.answer_form import AnswerForm
from gralora_fx.features.structured_outputs.grammars import Grammars
from gralora_fx.features.structured_outputs.json_schema import portable

CLASSES = [rf"\{letter}" for letter in "dDwWsS"]
EXPRESSIONS = [
    *CLASSES,
    *(f"[{one}_]" for one in CLASSES),
    *(f"[^{one}]" for one in CLASSES),
    ".",
    r"[^\W\d]",
    r"[.\s]",
]
EVERY = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node is needed, whose expressions are ECMA 262's")


@cache
def let_in(expression: str) -> set[str]:
    """Return the characters that an expression lets in as it is written out; `regex` reads Rust's syntax."""
    return set(regex.findall(portable(expression), "".join(EVERY), regex.VERSION1))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_it_lets_in_matches_in_python(expression: str) -> None:
    found = let_in(expression)
    assert found
    assert found <= set(re.findall(expression, "".join(EVERY)))


@pytest.mark.parametrize("expression", CLASSES)
def test_of_ascii_it_lets_in_what_ecma_does(expression: str) -> None:
    ascii_ones = "".join(map(chr, range(128)))
    expected = set(re.findall(expression, ascii_ones, re.ASCII))
    # Python counts these as white space, ECMA 262 does not, so they are in no class
    assert set(ascii_ones) & let_in(expression) == expected - set("\x1c\x1d\x1e\x1f" if expression in r"\s\S" else "")


@needs_node
def test_it_matches_in_javascript() -> None:
    script = """
    const { expressions, every } = JSON.parse(require('fs').readFileSync(0, 'utf8'));
    const matches = (one) => every.filter((code) => new RegExp(`^(?:${one})$`, 'u').test(String.fromCodePoint(code)));
    console.log(JSON.stringify(Object.fromEntries(expressions.map((one) => [one, matches(one)]))));
    """
    every = sorted({ord(letter) for one in EXPRESSIONS for letter in let_in(one) if ord(letter) < 0x10000})
    given = json.dumps({"expressions": EXPRESSIONS, "every": every})
    done = subprocess.run(["node", "-e", script], input=given, capture_output=True, text=True, check=True)
    for expression, codes in json.loads(done.stdout).items():
        assert {letter for letter in let_in(expression) if ord(letter) < 0x10000} <= set(map(chr, codes)), expression


@pytest.mark.parametrize(
    ("expression", "written"),
    [
        (r"\d{3}[^\s,]", r"[0-9]{3}[^[\p{White_Space}\x1c-\x1f\ufeff],]"),
        (r"[\w--\d]", r"[[0-9A-Za-z_]--[\p{Nd}]]"),
        (r"[^[^\d]]", "[^[^[0-9]]]"),
        (r"[]\d]", "[][0-9]]"),
        (r"\\d\.[.]", r"\\d\.[.]"),
        (r"a.", r"a[^\n\r\u2028\u2029]"),
        (r"(?s:.*)", r"(?s:.*)"),
        ("[", "["),
        ("\\", "\\"),
    ],
)
def test_only_classes_are_written_out(expression: str, written: str) -> None:
    assert portable(expression) == written


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """Those of a tokenizer of all bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({token: index for index, token in enumerate(["<end>", *letters])}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Grammars(PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>"))


def accepts(grammars: Grammars, kind: Any, form: Any, text: str) -> bool:
    """Return whether a text is an answer in a form."""
    assert grammars.tokenizer is not None
    tokens, end = grammars.tokenizer(text)["input_ids"], grammars.tokenizer.eos_token_id
    row = grammars.compiled(AnswerForm.of(kind, form)).begin(frozenset({end}), len(tokens) + 1)
    for token in tokens:
        if row.forced:
            if row.forced.popleft() != token:
                return False
        elif not row.permits(token):
            return False
        else:
            row.take(token)
    return row.is_complete or row.permits(end)


@pytest.mark.parametrize(("text", "expected"), [("123", True), ("๙2१", False), ("12é", False)])
def test_every_form_reads_them_so(grammars: Grammars, text: str, expected: bool) -> None:
    assert accepts(grammars, "regex", r"\d{3}", text) is expected
    assert accepts(grammars, "regex", r"[\d]{3}", text) is expected
    assert accepts(grammars, "grammar", r'start: "" /\d/ /[^\D]{2}/ // \d', text) is expected
    pattern = {"type": "string", "pattern": r"^\w[\d]\d$"}
    assert accepts(grammars, "json", pattern, json.dumps(text, ensure_ascii=False)) is expected
    schema = "start: %json " + json.dumps(pattern)
    assert accepts(grammars, "grammar", schema, json.dumps(text, ensure_ascii=False)) is expected


NAMED = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


@pytest.mark.parametrize(
    "schema",
    [
        NAMED,
        {**NAMED, "patternProperties": {"^[ab]": {"type": "integer"}}},
        {"type": "object", "required": ["a"]},
        {"allOf": [NAMED, {"type": "object", "properties": {"b": {}}}]},
    ],
)
def test_a_name_comes_once_however_it_is_written(grammars: Grammars, schema: dict[str, Any]) -> None:
    assert accepts(grammars, "json", schema, '{"a": 1, "ab": 2}')
    assert accepts(grammars, "json", schema, '{"a": 1, "b\\n": "\\t\\""}') is ("patternProperties" not in schema)
    for name in ("a", r"\u0061"):
        assert not accepts(grammars, "json", schema, f'{{"a": 1, "{name}": 2}}')
    lark = "start: %json " + json.dumps(schema)
    assert not accepts(grammars, "grammar", lark, r'{"a": 1, "\u0061": 2}')
