"""The grid: every architecture under every kind of configuration that PEFT accepts for it, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture


@dataclass(frozen=True)
class Case:
    """One configuration at one architecture.

    Attributes:
        architecture: Name in `ARCHITECTURES`.
        name: What is special about it.
        fields: Fields of the configuration, PEFT's and ours alike.
        dtype: Data type of the base.
        rank: Number of dimensions of a plain model's input.
        optimizer: Name of the optimizer whose step is compared.
        method: PEFT's name for the method, or DORA for its LoRA with `use_dora`.
    """

    architecture: str
    name: str
    fields: Mapping[str, Any] = field(hash=False)
    dtype: torch.dtype = torch.float32
    rank: int = 3
    optimizer: str = "SGD"
    method: str = "GRALORA"

    @property
    def starts_at_zero(self) -> bool:
        """True if the adapter changes nothing at first."""
        return bool(self.fields.get("init_weights", self.fields.get("init_lora_weights", False)))

    @property
    def dropout(self) -> float:
        """Dropout of the adapter's input."""
        return float(self.fields.get("gralora_dropout", self.fields.get("lora_dropout", 0.0)))

    def __str__(self) -> str:
        """Return the id of the case."""
        return f"{self.architecture}-{self.name}"


SMALL = {"r": 8, "gralora_k": 2, "alpha": 16}
HYBRID = {"r": 8, "gralora_k": 2, "hybrid_r": 4, "alpha": 24}


def _sizes(arch: Architecture) -> dict[str, dict[str, Any]]:
    """Ranks, blocks, scales, starting values and dropout."""
    two, all_named = list(arch.attention), [*arch.attention, *arch.others]
    return {
        "defaults": {"target_modules": two},
        "k1": {"target_modules": two, "r": 4, "gralora_k": 1, "alpha": 8},
        "k2": {"target_modules": all_named, **SMALL},
        "k4": {"target_modules": all_named, "r": 8, "gralora_k": 4, "alpha": 4},
        "r16-k4": {"target_modules": two, "r": 16, "gralora_k": 4, "alpha": 16},
        "hybrid": {"target_modules": all_named, **HYBRID},
        "hybrid-k1": {"target_modules": two, "r": 3, "gralora_k": 1, "hybrid_r": 5, "alpha": 3},
        "hybrid-k4": {"target_modules": two, "r": 4, "gralora_k": 4, "hybrid_r": 1, "alpha": 7},
        "zero-start": {"target_modules": two, **SMALL, "init_weights": True},
        "zero-start-hybrid": {"target_modules": all_named, **HYBRID, "init_weights": True},
        "dropout": {"target_modules": two, **SMALL, "gralora_dropout": 0.1},
        "dropout-hybrid": {"target_modules": two, **HYBRID, "gralora_dropout": 0.5},
    }


def _targets(arch: Architecture) -> dict[str, dict[str, Any]]:
    """Return the ways to name modules and layers."""
    two, last = list(arch.attention), arch.layers - 1
    targets: dict[str, dict[str, Any]] = {
        "paths": {"target_modules": list(arch.paths), **SMALL},
        "regex": {"target_modules": arch.pattern, **SMALL},
        "all-linear": {"target_modules": "all-linear", **SMALL},
        "ALL-LINEAR": {"target_modules": "ALL-LINEAR", **HYBRID},
        "layer": {"target_modules": two, **SMALL, "layers_to_transform": last},
        "layer-list": {"target_modules": two, **SMALL, "layers_to_transform": [last]},
        "no-layers": {"target_modules": two, **SMALL, "layers_to_transform": []},
        "pattern": {"target_modules": two, **SMALL, "layers_to_transform": [0], "layers_pattern": arch.container},
        "patterns": {
            "target_modules": two,
            **HYBRID,
            "layers_to_transform": last,
            "layers_pattern": ["absent", arch.container],
        },
    }
    if arch.has_default:
        targets["none"] = {"target_modules": None, **SMALL}
    return targets


def _trained(arch: Architecture) -> dict[str, dict[str, Any]]:
    """Biases and whole modules that train beside the adapters."""
    two = list(arch.attention)
    trained: dict[str, dict[str, Any]] = {}
    if arch.has_biases:
        trained["bias-all"] = {"target_modules": two, **SMALL, "bias": "all"}
        trained["bias-gralora-only"] = {"target_modules": two, **HYBRID, "bias": "gralora_only"}
    if arch.norm:
        trained["saved-norm"] = {"target_modules": two, **SMALL, "modules_to_save": [arch.norm]}
    if arch.head:
        trained["saved-head"] = {"target_modules": two, **HYBRID, "modules_to_save": [arch.head]}
    if arch.is_classifier:
        trained["seq-cls"] = {"target_modules": two, **SMALL, "task_type": "SEQ_CLS"}
    return trained


