"""A thousand adapters on disk, 32 in memory: the cost of a miss over a hit, and the service's memory.

SmolLM2-135M in float32 with GraLoRA adapters of r=16 on all seven projections, 20 MB each, as files of a root. Clients
choose them by Zipf's law, one client alone and four at a time, and measure the time to a stream's first token. Before
each request a client asks whether its adapter is loaded. The default is a smaller run; `--adapters 1000` is the full
one. Then steps of rows with small adapters are measured with and without one of a large rank.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from benchmarks.http_clients import HOST, served
from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.format.adapter_format import read_parameters
from gralora_fx.format.adapter_paths import SUFFIX, record_path
from gralora_fx.format.export_directory import ADAPTERS
from gralora_fx.run.engine.adapters import LoadedAdapter
from gralora_fx.run.sessions.adapter_file import read_record, record_in_memory, write_tensors
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot
from gralora_fx.service.adapter_store.adapter_versions import RootFiles
from gralora_fx.service.engines import open_engine
from gralora_fx.service.metrics import Metrics
from gralora_fx.serving import OrtModel, load

RUNS, NAME = Path("runs/many_adapters"), "adapter"
RANK, LOADED, PROMPT, NEW = 16, 32, 24, 8
BEYOND, GROWTH = 0.2, 1.05
ROWS, SMALL, LARGE = 8, 8, 64  # of the steps
_MIB = 2**20


def run(adapters: int = 200, seconds: float = 60.0) -> Report:
    """Measure requests for adapters on disk, `seconds` of one client and of four, and steps of mixed ranks."""
    report = Report("many-adapters", f"{adapters} adapters on disk, {LOADED} in memory: SmolLM2-135M, r={RANK}")
    base = smollm2.base(RUNS / "base")
    export = _export(base)
    root = _root(export, adapters)
    options = ["--adapter-root", str(root), "--max-adapters", str(LOADED), "--threads", "2", "--max-context", "256"]
    options += ["--prefix-cache", "none"]  # a prefix cache would first fill its own bound
    seen: dict[str, _Seen] = {}
    with served(export, *options) as (port, process):
        memory = _Memory(process)
        progress(f"the first {LOADED} adapters")
        _warm_up(port, adapters)
        for name, clients in (("one client", 1), ("four clients", 4)):
            progress(f"{name}, {seconds:g} s")
            memory.begin(name)
            seen[name] = _ask(port, adapters, clients, seconds)
        memory.end()
    report.tables.append(Table("time to the first token, ms", [one.row(name) for name, one in seen.items()]))
    report.tables.append(Table("resident memory over time, MiB", memory.rows()))
    for name, one in seen.items():
        text = f"{name}: share of misses at most {BEYOND * 1e3:g} ms above the median hit"
        report.claims.append(Claim(text, one.within(BEYOND), at_least=0.95))
    lost = sum(count for one in seen.values() for status, count in one.statuses.items() if status != 200)
    report.claims.append(Claim("requests without an answer", lost, at_most=0))
    report.claims.append(Claim("memory at the end, times that once it was full", memory.growth(), at_most=GROWTH))
    _measure_loads(report, export, root, min(adapters, 4 * ROWS))
    shutil.rmtree(root)  # 20 MB each
    _measure_ranks(report, export)
    return report


@dataclass
class _Seen:
    """The clients' measurements."""

    hits: list[float] = field(default_factory=list)  # seconds to the first token where the adapter was in memory
    misses: list[float] = field(default_factory=list)  # the others
    statuses: Counter[int] = field(default_factory=Counter)  # answers by status

    def row(self, name: str) -> dict[str, Any]:
        hits, misses = ([1e3 * seconds for seconds in times] for times in (self.hits, self.misses))
        return {
            "clients": name,
            "requests": sum(self.statuses.values()),
            "misses": len(misses),
            "hit, median": statistics.median(hits),
            "hit, 95 %": float(np.quantile(hits, 0.95)),
            "miss, median": statistics.median(misses),
            "miss, 95 %": float(np.quantile(misses, 0.95)),
        }

    def within(self, seconds: float) -> float:
        """Return the share of misses that are at most some seconds above the median hit."""
        most = statistics.median(self.hits) + seconds
        return sum(miss <= most for miss in self.misses) / len(self.misses)


