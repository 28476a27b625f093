"""`python -m benchmarks [NAME ...]`: run all benchmarks or some, print their tables, write benchmarks/results/."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from gralora_fx.cli.huge_pages import use_huge_pages

NAMES = (
    "merge",
    "fold",
    "forward",
    "encoding",
    "switching",
    "tracing",
    "training",
    "checkpointing",
    "adapter-rows",
    "packed",
    "decoders",
    "encoders",
    "generation",
    "engine",
    "answer-grammars",
    "tool-schemas",
    "prefix-cache",
    "activated",
    "dora-rows",
    "speculation",
    "adapters",
    "streaming",
    "merge-checkpoint",
    "batched",
    "forms",
    "service",
    "service-memory",
    "cold-start",
    "providers",
    "threads",
    "rounding",
    "rounded-training",
    "few_bits",
    "int4-export",
    "clients",
    "traces",
    "many-adapters",
    "batch-lengths",
    "long-prompts",
    "structure",
    "hybrids",
    "experts",
    "huge-pages",
    "vision",
    "image-models",
)
_SURVEYS = ("decoders", "encoders", "image-models")
_LONG = ("streaming-8b",)  # not among all: an hour or more, and 26 GB of disk
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str]) -> int:
    """Run benchmarks by name, or all of them.

    Args:
        arguments: Names of modules in this package, and `--threads N`. On a shared machine, one thread measures best:
            with more, each parallel region waits for the busiest core.

    Returns:
        The exit status: 2 for an unknown name, else 0; the table shows failed checks.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure gralora-fx beside PEFT.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; none for all; {', '.join(_LONG)}"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if left out")
    parser.add_argument("--only", metavar="CLASS,CLASS", help="of a survey: the classes to check; left out for all")
    parser.add_argument("--workers", type=int, help="of a survey: how many classes at a time; 2 if left out")
    parser.add_argument("--seconds", type=float, help="of clients and many-adapters: how long clients send requests")
    parser.add_argument("--adapters", type=int, help="of many-adapters: how many are on disk; 200 if left out")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES + _LONG]
    if unknown:
        print(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(NAMES + _LONG)}", file=sys.stderr)
        return 2
    names = options.names or NAMES
    chosen = {} if options.only is None else {"only": options.only.split(",")}
    chosen |= {} if options.workers is None else {"workers": options.workers}
    if chosen and (len(names) > 1 or names[0] not in _SURVEYS):
        parser.error(f"--only and --workers go with {' or '.join(_SURVEYS)} alone")
    if options.seconds is not None and list(names) not in (["clients"], ["many-adapters"]):
        parser.error("--seconds goes with clients or many-adapters alone")
    if options.adapters is not None and list(names) != ["many-adapters"]:
        parser.error("--adapters goes with many-adapters alone")
    chosen |= {} if options.seconds is None else {"seconds": options.seconds}
    chosen |= {} if options.adapters is None else {"adapters": options.adapters}
    if len(names) > 1:  # each in its own process: memory freed by one would change the next one's allocations
        threads = [] if options.threads is None else ["--threads", str(options.threads)]
        return max(subprocess.run([sys.executable, "-m", "benchmarks", name, *threads]).returncode for name in names)
    if options.threads is not None:
        importlib.import_module("torch").set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT reads an old attribute
    report = importlib.import_module(f"benchmarks.{names[0].replace('-', '_')}").run(**chosen)
    report.show()
    report.write(RESULTS)
    return 0


if __name__ == "__main__":
    use_huge_pages()  # as in the service; without, memory placement alone changes ratios of equal graphs by 4 %
    sys.exit(main(sys.argv[1:]))
