"""Programs that restart to use huge pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from running import run

from gralora_fx.cli import huge_pages
from gralora_fx.format.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest

ARGUMENTS = ["serve", "--onnx", "there"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Return a program started by arguments on a system with huge pages; what replaces it."""
    replaced: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(huge_pages, "_on_request", lambda: True)
    monkeypatch.setattr(huge_pages.os, "execv", lambda *call: replaced.append(call))
    monkeypatch.setattr(sys, "argv", ["gralora-fx", *ARGUMENTS])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "gralora_fx.cli", *ARGUMENTS])
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    return replaced


@pytest.mark.parametrize(("before", "after"), [("", ""), ("glibc.malloc.check=0", "glibc.malloc.check=0:")])
def test_the_program_is_replaced_by_itself(
    started: list[tuple[str, list[str]]],
    before: str,
    after: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(huge_pages.VARIABLE, before)
    huge_pages.use_huge_pages()
    assert started == [(sys.executable, ["python3", "-m", "gralora_fx.cli", *ARGUMENTS])]
    assert huge_pages.os.environ[huge_pages.VARIABLE] == f"{after}{huge_pages.TUNABLE}=1"
    huge_pages.use_huge_pages()
    assert len(started) == 1  # once
    printed = f"restarting with huge pages, for faster memory: GLIBC_TUNABLES={after}{huge_pages.TUNABLE}=1\n"
    assert capsys.readouterr().err == printed


def test_what_a_user_says_is_left(started: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(huge_pages.VARIABLE, f"{huge_pages.TUNABLE}=0")
    huge_pages.use_huge_pages()
    assert started == []


def test_a_program_that_gives_arguments_itself_goes_on(
    started: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "pytest", "tests"])
    huge_pages.use_huge_pages()
    assert started == []


def test_a_program_that_cannot_be_started_anew_goes_on(
    started: list[tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*call: object) -> None:
        tried.append(call)
        (tmp_path / "missing").read_text()

    tried: list[object] = []
    monkeypatch.setattr(huge_pages.os, "execv", refused)
    huge_pages.use_huge_pages()
    assert (len(tried), started) == (1, [])


@pytest.mark.parametrize("text", ["always madvise [never]", "[always] madvise never", None])
def test_without_pages_on_request_there_is_nothing_to_ask_for(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tmp_path / "enabled"
    if text is not None:
        kernel.write_text(text)
    monkeypatch.setattr(huge_pages, "_KERNEL", kernel)
    assert not huge_pages._on_request()


@pytest.mark.skipif(not huge_pages._on_request(), reason="the system gives no huge pages on request")
def test_a_command_that_decodes_runs_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    code = (
        "import os, sys; from gralora_fx.cli import huge_pages\n"
        "huge_pages.use_huge_pages(); print(os.environ[huge_pages.VARIABLE], os.getpid(), *sys.argv[1:])"
    )
    with subprocess.Popen([sys.executable, "-c", code, "serve", "x y"], stdout=subprocess.PIPE, text=True) as process:
        text, _ = process.communicate()
    assert text.split() == [f"{huge_pages.TUNABLE}=1", str(process.pid), "serve", "x", "y"]


def test_the_program_is_replaced_once_the_export_is_found_and_before_the_service_is_imported(
    tmp_path: Path, started: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["serve", "--onnx", str(tmp_path)]
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "gralora_fx.cli", *arguments])
    assert "no gralora_export.json" in run(*arguments).error  # and nothing of a restart
    assert started == []
    (tmp_path / MANIFEST_NAME).write_text(Manifest(SCHEMA_VERSION, None, "fp32").to_json(), encoding="utf-8")

    def replace(*call: object) -> None:
        sys.exit(int("gralora_fx.service.app" in sys.modules))

    monkeypatch.setattr(huge_pages.os, "execv", replace)
    monkeypatch.delitem(sys.modules, "gralora_fx.service.app", raising=False)
    found = run(*arguments)
    assert (found.status, found.stderr.startswith("restarting with huge pages")) == (0, True)


@pytest.mark.parametrize("arguments", [["-q", "tests"], ["generate", "serve"], []])
def test_other_commands_and_programs_go_on(
    arguments: list[str], started: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gralora-fx", *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "gralora_fx.cli", *arguments])
    huge_pages.use_huge_pages()
    assert started == []
