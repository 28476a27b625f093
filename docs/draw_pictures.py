"""Draw the pictures of the README and of these pages into `docs/images/`.

Run: python docs/draw_pictures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace

IMAGES = Path(__file__).parent / "images"


class TextClassifier(nn.Module):
    """One attention layer over a text, and a head."""

    def __init__(self) -> None:
        """Make the layers, 64 wide."""
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.query, self.key, self.value, self.projection = (nn.Linear(64, 64) for _ in range(4))
        self.classifier = nn.Linear(64, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores of three classes, `[batch, 3]`, for token ids `[batch, length]`."""
        x = self.embedding(input_ids)
        attention = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return self.classifier((x + self.projection(attention @ self.value(x))).mean(1))


def classifier() -> GraloraModel:
    """A classifier with an adapter at two layers; its head trains whole."""
    torch.manual_seed(0)
    traced = trace(TextClassifier().eval(), (torch.randint(100, (1, 7)),))
    config = GraloraConfig(
        r=8,
        gralora_k=4,
        alpha=16,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        init_weights=False,  # `B` at random too, in place of training
    )
    return rewrite(traced, config)


def two_adapters() -> GraloraModel:
    """A decoder of four layers, drawn as one, with an adapter that is active and one that waits."""
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, vocab_size=200
    )
    traced = trace(LlamaForCausalLM(sizes).eval())
    formal = GraloraConfig(r=8, gralora_k=4, target_modules=["q_proj", "v_proj"], init_weights=False)
    brief = GraloraConfig(r=8, hybrid_r=4, target_modules=["v_proj", "down_proj"], init_weights=False)
    model = rewrite(traced, formal, adapter_name="formal")
    model.add_adapter("brief", brief)
    return model


PICTURES = {"classifier": classifier, "two_adapters": two_adapters}


def main(arguments: list[str] | None = None) -> None:
    """Draw every picture.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGES, help="where to write")
    output = parser.parse_args(arguments).output
    for name, make in PICTURES.items():
        make().to_svg(output / f"{name}.svg")
        print(f"wrote {output / name}.svg")


if __name__ == "__main__":
    main()
