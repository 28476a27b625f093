"""Models whose adapters are data of their exports, adapters that PEFT saved for them, and what both compute."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft_oracle import peft_model
from tiny_images import IMAGE_MODELS, image_model
from tiny_models import tiny_model
from torch import Tensor, nn
from traces import inputs_of, real_positions, run

from gralora_fx import GraloraConfig, TracedModel, rewrite, trace
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.serving import OrtModel, load

CACHED = "text-generation-with-past"


class Perceptron(nn.Module):
    """Two layers that are called, the first of them twice, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.spare = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(torch.relu(self.inner(x)))))


def _perceptron() -> nn.Module:
    torch.manual_seed(0)
    return Perceptron().eval()


def _tied() -> nn.Module:
    return tiny_model("llama", tie_word_embeddings=True, vocab_size=104)


@dataclass(frozen=True)
class Kind:
    """A model and the layers of it that have adapters.

    Attributes:
        make: Makes the model, the same each time.
        targets: `target_modules` of every adapter.
        task: What the model is traced for.
        first: A name in the targets, for patterns of ranks and scales.
        inputs: Name of the tiny model whose inputs it takes; None for one input of rows.
    """

    make: Callable[[], Any]
    targets: Any = "all-linear"
    task: str | None = None
    first: str = "query"
    inputs: str | None = "bert"

    def batch(self) -> dict[str, Tensor]:
        """Return inputs, with padding where the model's own outputs at other positions do not depend on it."""
        generator = torch.Generator().manual_seed(5)
        if self.inputs is None:
            return {"x": torch.randn(3, 5, 32, generator=generator)}
        if self.inputs == "swin":
            return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
        inputs = inputs_of(self.inputs)
        if self.task == CACHED:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def trace(self, model: Any) -> TracedModel:
        """Return a trace of the model."""
        return trace(model, (torch.randn(2, 3, 32),)) if self.inputs is None else trace(model, task=self.task)


def _decoder(name: str, targets: Any = "all-linear", first: str = "q_proj") -> Kind:
    return Kind(lambda: tiny_model(name), targets, CACHED, first, name)


KINDS: dict[str, Kind] = {
    "llama": _decoder("llama"),
    "llama-q-v": _decoder("llama", ["q_proj", "v_proj"]),
    "llama-q-o-down": _decoder("llama", ["q_proj", "o_proj", "down_proj"]),
    "phi3": _decoder("phi3", "all-linear", "qkv_proj"),
    "tied-head": Kind(_tied, ["q_proj", "lm_head"], CACHED, "q_proj", "llama"),
    "gpt2": _decoder("gpt2", ["c_attn", "c_proj", "c_fc"], "c_attn"),
    "bert": Kind(lambda: tiny_model("bert", num_labels=4)),
    "albert": Kind(lambda: tiny_model("albert", num_labels=4), ["query", "value", "ffn"]),
    "t5": Kind(
        lambda: tiny_model("t5", num_layers=1), ["q", "v", "o", "wi"], "text2text-generation-with-past", "q", "t5"
    ),
    "vit": Kind(lambda: tiny_model("vit", num_labels=4), "all-linear", None, "q_proj", "vit"),
    "swin": Kind(
        lambda: image_model(IMAGE_MODELS["swin"]), ["q_proj", "v_proj", "o_proj", "fc1", "fc2"], None, "q_proj", "swin"
    ),
    "perceptron": Kind(_perceptron, ["inner", "outer", "spare"], None, "inner", None),
}


def _gralora(r: int, hybrid_r: int) -> dict[str, Any]:
    return {"r": r, "hybrid_r": hybrid_r, "alpha": 16}


