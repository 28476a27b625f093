"""The page: self-contained, whole, and with every name escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from reading_svg import SVG, parsed
from torch import nn
from traces import fresh_trace, traced

from gralora_fx import GraloraConfig, plan, rewrite, trace
from gralora_fx.picture import html_of
from gralora_fx.picture.facts import read_facts
from gralora_fx.picture.style import heat_colour


class Reader(HTMLParser):
    """Counts tags, and holds the rows of tables and what the page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_a_page_of_a_trained_model() -> None:
    model = rewrite(
        traced("bert"), GraloraConfig(r=8, gralora_k=4, target_modules=["query"], modules_to_save=["classifier"])
    )
    path = "bert.encoder.layer.1.attention.self.query"
    torch.nn.init.normal_(model.adapter("default").factors[path].B)
    page = html_of(model)
    reader = Reader(page)
    assert reader.open == []
    assert reader.fetched == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)
    assert reader.tags.count("figure") == 2
    assert reader.tags.count("svg") == 1 + 1 + 2  # the picture, the scale, the heat maps
    by_path = {row[0]: row for row in reader.rows}
    assert all(site.path in by_path for site in model.sites)
    assert by_path[path][1:7] == ["active", "linear", "32", "32", "1", "default: r=8 k=4 scale=8"]
    assert float(by_path[path][7]) > 0
    assert by_path["bert.encoder.layer.0.attention.self.query"][7] == "0"
    assert by_path["bert.pooler.dense"][1] == "rejected"
    assert by_path["classifier"][6] == "trains whole, as a copy of default"
    assert by_path["default"][:4] == [
        "default",
        "active",
        "GraLoRA",
        "r=8 hybrid_r=0 alpha=64 gralora_k=4 scale=8 gralora_dropout=0",
    ]
    assert by_path["default"][4:] == ["query", "classifier", "none", f"{model.plans['default'].trainable_parameters:,}"]
    trainable, total = model.get_nb_trainable_parameters()
    assert f"{trainable:,} of {total:,} parameters train" in reader.text


def test_a_page_of_a_plan_has_no_heat_maps() -> None:
    model = traced("bert")
    reader = Reader(html_of(model, plan=plan(model, GraloraConfig(r=8, target_modules=["query"]))))
    assert "figure" not in reader.tags
    assert "parameters would train" in reader.text


def test_deep_models_get_an_overview_by_layer() -> None:
    model = rewrite(
        fresh_trace("llama", task="text-generation-with-past", num_hidden_layers=4),
        GraloraConfig(r=8, target_modules=["q_proj"]),
    )
    torch.nn.init.normal_(model.adapter("default").factors["model.layers.2.self_attn.q_proj"].B)
    rows = {row[0]: row[1:] for row in Reader(html_of(model)).rows if len(row) == 2}
    assert rows["block norms, root mean square"] == ["self_attn.q_proj"]
    assert [rows[f"model.layers.{index}"] == ["0"] for index in range(4)] == [True, True, False, True]


def test_one_scale_holds_for_every_colour_of_a_page() -> None:
    """Two adapters of very different size: their overviews and maps are coloured by one function of the number."""
    model = rewrite(fresh_trace("llama", num_hidden_layers=3), GraloraConfig(r=8, target_modules=["q_proj"]))
    model.add_adapter("large", GraloraConfig(r=8, target_modules=["q_proj"]))
    for name, std in (("default", 0.1), ("large", 10.0)):
        for factors in model.adapter(name).factors.values():
            torch.nn.init.normal_(factors.B, std=std)
    page = html_of(model)
    assert page.count('class="scale"') == 2  # the picture's and the page's, which are the same
    largest = read_facts(model).largest_norm or 0.0
    cells = re.findall(r'style="background:(#\w+);color:#\w+">([\d.e-]+)<', page)
    assert len(cells) == 6
    for colour, number in cells:
        shades = [heat_colour(float(number), largest), colour]
        channels = [[int(shade[start : start + 2], 16) for start in (1, 3, 5)] for shade in shades]
        assert max(abs(a - b) for a, b in zip(*channels, strict=True)) < 16  # the number is rounded


def test_the_filter_knows_every_box() -> None:
    model = rewrite(
        fresh_trace("llama", task="text-generation-with-past", num_hidden_layers=4),
        GraloraConfig(r=8, target_modules=["q_proj"]),
    )
    page = html_of(model)
    picture = page[page.index("<svg") : page.index("</svg>") + 6]
    named: set[str] = set()
    for group in parsed(picture).iter(f"{SVG}g"):
        if "site" in group.get("class", "").split():
            named |= set((group.get("data-alike") or group.get("data-path") or "").split("\n"))
    assert named == {site.path for site in model.sites}
    assert 'querySelectorAll(".paper .node.site")' in page


def test_large_grids_are_drawn_coarser_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rewrite(traced("bert"), GraloraConfig(r=32, gralora_k=32, target_modules=["query"]))
    whole = Reader(html_of(model)).tags.count("rect")
    monkeypatch.setattr("gralora_fx.picture.page.MOST_CELLS", 100)
    coarse = Reader(html_of(model)).tags.count("rect")
    assert whole - coarse == 2 * (32 * 32 - 16 * 16)


def test_hostile_names_are_escaped() -> None:
    hostile = "</script><script>alert('&')</script>"
    model = nn.Sequential()
    model.add_module(hostile, nn.Linear(4, 4))
    reader = Reader(html_of(trace(model, (torch.randn(2, 4),))))
    assert reader.tags.count("script") == 1
    assert any(row[0] == hostile for row in reader.rows)
