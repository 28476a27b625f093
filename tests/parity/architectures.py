"""The architectures that are compared with PEFT: what their modules are called, a base and a trace of each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tiny_models import TINY, tiny_model
from torch import Tensor, nn
from traces import inputs_of

from gralora_fx import TracedModel, trace

HIDDEN = 32


@dataclass(frozen=True)
class Architecture:
    """Module names of one architecture, to write configurations with.

    Attributes:
        attention: Two or more linear layers by the end of their paths.
        others: More of them.
        paths: Linear layers by their whole paths.
        pattern: A regular expression of whole paths.
        container: The module whose children `layers_to_transform` counts.
        layers: The number of its children.
        norm: A norm, by the end of its path.
        head: A head that is not tied, for `modules_to_save`.
        has_default: Whether PEFT's table knows the model type.
        has_biases: Whether there are biases at all.
        is_classifier: Whether `task_type` SEQ_CLS fits.
    """

    attention: tuple[str, ...]
    others: tuple[str, ...]
    paths: tuple[str, ...]
    pattern: str
    container: str
    layers: int = 2
    norm: str | None = None
    head: str | None = None
    has_default: bool = False
    has_biases: bool = True
    is_classifier: bool = False


def _llama_like(attention: tuple[str, ...], others: tuple[str, ...], **fields: object) -> Architecture:
    first, *_ = attention
    return Architecture(
        attention=attention,
        others=others,
        paths=(f"model.layers.0.self_attn.{first}", "model.layers.1.self_attn.o_proj"),
        pattern=rf"model\.layers\.1\.self_attn\.({'|'.join(attention)})",
        container="layers",
        norm="norm",
        **{"has_default": True, "has_biases": False, **fields},  # type: ignore[arg-type]
    )


_Q_AND_V = ("q_proj", "v_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        attention=("query", "value"),
        others=("key", "intermediate.dense", "output.dense"),
        paths=("bert.encoder.layer.0.attention.self.query", "bert.pooler.dense"),
        pattern=r"bert\.encoder\.layer\.1\..*(query|dense)",
        container="layer",
        norm="LayerNorm",
        head="classifier",
        has_default=True,
        is_classifier=True,
    ),
    "roberta": Architecture(
        attention=("query", "value"),
        others=("key", "output.dense"),
        paths=("roberta.encoder.layer.0.attention.self.key", "classifier.dense"),
        pattern=r".*layer\.0\.(attention|intermediate)\..*(query|key|dense)",
        container="layer",
        norm="output.LayerNorm",
        head="classifier",
        has_default=True,
        is_classifier=True,
    ),
    "distilbert": Architecture(
        attention=("q_lin", "v_lin"),
        others=("k_lin", "out_lin", "lin1", "lin2"),
        paths=("distilbert.transformer.layer.1.attention.q_lin", "pre_classifier"),
        pattern=r".*(q_lin|ffn\.lin[12])",
        container="layer",
        norm="output_layer_norm",
        head="classifier",  # takes pre_classifier too
        is_classifier=True,
    ),
    "albert": Architecture(
        attention=("query", "value"),
        others=("attention.dense", "ffn", "ffn_output"),
        paths=("albert.pooler", "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.key"),
        pattern=r"albert\.(pooler|.*mapping_in|.*ffn)",
        container="albert_layers",
        layers=1,
        norm="full_layer_layer_norm",
        head="classifier",
        is_classifier=True,
    ),
    "mpnet": Architecture(
        attention=("attn.q", "attn.v"),
        others=("attn.o", "intermediate.dense"),
        paths=("mpnet.encoder.layer.0.attention.attn.k", "classifier.dense"),
        pattern=r".*layer\.1\..*\.(q|k|dense)",
        container="layer",
        norm="attention.LayerNorm",
        head="classifier",
        is_classifier=True,
    ),
    "gpt2": Architecture(
        attention=("c_attn", "attn.c_proj"),
        others=("c_fc", "mlp.c_proj"),
        paths=("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"),
        pattern=r".*\.h\.1\.(attn|mlp)\.c_(attn|proj)",
        container="h",
        norm="ln_f",
        has_default=True,
    ),
    "opt": Architecture(
        attention=_Q_AND_V,
        others=("k_proj", "out_proj", "fc1", "fc2"),
        paths=("model.decoder.layers.0.self_attn.k_proj", "model.decoder.layers.1.fc1"),
        pattern=r"model\.decoder\.layers\.0\.(fc\d|.*\.[qk]_proj)",
        container="layers",
        norm="final_layer_norm",
        has_default=True,
    ),
    "llama": _llama_like(_Q_AND_V, ("k_proj", "o_proj", *_GATED), head="lm_head"),
    "qwen3": _llama_like(_Q_AND_V, ("k_proj", "o_proj", *_GATED), head="lm_head"),
    "gemma3": _llama_like(_Q_AND_V, ("o_proj", *_GATED)),
    "phi3": _llama_like(("qkv_proj",), ("o_proj", "gate_up_proj", "down_proj"), head="lm_head", has_default=False),
    "mistral": _llama_like(_Q_AND_V, ("k_proj", *_GATED), head="lm_head"),
    "mixtral": _llama_like(_Q_AND_V, ("k_proj", "o_proj"), head="lm_head"),
    "t5": Architecture(
        attention=("q", "v"),
        others=("wi", "wo", "EncDecAttention.k"),
        paths=("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.o"),
        pattern=r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        container="block",
        norm="final_layer_norm",
        has_default=True,
    ),
    "bart": Architecture(
        attention=_Q_AND_V,
        others=("k_proj", "out_proj", "fc1", "fc2"),
        paths=("model.encoder.layers.0.fc1", "model.decoder.layers.1.encoder_attn.k_proj"),
        pattern=r"model\.decoder\.layers\.\d\.encoder_attn\.(q|out)_proj",
        container="layers",
        norm="layernorm_embedding",
        has_default=True,
    ),
    "whisper": Architecture(
        attention=_Q_AND_V,
        others=("k_proj", "out_proj", "fc1", "fc2"),
        paths=("model.encoder.layers.0.fc1", "model.decoder.layers.1.encoder_attn.k_proj"),
        pattern=r"model\.encoder\..*(q_proj|fc2)",
        container="layers",
        norm="model.decoder.layer_norm",
    ),
    "vit": Architecture(
        attention=_Q_AND_V,
        others=("o_proj", "fc1", "fc2"),
        paths=("vit.layers.0.attention.q_proj", "vit.layers.1.mlp.fc1", "classifier"),
        pattern=r"vit\.layers\.\d+\.mlp\.fc\d",
        container="layers",
        norm="vit.layernorm",
        head="classifier",
    ),
    "clip_text": Architecture(
        attention=_Q_AND_V,
        others=("out_proj", "fc1", "fc2", "text_projection"),
        paths=("text_model.encoder.layers.0.self_attn.out_proj", "text_projection"),
        pattern=r".*layers\.1\.(mlp\.fc1|self_attn\.k_proj)",
        container="layers",
        norm="final_layer_norm",
        head="text_projection",
    ),
    "mlp": Architecture(
        attention=("up",),
        others=("down", "first"),
        paths=("body.first", "body.blocks.1.down"),
        pattern=r"body\.blocks\.\d\.(up|down)",
        container="blocks",
        head="head",
    ),
    "multihead": Architecture(
        attention=("out_proj", "up"),
        others=("down", "first"),
        paths=("body.blocks.0.attention.out_proj", "body.blocks.1.down"),
        pattern=r".*(attention\.out_proj|\.down)",
        container="blocks",
        norm="norm",
        head="head",
    ),
}


class MlpBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class AttentionBlock(MlpBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        return super().forward(x + self.attention(hidden, hidden, hidden, need_weights=False)[0])


class Plain(nn.Module):
    """A model that is none of transformers': a first layer, two blocks and a head."""

    def __init__(self, block: type[MlpBlock]) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.first = nn.Linear(16, HIDDEN)
        self.body.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body.first(x))
        for block in self.body.blocks:
            x = block(x)
        return self.head(x)


