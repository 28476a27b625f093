"""A module drawn from a seed: a description that is printed as code, and the module that the code makes."""

from __future__ import annotations

import linecache
import random
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.generated.layers import FUNCTIONS, IMPORTS, KINDS

WIDTH = 16
ATTENTION = {"MultiheadAttention", "TransformerEncoderLayer"}
PEFTS_ALONE = ("a layer's weight", "weight_norm")  # what the dense formula does not describe
# how a module begins: what `forward` takes, what it does first, and the sizes of its inputs (b: batch, s: length, t)
BEGINNINGS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "rows": ("x", "", "h = x", {"x": "bD"}),
    "sequences": ("x", "", "h = x", {"x": "bsD"}),
    "grids": ("x", "", "h = x", {"x": "btsD"}),
    "tokens": ("ids", "self.e = nn.Embedding(20, D)", "h = self.e(ids)", {"ids": "bs"}),
    "images": (
        "x",
        "self.c = nn.Conv2d(3, D, 4, 4)",
        "h = self.c(x).flatten(2).transpose(1, 2)",
        {"x": "b388"},
    ),
    "two": (
        "x, y",
        "self.p = nn.Linear(D, D)\nself.q = nn.Linear(D, D)",
        "h = self.p(x) * self.q(y).tanh()",
        {"x": "bsD", "y": "bsD"},
    ),
    "one layer for two": (
        "x, y",
        "self.p = nn.Linear(D, D)",
        "h = self.p(x) + self.p(y).tanh()",
        {"x": "bsD", "y": "bsD"},
    ),
    "a condition": (
        "x, c",
        "self.p = nn.Linear(D, D)\nself.q = nn.Linear(D, D)",
        "h = x * self.p(c)[:, None] + self.q(c)[:, None]",
        {"x": "bsD", "c": "bD"},
    ),
    "a mask": ("x, m", "self.p = nn.Linear(D, D)", "h = self.p(x) * m[..., None]", {"x": "bsD", "m": "bs"}),
    "any number": ("*xs", "self.p = nn.Linear(D, D)", "h = self.p(xs[0]) * xs[1]", {"x": "bsD", "y": "bsD"}),
    "defaults": (
        "x, y=None, scale=2.0",
        "self.p = nn.Linear(D, D)",
        "h = self.p(x) * scale\nif y is not None:\n    h = h + y",
        {"x": "bsD"},
    ),
}
RANKS = {"rows": 2, "grids": 4}  # the others have three axes
ENDS: dict[str, tuple[str, str]] = {
    "tensor": ("", "return h"),
    "head": ("self.head = nn.Linear(D, 8)", "return self.head(h)"),
    "heads": ("self.p = nn.Linear(D, 8)\nself.v = nn.Linear(D, 4)", "return self.p(h), self.v(h)"),
    "dict": ("self.p = nn.Linear(D, D)", 'return {"a": self.p(h), "b": [h.mean(-1), h * 2]}'),
    "record": ("self.p = nn.Linear(D, D)", "return BaseModelOutput(last_hidden_state=self.p(h))"),
    "pooled": ("self.head = nn.Linear(D, 8)", "return self.head(h.mean(1))"),
    "first": ("self.head = nn.Linear(D, 8)", "return self.head(h[:, 0])"),
    "tied head": ("", "return F.linear(h, self.e.weight)"),
}
BLOCKS: dict[str, tuple[str, str]] = {
    "residual block": ("self.z_N = Block_N()", "h = h + self.z_N(h)"),
    "Sequential": ("self.z_N = nn.Sequential(Block_N(), Block_N())", "h = self.z_N(h)"),
    "ModuleList": (
        "self.z_N = nn.ModuleList([Block_N() for _ in range(2)])",
        "for b in self.z_N:\n    h = h + b(h)",
    ),
    "shared block": ("self.z_N = Block_N()", "h = self.z_N(self.z_N(h) + h)"),
}


@dataclass(frozen=True)
class Layer:
    """A layer of a description: a row of the table, or a block with layers of its own."""

    kind: str
    number: int
    parts: tuple[Layer, ...] = ()

    def lines(self) -> tuple[list[str], list[str]]:
        """Return what `__init__` and `forward` say."""
        init, forward = BLOCKS[self.kind] if self.parts else (KINDS[self.kind].init, KINDS[self.kind].forward)
        return [_filled(text, self.number) for text in init.splitlines()], [
            _filled(text, self.number) for text in forward.splitlines()
        ]


