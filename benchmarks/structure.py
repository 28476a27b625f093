"""The size of the source, the files that a job loads, and a reader's walks: a trace, an export, a request.

A walk is the package's functions in the order of their first call; reading one opens its file. A return is a step back
to a file that was opened before and left. A climb opens a new file of a later stage, by the import order in
`tests/test_import_order.py`, than the file before it.
"""

from __future__ import annotations

import ast
import contextlib
import json
import runpy
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import uvicorn
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks import loaded_files
from benchmarks.harness import Claim, Report, Table, progress
from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.core.config.service_settings import ConnectionLimits, ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.server import bind, limited

_ROOT = Path(__file__).parents[1]
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
}
_MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str | None]] = {
    "BERT": (lambda: BertForSequenceClassification(BertConfig(**_SIZES)), None),
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, pad_token_id=0)), "text-generation-with-past"),
}
_LINES, _FILES, _MEDIAN, _RETURNS, _CLIMBS = 64_000, 360, 120, 30, 20  # targets
_OPENED = {"trace": 30, "export": 80, "request": 22}  # files of a walk


def run() -> Report:
    """Count the source's lines and files, and walk through two traces, two exports and a request."""
    report = Report("structure", "structure: the size of the source, and walks through it")
    _count_lines(report)
    loaded_files.add_to(report)
    sys.path.insert(0, str(_ROOT / "tests"))  # which the test of the import order imports from
    order = runpy.run_path(str(_ROOT / "tests" / "test_import_order.py"))
    rows: list[dict[str, Any]] = []
    for label, (make, task) in _MODELS.items():
        progress(f"structure, {label}")
        model = make().eval()
        traced = trace(model, task=task)  # the first one triggers lazy imports
        walk = Walk()
        with walk.recorded():
            trace(model, task=task)
        rows.append(walk.row(f"trace, {label}", order))
        report.claims.append(walk.opened("trace", label))
        report.claims.append(Claim(f"trace, {label}: returns", walk.returns, at_most=_RETURNS))
        adapted = rewrite(traced, GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", init_weights=False))
        with tempfile.TemporaryDirectory() as folder:
            rows += _walk_exports(report, label, adapted, Path(folder), order)
            if task is not None:
                rows += [_walk_request(report, Path(folder, mode), order) for mode in ("merged", "data")]
    report.tables.append(Table("walks", rows))
    return report


def _count_lines(report: Report) -> None:
    """Return a table of the source's lines by kind, and claims on its size."""
    files = [file for folder in ("gralora_fx", "exporters") for file in (_ROOT / folder).rglob("*.py")]
    files = sorted({file.resolve() for file in files})
    kinds: Counter[str] = Counter()
    lengths = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        kinds.update(_kinds(text))
        lengths.append(len(text.splitlines()))
    report.tables.append(Table("lines", [{"kind": kind, "lines": count} for kind, count in kinds.most_common()]))
    report.claims += [
        Claim("lines", sum(lengths), at_most=_LINES),
        Claim("files", len(files), at_most=_FILES),
        Claim("lines of the median file", statistics.median(lengths), at_least=_MEDIAN),
    ]


def _kinds(text: str) -> list[str]:
    """Return each line's kind: docstring, import, comment, code, or blank."""
    lines = text.splitlines()
    kinds = ["blank" if not line.strip() else "comment" if line.strip().startswith("#") else "code" for line in lines]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                _mark(kinds, node.body[0], "docstring")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            _mark(kinds, node, "import")
    return kinds


def _mark(kinds: list[str], node: ast.stmt, kind: str) -> None:
    assert node.end_lineno is not None
    kinds[node.lineno - 1 : node.end_lineno] = [kind] * (node.end_lineno - node.lineno + 1)


@dataclass
class Walk:
    """The package's functions in the order of their first call."""

    files: list[Path] = field(default_factory=list)  # the file of each, relative to the repository
    _seen: set[CodeType] = field(default_factory=set)
    _is_on: bool = False

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the calls in this thread, and in those that it starts."""
        sys.setprofile(self._note)
        threading.setprofile(self._note)
        self._is_on = True
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def begin(self) -> None:
        """Start a new recording."""
        self.files, self._seen, self._is_on = [], set(), True

    def end(self) -> None:
        """Stop recording."""
        self._is_on = False

    @property
    def returns(self) -> int:
        """Number of returns to a file that was opened before and left."""
        steps = [file for at, file in enumerate(self.files) if not at or file != self.files[at - 1]]
        return len(steps) - len(set(steps))

    def climbs(self, order: dict[str, Any]) -> int:
        """Return the number of opened files of a later stage than the one before, by the order of imports."""
        stages = [order["stage"](order["module_name"](_ROOT / file)) for file in self.files]
        opened = [at for at, file in enumerate(self.files) if at and file not in self.files[:at]]
        return sum(stages[at] > stages[at - 1] for at in opened)

    def opened(self, kind: str, label: str) -> Claim:
        """Return the claim on the number of files that a walk of a kind of `_OPENED` opens."""
        return Claim(f"{kind}, {label}: files", len(set(self.files)), at_most=_OPENED[kind])

    def row(self, name: str, order: dict[str, Any]) -> dict[str, Any]:
        """Return its row in the table."""
        return {
            "walk": name,
            "files": len(set(self.files)),
            "functions": len(self.files),
            "returns": self.returns,
            "climbs": self.climbs(order),
        }

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not self._is_on or code in self._seen or code.co_name.startswith("<"):
            return
        self._seen.add(code)
        file = Path(code.co_filename)
        if file.is_absolute() and file.is_relative_to(_ROOT):
            file = file.resolve().relative_to(_ROOT)
            if file.parts[0] in ("gralora_fx", "exporters"):
                self.files.append(file)


def _walk_exports(
    report: Report, label: str, model: GraloraModel, folder: Path, order: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for mode in ("merged", "data"):
        export_onnx(model, folder / "first", adapters=mode, tokenizer=_tokenizer())  # type: ignore[arg-type]
        walk = Walk()
        with walk.recorded():
            export_onnx(model, folder / mode, adapters=mode, tokenizer=_tokenizer())  # type: ignore[arg-type]
        if mode == "merged":
            report.claims.append(Claim(f"export_onnx, {label}: climbs", walk.climbs(order), at_most=_CLIMBS))
            report.claims.append(walk.opened("export", label))
        yield walk.row(f"export_onnx, {label}, {mode}", order)


def _walk_request(report: Report, directory: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Walk a streamed completion to its first event; the service has answered one before."""
    walk = Walk()
    body = json.dumps(
        {"model": "default" if directory.name == "data" else directory.name, "prompt": "a b", "stream": True}
    )
    with walk.recorded(), _served(directory) as address:
        for _ in range(2):
            walk.begin()
            connection = HTTPConnection(*address)
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.readline()
            walk.end()
            assert response.status == 200, response.read()
            response.read()
            connection.close()
            time.sleep(0.2)  # until the work after an answer has ended
    report.claims.append(walk.opened("request", directory.name))
    return walk.row(f"request, {directory.name}", order)


@contextlib.contextmanager
def _served(directory: Path) -> Iterator[tuple[str, int]]:
    """Serve an export in this process within the block; yield the address."""
    protocol = limited(ConnectionLimits(), None)
    server = uvicorn.Server(
        uvicorn.Config(create_app(ServiceSettings(directory)), http=protocol, ws="none", log_level="error")
    )
    sockets = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(20)


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: index for index, letter in enumerate("_^abcdefghijklmnopqrstuvwxyz")}
    words = Tokenizer(WordLevel({**letters, "?": len(letters)}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="_", eos_token="^", unk_token="?")
