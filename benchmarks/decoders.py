"""Which decoders hold: every causal language model of transformers, tiny and random, from trace to greedy tokens.

Each is built from its default configuration with every size set small, traced with a cache, rewritten with adapters on
all linear layers, exported with verification, and its greedy tokens on ONNX Runtime are compared with those of
transformers' own generation. Each runs in a process of its own under a time limit.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.decoder_check import Checked, check_decoder
from benchmarks.harness import Claim, Report, Table, progress
from benchmarks.tiny_decoders import decoder_classes, tiny_decoder
from gralora_fx.errors import first_line

AT_ONCE = 2
LIMIT = 90  # seconds of processor time an architecture may take
PATIENCE = 10 * LIMIT  # seconds on the clock, however busy the machine is


@dataclass(frozen=True)
class Found:
    """What was found of one architecture: a result, or the reason why there is none."""

    name: str
    seconds: float
    checked: Checked | None = None
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether it was exported, verified, and gives the model's tokens."""
        return self.checked is not None and self.checked.equal


def run(only: Sequence[str] = ()) -> Report:
    """Check every decoder, or those named.

    Args:
        only: Class names; none for all.

    Raises:
        ValueError: A name is not a causal language model of transformers.
    """
    names = list(decoder_classes())
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f"transformers has no causal language model {', '.join(unknown)}")
    names = [name for name in names if not only or name in only]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # the imports, once
    entries: list[Found] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for result in pool.map(lambda name: _apart(context, name), names):
            entries.append(result)
            verdict = "holds" if result.holds else _reason(result)
            progress(f"{len(entries)} of {len(names)}, {result.name}, {result.seconds:.0f} s: {verdict}")
    return _report(entries)


def known_to_genai() -> frozenset[str]:
    """The classes that onnxruntime-genai's builder supports, read from its source; empty if it is not installed."""
    spec = find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        return frozenset()
    source = (Path(spec.origin).parent / "models" / "builder.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r'config\.architectures\[0\] == "(\w+)"', source))


def _apart(context: Any, name: str) -> Found:
    """Check one architecture in another process, which is ended at the limit."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(name, sender), daemon=True)
    begin = time.perf_counter()
    process.start()
    sender.close()
    try:
        if receiver.poll(PATIENCE):
            result: Found = receiver.recv()
            return result
        return Found(name, PATIENCE, reason=f"it takes more than {PATIENCE} s")
    except EOFError:
        process.join()
        is_slow = process.exitcode == -signal.SIGXCPU
        reason = f"it takes more than {LIMIT} s" if is_slow else f"its process ended with {process.exitcode}"
        return Found(name, time.perf_counter() - begin, reason=reason)
    finally:
        process.kill()
        process.join()
        receiver.close()


def _check(name: str, sender: Connection) -> None:
    import torch
    import transformers

    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    begin = time.process_time()
    checked, reason = None, ""
    try:
        with tempfile.TemporaryDirectory() as directory:
            checked = check_decoder(tiny_decoder(name), Path(directory) / "export")
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the reason
        reason = f"{type(error).__name__}: {first_line(error)}"
    sender.send(Found(name, time.process_time() - begin, checked, reason))


def _reason(result: Found) -> str:
    return result.reason or "its greedy tokens are not the model's"


def _report(entries: Sequence[Found]) -> Report:
    known = known_to_genai()
    rows = []
    for result in entries:
        checked = result.checked
        rows.append(
            {
                "architecture": result.name,
                "result": "holds" if result.holds else _reason(result),
                "fused": checked.fused if checked else "",
                "not fused": len(checked.plain) if checked else "",
                "genai": "knows it" if result.name in known else "",
                "seconds": result.seconds,
            }
        )
    holding = [result for result in entries if result.holds]
    report = Report("decoders", f"decoders: {len(holding)} of {len(entries)} hold", [Table("every causal LM", rows)])
    plain = sorted({f"{r.name}: {why}" for r in entries if r.checked for why in r.checked.plain.values()})
    report.notes += [f"not fused: {line}" for line in plain]
    report.notes.append(f"genai: classes that the builder of onnxruntime-genai {version('onnxruntime-genai')} takes")
    unfused = [r for r in holding if r.name in known and r.checked and (r.checked.plain or not r.checked.fused)]
    report.claims = [
        Claim("decoders that hold", float(len(holding)), at_least=100),
        Claim("decoders that genai knows and hold with attention not fused", float(len(unfused)), at_most=0),
    ]
    return report
