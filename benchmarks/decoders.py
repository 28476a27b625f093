"""The decoders that pass: every causal language model of transformers, tiny and random, from trace to greedy tokens.

Each is built from its default configuration with every size set small, traced with a cache, rewritten with adapters on
all linear layers, exported with verification, and its greedy tokens on ONNX Runtime are compared with those of
transformers' own generation; so are answers to prompts of unequal length, together and alone. Each runs in its own
process with a time limit.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.apart import Outcome, survey
from benchmarks.harness import Claim, Report, Table
from tests.architectures.decoder_check import Checked, check_decoder
from tests.architectures.tiny_decoders import decoder_classes, tiny_decoder

Found = Outcome[Checked]


def run(only: Sequence[str] = (), workers: int = 2) -> Report:
    """Check every decoder, or the classes in `only`, with `workers` concurrent checks."""
    kind = "causal language model"
    return _report(survey(decoder_classes(), only, _check, _verdict, kind=kind, module=__name__, at_once=workers))


def known_to_genai() -> frozenset[str]:
    """Return the classes in the source of onnxruntime-genai's builder; empty if it is not installed."""
    spec = find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        return frozenset()
    source = (Path(spec.origin).parent / "models" / "builder.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r'config\.architectures\[0\] == "(\w+)"', source))


def _check(name: str, note: Callable[[str], None]) -> Checked:
    note("check")
    with tempfile.TemporaryDirectory() as directory:
        return check_decoder(tiny_decoder(name), Path(directory) / "export")


def _verdict(result: Found) -> str:
    return "holds" if _holds(result) else _reason(result)


def _holds(result: Found) -> bool:
    """Return whether an architecture was exported and verified, and generates the model's tokens."""
    return result.result is not None and result.result.holds


def _reason(result: Found) -> str:
    answers = "" if result.result is None else result.result.answers
    return result.reason or answers or "its greedy tokens are not the model's"


def _report(entries: Sequence[Found]) -> Report:
    known = known_to_genai()
    rows = [
        {
            "architecture": result.name,
            "result": _verdict(result),
            **_how(result.result),
            "genai": "knows it" if result.name in known else "",
            "seconds": result.seconds,
        }
        for result in entries
    ]
    holding = [result for result in entries if _holds(result)]
    report = Report("decoders", f"decoders: {len(holding)} of {len(entries)} hold", [Table("every causal LM", rows)])
    plain = sorted({f"{r.name}: {why}" for r in entries if r.result for why in r.result.plain.values()})
    report.notes += [f"not fused: {line}" for line in plain]
    report.notes.append(f"genai: classes that the builder of onnxruntime-genai {version('onnxruntime-genai')} takes")
    unfused = [r for r in holding if r.name in known and r.result and (r.result.plain or not r.result.fused)]
    report.claims = [
        Claim("decoders that hold", float(len(holding)), at_least=170),
        Claim("decoders that genai knows and hold with attention not fused", float(len(unfused)), at_most=0),
    ]
    return report


def _how(checked: Checked | None) -> dict[str, str]:
    """Describe what a step keeps, its operators, and what is not fused and why; empty without an export."""
    if checked is None:
        return dict.fromkeys(("keeps", "operators", "not fused", "rows of their own lengths"), "")
    counts = Counter(checked.plain.values())
    return {
        "keeps": ", ".join(checked.cache),
        "operators": ", ".join(f"{count} {name}" for name, count in sorted(checked.operators.items())),
        "not fused": "; ".join(f"{count} x {why}" if count > 1 else why for why, count in counts.items()),
        "rows of their own lengths": checked.one_length or "yes",
    }