@dataclass(frozen=True)
class Adapter:
    """An adapter of a description: a method, its fields, and what it targets (`None`: all layers)."""

    method: str
    fields: tuple[tuple[str, Any], ...]
    targets: Any = "all-linear"

    def text(self) -> str:
        """Return the configuration as code."""
        name = "GraloraConfig" if self.method == "gralora" else "LoraConfig"
        fields = ", ".join(f"{key}={value!r}" for key, value in (*self.fields, ("target_modules", self.targets)))
        return f"{name}({fields})"

    @property
    def scale(self) -> float:
        """Return the factor of a product, as the papers define it."""
        fields = dict(self.fields)
        if self.method == "gralora":
            return float(fields["alpha"] / (fields["r"] + fields.get("hybrid_r", 0)))
        return float(fields["lora_alpha"] / (fields["r"] ** 0.5 if fields.get("use_rslora") else fields["r"]))


@dataclass(frozen=True)
class Description:
    """A module and its adapter, drawn from a seed."""

    seed: int
    beginning: str
    layers: tuple[Layer, ...]
    end: str
    adapter: Adapter

    def kinds(self) -> set[str]:
        """Return the kinds of the layers, within blocks too."""
        return {part.kind for layer in self.layers for part in (layer, *layer.parts)}

    def is_dense(self) -> bool:
        """Return whether PEFT cannot tell what is right.

        Its layers inside an `nn.MultiheadAttention` are not called, and it knows no parameters without a layer.
        """
        return bool(self.kinds() & ATTENTION) or not set(self.own()).isdisjoint(self.adapter.targets)

    def own(self) -> list[str]:
        """Return the names of the module's own matrices."""
        own = ("F.linear", "F.linear twice", "x @ w.T", "einsum", "bmm")
        return [f"w_{layer.number}" for layer in self.layers if layer.kind in own]

    def turned(self) -> list[str]:
        """Return the names of those that are `[in, out]`."""
        return [f"w_{layer.number}" for layer in self.layers if layer.kind in ("einsum", "bmm")]

    def code(self) -> str:
        """Return the source of the module, `Net`."""
        arguments, init, first, _ = BEGINNINGS[self.beginning]
        blocks = [layer for layer in self.layers if layer.parts]
        body = [
            *(_class(f"Block_{block.number}", "h", "", "", block.parts, ("", "return h")) for block in blocks),
            _class("Net", arguments, init, first, self.layers, ENDS[self.end]),
        ]
        text = "\n".join(body)
        names = set(re.findall(r"\w+", text))
        above = [line for name, line in IMPORTS.items() if name in names]
        return "\n".join([*above, *(line for name, line in FUNCTIONS.items() if name in names), text])

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the example, by axis."""
        rng = random.Random(self.seed + 1)
        return {"b": rng.choice((2, 2, 4)), "s": rng.choice((5, 6, 7)), "t": 3}

    def inputs(self, sizes: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Return inputs of some sizes, by name."""
        sizes = {**self.sizes(), **(sizes or {})}
        generator = torch.Generator().manual_seed(self.seed)
        made = {}
        for name, axes in BEGINNINGS[self.beginning][3].items():
            shape = [sizes[a] if a in sizes else WIDTH if a == "D" else int(a) for a in axes]
            if name == "ids":
                made[name] = torch.randint(0, 20, shape, generator=generator)
            elif name == "m":
                made[name] = (torch.rand(shape, generator=generator) > 0.3).float()
            else:
                made[name] = torch.randn(shape, generator=generator)
        return made

    def axes(self) -> list[str]:
        """Return the axes whose size may be another."""
        return sorted({axis for axes in BEGINNINGS[self.beginning][3].values() for axis in axes if axis in "bst"})

    def module(self) -> nn.Module:
        """Make the module, in evaluation, with weights that the seed draws; its class can be pickled."""
        module = types.ModuleType("generated_net")
        header = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
        source = header + self.code() + "\n"
        module.__file__ = f"<generated module {self.seed}>"
        linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
        sys.modules["generated_net"] = module
        exec(compile(source, module.__file__, "exec"), module.__dict__)
        torch.manual_seed(self.seed)
        made: nn.Module = module.Net().eval()
        return made

    def as_dense(self) -> Description:
        """Return a description that the dense formula describes."""

        def plain(layer: Layer) -> Layer:
            kind = "linear" if layer.kind in PEFTS_ALONE else layer.kind
            return replace(layer, kind=kind, parts=tuple(map(plain, layer.parts)))

        return replace(self, layers=tuple(map(plain, self.layers)))

    def smaller(self) -> Iterator[Description]:
        """Yield descriptions with one thing less."""
        for index, layer in enumerate(self.layers):
            rest = self.layers[:index], self.layers[index + 1 :]
            yield replace(self, layers=(*rest[0], *rest[1]))
            if layer.parts:
                yield replace(self, layers=(*rest[0], *layer.parts, *rest[1]))
                for at in range(len(layer.parts)) if len(layer.parts) > 1 else ():
                    less = replace(layer, parts=(*layer.parts[:at], *layer.parts[at + 1 :]))
                    yield replace(self, layers=(*rest[0], less, *rest[1]))
        if self.end != "tensor":
            yield replace(self, end="tensor")
        if self.beginning not in ("rows", "sequences", "grids"):
            yield replace(self, beginning="sequences")
        if self.adapter.targets != "all-linear":
            yield replace(self, adapter=replace(self.adapter, targets="all-linear"))
        plain = Adapter("lora", (("r", 4), ("lora_alpha", 8)), self.adapter.targets)
        if self.adapter != plain:
            yield replace(self, adapter=plain)


