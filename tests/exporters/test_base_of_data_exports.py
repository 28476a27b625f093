"""Without an adapter, an export that takes adapters as data computes what the base's export does, bit for bit.

What ONNX Runtime fuses next to a layer decides the order of rounding, so biases are not zero here, sums are longer than
a block of the kernels, and every level of optimisation is compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from sentence_encoders import save_encoder
from tiny_images import VIT
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from gralora_fx import GraloraConfig, LoraConfig, TracedModel, rewrite, trace
from gralora_fx.core.loading.models import load_model
from gralora_fx.exporters import export_onnx
from tests.architectures.tiny_decoders import tiny_decoder
from tests.architectures.tiny_encoders import tiny_encoder

CACHED, TO_TEXT = "text-generation-with-past", "text2text-generation-with-past"
LEVELS = [
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
]
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": bool,
}


def shaken(model: Any) -> Any:
    """Return a model whose biases and norms are what training makes of them, and not zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


class Layers(nn.Module):
    """Two linear layers within a function of theirs."""

    def __init__(self, function: Callable[[Layers, Tensor], Tensor], width: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.norm = function, nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, width, bias), nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# function, width, whether there are biases, axes of the input
PLAIN: dict[str, tuple[Callable[[Layers, Tensor], Tensor], int, bool, int]] = {
    "a product": (lambda m, x: m.second(torch.relu(m.first(x))), 64, True, 2),
    "a factor": (lambda m, x: x + 0.3 * m.second(torch.relu(m.first(x))), 512, False, 3),
    "a quotient": (lambda m, x: m.second(m.first(x) / 1.7), 64, False, 3),
    "two factors": (lambda m, x: m.first(x) / 1.7 * 0.3, 64, False, 2),
    "a factor of the input": (lambda m, x: m.first(x * 0.3), 512, False, 3),
    "a factor and a bias": (lambda m, x: m.second(0.3 * m.first(x)), 512, True, 3),
    "a norm of a residual": (lambda m, x: m.norm(x + m.second(nn.functional.gelu(m.first(x)))), 64, True, 3),
}


def plain(name: str, dynamic: bool = True) -> TracedModel:
    """Return a trace of a module that is none of transformers'."""
    function, width, bias, axes = PLAIN[name]
    torch.manual_seed(2)
    sample = torch.randn(2, 5, width) if axes == 3 else torch.randn(2, width)
    return trace(shaken(Layers(function, width, bias)), (sample,), dynamic=dynamic)


def tiny(name: str, task: str | None = None, **sizes: Any) -> TracedModel:
    """Return a trace of a tiny model."""
    return trace(shaken(tiny_model(name, **sizes)), task=task)


def sentence_encoder(directory: Path) -> TracedModel:
    """Return a trace of a sentence encoder."""
    path = save_encoder("bert", directory, "mean")
    return trace(shaken(load_model(path, "sentence-similarity")))


FAMILIES: dict[str, Callable[[Path], TracedModel]] = {
    "encoder": lambda _: tiny("bert", num_labels=4),
    "encoder that calls a layer twice": lambda _: tiny("albert", num_labels=4),
    "GPT-2": lambda _: tiny("gpt2", CACHED, n_embd=64),
    "GPT-2 without a cache": lambda _: tiny("gpt2", "text-generation", n_embd=64),
    "Llama": lambda _: tiny("llama", CACHED),
    "OPT": lambda _: tiny("opt", CACHED),
    "Phi-3": lambda _: tiny("phi3", CACHED),
    "Granite": lambda _: trace(shaken(tiny_decoder("GraniteForCausalLM")), task=CACHED),
    "GPT-NeoX": lambda _: trace(shaken(tiny_decoder("GPTNeoXForCausalLM")), task=CACHED),
    "T5": lambda _: tiny("t5", TO_TEXT, num_layers=1),
    "BART": lambda _: tiny("bart", TO_TEXT, encoder_layers=1, decoder_layers=1),
    "ViT": lambda _: tiny("vit", num_labels=4),
    "LeViT": lambda _: trace(shaken(tiny_encoder("LevitForImageClassification"))),
    "CLIP's images": lambda _: trace(shaken(CLIPVisionModel(CLIPVisionConfig(**VIT)))),
    "CLIP's texts": lambda _: tiny("clip_text"),
    "sentence encoder": sentence_encoder,
    **{f"module with {name}": lambda _, name=name: plain(name) for name in PLAIN},
    "module of fixed sizes": lambda _: plain("a norm of a residual", dynamic=False),
}