TRANSPOSED = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# whole modules that are neither a head nor a norm, and modules that hold others
SAVED = {
    "bert": {"saved-pooler": ["pooler"], "saved-layer": ["layer.1"]},
    "llama": {"saved-embedding": ["embed_tokens"], "saved-attention": ["layers.0.self_attn"]},
    "whisper": {"saved-convolution": ["conv1"]},
    "vit": {"saved-patches": ["patch_embeddings.projection"]},
    "multihead": {
        "saved-attention": ["0.attention"],
        "saved-out-proj": ["1.attention.out_proj"],
        "saved-two": ["head", "first"],
    },
}
UNTRACEABLE = {
    ("mixtral", "fp64"),  # torch's grouped matrix product of the experts takes no float64
    ("bart", "fp16"),  # its encoder asks in Python whether a float16 value has overflowed
}


# of a relative of another architecture, and of one whose forward is slow, what depends on the architecture alone
_REPEATED = (
    "roberta",
    "distilbert",
    "mpnet",
    "qwen3",
    "gemma3",
    "mistral",
    "mixtral",
    "bart",
    "t5",
    "whisper",
    "clip_text",
)
_OF_RULES = ("ALL-LINEAR", "no-layers", "layer-list", "k1", "hybrid-k1")  # what depends on PEFT's rules alone
_BY_ARCHITECTURE = ("lora", "rslora-patterns", "lora-all-linear", "lora-bias-only", "lora-saved-head", "lora-seq-cls")


def _cases(name: str, arch: Architecture) -> Iterator[Case]:
    for kind, fields in {**_sizes(arch), **_targets(arch), **_trained(arch)}.items():
        if name in _REPEATED and kind in _OF_RULES:
            continue
        yield Case(name, kind, fields, optimizer="AdamW" if "hybrid" in kind else "SGD")
    for kind, dtype in DTYPES.items():
        if (name, kind) in UNTRACEABLE:
            continue
        yield Case(name, kind, {"target_modules": list(arch.attention), **HYBRID}, dtype=dtype)
    if name == "gpt2":
        yield Case(name, "fan-in-fan-out", {**TRANSPOSED, **SMALL})
        yield Case(name, "fan-in-fan-out-hybrid", {**TRANSPOSED, **HYBRID}, optimizer="AdamW")
        yield Case(name, "fan-in-fan-out-bf16", {**TRANSPOSED, **SMALL}, dtype=torch.bfloat16)
    for kind, modules in SAVED.get(name, {}).items():
        yield Case(name, kind, {"target_modules": list(arch.attention), **SMALL, "modules_to_save": modules})
    if name == "mlp":
        for kind in ("k2", "hybrid", "k4"):
            yield Case(name, f"2d-{kind}", _sizes(arch)[kind], rank=2)
        yield Case(name, "2d-all-linear", _targets(arch)["all-linear"], rank=2)
    if arch.is_classifier and name != "distilbert":  # there PEFT takes pre_classifier for a head too, and then fails
        yield Case(name, "seq-cls-all-linear", {"target_modules": "all-linear", **HYBRID, "task_type": "SEQ_CLS"})


