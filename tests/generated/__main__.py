"""`python -m tests.generated --seeds 0:1000`: what holds, what is refused, and each fault as a script."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter, defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["GRALORA_FX_PROGRESS"] = "0"


def main() -> int:
    """Run the seeds, print a summary, and return whether there are faults or too many refusals."""
    parser = argparse.ArgumentParser(prog="python -m tests.generated", description=__doc__)
    parser.add_argument("--seeds", default="0:100", help="a range such as 0:1000, or one seed")
    parser.add_argument("--checks", help="names of checks, separated by commas (default: all)")
    parser.add_argument("--no-exports", action="store_true", help="leave out the checks that export")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--script", action="store_true", help="shrink faults (one of each text) and print their scripts"
    )
    parser.add_argument("--show", action="store_true", help="print the code of the first seed, and end")
    options = parser.parse_args()
    first, _, last = options.seeds.partition(":")
    seeds = range(int(first), int(last or int(first) + 1))

    from tests.generated.checks import CHECKS, EXPORTS, Verdict
    from tests.generated.modules import drawn
    from tests.generated.scripts import script, short, smallest
    from tests.generated.seed_ranges import run

    if options.show:
        print(drawn(seeds[0]).code(), short(drawn(seeds[0])), sep="\n")
        return 0
    names = (
        options.checks.split(",")
        if options.checks
        else [n for n in CHECKS if n not in EXPORTS]
        if options.no_exports
        else None
    )
    began = time.perf_counter()
    found: list[Verdict] = []
    for verdicts in run(seeds, names, options.workers):
        found += verdicts
        for verdict in verdicts:
            if verdict.outcome == "FAULT":
                print(f"FAULT {verdict.seed} {verdict.check}: {' '.join(verdict.text.split())[:300]}", flush=True)
    refusals: defaultdict[str, list[Verdict]] = defaultdict(list)
    for verdict in found:
        if verdict.outcome in ("refused", "said"):
            refusals[_general(verdict.text)].append(verdict)
    for text, those in sorted(refusals.items(), key=lambda item: -len(item[1])):
        print(f"{len(those)} {those[0].outcome}, as by {those[0].check} of seed {those[0].seed}: {text}")
    counts = Counter(verdict.outcome for verdict in found)
    modules = len({verdict.seed for verdict in found if verdict.outcome == "FAULT"})
    print(
        f"{len(seeds)} modules, {len(found)} checks: {dict(counts)}; {modules} modules with a fault; "
        f"{counts['refused'] / max(len(found), 1):.1%} refused; {time.perf_counter() - began:.0f} s"
    )
    if options.script:
        shown: set[tuple[str, str]] = set()
        for verdict in found:
            key = verdict.check, _general(verdict.text)[:60]
            if verdict.outcome == "FAULT" and "crashed" not in verdict.text and key not in shown:
                shown.add(key)
                description = smallest(drawn(verdict.seed), verdict.check)
                print(f"\n# {short(description)}\n{script(description, verdict.check, verdict.text)}", flush=True)
    return int(bool(counts["FAULT"]) or counts["refused"] > 0.08 * len(found))


def _general(text: str) -> str:
    """Return a text without the names and numbers that differ from module to module."""
    text = re.sub(r"\b\w+_\d+\b", "NAME", " ".join(text.split()))
    return re.sub(r"\d[\d.e+-]*", "N", text)[:220]


if __name__ == "__main__":
    sys.exit(main())