def feeds(session: onnxruntime.InferenceSession, past: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs of a session by their names and types; tensors of adapters have rank 0, those of rows one row."""
    generator = np.random.default_rng(past)
    batch = 1 if past else 2  # several new positions after a cache need a batch of one
    sizes = {"batch_size": batch, "past_sequence_length": past, "total_sequence_length": past + 5}
    if any(value.name == "past_seqlens" for value in session.get_inputs()):  # a buffer with room for what is read
        sizes["past_sequence_length"] = past + 10
    arrays = {}
    for value in session.get_inputs():
        is_adapter = ".gralora_" in value.name
        shape = [
            size if isinstance(size, int) else 1 if size == "adapters" else 0 if is_adapter
            else sizes.get(size, batch if axis == 0 else 5)
            for axis, size in enumerate(value.shape)
        ]  # fmt: skip
        dtype = DTYPES[value.type]
        if value.name == "query_seqlens":
            arrays[value.name] = np.full(shape, 5, dtype)
        elif value.name == "past_seqlens":
            arrays[value.name] = np.full(shape, past, dtype)
        elif value.name == "adapter_ids" or value.name == "token_type_ids":
            arrays[value.name] = np.zeros(shape, dtype)
        elif "mask" in value.name:
            arrays[value.name] = np.ones(shape, dtype)
        elif value.name == "use_cache_branch":
            arrays[value.name] = np.full(shape, past > 0)
        elif value.name == "position_ids":
            arrays[value.name] = np.tile(np.arange(past, past + shape[1], dtype=dtype), (shape[0], 1))
        elif dtype is np.int64:
            arrays[value.name] = generator.integers(4, 60, shape)
        else:
            arrays[value.name] = generator.standard_normal(shape).astype(dtype)
    return arrays


def session_of(path: Path, level: Any) -> onnxruntime.InferenceSession:
    """Return a session of one thread, whose order of sums depends on the graph alone."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def differences(base: Path, data: Path, levels: list[Any]) -> list[str]:
    """Return the outputs in which two exports differ."""
    found = []
    for file in sorted(base.glob("*.onnx")):
        for level in levels:
            ours, theirs = session_of(data / file.name, level), session_of(file, level)
            cached = any(value.name.startswith("past_key_values") for value in theirs.get_inputs())
            for past in (0, 4) if cached else (0,):
                inputs, of_base = feeds(ours, past), feeds(theirs, past)
                inputs |= of_base
                outputs = zip(ours.get_outputs(), ours.run(None, inputs), theirs.run(None, of_base), strict=True)
                found += [
                    f"{file.name} {value.name} at {level} by {np.abs(mine - its).max():.1e}"
                    for value, mine, its in outputs
                    if not np.array_equal(mine, its)
                ]
    return found


def compared(
    traced: TracedModel,
    directory: Path,
    *,
    mode: Any = "data",
    levels: list[Any] = LEVELS,
    method: Any = GraloraConfig,
    has_blocks: bool | None = None,
    **options: Any,
) -> list[str]:
    """Return the outputs in which a data export with adapters at all layers differs from the base's."""
    sites = {site.path for site in traced.sites if site.in_features % 2 == site.out_features % 2 == 0 and site.calls}
    sites -= {site.path for site in traced.sites if site.tied_with}
    sizes = {"r": 2, "gralora_k": 2} if method is GraloraConfig else {"r": 2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        model = rewrite(traced, method(target_modules=sites, **sizes))
    export_onnx(traced, directory / "base", verify=False, **options)
    rule = "gralora_fx.exporters.kinds.data_sites.takes_blocks"
    with nullcontext() if has_blocks is None else mock.patch(rule, return_value=has_blocks):
        export_onnx(model, directory / "data", adapters=mode, verify=False, **options)
    return differences(directory / "base", directory / "data", levels)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_its_base(family: str, tmp_path: Path) -> None:
    assert compared(FAMILIES[family](tmp_path / "model"), tmp_path) == []


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("GPT-2", {"quantize": "int4"}),
        ("GPT-2", {"quantize": "int8", "mode": "inputs"}),
        ("GPT-2", {"mode": "inputs", "method": LoraConfig}),
        ("GPT-2", {"precision": "fp16", "has_blocks": False, "logits": "all"}),
        ("encoder", {"quantize": "int8"}),
        ("encoder", {"keep_padding": True}),
        ("encoder", {"mode": "inputs"}),
        ("encoder", {"precision": "fp16", "has_blocks": False}),
        ("ViT", {"quantize": "int4"}),
        ("T5", {"precision": "fp16", "has_blocks": False, "keep_padding": True}),
    ],
    ids=str,
)
def test_so_is_every_form_precision_and_mode(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert compared(FAMILIES[family](tmp_path / "model"), tmp_path, levels=LEVELS[1::2], **options) == []
