"""A dataclass's annotations say what an object of a JSON file holds; what does not fit is named with its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from gralora_fx.format.adapter_inputs import AdapterInputs
from gralora_fx.format.json_records import Count, FieldError, read_object, wrong_fields
from gralora_fx.format.quantized_weights import Quality


@dataclass(frozen=True)
class Part:
    name: str
    size: Count = 0


@dataclass(frozen=True)
class Whole:
    kind: Annotated[str, ("round", "square")]
    parts: tuple[Part, ...] = ()
    by_name: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    sizes: tuple[int, int] | None = None
    share: float | None = None
    rest: Mapping[str, Any] | None = None


FULL: dict[str, Any] = {
    "kind": "round",
    "parts": [{"name": "a"}, {"name": "b", "size": 2}],
    "by_name": {"x": [{"name": "c"}]},
    "sizes": [3, 4],
    "share": 0.5,
    "rest": {"any": [1, None]},
    "unknown": 1,
}


@pytest.mark.quick
def test_objects_become_records() -> None:
    expected = Whole("round", (Part("a"), Part("b", 2)), {"x": (Part("c"),)}, (3, 4), 0.5, {"any": [1, None]})
    assert read_object(Whole, FULL) == expected
    assert read_object(Whole, {"kind": "square", "sizes": None}) == Whole("square")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": ...}, "kind is missing"),
        ({"kind": "oval"}, "kind is 'oval', which no export writes"),
        ({"kind": None}, "kind is None, which"),
        ({"parts": {}}, "parts is {}, which"),
        ({"parts": [{"name": "a"}, 1]}, "parts is 1, which"),
        ({"parts": [{"name": "a"}, {}]}, "parts.1.name is missing"),
        ({"parts": [{"name": "a", "size": True}]}, "parts.0.size is True, which"),
        ({"parts": [{"name": "a", "size": -1}]}, "parts.0.size is -1, which"),
        ({"by_name": {"x": [{"name": 1}]}}, "by_name.x.0.name is 1, which"),
        ({"sizes": [1]}, r"sizes is \[1\], which"),
        ({"sizes": [1, "2"]}, "sizes is '2', which"),
        ({"share": 1}, "share is 1, which"),
        ({"rest": []}, r"rest is \[\], which"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in {**FULL, **fields}.items() if value is not ...}
    with pytest.raises(FieldError, match=f"^{message}"):
        read_object(Whole, given)
    assert list(wrong_fields(Whole, given)) == list(fields)


def test_lists_of_a_manifest_may_be_missing() -> None:
    assert read_object(Quality, {"inputs": "200 given texts"}) == Quality("200 given texts", ())
    fields = {"mode": "data", "k": 2, "dtype": "float32"}
    assert read_object(AdapterInputs, fields) == AdapterInputs("data", 2, "float32", ())
