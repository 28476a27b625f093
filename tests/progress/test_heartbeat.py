"""A log of long work has a line now and then, if there is news; a terminal has its live display and nothing more."""

from __future__ import annotations

import gc
import io
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from terminals import in_terminal, plain_lines
from tqdm import tqdm

from gralora_fx.base.progress import live_stages as module
from gralora_fx.base.progress.console import SILENCED, CommandProgress, StageProgress, with_progress
from gralora_fx.base.progress.live_stages import FIRST, SILENCE, print_news
from gralora_fx.base.progress.stages import counted, counting, displayed, gc_pause, quiet, timed

ROOT = Path(__file__).parents[2]


class Log:
    """A log by a clock that the test sets, of the stages of the test's own thread."""

    def __init__(self) -> None:
        self.now, self.sink = 0.0, io.StringIO()
        self.progress = Progress(console=Console(file=self.sink, width=200, get_time=lambda: self.now))

    def news(self) -> float:
        return print_news(self.progress, SILENCE)

    @property
    def lines(self) -> list[str]:
        return self.sink.getvalue().splitlines()


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    token = displayed.set(log.progress)
    yield log
    displayed.reset(token)


@pytest.mark.quick
def test_a_log_has_a_line_every_fifteen_seconds_as_long_as_there_is_news(log: Log) -> None:
    times, due = [], FIRST
    with ExitStack() as stages:
        stages.enter_context(timed("trace"))
        for step in range(1, 1201):  # two minutes, in tenths of a second
            log.now = step / 10
            if step == 222:
                stages.close()
                count = stages.enter_context(counting("choosing bits", 240, "matrices"))
            if step >= 222:
                count((step - 222) // 4)
            if log.now >= due:
                before = len(log.lines)
                due = log.now + log.news()
                times += [log.now] if len(log.lines) > before else []
    assert times == [FIRST, 22.5, *(22.5 + SILENCE * index for index in range(1, 7))]
    assert log.lines[:2] == ["trace ...", "choosing bits: 0/240 matrices"]
    assert log.lines[3] == "choosing bits: 75/240 matrices, about 65 s left"


def test_nothing_is_printed_without_news(log: Log) -> None:
    with timed("trace"):
        for log.now in range(300):
            log.news()
        assert log.lines == ["trace ..."]
    log.now = 0
    with counting("train", 3, "") as count:
        log.now = 299
        count(1, "loss 0.41")
        log.news()
        count(1, "loss 0.41")
        log.now = 400
        log.news()
    assert log.lines[1:] == ["train: 1/3, loss 0.41, about 10 min left"]
    log.news()  # of no stage
    assert len(log.lines) == 2


def test_a_stage_that_an_error_ended_is_left_with_the_one_around_it(log: Log) -> None:
    left = counted(range(3), "write", "files")

    def fail() -> None:
        with timed("export"):
            next(left)
            raise ValueError("unknown")

    with timed("working"):
        with pytest.raises(ValueError, match="unknown"):
            fail()
        log.news()
        next(left)  # of the stage that was left
        log.news()
        assert log.lines == ["working ..."]


@pytest.mark.parametrize(
    ("elapsed", "done", "words"),
    [(1, 5, "about 1 s left"), (42, 5, "about 8 s left"), (23, 3, "about 25 s left"), (200, 3, "about 3 min left")],
)
def test_the_time_that_is_left_is_rounded(log: Log, elapsed: float, done: int, words: str) -> None:
    with counting("reading", 6, "files") as count:
        log.now = elapsed
        count(done)
        log.news()
    assert log.lines == [f"reading: {done}/6 files, {words}"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_come_in_a_log_alone(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SILENCED)
    sink = io.StringIO()
    with StageProgress(Console(file=sink, force_terminal=is_terminal), silence=0.01):
        deadline = time.monotonic() + (0.1 if is_terminal else 10)
        while time.monotonic() < deadline and sink.getvalue().count("reading") < 2:
            for _ in counted(range(3), "reading", "files"):
                time.sleep(0.01)
    lines = re.findall(r"^reading: \d/3 files$", sink.getvalue(), re.MULTILINE)
    assert not lines if is_terminal else len(lines) >= 2
    ended = sink.getvalue()
    time.sleep(0.05)
    assert sink.getvalue() == ended


@with_progress
def work() -> None:
    with timed("convert", shown="converting"), quiet():
        for _ in counted(range(10), "choosing bits", "matrices"):
            time.sleep(0.02)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SILENCED)
    monkeypatch.setattr(module, "FIRST", 0.01)
    monkeypatch.setattr(module, "SILENCE", 0.03)


@pytest.mark.usefixtures("impatient")
def test_a_function_shows_its_stages_while_the_libraries_are_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    shown = capsys.readouterr()
    assert re.search(r"^choosing bits: \d/10 matrices\n", shown.err, re.MULTILINE)
    assert shown.out == ""
    assert displayed.get() is None
    with StageProgress():
        work()  # which its caller shows already
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) >= 2


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("value", ["0", "off"])
def test_the_environment_silences_it(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SILENCED, value)
    work()
    assert capsys.readouterr().err == ""


