"""A log of long work has a line every few seconds; a terminal has its live display and nothing more."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from gralora_fx.progress import console as module
from gralora_fx.progress.console import SILENCE, Heartbeat, StageProgress
from gralora_fx.progress.stages import quiet, timed

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.quick
def test_no_ten_seconds_are_silent() -> None:
    sink, clock = io.StringIO(), Clock()
    heartbeat = Heartbeat(Console(file=sink), clock=clock)
    last, gaps = 0.0, []
    heartbeat.begin("trace")
    for step in range(1, 601):  # a minute, in tenths of a second
        clock.now = step / 10
        if step == 222:
            heartbeat.end("trace")
            heartbeat.begin("write")
        before = sink.tell()
        heartbeat.beat()
        if sink.tell() > before:
            gaps.append(clock.now - last)
            last = clock.now
    assert max(gaps) <= SILENCE + 0.2 < 10
    lines = sink.getvalue().splitlines()
    assert lines[:2] == ["trace            5.0 s so far", "trace           10.0 s so far"]
    assert lines[4] == "write            2.8 s so far"


def test_other_lines_put_it_off() -> None:
    sink, clock = io.StringIO(), Clock()
    heartbeat = Heartbeat(Console(file=sink), clock=clock, silence=5)
    clock.now = 4.0
    heartbeat.shown()
    clock.now = 8.0
    assert heartbeat.beat() == 1.0
    assert not sink.getvalue()
    clock.now = 9.0
    assert heartbeat.beat() == 5.0
    assert sink.getvalue() == "working          9.0 s so far\n"


def test_a_stage_that_an_error_ended_is_left_with_the_one_around_it() -> None:
    sink, clock = io.StringIO(), Clock()
    heartbeat = Heartbeat(Console(file=sink), clock=clock)
    for stage in ("export", "write"):
        heartbeat.begin(stage)
    heartbeat.end("export")
    heartbeat.end("never begun")
    clock.now = 6.0
    heartbeat.beat()
    assert sink.getvalue().startswith("working")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_it_beats_in_a_log_alone(is_terminal: bool) -> None:
    sink = io.StringIO()
    with Heartbeat(Console(file=sink, force_terminal=is_terminal), silence=0.01):
        deadline = time.monotonic() + (0.1 if is_terminal else 10)
        while time.monotonic() < deadline and sink.getvalue().count("so far") < 2:
            time.sleep(0.01)
    lines = sink.getvalue().count("so far")
    assert lines == 0 if is_terminal else lines >= 2
    ended = sink.getvalue()
    time.sleep(0.05)
    assert sink.getvalue() == ended


def test_stages_beat_while_the_libraries_are_silenced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SILENCE", 0.02)
    with StageProgress(), timed("convert"), quiet():
        time.sleep(0.5)
    shown = capsys.readouterr().err
    assert re.search(r"convert +\d+\.\d s so far\n", shown)
    assert re.search(r"convert +\d+\.\d s\ntotal +\d+\.\d s\n$", shown)


def test_make_says_that_an_installation_goes_on(tmp_path: Path) -> None:
    """The Makefile's own part, before Python runs: the recipe of a command that shows nothing."""
    text = (ROOT / "Makefile").read_text()
    saying = text[text.index("define saying") : text.index("endef") + len("endef")]
    rules = (
        "ok:\n\t$(call saying,installing [x],sleep 1)\n\t@echo done\nbad:\n\t$(call saying,failing,false)\n\t@echo no\n"
    )
    (tmp_path / "Makefile").write_text(saying.replace("sleep 5", "sleep 0.2") + f"\n{rules}")
    make = ["make", "--no-print-directory"]  # the tests themselves may run under make
    ran = subprocess.run([*make, "ok"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "installing [x] ..." in ran.stdout
    assert re.search(r"installing \[x\]: \d+ s so far", ran.stdout)
    assert ran.stdout.endswith("done\n")
    failed = subprocess.run([*make, "bad"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "no\n" not in failed.stdout
    assert text.count("--quiet --editable") == text.count("$(call saying,installing")


@pytest.mark.quick
def test_quiet_blocks_of_several_threads_leave_the_process_as_it_was() -> None:
    """The block that begins first ends first: its own state is no more than the first part of theirs."""
    before = logging.root.manager.disable, sys.stdout, sys.stderr, warnings.filters[:]
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.root.manager.disable == logging.CRITICAL
    second.__exit__(None, None, None)
    assert (logging.root.manager.disable, sys.stdout, sys.stderr, warnings.filters) == before
