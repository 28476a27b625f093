"""Options of the service that features declare, and those that may be repeated, reach its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gralora_fx.cli import serve
from gralora_fx.cli.commands import app
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.features.images.image_limits import ServedImages


def settings_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ServiceSettings:
    """Return the settings that `gralora-fx serve` makes of its options."""
    found: list[ServiceSettings] = []

    def seen(*_: Any) -> None:
        raise SystemExit(0)

    def settings(*given: Any, **named: Any) -> ServiceSettings:
        found.append(ServiceSettings(*given, **named))
        return found[-1]

    monkeypatch.setattr(serve, "ServiceSettings", settings)
    monkeypatch.setattr(serve, "read_manifest", seen)
    CliRunner().invoke(app, ["serve", "--onnx", "onnx", *arguments])
    return found[-1]


def test_options_of_a_feature_are_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "--max-images",
        "3",
        "--allow-image-host",
        "a.org",
        "--allow-image-host",
        "10.0.0.5:9000",
        "--max-queue",
        "7",
    ]
    found = settings_of(monkeypatch, *given, "--allow-origin", "https://b.org", "--allow-origin", "*")
    images = ServedImages(max_images=3, allow_image_host=("a.org", "10.0.0.5:9000"))
    assert found == ServiceSettings(Path("onnx"), max_queue=7, allow_origin=("https://b.org", "*"), more=(images,))
    assert found.part(ServedImages) == images


def test_left_out_they_are_the_records_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_of(monkeypatch)
    assert found == ServiceSettings(Path("onnx"), more=(ServedImages(),))
    assert ServiceSettings(Path("onnx")).part(ServedImages) == ServedImages()
