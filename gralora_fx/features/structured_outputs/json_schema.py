r"""JSON schemas of answers, checked before compilation, and regular expressions that all dialects read alike.

A keyword that would be ignored, or recursion without end, is refused. Patterns in schemas are ECMA 262, answers are
often checked with Python's `re`, and llguidance compiles Rust's. `\d`, `\w`, `\s` and `.` differ: in ECMA 262 the
first two are ASCII, in Python and Rust they include letters and digits of all scripts. So each class is written out
as what all dialects agree on: `\d`, `\w` and `\s` are ASCII, and `\D`, `\W`, `\S` and `.` exclude whatever any of the
dialects excludes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from gralora_fx.errors import ServingError, shown

# for each class: what every dialect includes, and what any does
_CLASSES = {
    "d": ("0-9", r"\p{Nd}"),
    "w": ("0-9A-Za-z_", r"\p{Alphabetic}\p{M}\p{N}\p{Pc}\u200c\u200d"),
    "s": (r" \t\n\r\f\v", r"\p{White_Space}\x1c-\x1f\ufeff"),
}
_DOT = r"[^\n\r\u2028\u2029]"
_ALL_DOTS = re.compile(r"\(\?[a-zA-Z]*s")  # a flag that makes a dot match any character
_PART = re.compile(r"\\.|\[\^?\]?|\]|--|.", re.DOTALL)


def portable(expression: str) -> str:
    r"""Expand the character classes of an expression in Rust's syntax to what all dialects agree on.

    Before:  `\d{3}[^\s,]`
    After:   `[0-9]{3}[^[\p{White_Space}\x1c-\x1f\ufeff],]`
    """
    has_dots = _ALL_DOTS.search(expression) is None
    negated: list[bool] = []  # for each open class: whether its members are excluded
    written = []
    for part in _PART.findall(expression):
        is_out = bool(negated) and negated[-1]
        if part[0] == "[":
            negated.append(is_out is not part.startswith("[^"))
        elif part == "]" and negated:
            negated.pop()
        elif part == "--" and negated:  # set difference
            negated[-1] = not is_out
        elif part == "." and not negated and has_dots:
            part = _DOT
        elif part[0] == "\\" and (found := _CLASSES.get(part[1:].lower())):
            is_inverse = part[1:].isupper()
            part = f"[{'^' * is_inverse}{found[is_out is not is_inverse]}]"
        written.append(part)
    return "".join(written)


LARGEST = 64 * 1024  # maximum bytes of a form
_MOST_PROPERTIES = 1000  # compilation time, here 0.1 s, grows with their square
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # keywords whose values are schemas by name
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_LIMITS = ("required", "minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")
_VALUES = ("type", "const", "enum", "pattern", "format", "multipleOf", "$ref")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_CONTENTS = ("contentMediaType", "contentEncoding", "contentSchema")
_TEXTS = ("title", "description", "default", "examples", "example", "$comment")
_NOTES = (*_TEXTS, "deprecated", "readOnly", "writeOnly", *_CONTENTS)
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")  # supported
# neutral values of other keywords, which programs write
_IDLE: dict[str, Any] = {"propertyNames": (True, {}, {"type": "string"}), "uniqueItems": (False,)}
# within JSON, a control character that has no escape of its own
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*(?:\\u00(?:[01][0-9a-f]|7f)|\x7f)")
_HEAD = ("$schema", "$id")  # allowed in the root schema only
_KEYWORDS = frozenset((*_MAPS, *_LISTS, *_SINGLE, *_LIMITS, *_VALUES, *_BOUNDS, *_NOTES))


def schema_text(schema: Any) -> str:
    """Return a schema as JSON, checked to be expressible as a grammar and to have a finite value.

    Formats unknown to grammars are annotations and are dropped, character classes in patterns are expanded (see
    `portable`), and choices with a `discriminator` become `anyOf`.

    Raises:
        ServingError: It is not an object, is larger than `LARGEST` bytes, has more than 1000 properties or a keyword
            that no grammar follows, refers to something outside it, or has only infinitely nested values.
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
    root = json.loads(text)
    _Walk(root).check()
    return json.dumps(root)


def check_size(text: str) -> None:
    """Raise a `ServingError` for a form of more than `LARGEST` bytes."""
    if len(text) > LARGEST or len(text.encode(errors="replace")) > LARGEST:
        raise ServingError(f"it is larger than {LARGEST // 1024} KiB; ask for a simpler answer")


