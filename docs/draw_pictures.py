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
from gralora_fx.picture import svg_of
from gralora_fx.picture.dot import lay_out

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
    """Return a classifier with an adapter at two layers; its head trains whole."""
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
    """Return a decoder of four layers, drawn as one, with an adapter that is active and one that waits."""
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


FLOW = """
digraph {
  bgcolor=transparent; nodesep=0.3; ranksep=0.25
  node [shape=box style="rounded,filled" fillcolor="#eeeeee" color="#999999" fontname="Helvetica,Arial,sans-serif"
        fontsize=11
        margin="0.18,0.06" height=0.3]
  edge [color="#777777" fontcolor="#777777" fontname="Helvetica,Arial,sans-serif" fontsize=10]
  node [fillcolor="#d6e6f5" color="#4a90c2"]
  trace; plan; rewrite; merge; load; export [label="export_onnx\nverify_onnx"]
  node [fillcolor="#f7f7f7" color="#999999"]
  source [label="PyTorch model"]
  traced [label="TracedModel\ntorch.fx graph, sites"]
  config [label="GraloraConfig\nPEFT's adapter_config.json"]
  planned [label="RewritePlan\nselected and rejected sites"]
  model [label="GraloraModel\nnn.Module"]
  files [label="adapter files"]
  merged [label="TracedModel\nmerged weights"]
  directory [label="export directory\ngralora_export.json"]
  served [label="OrtModel\nONNX Runtime"]
  source -> trace -> traced -> plan -> planned -> rewrite -> model -> merge -> merged -> export
  export -> directory -> load -> served
  config -> plan
  model -> files [dir=both label="train, load,\nsave" minlen=2]
  { rank=same; model; files }
  model -> export
  traced -> export
}
"""


def flow() -> str:
    """Return the stages, in blue, and what each takes and gives."""
    return lay_out(FLOW)


PICTURES = {
    "classifier": lambda: svg_of(classifier()),
    "two_adapters": lambda: svg_of(two_adapters()),
    "flow": flow,
}


def main(arguments: list[str] | None = None) -> None:
    """Draw every picture.

    Args:
        arguments: Those of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGES, help="where to write")
    output = parser.parse_args(arguments).output
    for name, make in PICTURES.items():
        (output / f"{name}.svg").write_text(make(), encoding="utf-8")
        print(f"wrote {output / name}.svg")


if __name__ == "__main__":
    main()