ADAPTERS: dict[str, dict[str, Any]] = {
    **{f"gralora-{r}-{hybrid}": _gralora(r, hybrid) for r in (2, 4, 8, 64) for hybrid in (0, 4)},
    **{f"lora-{r}": {"method": "LORA", "r": r, "lora_alpha": 16} for r in (4, 16)},
    "rslora": {"method": "LORA", "r": 8, "lora_alpha": 8, "use_rslora": True},
    "lora-patterns": {"method": "LORA", "r": 4, "lora_alpha": 8, "patterns": True},
    "lora-at-some": {"method": "LORA", "r": 4, "lora_alpha": 64, "some": True},
}


def fields_of(name: str, kind: Kind, k: int) -> dict[str, Any]:
    """Return an adapter's configuration for a model."""
    fields: dict[str, Any] = {**ADAPTERS[name], "target_modules": kind.targets}
    if fields.pop("some", False):
        fields["target_modules"] = [kind.first]
    if fields.pop("patterns", False):
        fields |= {"rank_pattern": {kind.first: 2}, "alpha_pattern": {kind.first: 3}}
    return fields if fields.get("method") == "LORA" else {**fields, "gralora_k": k}


def saved(kind: Kind, directory: Path, **fields: Any) -> peft.PeftModel:
    """Return the model adapted by PEFT, and its checkpoint in a directory."""
    wrapped = peft_model(kind.make(), **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tied head, whose weight PEFT adds to the file
        wrapped.save_pretrained(str(directory))
    return wrapped


@dataclass
class Exports:
    """Exports that several tests share, each made once, in one folder."""

    root: Path
    models: dict[str, OrtModel] = field(default_factory=dict)

    def adapted(self, name: str, k: int, mode: Any = "data", **options: Any) -> OrtModel:
        """Return an export that takes adapters as data, with a new adapter `default` of its own that is zero."""
        key = f"{name}-{k}-{mode}-{'-'.join(map(str, options.values()))}"
        if key not in self.models:
            kind = KINDS[name]
            config = GraloraConfig(r=k, gralora_k=k, target_modules=kind.targets)
            model = rewrite(kind.trace(kind.make()), config)
            export_onnx(model, self.root / key, adapters=mode, **_options(kind, options))
            self.models[key] = load(self.root / key)
        return self.models[key]

    def base(self, name: str, **options: Any) -> OrtModel:
        """Return the export of the model without adapters."""
        key = f"{name}-base-{'-'.join(map(str, options.values()))}"
        if key not in self.models:
            kind = KINDS[name]
            export_onnx(kind.trace(kind.make()), self.root / key, **_options(kind, options))
            self.models[key] = load(self.root / key)
        return self.models[key]


def _options(kind: Kind, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"verify": False, **({"logits": "all"} if kind.task == CACHED else {}), **options}


def copy_export(served: OrtModel, directory: Path) -> None:
    """Copy an export without the adapters that were added to it."""
    shutil.copytree(served.directory, directory)
    for path in (directory / "adapters").iterdir():
        if path.stem != "default":
            path.unlink()


def add(served: OrtModel, kind: Kind, directory: Path, name: str, **fields: Any) -> peft.PeftModel:
    """Save an adapter with PEFT and add it to an export."""
    wrapped = saved(kind, directory, **fields)
    export_adapter(directory, served.directory, name)
    return wrapped


def arrays(inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return inputs as arrays."""
    return {name: value.numpy() for name, value in inputs.items()}


def expected_of(model: Any, kind: Kind) -> Tensor:
    """Compute what a model gives for the inputs of a kind, at positions that are not padding."""
    inputs = kind.batch()
    return real_positions(model(inputs["x"]).detach() if kind.inputs is None else run(model, inputs), inputs)


def output_of(served: OrtModel, kind: Kind, adapter: str | None = None) -> Tensor:
    """Compute what an export gives for them."""
    inputs = kind.batch()
    names = served.output_names
    main = next((name for name in ("logits", "last_hidden_state") if name in names), names[0])
    given = inputs if kind.inputs is not None else dict(zip(served.input_names, inputs.values(), strict=True))
    return real_positions(torch.as_tensor(served(adapter=adapter, **arrays(given))[main]), inputs)
