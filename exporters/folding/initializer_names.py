"""Names of initializers: which parameters of the model an initializer holds, and the record of it in a manifest."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from gralora_fx.exporters.folding.initializers import ProductWeight, product_weights
from gralora_fx.runtime.manifest import WeightEntry

if TYPE_CHECKING:
    from gralora_fx.tracing.traced_model import TracedModel

_QUANTIZED = re.compile(r"(_transposed)?_(Q[48](G\d+)?|quantized)$")
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"  # which constants onnxscript computed one from
# Names that onnxruntime-genai's builder gives to the parts of a path, beside those of transformers.
_SYNONYMS = {"self_attn": "attn", "self_attention": "attn", "attention": "attn"}
_FILLERS = ("MatMul", "Gemm")
# Weights that are stored as one under a name of their own, in this order.
_JOINT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_ALIKE = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))  # projections that have one width
_WEIGHT = ".weight"


def parameter_names(value: ir.Value) -> list[tuple[str, ...]]:
    """What parameters an initializer may hold by its name, side by side along its output features.

    `attn.q_proj+k_proj.weight` is `attn.q_proj.weight` and `attn.k_proj.weight`. A name can be read in several ways.

    Args:
        value: The initializer.
    """
    origin = value.metadata_props.get(_FOLDED_FROM)
    if origin is not None:
        names = ast.literal_eval(origin)
        return [(str(names[0]),)] if isinstance(names, list) and len(names) == 1 else []
    name = _QUANTIZED.sub("", str(value.name))
    if "+" not in name:
        return [(name,)]
    columns = [part.split("+") for part in name.split(".")]
    count = max(len(column) for column in columns)
    readings = []
    if all(len(column) in (1, count) for column in columns):
        rows = zip(*(column * count if len(column) == 1 else column for column in columns), strict=True)
        readings.append(tuple(".".join(row) for row in rows))
    return [*readings, tuple(name.split("+"))]  # the latter is of names with unequal numbers of parts


def foreign_names(value: ir.Value) -> list[tuple[str, ...]]:
    """As `parameter_names`, of an initializer that another exporter named, reduced as `reduced` does."""
    readings = []
    for names in parameter_names(value):
        last = names[0].removesuffix(_WEIGHT).split(".")
        while last and last[-1] in _FILLERS:
            last.pop()
        if len(names) == 1 and last and last[-1] in _JOINT:
            owner = ".".join(last[:-1])
            readings.append(tuple(reduced(f"{owner}.{part}{_WEIGHT}") for part in _JOINT[last[-1]]))
        readings.append(tuple(map(reduced, names)))
    return readings


def reduced(name: str) -> str:
    """A parameter's name without what exporters change: the operator's name, `self_attn` or `attn`."""
    parts = [_SYNONYMS.get(part, part) for part in name.split(".") if part not in _FILLERS]
    return ".".join(parts)


def ranges(names: Sequence[str], total: int, width_of: Callable[[str], int | None]) -> Iterator[tuple[int, int]]:
    """First and last output feature of each part of an initializer; nothing if the widths do not say.

    Args:
        names: The parameters that it holds.
        total: Its output features.
        width_of: The output features of a parameter, or None where they are not known.
    """
    widths = dict(zip(names, _widths(names, total, width_of), strict=True))
    if len(widths) < len(names) or sum(width or total for width in widths.values()) != total:
        return
    start = 0
    for name in names:
        stop = start + (widths[name] or 0)
        yield start, stop
        start = stop


def _widths(names: Sequence[str], total: int, width_of: Callable[[str], int | None]) -> list[int | None]:
    """The known widths, and those that follow from the total and from projections that have one width."""
    widths: dict[str, int | None] = {name: width_of(name) for name in names}
    twins = _twins(names)
    for name, other in twins.items():
        widths[name] = widths[name] or widths[other]
    unknown = [name for name, width in widths.items() if width is None]
    rest = total - sum(width or 0 for width in widths.values())
    is_pair = len(unknown) == 2 and twins.get(unknown[0]) == unknown[1]
    if len(unknown) == 1 or is_pair:
        widths |= dict.fromkeys(unknown, rest // len(unknown) if rest > 0 else None)
    return [widths[name] for name in names]


def _twins(names: Sequence[str]) -> Mapping[str, str]:
    """The part of equal width of each part that has one."""
    layers = {name.removesuffix(_WEIGHT).rpartition(".")[2]: name for name in names}
    pairs = [(layers[a], layers[b]) for a, b in _ALIKE if a in layers and b in layers]
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}


def weight_entries(traced: TracedModel, graphs: Mapping[str, ir.Graph]) -> dict[str, tuple[WeightEntry, ...]]:
    """Where the weight of each linear layer lies, by the layer's path.

    Args:
        traced: The model, whose parameters tell which names are of one tensor.
        graphs: The exported graphs by the names of their files, without a suffix.
    """
    names = {site.path: {f"{site.path}.weight", *traced.tree.names_of(site.weight)} for site in traced.sites}
    sites: dict[str, list[str]] = {}
    for path, of_site in names.items():
        for name in of_site:
            sites.setdefault(name, []).append(path)
    widths = {site.path: site.out_features for site in traced.sites}
    entries: dict[str, list[WeightEntry]] = {}
    for file, graph in graphs.items():
        for weight in product_weights(graph):
            start = 0
            for part in _parts(weight, sites, widths):
                stop = start + widths[sites[part][0]]
                entry = WeightEntry(f"{file}.onnx", weight.name, start, stop, weight.transposed)
                for path in sites[part]:
                    entries.setdefault(path, []).append(entry)
                start = stop
    return {path: tuple(of_layer) for path, of_layer in entries.items()}


def _parts(weight: ProductWeight, sites: Mapping[str, list[str]], widths: Mapping[str, int]) -> tuple[str, ...]:
    """The parameters that an initializer holds; none if it does not hold weights of layers alone."""
    for names in parameter_names(weight.value):
        is_known = all(name in sites for name in names)
        if is_known and sum(widths[sites[name][0]] for name in names) == weight.out_features:
            return names
    return ()