class _Memory:
    """The resident memory of a process, read every second."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._samples = process, list[tuple[str, float]]()
        self._name, self._is_done = "", threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def begin(self, name: str) -> None:
        """Begin a phase."""
        self._name = name
        if not self._thread.is_alive():
            self._thread.start()

    def end(self) -> None:
        """End."""
        self._is_done.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._is_done.wait(1.0):
            self._samples.append((self._name, self._process.memory_info().rss / _MIB))

    def rows(self) -> list[dict[str, Any]]:
        """Return twelve moments as rows."""
        step = max(len(self._samples) // 12, 1)
        moments = range(step - 1, len(self._samples), step)
        return [{"second": at + 1, "phase": self._samples[at][0], "MiB": self._samples[at][1]} for at in moments]

    def growth(self) -> float:
        """Return the memory of the last tenth of the time relative to that of the first."""
        sizes = [size for _, size in self._samples]
        tenth = max(len(sizes) // 10, 1)
        return statistics.median(sizes[-tenth:]) / statistics.median(sizes[:tenth])


def _warm_up(port: int, adapters: int) -> None:
    """Fill the memory with adapters, the last one first, in concurrent rows."""
    names = [f"{NAME}{number}" for number in reversed(range(min(LOADED + ROWS, adapters)))]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: _first_token(port, name, [5] * PROMPT), names))


def _ask(port: int, adapters: int, clients: int, seconds: float) -> _Seen:
    """Request completions by Zipf's law, for a time."""
    weights = 1 / np.arange(1, adapters + 1)
    weights /= weights.sum()
    seen, lock, end = _Seen(), threading.Lock(), time.monotonic() + seconds

    def talk(number: int) -> None:
        generator = np.random.default_rng(number + 10 * clients)
        while time.monotonic() < end:
            name = f"{NAME}{generator.choice(adapters, p=weights)}"
            prompt = generator.integers(3, 1000, PROMPT).tolist()
            is_loaded = json.loads(_get(port, f"/v1/models/{name}"))["loaded"]
            status, first = _first_token(port, name, prompt)
            with lock:
                seen.statuses[status] += 1
                (seen.hits if is_loaded else seen.misses).append(first)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def _get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body


