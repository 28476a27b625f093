"""Structured outputs: answers that meet a JSON schema, match an expression, are one of some, or follow a grammar."""

from gralora_fx.base.features import Feature

FEATURE = Feature(
    "structured_outputs",
    parts={"constraints": "grammars:Grammars", "request fields": "request_fields:FIELDS"},
)
