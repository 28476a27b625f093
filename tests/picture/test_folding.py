"""Layers that look alike are drawn once; what differs to the reader is not folded."""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch
from reading_svg import SVG, boxes, parsed, tooltip, words
from tiny_models import tiny_model
from torch import Tensor, nn

from gralora_fx import GraloraConfig, TracedModel, plan, rewrite, trace
from gralora_fx.picture import svg_of


@functools.cache
def deep() -> TracedModel:
    return trace(tiny_model("llama", num_hidden_layers=6))


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


def test_a_trained_layer_is_not_folded() -> None:
    model = rewrite(deep(), GraloraConfig(r=8, target_modules=["q_proj"]))
    assert "layers 0 to 5, alike" in svg_of(model)
    torch.nn.init.normal_(model.installed("default").factors["model.layers.3.self_attn.q_proj"].B)
    drawn = boxes(svg_of(model))
    assert "layers 0 to 2, alike" in words(drawn["model.layers.0"])
    assert "layer 3" in words(drawn["model.layers.3"])


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
