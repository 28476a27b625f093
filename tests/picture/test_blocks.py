"""Blocks are found from module paths alone, whatever the architecture calls them."""

from __future__ import annotations

import pytest

from gralora_fx.picture.blocks import BlockMap


@pytest.mark.parametrize(
    ("site", "frames"),
    [
        ("bert.encoder.layer.0.attention.self.query", ["bert.encoder.layer.0"]),
        ("transformer.h.11.attn.c_attn", ["transformer.h.11"]),
        ("0.fc", ["0"]),
        ("encoder.block.0.layer.1.DenseReluDense.wi", ["encoder.block.0"]),
        ("lm_head", []),
        ("2", []),
        ("layers.3", []),
    ],
)
def test_frames_of_a_single_path(site: str, frames: list[str]) -> None:
    assert BlockMap([site]).frames_of(site) == frames


def test_branches_are_where_the_ways_to_the_layers_part() -> None:
    paths = ["model.encoder.layers.0.fc", "model.decoder.layers.0.fc", "proj_out"]
    blocks = BlockMap(paths)
    assert blocks.frames_of("model.decoder.layers.0.fc") == ["model.decoder", "model.decoder.layers.0"]
    assert blocks.frames_of("model.encoder.conv1") == ["model.encoder"]
    assert blocks.frames_of("proj_out") == []


def test_a_second_numbering_counts_where_its_children_are_alike() -> None:
    stages = [f"layers.{i}.blocks.{j}.{name}" for i in range(2) for j in range(2) for name in ("q", "k")]
    assert BlockMap(stages).frames_of("layers.1.blocks.0.q") == ["layers.1", "layers.1.blocks.0"]
    unlike = ["block.0.layer.0.q", "block.0.layer.0.k", "block.0.layer.1.wi"]
    assert BlockMap(unlike).frames_of("block.0.layer.0.q") == ["block.0"]


def test_the_outermost_layer_apart_from_another_module() -> None:
    blocks = BlockMap([f"layers.{i}.blocks.{j}.q" for i in range(2) for j in range(2)])
    assert blocks.layer_of("layers.0.blocks.1.q", apart_from="layers.1.blocks.0.q") == "layers.0"
    assert blocks.layer_of("layers.0.blocks.1.q", apart_from="layers.0.blocks.0.q") == "layers.0.blocks.1"
    assert blocks.layer_of("layers.0.blocks.1.q", apart_from="layers.0.blocks.1.k") is None