def _lora_cases(name: str, arch: Architecture) -> Iterator[Case]:
    """Plain LoRA and rsLoRA."""
    two, all_named = list(arch.attention), [*arch.attention, *arch.others]
    small = {"r": 8, "lora_alpha": 16}
    first, last = two[0], all_named[-1]
    kinds: dict[str, dict[str, Any]] = {
        "lora": {"target_modules": all_named, **small},
        "rslora": {"target_modules": two, "r": 5, "lora_alpha": 7, "use_rslora": True},
        "lora-patterns": {
            "target_modules": all_named,
            **small,
            "rank_pattern": {first: 3},
            "alpha_pattern": {last: 5, first: 4},
        },
        "rslora-patterns": {
            "target_modules": all_named,
            **small,
            "use_rslora": True,
            "rank_pattern": {f"0.*{last}": 2, last: 4},
            "alpha_pattern": {last: 5},
        }
        if arch.layers > 1
        else {"target_modules": two, **small, "use_rslora": True, "alpha_pattern": {first: 5}},
        "lora-zero-start": {"target_modules": two, **small, "init_lora_weights": True},
        "lora-gaussian": {"target_modules": two, **small, "init_lora_weights": "gaussian"},
        "lora-dropout": {"target_modules": two, **small, "lora_dropout": 0.2},
        "lora-all-linear": {"target_modules": "all-linear", **small},
    }
    if len(two) > 1:
        kinds["lora-exclude"] = {"target_modules": two, **small, "exclude_modules": [first]}
    if arch.has_biases:
        kinds["lora-bias-all"] = {"target_modules": two, **small, "bias": "all"}
        kinds["lora-bias-only"] = {"target_modules": two, **small, "bias": "lora_only"}
    if arch.head:
        kinds["lora-saved-head"] = {"target_modules": two, **small, "modules_to_save": [arch.head]}
    if arch.is_classifier:
        kinds["lora-seq-cls"] = {"target_modules": two, **small, "task_type": "SEQ_CLS"}
    if name == "gpt2":
        kinds["lora-fan-in-fan-out"] = {**TRANSPOSED, **small}
        kinds["rslora-fan-in-fan-out"] = {**TRANSPOSED, **small, "use_rslora": True}
    if name == "mixtral":  # PEFT adapts its stacked experts too, which test_expert_adapters.py compares
        del kinds["lora-all-linear"]
    for kind, fields in kinds.items():
        if name in _REPEATED and kind not in _BY_ARCHITECTURE:
            continue
        yield Case(name, kind, fields, optimizer="AdamW" if "zero" in kind else "SGD", method="LORA")
    for kind, dtype in DTYPES.items():
        if (name, kind) not in UNTRACEABLE and name in ("gpt2", "llama", "bert", "vit"):
            yield Case(name, f"lora-{kind}", {"target_modules": two, **small}, dtype=dtype, method="LORA")


def _dora_cases(name: str, arch: Architecture) -> Iterator[Case]:
    """DoRA: what differs from LoRA, since the weights take part."""
    two, all_named = list(arch.attention), [*arch.attention, *arch.others]
    small = {"r": 8, "lora_alpha": 16}
    kinds: dict[str, dict[str, Any]] = {
        "dora": {"target_modules": all_named, **small},
        "dora-rslora-patterns": {
            "target_modules": two,
            **small,
            "use_rslora": True,
            "rank_pattern": {two[0]: 3},
            "alpha_pattern": {two[-1]: 5},
        },
        "dora-zero-start": {"target_modules": two, **small, "init_lora_weights": True},
        "dora-dropout": {"target_modules": two, **small, "lora_dropout": 0.2},
    }
    if arch.has_biases:
        kinds["dora-bias-all"] = {"target_modules": two, **small, "bias": "all"}
        kinds["dora-bias-only"] = {"target_modules": two, **small, "bias": "lora_only"}
    if arch.head:
        kinds["dora-saved-head"] = {"target_modules": two, **small, "modules_to_save": [arch.head]}
    if name == "gpt2":
        kinds["dora-fan-in-fan-out"] = {**TRANSPOSED, **small}
    for kind, fields in kinds.items():
        if name in _REPEATED and kind != "dora":
            continue
        yield Case(name, kind, fields, optimizer="AdamW" if "zero" in kind else "SGD", method="DORA")
    for kind, dtype in DTYPES.items():
        if (name, kind) not in UNTRACEABLE and name in ("gpt2", "llama", "bert"):
            yield Case(name, f"dora-{kind}", {"target_modules": two, **small}, dtype=dtype, method="DORA")


DORA_GRID: tuple[Case, ...] = tuple(case for name, arch in ARCHITECTURES.items() for case in _dora_cases(name, arch))
LORA_GRID: tuple[Case, ...] = tuple(case for name, arch in ARCHITECTURES.items() for case in _lora_cases(name, arch))
GRID: tuple[Case, ...] = tuple(case for name, arch in ARCHITECTURES.items() for case in _cases(name, arch))

GROUPS = {
    "encoders": ("bert", "roberta", "distilbert", "albert", "mpnet"),
    "decoders": ("gpt2", "opt", "llama", "qwen3"),
    "more_decoders": ("gemma3", "phi3", "mistral", "mixtral"),
    "encoder_decoders": ("t5", "bart", "whisper"),
    "vision_and_plain": ("vit", "clip_text", "mlp", "multihead"),
}


def cases_of(group: str) -> list[Any]:
    """Return the cases of a group as parameters of a test."""
    return as_parameters([case for case in GRID if case.architecture in GROUPS[group]])


def as_parameters(cases: Sequence[Case], *of_the_first: pytest.MarkDecorator) -> list[Any]:
    """Cases as parameters of a test, the first with marks of its own."""
    return [pytest.param(case, id=str(case), marks=of_the_first if case is cases[0] else ()) for case in cases]
