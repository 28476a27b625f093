"""Block norms at a glance: a row for each layer, a column for each site of the layers."""

from __future__ import annotations

from dataclasses import dataclass

from gralora_fx.picture.blocks import BlockMap
from gralora_fx.picture.colours import heat_colour, text_on
from gralora_fx.picture.facts import ModelFacts
from gralora_fx.picture.heat import short_number

_FEWEST_LAYERS = 3  # with fewer, the heat maps themselves are the overview


@dataclass(frozen=True)
class Cell:
    """A norm with the colours it is shown in."""

    text: str
    fill: str
    ink: str


@dataclass(frozen=True)
class Overview:
    """A table of one adapter's block norms in the layers of one container: the root mean square at each site.

    Attributes:
        title: The adapter and the container.
        columns: Paths of the sites within a layer.
        rows: Paths of the layers, with a cell for each column; None where the layer has no such adapter.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def overviews(facts: ModelFacts, blocks: BlockMap) -> list[Overview]:
    """A table for each adapter and each container of three or more adapted layers.

    Args:
        facts: The model.
        blocks: Its layers.
    """
    norms: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for path, entry in facts.sites.items():
        layer = blocks.layer_of(path)
        for adapter in entry.adapters:
            norm = adapter.mean_block_norm
            if layer is not None and norm is not None:
                table = norms.setdefault((adapter.name, layer.rpartition(".")[0]), {})
                table.setdefault(layer, {})[path.removeprefix(f"{layer}.")] = norm
    tables = []
    for (adapter_name, container), table in norms.items():
        if len(table) >= _FEWEST_LAYERS:
            columns = tuple(dict.fromkeys(column for row in table.values() for column in row))
            largest = facts.largest_norm or 0.0  # the end of the one scale of a page
            rows = tuple(
                (layer, tuple(_cell(row.get(column), largest) for column in columns)) for layer, row in table.items()
            )
            tables.append(Overview(f"{adapter_name}: {container or 'layers'}", columns, rows))
    return tables


def _cell(norm: float | None, largest: float) -> Cell | None:
    if norm is None:
        return None
    fill = heat_colour(norm, largest)
    return Cell("0" if norm == 0 else short_number(norm), fill, text_on(fill))
