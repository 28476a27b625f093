"""The tables of `image_models.md`, of what `python -m benchmarks image-models` found: `python docs/image_table.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "image_models.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results" / "image_models.json"
_HEADS = {
    "whole": "| class | one image is | rows share steps |\n|---|---|---|\n",
    "the decoder alone": "| class, its decoder alone | why |\n|---|---|\n",
    "refused": "| class, refused | why |\n|---|---|\n",
    "not tried": "| class, not tried | why |\n|---|---|\n",
}
_OWN = re.compile(r"(Trace|Export|Serving)Error: |its answers differ")  # else a tiny model was not made
_COUNT = re.compile(r"\d+ of the \d+ classes")


def entries() -> list[Mapping[str, Any]]:
    """Return what was found of each class, in the order of their names."""
    found: list[Mapping[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["tables"][0]["rows"]
    return sorted(found, key=lambda entry: entry["architecture"])


def _rows(result: str) -> Iterator[str]:
    for entry in entries():
        if _result(entry) == result:
            cells = _whole(entry) if result == "whole" else [_reason(entry)]
            yield f"| `{entry['architecture']}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _result(entry: Mapping[str, Any]) -> str:
    result: str = entry["result"]
    return "not tried" if result == "refused" and not _OWN.match(entry["why"]) else result


def _whole(entry: Mapping[str, Any]) -> list[str]:
    lengths = entry["rows of their own lengths"]
    return [entry["takes"], "yes" if lengths == "yes" else "no"]


def _reason(entry: Mapping[str, Any]) -> str:
    """Return the reason of an error, without its type and the name of the class."""
    text = re.sub(r"^\w+Error: ", "", entry["why"])
    text = " ".join(text.split())
    return text.removeprefix(f"{entry['architecture']} ").replace(f"cannot trace {entry['architecture']} ", "")


def with_tables(page: str) -> str:
    """Return a page with the tables and the count as they were found."""
    whole = [entry for entry in entries() if entry["result"] == "whole"]
    page = _COUNT.sub(f"{len(whole)} of the {len(entries())} classes", page)
    for result, head in _HEADS.items():
        table = "".join(_rows(result))
        page = re.sub(rf"(?<={re.escape(head)})(\|.*\n)*", lambda _, table=table: table, page)  # type: ignore[misc]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
