"""The harness of all benchmarks: all sides in one process, in turns, so that noise affects all of them alike.

The speed of a shared machine changes from second to second, so only neighbouring runs are comparable: each iteration
    runs every case once, in rotating order, and the ratio of two cases is reported twice, as the ratio of their medians
    and as the median of the ratios within each iteration.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch.profiler import ProfilerActivity, profile

State = TypeVar("State")
console = Console(width=None if Console().is_terminal else 140)

_SETTLING = 4.0  # seconds
_PAUSE = 0.02  # seconds in which the last case's threads stop spinning, which takes a whole core
_PACKAGES = ("gralora-fx", "torch", "transformers", "peft", "onnxruntime", "onnxruntime-ep-openvino", "numpy")


@dataclass(frozen=True)
class Case(Generic[State]):
    """One side of a comparison."""

    name: str
    run: Callable[[State], object]  # what is timed
    setup: Callable[[], State]  # creates the state that `run` takes; once, untimed
    # undoes a run and returns the state for the next; after each run, untimed
    reset: Callable[[State], State] = lambda state: state

    @classmethod
    def of(cls, name: str, function: Callable[[], object]) -> Case[None]:
        """Return a case without a state: `function` has no side effects."""
        return Case(name, lambda _: function(), lambda: None)


@dataclass(frozen=True)
class Ratio:
    """The ratio of one series of times to another, iteration by iteration."""

    of_medians: float
    median_of_pairs: float
    low: float
    high: float

    @classmethod
    def between(cls, upper: Sequence[float], lower: Sequence[float]) -> Ratio:
        """Return the ratio `upper / lower` of two series from the same iterations."""
        pairs = [a / b for a, b in zip(upper, lower, strict=True)]
        of_medians = statistics.median(upper) / statistics.median(lower)
        return cls(of_medians, statistics.median(pairs), min(pairs), max(pairs))


@dataclass(frozen=True)
class Timings:
    """Seconds of every run, by case; runs with one index belong to one iteration."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Return the median time of a case in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, upper: str, lower: str) -> Ratio:
        """Return the ratio of two cases' times."""
        return Ratio.between(self.seconds[upper], self.seconds[lower])

    def over(self, name: str, base: str) -> tuple[float, ...]:
        """Return the seconds that a case took longer than another, iteration by iteration."""
        return tuple(a - b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))

    def best(self, names: Sequence[str]) -> str:
        """Return the case with the smallest median."""
        return min(names, key=self.median)

    def row(self, name: str, base: str | None = None) -> dict[str, Any]:
        """Return a table row: median, smallest and largest time in ms, and the ratio to the times of `base`."""
        times = self.seconds[name]
        row = {"case": name, "median ms": _ms(self.median(name)), "min": _ms(min(times)), "max": _ms(max(times))}
        if base is not None:
            ratio = self.ratio(name, base)
            row |= {f"/ {base}": ratio.of_medians, "pairwise": ratio.median_of_pairs}
        return row


def measure(cases: Sequence[Case[Any]], *, iterations: int, warmup: int = 2) -> Timings:
    """Return the times of `iterations` runs of each case after `warmup` runs, in turns, without garbage collection."""
    states = [case.setup() for case in cases]
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    gc.collect()
    for iteration in range(-warmup, iterations):
        for position in range(len(cases)):
            index = (position + iteration) % len(cases)
            case = cases[index]
            elapsed = _timed(case.run, states[index])
            states[index] = case.reset(states[index])
            if iteration >= 0:
                seconds[case.name].append(elapsed)
    return Timings({name: tuple(times) for name, times in seconds.items()})


def remove(path: Path) -> None:
    """Remove a file or directory that a case has written, and wait until its memory is returned.

    A virtual machine returns freed pages to its host after a second or two. An earlier writer finds some pages present
    and some gone, and takes half or twice the time, whichever case it is.
    """
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    time.sleep(_SETTLING)


def peak_allocation(function: Callable[[], object]) -> int:
    """Return the peak CPU memory in bytes that a call allocates, beyond what was allocated before it.

    It is counted at torch's allocator, so BLAS scratch memory is not included.
    """
    with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    del kept
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def set_allocator(largest_freed: int) -> bool:
    """Bring glibc's allocator into the state that it reaches after a tensor of a size was freed.

    Larger tensors are then mapped each time, smaller ones come from the heap, and the heap's free end is returned to
    the system if it exceeds twice that size; returned pages fault in again. Otherwise the state depends on earlier
    runs.

    Args:
        largest_freed: Size in bytes; 32 MiB is the largest that glibc adapts to.

    Returns:
        Whether it could be set; it stays until it is set again, and glibc no longer adapts in this process.
    """
    trim_threshold, mmap_threshold = -1, -3
    size = min(largest_freed + 2**13, 2**25)  # with the header, alignment and whole pages
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_threshold, size) and mallopt(trim_threshold, 2 * size))


@dataclass(frozen=True)
class Table:
    """Rows of one shape, each a mapping from column to value; the columns are the first row's."""

    title: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """A claim and its measured value."""

    text: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """True if the value is within its bounds."""
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        """Return a line: the claim, the value and whether it holds."""
        bounds = [f">= {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"<= {self.at_most:g}"] if self.at_most is not None else []
        return f"{'holds' if self.holds else 'FAILS'}: {self.text} {' and '.join(bounds)}: {_shown(self.value)}"


@dataclass
class Report:
    """The results of a benchmark."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Print every table, note and claim."""
        console.rule(self.title)
        host = environment()
        versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items() if version)
        machine = f"{host['cpu']}, {host['threads']} threads on {host['cores']} cores"
        load = f", load {host['load'][0]:.1f}" if host["load"] else ""
        console.print(f"{machine}{load}\n{versions}", highlight=False)
        for table in self.tables:
            drawn = RichTable(title=table.title, title_justify="left")
            for position, column in enumerate(table.rows[0]):
                drawn.add_column(column, justify="right" if position else "left")
            for row in table.rows:
                drawn.add_row(*(_shown(value) for value in row.values()))
            console.print(drawn)
        for line in [*self.notes, *map(str, self.claims)]:
            console.print(line, markup=False, highlight=False)

    def write(self, directory: Path) -> Path:
        """Write `<name>.json`, with the machine and package versions, into a directory; return the file."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        content = dataclasses.asdict(self) | {"environment": environment()}
        content["claims"] = [dataclasses.asdict(claim) | {"holds": claim.holds} for claim in self.claims]
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def environment() -> dict[str, Any]:
    """Return date, machine, threads and package versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def progress(text: str) -> None:
    """Print what is measured next; nothing is printed during a measurement."""
    console.print(f"... {text}", style="dim", highlight=False)


def _timed(run: Callable[[Any], object], state: Any) -> float:
    was_enabled = gc.isenabled()
    gc.disable()
    time.sleep(_PAUSE)
    try:
        start = time.perf_counter()
        result = run(state)
        elapsed = time.perf_counter() - start
    finally:
        if was_enabled:
            gc.enable()
    del result  # after the timing, which excludes freeing a case's result
    return elapsed


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard stderr: the profiler writes notes to the file descriptor itself."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ms(seconds: float) -> float:
    return 1e3 * seconds


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