class _Walk:
    """Visits every schema within a schema, and those it refers to; iteratively, so that any depth works."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._targets: dict[int, Any] = {}  # the target of a schema with `$ref`, by its id
        self._order: list[dict[str, Any]] = []
        self._properties = 0

    def check(self) -> None:
        """Check all keywords and references, simplify them, and check that the root has a finite value."""
        waiting, seen = [self._root], set[int]()
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, bool) or id(schema) in seen:
                continue
            if not isinstance(schema, dict):
                raise ServingError(f"a schema is an object of keywords, but got {shown(schema)} within it")
            seen.add(id(schema))
            self._order.append(schema)
            self._simplify(schema)
            self._check_keywords(schema)
            waiting += _children(schema)
            if "$ref" in schema:
                waiting.append(self._targets.setdefault(id(schema), self._referred(schema["$ref"])))
        self._check_end()

    def _simplify(self, schema: dict[str, Any]) -> None:
        """Drop keywords that every value meets; expand patterns' classes and choices with a discriminator."""
        if isinstance(form := schema.get("format"), str) and form not in _FORMATS:
            del schema["format"]
        for keyword, values in _IDLE.items():
            if schema.get(keyword) in values:
                del schema[keyword]
        if isinstance(pattern := schema.get("pattern"), str):
            schema["pattern"] = portable(pattern)
        told, choices = schema.get("discriminator"), schema.get("oneOf")
        if not isinstance(told, dict) or not isinstance(choices, list) or "anyOf" in schema:
            return
        name, tags = told.get("propertyName"), set[str]()
        if not isinstance(name, str):
            raise ServingError("a discriminator of the schema has no propertyName; give it")
        for choice in choices:
            own = self._tags(choice, name)
            if not own or own & tags:
                raise ServingError(f"a discriminator needs another const as {shown(name)} in each choice of the schema")
            tags |= own
        schema["anyOf"] = [{**choice, "required": _with_name(choice.get("required"), name)} for choice in choices]
        del schema["oneOf"], schema["discriminator"]

    def _tags(self, choice: Any, name: str) -> set[str]:
        """Return the values that a choice allows for a member, as JSON; none if it may have others."""
        tags, waiting, seen = set[str](), [choice], set[int]()
        while waiting:
            schema = waiting.pop()
            if not isinstance(schema, dict) or id(schema) in seen:
                return set()
            seen.add(id(schema))
            properties = schema.get("properties")
            tag = properties.get(name) if isinstance(properties, dict) else None
            if isinstance(tag, dict) and ("const" in tag or isinstance(tag.get("enum"), list)):
                tags |= {json.dumps(value) for value in ([tag["const"]] if "const" in tag else tag["enum"])}
            elif "$ref" in schema:
                waiting.append(self._referred(schema["$ref"]))
            elif inner := _listed(schema, "oneOf") or _listed(schema, "anyOf"):
                waiting += inner
            else:
                return set()
        return tags

    def _check_keywords(self, schema: Mapping[str, Any]) -> None:
        for name in schema:
            if name not in _KEYWORDS and not (schema is self._root and name in _HEAD):
                raise ServingError(f"the keyword {shown(name)} of the schema is not supported; leave it out")
        for name in ("const", "enum"):
            if _CONTROL.search(json.dumps(schema.get(name), ensure_ascii=False)):
                raise ServingError(f"{name} of the schema has a control character, which no answer has; leave it out")
        for name in ("properties", "patternProperties"):
            self._properties += len(inner) if isinstance(inner := schema.get(name), dict) else 0
        if self._properties > _MOST_PROPERTIES:
            raise ServingError(f"the schema has more than {_MOST_PROPERTIES} properties; ask for a simpler answer")
        least, required = schema.get("minProperties"), schema.get("required", [])
        is_free = schema.get("additionalProperties") is not False or bool(schema.get("patternProperties"))
        if is_free and isinstance(least, int) and isinstance(required, list) and least > len({*map(str, required)}) + 1:
            raise ServingError(
                f"minProperties {least} of the schema is not supported where names are free, since one may come twice; "
                "name the members in properties, with additionalProperties false"
            )

    def _referred(self, reference: Any) -> Any:
        """Resolve a reference within the schema."""
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
        """Find all schemas with a finite value: first those that need no other, then those that need only these."""
        ending, left = set[int](), self._order[::-1]  # referenced schemas first, so a chain takes one pass
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
            if not self._targets:
                raise ServingError("no answer meets the schema, in which a list of types or choices is empty; fill it")
            raise ServingError("the schema refers to itself without end: no answer that meets it is finite")

    def _ends(self, schema: Mapping[str, Any], ending: set[int]) -> bool:
        """Return whether a schema is known to have a finite value."""

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
            return True  # a value without nested values
        return any(all(map(known, needed(schema))) for needed in nesting)


def _children(schema: Mapping[str, Any]) -> Iterator[Any]:
    for name in _MAPS:
        if isinstance(inner := schema.get(name), dict):
            yield from inner.values()
    for name in (*_LISTS, *_SINGLE):
        if name in schema:
            yield from _listed(schema, name)


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    inner = schema.get(name, [])
    return inner if isinstance(inner, list) else [inner]


def _with_name(required: Any, name: str) -> Any:
    """Return a choice's required members, including its tag."""
    return sorted({name, *required}) if isinstance(required, list) and _are_texts(required) else required or [name]


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _needed_members(schema: Mapping[str, Any]) -> list[Any]:
    """Return the schemas of members that every object has."""
    properties, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    required = schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return []  # the compiler refuses it
    needed = [properties.get(name, other) for name in required if isinstance(name, str)]
    least = schema.get("minProperties", 0)
    if isinstance(least, int) and least > len(properties):
        needed.append(other)
    return needed


def _needed_items(schema: Mapping[str, Any]) -> list[Any]:
    """Return the schemas of items that every array has."""
    least, items = schema.get("minItems", 0), schema.get("items", True)
    first = items if isinstance(items, list) else _listed(schema, "prefixItems")
    after = schema.get("additionalItems", True) if isinstance(items, list) else items
    if not isinstance(least, int) or least < 1:
        return []
    return [*first[:least], *([after] if least > len(first) else [])]


_NEEDED = {"object": _needed_members, "array": _needed_items}
