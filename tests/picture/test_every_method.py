"""Every picture of every method: drawn, and told in the terms of the method's own configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from outer_method import Outer, OuterConfig
from reading_svg import parsed
from test_page import Reader
from traces import fresh_trace, traced

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, plan, rewrite
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods import METHODS, AdapterMethod, method_of, register
from gralora_fx.picture import html_of, svg_of

TARGETS: dict[str, Any] = {"target_modules": ["query", "dense"]}
CONFIGS: dict[str, AdapterConfig] = {
    "GraLoRA": GraloraConfig(r=8, gralora_k=4, init_weights=False, gralora_dropout=0.1, **TARGETS),
    "hybrid": GraloraConfig(r=8, hybrid_r=4, alpha=48, init_weights=False, bias="gralora_only", **TARGETS),
    "LoRA": LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, init_lora_weights=False, **TARGETS),
    "rsLoRA": LoraConfig(r=4, use_rslora=True, rank_pattern={"query": 2}, init_lora_weights=False, **TARGETS),
    "another": OuterConfig(target_modules={"query", "dense"}, scale=0.5),
}
every_method = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def outer() -> Iterator[AdapterMethod]:
    method = register(Outer())
    yield method
    METHODS.remove(method)


def row_of(adapter: str, page: str) -> list[str]:
    return next(row for row in Reader(page).rows if row and row[0] == adapter)


@every_method
def test_every_picture_shows_every_method(name: str) -> None:
    config = CONFIGS[name]
    model = rewrite(fresh_trace("bert"), config)
    page, svg = html_of(model), svg_of(model)
    row = row_of("default", page)
    assert row[1:3] == ["active", config.TITLE]
    for field in (*config.SIZE_FIELDS, config.DROPOUT):
        value = getattr(config, field)
        assert (f"{field}={value:.4g}" if isinstance(value, float) else f"{field}={value}") in row[3] or value == {}
    sizes = method_of(config).text(model.plans["default"].selected[0].sizes)
    assert sizes in page
    assert sizes in "".join(parsed(svg).itertext())
    assert sizes in html_of(model.traced, plan=plan(model.traced, config))
    assert repr(model).count("\n") == 1


@every_method
@pytest.mark.parametrize("state", ["both active", "one disabled", "one merged", "all disabled"])
def test_a_method_beside_another(name: str, state: str) -> None:
    model = rewrite(fresh_trace("bert"), CONFIGS[name], adapter_name="first")
    other = CONFIGS["LoRA" if name != "LoRA" else "hybrid"]
    model.add_adapter("second", dataclasses.replace(other, bias="none"))
    model.set_adapter(["first", "second"])
    expected = {"first": "active", "second": "active"}
    if state == "one disabled":
        model.set_adapter("second")
        expected["first"] = "waiting"
    elif state == "one merged":
        model.merge_adapter(["first"])
        expected["first"] = "merged"
    pages: list[str] = []

    def draw() -> None:
        pages.extend([html_of(model), html_of(model, full=True), svg_of(model), svg_of(model, full=True)])

    if state == "all disabled":
        with model.disable_adapter():
            draw()
        expected = dict.fromkeys(expected, "waiting")
    else:
        draw()
    for adapter, shown in expected.items():
        assert row_of(adapter, pages[0])[1] == shown
        assert f"{adapter}" in "".join(parsed(pages[2]).itertext())


@pytest.mark.parametrize("method", [GraloraConfig, LoraConfig])
def test_a_long_list_of_targets_is_counted(method: Callable[..., AdapterConfig]) -> None:
    model = traced("bert")
    paths = [site.path for site in model.sites if "layer" in site.path]
    page = html_of(rewrite(fresh_trace("bert"), method(r=4, target_modules=paths)))
    reader = Reader(page)
    assert reader.tags.count("details") == 1
    assert f"<summary>{len(paths)} layers</summary>{', '.join(sorted(paths))}</details>" in page
    assert "details" not in Reader(html_of(model, plan=plan(model, method(r=4, target_modules=["query"])))).tags


def test_a_model_writes_its_pictures_whatever_its_method(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        model: GraloraModel = rewrite(fresh_trace("bert"), config)
        model.to_html(tmp_path / f"{name}.html")
        model.to_svg(tmp_path / f"{name}.svg")
    assert len(list(tmp_path.iterdir())) == 2 * len(CONFIGS)
