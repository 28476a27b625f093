"""Layers that look alike are drawn once, with the updates of all of them; what differs otherwise is not folded."""

from __future__ import annotations

import functools
from collections import OrderedDict

import pytest
import torch
from reading_svg import SVG, boxes, parsed, tooltip, words
from torch import Tensor, nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, TracedModel, plan, rewrite, trace
from gralora_fx.picture import svg_of


@functools.cache
def deep() -> TracedModel:
    return fresh_trace("llama", task="text-generation-with-past", num_hidden_layers=6)  # traced in less time


def test_layers_that_look_alike_are_folded() -> None:
    config = GraloraConfig(r=8, target_modules=["q_proj"], layers_to_transform=[1, 2, 3, 4])
    model = rewrite(deep(), config)
    folded, full = boxes(svg_of(model)), boxes(svg_of(model, full=True))
    assert "layers 1 to 4, alike" in words(folded["model.layers.1"])
    assert tooltip(folded["model.layers.1"]).split() == [f"model.layers.{index}" for index in range(1, 5)]
    assert {f"model.layers.{index}" for index in range(6)} & folded.keys() == {f"model.layers.{i}" for i in (0, 1, 5)}
    assert {f"model.layers.{index}.mlp.up_proj" for index in range(6)} <= full.keys()
    assert "alike" not in svg_of(model, full=True)


def test_reasons_that_differ_by_the_layer_only_fold() -> None:
    chosen = plan(deep(), GraloraConfig(r=8, target_modules=["q_proj"], layers_to_transform=[0]))
    drawn = boxes(svg_of(deep(), plan=chosen))
    assert "layers 1 to 5, alike" in words(drawn["model.layers.1"])


def test_trained_layers_fold_with_a_strip_of_their_updates() -> None:
    model = rewrite(deep(), GraloraConfig(r=8, gralora_k=4, target_modules=["q_proj"]))
    paths = [f"model.layers.{index}.self_attn.q_proj" for index in range(6)]
    for index, path in enumerate(paths[1:]):
        torch.nn.init.normal_(model.adapter("default").factors[path].B, std=float(index + 1))
    folded, full = svg_of(model), svg_of(model, full=True)
    box = boxes(folded)[paths[0]]
    assert "layers 0 to 5, alike" in folded
    assert box.get("data-alike", "").split() == paths
    cells = [cell for group in box.iter(f"{SVG}g") if "strip" in group.get("class", "") for cell in group]
    assert [tooltip(cell).split(":")[0] for cell in cells] == paths
    for path, cell in zip(paths, cells, strict=True):
        norm = float(model.delta_weight(path).norm())
        assert float(tooltip(cell).split()[-1]) == pytest.approx(norm, rel=1e-3, abs=1e-9)
        assert float(tooltip(cell).split("blocks ")[1].split(",")[0]) == pytest.approx(norm / 4, rel=1e-3, abs=1e-9)
    colours = [cell.find(f"{SVG}rect").get("fill") for cell in cells]  # type: ignore[union-attr]
    assert len(set(colours)) == 6
    assert "strip" not in full
    assert "data-alike" not in full
    assert float(parsed(full).get("height", "0")) > 3 * float(parsed(folded).get("height", "0"))


class Stages(nn.Module):
    """Two numbered stages of four numbered blocks, as vision models have."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Module:
            return nn.Sequential(OrderedDict(up=nn.Linear(4, 8), act=nn.ReLU(), down=nn.Linear(8, 4)))

        self.stages = nn.ModuleList(
            nn.Sequential(OrderedDict(blocks=nn.Sequential(*(block() for _ in range(4))))) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = x + stage(x)
        return x


def test_layers_within_layers_fold_by_themselves() -> None:
    svg = svg_of(trace(Stages(), (torch.randn(2, 4),)))
    drawn = boxes(svg)
    assert "layer 1" in words(drawn["stages.1"])
    assert "blocks 0 to 3, alike" in words(drawn["stages.1.blocks.0"])
    assert "stages.1.blocks.1.up" not in drawn
    arrows = [group for group in parsed(svg).iter(f"{SVG}g") if group.get("class") == "edge flow"]
    assert len(arrows) == 1 + 2 + 1 + 1  # from the input, up -> down in each stage, between them, to the output