def drawn(seed: int) -> Description:
    """Draw a description of 2 to 10 layers."""
    rng = random.Random(seed)
    beginning = rng.choice([*BEGINNINGS, "sequences", "sequences", "sequences", "rows", "tokens"])
    rank = RANKS.get(beginning, 3)
    layers: list[Layer] = []
    count = rng.randint(2, 10)
    place = rng.randrange(count)
    for number in range(count):
        if number == place:
            layers.append(Layer("linear", number))
        elif rng.random() < 0.12:
            parts = tuple(
                Layer(_kind(rng, rank, resizing=False), 10 * (number + 1) + i) for i in range(rng.randint(1, 3))
            )
            layers.append(Layer(rng.choice(list(BLOCKS)), number, parts))
        else:
            layers.append(Layer(_kind(rng, rank, resizing=True), number))
    ends = [end for end in ENDS if end != "tied head" or beginning == "tokens"]
    if rank == 2:
        ends = [end for end in ends if end not in ("pooled", "first")]
    if beginning in ("two", "one layer for two", "a condition", "a mask", "any number", "defaults"):
        ends = [end for end in ends if "self.p " not in ENDS[end][0]]
    whole = Description(seed, beginning, tuple(layers), rng.choice([*ends, "tensor", "head"]), _adapter(rng))
    whole = replace(whole, adapter=replace(whole.adapter, targets=_targets(rng, whole)))
    return whole.as_dense() if whole.is_dense() else whole


def _kind(rng: random.Random, rank: int, *, resizing: bool) -> str:
    fitting = {name: kind for name, kind in KINDS.items() if str(rank) in kind.ranks and (resizing or not kind.resizes)}
    return rng.choices(list(fitting), [kind.weight for kind in fitting.values()])[0]


def _adapter(rng: random.Random) -> Adapter:
    method = rng.choice(("gralora", "gralora", "hybrid", "lora", "rslora", "dora"))
    if method in ("gralora", "hybrid"):
        k = rng.choice((1, 2, 4))
        fields = [("r", rng.choice((4, 8))), ("gralora_k", k), ("alpha", 8)]
        return Adapter("gralora", (*fields, ("hybrid_r", 2)) if method == "hybrid" else tuple(fields))
    extra = {"lora": (), "rslora": (("use_rslora", True),), "dora": (("use_dora", True),)}[method]
    return Adapter("lora", (("r", 4), ("lora_alpha", 8), *extra))


def _targets(rng: random.Random, description: Description) -> Any:
    """Draw what is targeted: everything, names, a pattern, or a parameter of the module's own."""
    paths = linear_paths(description.module())
    named = [path for path in paths if not path.rpartition(".")[2].isdigit()]  # not of a Sequential
    how = rng.choice(("all", "all", "names", "pattern", "parameters"))
    if how == "names":
        some = rng.sample(paths, (len(paths) + 1) // 2)
        return sorted({path.rpartition(".")[2] if path in named and rng.random() < 0.5 else path for path in some})
    if how == "pattern" and named:
        return rf"(.*\.)?{rng.choice(named).rpartition('.')[2][0]}\w*"
    own = description.own()
    return own if how == "parameters" and own else "all-linear"


def linear_paths(module: nn.Module) -> list[str]:
    """Return the paths of the layers of a module."""
    return [name for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D))]


def _filled(text: str, number: int | str) -> str:
    text = re.sub(r"\b(\w+)_N\b", rf"\g<1>_{number}", text)
    return re.sub(r"\bD\b", str(WIDTH), re.sub(r"\bDD\b", str(2 * WIDTH), text))


def _class(name: str, arguments: str, init: str, first: str, layers: tuple[Layer, ...], end: tuple[str, str]) -> str:
    built = [_filled(text, "") for text in init.splitlines()]
    said = [_filled(text, "") for text in first.splitlines()]
    for layer in layers:
        more = layer.lines()
        built += more[0]
        said += more[1]
    built += [_filled(text, "") for text in end[0].splitlines()]
    said += [_filled(text, "") for text in end[1].splitlines()]
    return "\n".join(
        [
            f"class {name}(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in built),
            f"    def forward(self, {arguments}):",
            *(f"        {line}" for line in said),
        ]
    )
