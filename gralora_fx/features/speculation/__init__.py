"""Speculation: tokens that an answer repeats are proposed, and verified several in a step."""

from gralora_fx.base.features import Feature

FEATURE = Feature("speculation", parts={"proposers": "speculation:Speculation"})