PLAIN = {"mlp": MlpBlock, "multihead": AttentionBlock}


@functools.cache
def _base(name: str, dtype: torch.dtype) -> nn.Module:
    if name in PLAIN:
        torch.manual_seed(0)
        return Plain(PLAIN[name]).to(dtype).eval()
    config = type(tiny_model(name).config)()
    # without dropout, training and evaluation compute the same, and so can be compared
    rates = {key: 0.0 for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)}
    return tiny_model(name, **rates).to(dtype)


def base_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model of the architecture, for a test to change."""
    return copy.deepcopy(_base(name, dtype))


def model_inputs(name: str, dtype: torch.dtype = torch.float32, rank: int = 3) -> dict[str, Tensor]:
    """Return inputs of an architecture; those of a plain model have `rank` dimensions."""
    if name in PLAIN:
        shape = (3, 16) if rank == 2 else (3, 5, 16)
        inputs = {"x": torch.randn(shape, generator=torch.Generator().manual_seed(17))}
    else:
        inputs = inputs_of(name)
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs.items()}


@functools.cache
def base_trace(name: str, dtype: torch.dtype = torch.float32, rank: int = 3) -> TracedModel:
    """Return a trace of the architecture, to be read only."""
    # what trace() makes from a configuration is float32, which such a model does not take
    needs_inputs = name in PLAIN or (name in ("vit", "whisper") and dtype != torch.float32)
    inputs: Mapping[str, Tensor] | None = model_inputs(name, dtype, rank) if needs_inputs else None
    return trace(base_model(name, dtype), inputs)


assert ARCHITECTURES.keys() - PLAIN.keys() <= TINY.keys()
