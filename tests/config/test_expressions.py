"""Regular expressions of a configuration: Python's meaning, and none that hangs the process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import traced

from gralora_fx import GraloraConfig, plan
from gralora_fx.core.config import checks
from gralora_fx.core.config.checks import fullmatch, match
from gralora_fx.errors import ConfigError

PATHS = ["bert.encoder.layer.0.attention.self.query", "h.11.mlp.c_fc", "lm_head", "a{e}", "x{2", "[:alpha:]", "é", "a:"]
MEANINGS = [
    r".*layer\.\d+\..*query",
    r".*\.(c_fc|query)",
    r"(?!lm).*",
    r"(?i)LM_HEAD",
    r".*(?<!query)$",
    r"a{e}",
    r"a\{e}",
    r"x{2",
    r"x{1,2}\{2",
    r"[[:alpha:]]+",
    r"[:alph]+",
    r"[a-z]++_head",
    r"(\w)(?P<name>\w).*(?P=name).*",
    r"\w+\Z",
    r"",
    r"{}",
    r"(.*)\.\1",
]


@pytest.mark.parametrize("expression", MEANINGS)
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_an_expression_means_what_python_means(expression: str) -> None:
    for path in PATHS:
        assert fullmatch(expression, path) == (re.fullmatch(expression, path) is not None)
        actual, expected = match(expression, path), re.match(expression, path)
        assert (actual and actual.groups()) == (expected and expected.groups())


@pytest.mark.filterwarnings("ignore:Possible (nested set|set difference|set):FutureWarning")
@given(st.text(alphabet=r"ab.*+?|()[]{}\1,:^$e=-&", max_size=12), st.text(alphabet="ab.{}[]:e1=-&", max_size=8))
def test_drawn_expressions_mean_what_python_means(expression: str, text: str) -> None:
    try:
        expected = re.fullmatch(expression, text) is not None
    except re.error:
        with pytest.raises(ConfigError, match="is not a valid regular expression"):
            GraloraConfig(target_modules=expression)
        return
    assert fullmatch(expression, text) == expected


FIELDS: dict[str, Any] = {
    "target_modules": lambda text: text,
    "exclude_modules": lambda text: text,
    "modules_to_save": lambda text: [text],
    "layers_pattern": lambda text: [text],
    "rank_pattern": lambda text: {text: 4},
    "alpha_pattern": lambda text: {text: 4},
    "gralora_k_pattern": lambda text: {text: 1},
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", ["(" * 5000, "(" * 50 + "x" + ")" * 49, "[", "a{99999999999999}", "(?P<a>x)(?P<a>y)"])
def test_what_cannot_be_compiled_is_one_clear_error(field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        GraloraConfig(**{"target_modules": ["q"], "layers_to_transform": [0], field: FIELDS[field](text)})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "text"), [("modules_to_save", "(?i)head"), ("layers_pattern", "(?P<index>h)"), ("rank_pattern", "(?i)q")]
)
def test_a_name_that_only_fits_by_itself_is_refused(field: str, text: str) -> None:
    re.compile(text)
    with pytest.raises(ConfigError, match=f"{field} holds .*, which is not a valid name"):
        GraloraConfig(**{"target_modules": ["q"], "layers_to_transform": [0], field: FIELDS[field](text)})


HANGING = r"(?:[a-z.0-9_]|[a-z.0-9_][a-z.0-9_])+[XY]"


@pytest.mark.parametrize("field", FIELDS)
def test_an_expression_that_would_hang_is_refused(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_LIMIT", 0.1)  # seconds, which the expressions would need many times over
    fields = {"target_modules": ["query"], "layers_to_transform": [0], field: FIELDS[field](f"{HANGING}(?#{field})")}
    if field == "target_modules":
        del fields["layers_to_transform"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "GRALORA", "r": 8, **fields}))
    with pytest.raises(ConfigError, match=r"takes too long to match .*write it without repetitions"):
        plan(traced("bert"), GraloraConfig.from_pretrained(tmp_path))


def test_an_expression_of_many_names_is_taken() -> None:
    names = [f"model.layers.{layer}.mlp.{name}" for layer in range(100) for name in ("up_proj", "down_proj", "gate")]
    config = GraloraConfig(target_modules="|".join(re.escape(name) for name in names))
    assert all(fullmatch(str(config.target_modules), name) for name in names)
    assert not fullmatch(str(config.target_modules), "model.layers.100.mlp.gate")


def test_an_expression_without_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="it has 2,000,000 characters; the maximum is 1,000,000"):
        GraloraConfig(target_modules="a" * 2_000_000)
