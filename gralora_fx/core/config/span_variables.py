"""What OpenTelemetry's environment variables say of spans, without OpenTelemetry."""

from __future__ import annotations

import os

from gralora_fx.base.compat.packages import installation, missing_packages
from gralora_fx.errors import warn_caller

EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def span_exporters() -> list[str]:
    """The names of the exporters of spans that the environment asks for; empty where it asks for none."""
    names = [name for text in os.environ.get(EXPORTER, "").split(",") if (name := text.strip())]
    is_disabled = "none" in names or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or _asking() is None:
        return []
    return names or ["otlp"]


def warn_of_missing_spans() -> bool:
    """Warn if the environment asks for spans, and OpenTelemetry is not installed; return whether that is so."""
    if not span_exporters() or "opentelemetry-sdk" not in missing_packages("otel"):
        return False
    warn_caller(
        f"{_asking()} is set, but requests are not traced, since opentelemetry-sdk is not installed: "
        f"{installation('otel')}"
    )
    return True


def _asking() -> str | None:
    """The variable that asks for spans."""
    return next((name for name in (EXPORTER, *_ENDPOINTS) if os.environ.get(name, "").strip(" ,")), None)
