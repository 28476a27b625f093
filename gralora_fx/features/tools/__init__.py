"""Calls of tools in answers to chats: described to the model, constrained to their schemas, read as they come."""

from gralora_fx.base.features import Feature

FEATURE = Feature(
    "tools",
    parts={"chat templates": "tool_template:ToolTemplate", "request fields": "request_fields:FIELDS"},
)