def test_what_shows_nothing_loads_no_rich() -> None:
    code = (
        "import sys\nfrom gralora_fx.base.progress.console import CommandProgress\n"
        "from gralora_fx.base.progress.stages import timed\n"
        "with CommandProgress(), timed('opening'): pass\n"
        "assert not {'rich.console', 'rich.progress'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, SILENCED: "0"})


def test_a_terminal_may_have_counts_alone() -> None:
    code = (
        "from gralora_fx.base.progress.console import StageProgress\n"
        "from gralora_fx.base.progress.stages import counted\n"
        "with StageProgress(): [list(counted([1, 2], name, 'files')) for name in ('reading', 'writing')]"
    )
    shown = plain_lines(in_terminal([sys.executable, "-c", code], 60, GRALORA_FX_PROGRESS="1"))
    assert [line.split()[0] for line in shown if line][-1] == "total"


@pytest.mark.parametrize("columns", [60, 100])
def test_a_terminal_has_every_stage_with_its_time_and_bars_while_it_counts(columns: int) -> None:
    code = "from test_heartbeat import work; work()"
    lines = plain_lines(in_terminal([sys.executable, "-c", code], columns, GRALORA_FX_PROGRESS="1"))
    assert any(re.search(r"choosing bits .*\d/10 matrices", line) for line in lines)
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines if line][-1] == "converting"  # whose time is the total


def test_a_terminal_has_the_total_of_several_stages() -> None:
    code = (
        "from gralora_fx.base.progress.console import StageProgress\n"
        "from gralora_fx.base.progress.stages import timed\n"
        "with StageProgress():\n    for name in ('open', 'read'):\n        with timed(name): pass"
    )
    lines = plain_lines(in_terminal([sys.executable, "-c", code], 80, GRALORA_FX_PROGRESS="1"))
    assert [line.split()[0] for line in lines if line][-3:] == ["open", "read", "total"]


def test_make_says_that_an_installation_goes_on(tmp_path: Path) -> None:
    """The Makefile's own part, before Python runs: the recipe of a command that shows nothing."""
    text = (ROOT / "Makefile").read_text()
    saying = text[text.index("define saying") : text.index("endef") + len("endef")]
    rules = (
        "ok:\n\t$(call saying,installing [x],sleep 1)\n\t@echo done\nbad:\n\t$(call saying,failing,false)\n\t@echo no\n"
    )
    (tmp_path / "Makefile").write_text(saying.replace("sleep 15", "sleep 0.2") + f"\n{rules}")
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
def test_quiet_blocks_silence_their_own_threads_alone_and_leave_the_process_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The block that begins first ends first, while the other thread's is still silent."""
    before = logging.root.manager.disable, sys.stdout, sys.stderr, warnings.filters[:], gc.get_threshold()
    library, begun, may_end = logging.getLogger("library"), threading.Event(), threading.Event()

    def work() -> None:
        with quiet(), gc_pause():
            begun.set()
            may_end.wait(60)
            library.warning("of the silent thread")
            warnings.warn("of the silent thread", UserWarning, stacklevel=1)

    with ThreadPoolExecutor(1) as pool:
        with quiet(), gc_pause():
            done = pool.submit(work)
            begun.wait(60)
            library.warning("of a silent block")
        assert (logging.root.manager.disable, sys.stdout, sys.stderr) == before[:3]
        library.warning("of this thread")
        with pytest.warns(UserWarning, match="of this thread"):
            warnings.warn("of this thread", UserWarning, stacklevel=1)
        may_end.set()
        done.result()
    assert [record.message for record in caplog.records] == ["of this thread"]
    after = logging.root.manager.disable, sys.stdout, sys.stderr, warnings.filters[:], gc.get_threshold()
    assert after == before


def test_quiet_blocks_draw_no_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        assert list(tqdm(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_command_shows_what_the_package_logs_beside_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    with CommandProgress(), timed("opening"):
        logging.getLogger("gralora_fx.service.engines").info("no prefix cache: steps are too short")
    shown = capsys.readouterr().err
    assert shown.splitlines().count("no prefix cache: steps are too short") == 1
    assert "opening: 0.0 s" not in shown
