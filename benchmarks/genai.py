"""onnxruntime-genai as a side of a benchmark: its builder, and the seconds of each token of a graph that it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def build(model: Path, output: Path, precision: str, cache: Path, **extra: str) -> Path:
    """Build a checkpoint's graph, `fp32` or `int4`, with onnxruntime-genai's builder, in its own process.

    `output` is emptied first, `cache` is for the builder's downloads, and `extra` has its extra options.
    """
    options = ["-m", model, "-o", output, "-p", precision, "-e", "cpu", "-c", cache]
    options += ["--extra_options", *(f"{key}={value}" for key, value in extra.items())] if extra else []
    run_process(["-m", "onnxruntime_genai.models.builder", *options], output)
    return output


def run_process(arguments: Sequence[Any], output: Path) -> None:
    """Run Python with arguments, its output directory emptied first.

    Raises:
        RuntimeError: The process failed.
    """
    shutil.rmtree(output, ignore_errors=True)
    done = subprocess.run([sys.executable, "-W", "ignore", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments[:2]} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def open_model(directory: Path, threads: int) -> Any:
    """Open a graph with onnxruntime-genai, with a number of threads."""
    config = og.Config(str(directory))
    options = {"intra_op_num_threads": threads, "log_severity_level": 4}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def token_times(
    model: Any, ids: np.ndarray[Any, Any], steps: int, *, chunk: int = 0, adapter: tuple[Any, str] | None = None
) -> list[float]:
    """Return the seconds of a prompt `[1, length]`, then of each of `steps` further tokens.

    The prompt is read in pieces of `chunk` tokens, 0 for all at once. `adapter` is the model's adapters and the name of
    the active one.
    """
    parameters = og.GeneratorParams(model)
    length = ids.shape[1] + steps + 1
    chunks = {"chunk_size": chunk} if chunk else {}
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False, **chunks)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        generator.set_active_adapter(*adapter)

    def prompt() -> None:
        generator.append_tokens(ids)
        generator.generate_next_token()

    return [seconds_of(prompt), *(seconds_of(generator.generate_next_token) for _ in range(steps))]
