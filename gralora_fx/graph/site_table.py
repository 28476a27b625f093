"""Linear sites as a table of text: the one form in which plans and the command line show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gralora_fx.graph.sites import LinearSite

_LEFT = 2  # columns aligned to the left: words; the others are numbers


def site_table(sites: Sequence[LinearSite], notes: Mapping[str, Mapping[str, str]]) -> str:
    """A table with a line for each site: its path, kind and sizes, and what else is said of it.

    Args:
        sites: The sites, in the order of the lines.
        notes: A column for each key: its texts by the path of a site. One without texts is left out.

    Returns:
        The lines, the first with the names of the columns.
    """
    columns = {name: texts for name, texts in notes.items() if texts}
    rows = [("site", "kind", "in", "out", "calls", *columns)]
    for site in sites:
        sizes = (str(site.in_features), str(site.out_features), str(len(site.calls)))
        rows.append((site.path, site.kind, *sizes, *(texts.get(site.path, "") for texts in columns.values())))
    numbers = range(_LEFT, len(rows[0]) - len(columns))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