def _first_token(port: int, name: str, prompt: Sequence[int]) -> tuple[int, float]:
    """Read a streamed answer to its end; return its status, and the seconds until its first event."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    body = {"model": name, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True}
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    line = response.readline()
    first = time.perf_counter() - start
    rest = line + response.read()
    connection.close()
    is_whole = rest.rstrip().endswith(b"[DONE]") and b'"error"' not in rest
    return response.status if response.status != 200 or is_whole else 0, first


def _export(base: Path) -> Path:
    """Make an export without adapters, and one adapter beside it, once."""
    path = RUNS / "data_fp32"
    if not path.is_dir():
        progress(f"export {path.name}")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        config = GraloraConfig(r=RANK, alpha=2, target_modules=smollm2.PROJECTIONS, init_weights=False)
        torch.manual_seed(0)
        adapted = rewrite(trace(model, task="text-generation-with-past"), config, adapter_name="template")
        export_onnx(adapted, path, tokenizer=base, verify=False, adapters="data")
        (path / ADAPTERS).rename(RUNS / "template")
    return path


def _root(export: Path, adapters: int) -> Path:
    """Write adapters of different values, each a file with its record."""
    root, template = RUNS / "root", RUNS / "template" / f"template{SUFFIX}"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    record = read_record(template)
    content = np.fromfile(template, np.uint8)
    parameters = read_parameters(content)
    for number in range(adapters):
        path = root / f"{NAME}{number}{SUFFIX}"
        if number % 100 == 0:
            progress(f"adapters {number} to {min(number + 100, adapters) - 1}")
        for name, array in parameters.items():
            if name.endswith("A") and array.size:
                array[...] = np.roll(array, 1 + number % 7, axis=0) * np.float32(1 + 1e-6 * number)
        path.write_bytes(content.data)
        own = replace(record, name=path.stem, file_sha256=hashlib.sha256(content.data).hexdigest())
        record_path(path).write_text(own.to_json(), encoding="utf-8")
    return root


def _measure_loads(report: Report, export: Path, root: Path, adapters: int) -> None:
    """Measure the CPU time of loads, more reliable than wall-clock time on a shared machine."""
    progress("loads in this process")
    engine = open_engine(ServiceSettings(export, max_adapters=ROWS, max_context=256, prefix_cache="none"), Metrics())
    store, files = engine.models, RootFiles(AdapterRoot.of(root), export)
    spent: list[float] = []

    def work(name: str) -> None:
        began = time.thread_time()
        store.release(store.load_found(name, files.at(f"{name}{SUFFIX}")).key)
        spent.append(1e3 * (time.thread_time() - began))

    for number in range(adapters):
        store.change(partial(work, f"{NAME}{number}")).result()
    store.close()
    full = sorted(spent[ROWS:])
    row = {"loads": len(full), "median": statistics.median(full), "95 %": full[int(0.95 * len(full))], "most": full[-1]}
    report.tables.append(Table("processor time of a load in the place of another, ms", [row]))


def _measure_ranks(report: Report, export: Path) -> None:
    """Measure steps of rows with small adapters, alone and beside a large one, in one stack and as rows are run."""
    progress("steps of mixed ranks")
    model = load(export, threads=2)
    adapters: dict[str, LoadedAdapter] = {}
    for number in range(ROWS):
        _add(model, adapters, f"small{number}", SMALL)
    _add(model, adapters, "large", LARGE)
    names = [f"small{number}" for number in range(ROWS - 1)]

    def case(name: str, last: str, weights: int | None) -> Case[Any]:
        decoder: Any = model.decoder(rows=ROWS, capacity=512, chunk=8)
        if weights is not None:
            decoder._row_stacks._weights = weights
        rows = [decoder.open(adapter) for adapter in (*names, last)]
        decoder.step({row: [5] * 8 for row in rows})
        return Case.of(name, lambda: decoder.step({row: [7] for row in rows}))

    together, apart = "1 of r=64, all rows at once", "1 of r=64, as rows are run"
    cases = [
        case("all of r=8", f"small{ROWS - 1}", None),
        case(together, "large", 2**60),
        case(apart, "large", None),
        case("1 of r=64, always apart", "large", 0),
    ]
    times = measure(cases, iterations=12)
    report.tables.append(Table(f"a step of {ROWS} rows", [times.row(each.name, "all of r=8") for each in cases]))
    ratio = times.ratio(apart, together)
    report.claims.append(Claim("a step with one of r=64, in times of one stack", ratio.median_of_pairs, at_most=1.05))


def _add(model: OrtModel, adapters: dict[str, LoadedAdapter], name: str, rank: int) -> None:
    """Load an adapter of random values."""
    inputs = model.adapters.inputs()
    generator = np.random.default_rng(len(adapters))
    shapes = {key: shape for site in inputs.sites for key, shape in site.shapes(inputs.k, rank, 0).items()}
    tensors = {
        key: 0.01 * generator.standard_normal([int(n) for n in shape], np.float32) for key, shape in shapes.items()
    }
    path = RUNS / "ranks" / f"{name}{SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, tensors)
    record = record_in_memory(name, tensors, {}, inputs, model.manifest.base_fingerprint)
    content = path.read_bytes()
    record = replace(record, size=len(content), file_sha256=hashlib.sha256(content).hexdigest())
    record_path(path).write_text(record.to_json(), encoding="utf-8")
    model.load_adapter(name, path)
    adapters[name] = model.adapters[name]
    shutil.rmtree(path.parent)
