"""The declaration of an option gives a command's parameters and checks."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from typer.main import get_command

from gralora_fx.cli import app
from gralora_fx.core.config.option import Option, check_options, declared_options
from gralora_fx.errors import ConfigError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.options import ExportOptions

pytestmark = pytest.mark.quick


def _even(value: int) -> str | None:
    return f"{value} is odd" if value % 2 else None


@dataclass(frozen=True)
class Options:
    """Options of every kind."""

    kind: Annotated[Literal["a", "b"], Option("A choice.")] = "a"
    other: Annotated[Literal["c"] | None, Option("A choice or none.")] = None
    is_on: Annotated[bool, Option("A flag.")] = False
    count: Annotated[int | None, Option("A number.", metavar="N", least=1)] = None
    place: Annotated[str | Path | None, Option("A path.", metavar="DIR")] = None
    pair: Annotated[int, Option(problem=_even)] = 2
    plain: int = 3

    def __post_init__(self) -> None:
        """Check them."""
        check_options(self, ConfigError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "x"}, "kind='x' is not available; take 'a' or 'b'"),
        ({"kind": None}, "kind=None is not available; take 'a' or 'b'"),
        ({"other": 5}, "other=5 is not available; take 'c', or leave it out"),
        ({"is_on": 1}, "is_on must be True or False, but got 1"),
        ({"count": True}, "count must be a whole number of at least 1, but got True"),
        ({"count": 0}, "count must be a whole number of at least 1, but got 0"),
        ({"place": 5}, "place must be the path of a directory or None, but got 5"),
        ({"pair": 3}, "3 is odd"),
    ],
)
def test_a_value_is_checked_by_its_declaration(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Options(**options)  # type: ignore[arg-type]


def test_values_that_fit_pass() -> None:
    assert Options("b", "c", True, 1, Path("x"), 4, 5).plain == 5
    assert [declared.name for declared in declared_options(Options)][-1] == "pair"


def test_the_keywords_of_an_export_are_its_options() -> None:
    keywords = list(inspect.signature(export_onnx, eval_str=True).parameters.values())[2:]
    declared = declared_options(ExportOptions)
    assert [(one.name, one.annotation, one.default) for one in keywords] == [
        (one.name, one.type, one.default) for one in declared
    ]


def test_a_command_has_the_options_that_its_record_declares() -> None:
    params = {param.name: param for param in get_command(app).commands["export"].params}  # type: ignore[attr-defined]
    for declared in declared_options(ExportOptions):
        if declared.option.help:
            assert params[declared.name].opts == [declared.flag]
            assert params[declared.name].is_flag == declared.is_flag
