"""The tables of `decoders.md`, of what `python -m benchmarks decoders` found: `python docs/decoder_table.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "decoders.md"
WAITING = "not run"  # the result of a class that is to be checked yet
RESULTS = PAGE.parents[1] / "benchmarks" / "results" / "decoders.json"
_HOLDS = (
    "| class | a step keeps | computed by | by plain operators, and why | rows of their own lengths |\n" + 5 * "|---"
)
_HOLDS += "|\n"
_REFUSED = "| class | why not |\n|---|---|\n"
_WAITING = "Not run since the page was made anew: "
_ATTENTION = re.compile(r"rows of their own lengths need GroupQueryAttention.*")
_COUNT = re.compile(r"\d+ of the 185")


def entries() -> list[Mapping[str, Any]]:
    """Return what was found of each class, in the order of their names."""
    found: list[Mapping[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["tables"][0]["rows"]
    return sorted(found, key=lambda entry: entry["architecture"])


def holding() -> list[Mapping[str, Any]]:
    """Those whose exports hold."""
    return [entry for entry in entries() if entry["result"] == "holds"]


def _rows_that_hold() -> Iterator[str]:
    for entry in holding():
        lengths = _ATTENTION.sub("no: its attention is not fused", entry["rows of their own lengths"])
        lengths = lengths if lengths.startswith(("yes", "no: ")) else f"no: {lengths.partition(':')[0]}"
        cells = (entry["keeps"], entry["operators"], entry["not fused"], lengths)
        yield f"| `{entry['architecture']}` | {' | '.join(map(_cell, cells))} |\n"


def _rows_that_do_not() -> Iterator[str]:
    for entry in entries():
        if entry["result"] not in ("holds", WAITING):
            yield f"| `{entry['architecture']}` | {_cell(_reason(entry))} |\n"


def _waiting() -> str:
    """Return the classes that are to be checked yet, in a sentence."""
    names = [f"`{entry['architecture']}`" for entry in entries() if entry["result"] == WAITING]
    return f"{_WAITING}{', '.join(names) or 'none'}.\n"


def _reason(entry: Mapping[str, Any]) -> str:
    """Return the reason of an error, without its type and the name of the class."""
    text = re.sub(r"^\w+Error: ", "", entry["result"])
    return text.removeprefix(f"{entry['architecture']} ").removeprefix(f"cannot trace {entry['architecture']} ")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def with_tables(page: str) -> str:
    """Return a page with the tables and the count as they were found."""
    page = _COUNT.sub(f"{len(holding())} of the {len(entries())}", page)
    for head, rows in ((_HOLDS, _rows_that_hold()), (_REFUSED, _rows_that_do_not())):
        table = "".join(rows)
        page = re.sub(rf"(?<={re.escape(head)})(\|.*\n)*", lambda _, table=table: table, page)  # type: ignore[misc]
    return re.sub(rf"{_WAITING}.*\n", lambda _: _waiting(), page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
