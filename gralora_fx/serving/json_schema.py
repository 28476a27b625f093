"""JSON schemas of answers, checked before a grammar is made of them: what would be ignored or never end is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from gralora_fx.errors import ServingError, shown

LARGEST = 64 * 1024  # bytes of a form: the time to compile a schema grows with the square of its properties
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # keywords whose values are schemas by name
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_LIMITS = ("required", "minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")
_VALUES = ("type", "const", "enum", "pattern", "format", "multipleOf", "$ref")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_NOTES = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment")  # any value
_HEAD = ("$schema", "$id")  # of the whole schema
_KEYWORDS = frozenset((*_MAPS, *_LISTS, *_SINGLE, *_LIMITS, *_VALUES, *_BOUNDS, *_NOTES))


def schema_text(schema: Any) -> str:
    """A schema as JSON, after a check that a grammar can say all of it and that some answer meets it.

    Args:
        schema: The schema as an object, or as JSON text.

    Raises:
        ServingError: It is not an object, is larger than `LARGEST` bytes, has a keyword that no grammar follows, refers
            to what is not within it, or every value of it holds another of its kind without end.
    """
    if isinstance(schema, str):
        check_size(schema)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ServingError(f"the schema is not JSON ({error})") from error
    if not isinstance(schema, Mapping):
        raise ServingError(f"a schema is an object of keywords, but got {shown(schema)}")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ServingError(f"the schema cannot be written as JSON ({error})") from error
    check_size(text)
    _Walk(json.loads(text)).check()
    return text


def check_size(text: str) -> None:
    """Check the bound of a form.

    Raises:
        ServingError: It has more than `LARGEST` bytes.
    """
    if len(text) > LARGEST or len(text.encode(errors="replace")) > LARGEST:
        raise ServingError(f"it is larger than {LARGEST // 1024} KiB; ask for a simpler answer")


class _Walk:
    """Every schema within a schema, and those that it refers to; without recursion, however deep they are."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._targets: dict[int, Any] = {}  # by the id of a schema with `$ref`: what that is
        self._order: list[dict[str, Any]] = []

    def check(self) -> None:
        """Check the keywords and references of all, and that the first one has a value that ends.

        Raises:
            ServingError: One is wrong.
        """
        waiting, seen = [self._root], set[int]()
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, bool) or id(schema) in seen:
                continue
            if not isinstance(schema, dict):
                raise ServingError(f"a schema is an object of keywords, but got {shown(schema)} within it")
            seen.add(id(schema))
            self._order.append(schema)
            self._check_keywords(schema)
            waiting += _children(schema)
            if "$ref" in schema:
                waiting.append(self._targets.setdefault(id(schema), self._referred(schema["$ref"])))
        self._check_end()

    def _check_keywords(self, schema: Mapping[str, Any]) -> None:
        for name in schema:
            if name not in _KEYWORDS and not (schema is self._root and name in _HEAD):
                raise ServingError(f"the keyword {shown(name)} of the schema is not supported; leave it out")

    def _referred(self, reference: Any) -> Any:
        """What a reference names within the schema."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise ServingError(
                f"the schema refers to {shown(reference)}; only what is within it can be referred to, as '#/$defs/name'"
            )
        found = self._root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and len(name) < 6 and int(name) < len(found):
                found = found[int(name)]
            else:
                raise ServingError(f"the schema refers to {shown(reference)}, and there is no such part of it")
        return found

    def _check_end(self) -> None:
        """Find all schemas that have a finite value: those that need no other one, then those that need only these."""
        ending, left = set[int](), self._order[::-1]  # what is referred to comes first, so a chain takes one turn
        while left:
            rest = []
            for schema in left:
                if self._ends(schema, ending):
                    ending.add(id(schema))
                else:
                    rest.append(schema)
            if len(rest) == len(left):
                break
            left = rest
        if id(self._root) not in ending:
            raise ServingError("the schema refers to itself without end: no answer that meets it is finite")

    def _ends(self, schema: Mapping[str, Any], ending: set[int]) -> bool:
        """Whether a schema has a finite value, as far as is known."""

        def known(inner: Any) -> bool:
            return not isinstance(inner, dict) or id(inner) in ending

        if "$ref" in schema and not known(self._targets[id(schema)]):
            return False
        if not all(map(known, _listed(schema, "allOf"))):
            return False
        for name in ("anyOf", "oneOf"):
            if name in schema and not any(map(known, _listed(schema, name))):
                return False
        types = schema.get("type")
        kinds = types if isinstance(types, list) else [types]
        nesting = [_NEEDED[kind] for kind in kinds if isinstance(kind, str) and kind in _NEEDED]
        if "enum" in schema or "const" in schema or len(nesting) < len(kinds):
            return True  # a value without others in it
        return any(all(map(known, needed(schema))) for needed in nesting)


def _children(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas right within a schema."""
    for name in _MAPS:
        if isinstance(inner := schema.get(name), dict):
            yield from inner.values()
    for name in (*_LISTS, *_SINGLE):
        if name in schema:
            yield from _listed(schema, name)


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    inner = schema.get(name, [])
    return inner if isinstance(inner, list) else [inner]


def _needed_members(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of members that every object has."""
    properties, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    required = schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return []  # which the compiler refuses
    needed = [properties.get(name, other) for name in required if isinstance(name, str)]
    least = schema.get("minProperties", 0)
    if isinstance(least, int) and least > len(properties):
        needed.append(other)
    return needed


def _needed_items(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of items that every array has."""
    least, items = schema.get("minItems", 0), schema.get("items", True)
    first = items if isinstance(items, list) else _listed(schema, "prefixItems")
    after = schema.get("additionalItems", True) if isinstance(items, list) else items
    if not isinstance(least, int) or least < 1:
        return []
    return [*first[:least], *([after] if least > len(first) else [])]


_NEEDED = {"object": _needed_members, "array": _needed_items}
