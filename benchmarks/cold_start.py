"""From process start to the first token: the runtime alone compared with onnxruntime-genai; and its size on disk.

SmolLM2-135M in int4, the same directory for both. Each process imports, opens the model, reads a prompt and exits.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import smollm2
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx.base.sources.model_files import EXPORT_FILE

RUNS, ROOT = Path("runs/cold_start"), Path(__file__).parents[1]
SLOWER, DISK, MB = 1.2, 400, 10**6  # times onnxruntime-genai's seconds, and MB of the environment
_PROMPT = "The capital of France is"
_OURS = f"""
import sys
from gralora_fx.serving import load
print(load(sys.argv[1]).generate({_PROMPT!r}, max_new_tokens=1))
"""
_GENAI = f"""
import sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
parameters.set_search_options(max_length=64)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode({_PROMPT!r}))
generator.generate_next_token()
print(tokenizer.decode([generator.get_sequence(0)[-1]]))
"""
_PEAK = """
status = open("/proc/self/status").read().split()
print(int(status[status.index("VmHWM:") + 1]) / 1000)
"""


def run(iterations: int = 15) -> Report:
    """Measure `iterations` new processes of each side, in turns."""
    report = Report("cold-start", "to the first token of SmolLM2-135M in int4, a new process each time")
    path, python = _export(), _runtime()
    sides = {"gralora-fx": (python, _OURS), "onnxruntime-genai": (Path(sys.executable), _GENAI)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    for iteration in range(iterations + 1):
        progress(f"{iteration} of {iterations}")
        for name, (interpreter, program) in sides.items():
            begin = time.perf_counter()
            done = subprocess.run(
                [interpreter, "-c", program + _PEAK, path.absolute()],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            if iteration:  # the first reads files that are not in memory yet
                seconds[name].append(time.perf_counter() - begin)
            peaks[name] = float(done.stdout.splitlines()[-1])
    ratio = Ratio.between(seconds["gralora-fx"], seconds["onnxruntime-genai"])
    rows = [
        {"": name, "s": statistics.median(seconds[name]), "least s": min(seconds[name]), "most MB": peaks[name]}
        for name in sides
    ]
    report.tables.append(Table("a process from its start to its end", rows))
    size = sum(file.stat().st_size for file in python.parents[1].rglob("*") if file.is_file()) / MB
    report.tables.append(Table("the environment of the runtime alone", [{"MB": size}]))
    report.claims += [
        Claim("over onnxruntime-genai, seconds to the first token", ratio.median_of_pairs, at_most=SLOWER),
        Claim("MB of the environment", size, at_most=DISK),
    ]
    return report


def _export() -> Path:
    """Make the export, once, in its own process."""
    path = RUNS / "int4"
    if not (path / EXPORT_FILE).is_file():
        base = smollm2.base(RUNS / "base")
        options = ["--model", base, "--output", path, "--quantize", "int4", "--no-verify"]
        subprocess.run([sys.executable, "-m", "gralora_fx.cli", "export", *options], check=True)
    return path


def _runtime() -> Path:
    """Return the interpreter of an environment with the runtime alone, created once."""
    place = (RUNS / "environment").absolute()
    python = place / "bin" / "python"
    if not (place / "lib").is_dir():
        progress("install")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        constraints, requirements = ROOT / "docs/constraints/0.1.0.txt", ROOT / "examples/deploy/runtime.txt"
        subprocess.run([*pip, "--constraint", constraints, "--requirement", requirements], check=True)
    return python
