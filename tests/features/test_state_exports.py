"""Exports of models that keep states: names, precisions, states of rows bit for bit, and onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxruntime_genai
import pytest
import torch

from gralora_fx import GraloraConfig, LoraConfig, rewrite, trace
from gralora_fx.core.config import AdapterConfig
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.rules.builder import Builder, add_input
from gralora_fx.exporters.rules.rows.row_tokens import row_tokens
from gralora_fx.features.states.rows import RowStates
from tests.architectures.tiny_decoders import tiny_decoder

LFM2: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
MAMBA2: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1, "num_hidden_layers": 1}
TASK = "text-generation-with-past"
GRALORA = GraloraConfig(r=2, gralora_k=2, target_modules="all-linear", init_weights=False)
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def inputs_of(path: Path) -> dict[str, tuple[Any, ...]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return {value.name: (value.type, *value.shape[1:]) for value in session.get_inputs() if "past_key" in value.name}


def test_states_are_in_their_operators_layout_in_half_precision_and_recurrent_ones_float32(tmp_path: Path) -> None:
    model = trace(tiny_decoder("Mamba2ForCausalLM", **MAMBA2), task=TASK)
    report = export_onnx(model, tmp_path / "export", precision="fp16")
    assert "model_rows.onnx: greedy tokens" in report.details
    for name in ("model.onnx", "model_rows.onnx"):
        assert inputs_of(tmp_path / "export" / name) == {
            "past_key_values.0.conv": ("tensor(float16)", 3, 80),  # transformers': 80, 3
            "past_key_values.0.recurrent": ("tensor(float)", 4, 8, 16),  # transformers': 16, 8
        }


def test_onnxruntime_genai_drives_a_hybrid(tmp_path: Path) -> None:
    source = tiny_decoder("Lfm2ForCausalLM", eos_token_id=2, **LFM2)
    export_onnx(trace(source, task=TASK), tmp_path / "export", verify=False)
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(3))
    expected = source.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist()
    model = onnxruntime_genai.Model(str(tmp_path / "export"))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=17, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0).tolist()
    assert found == expected[: len(found)]
    assert len(found) > 12


CHANNELS, KERNEL, HEADS, SIZE = 6, 4, 3, 8
COUNTS = (5, 1, 0, 2)


def operators(by_rows: bool) -> Any:
    """Return a session over a convolution and linear attention: of `[batch, length]`, or of the tokens that count."""
    batch, length = ir.SymbolicDim("batch"), ir.SymbolicDim("length")
    width, float32 = HEADS * SIZE, ir.DataType.FLOAT
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1})
    tokens: Any = [1, ir.SymbolicDim("tokens")] if by_rows else [batch, length]
    x, q, k, v = (
        add_input(graph, n, float32, [*tokens, w]) for n, w in zip("xqkv", (CHANNELS, width, width, width), strict=True)
    )
    decay, beta = (add_input(graph, n, float32, [*tokens, HEADS]) for n in ("decay", "beta"))
    conv = add_input(graph, "conv", float32, [batch, CHANNELS, KERNEL - 1])
    state = add_input(graph, "state", float32, [batch, HEADS, SIZE, SIZE])
    weight = add_input(graph, "weight", float32, [CHANNELS, 1, KERNEL])
    build = Builder(graph)
    columns = build("Transpose", x, perm=[0, 2, 1])
    convolved = build.node(
        "CausalConvWithState", [columns, weight, None, conv], domain="com.microsoft", num_outputs=2, activation="silu"
    )
    options = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "update_rule": "gated_delta", "scale": 1.0}
    attended = build.node(
        "LinearAttention", [q, k, v, state, decay, beta], domain="com.microsoft", num_outputs=2, **options
    )
    for value, shape in ((convolved.outputs[0], [*tokens]), (attended.outputs[0], [*tokens, width])):
        value.shape, value.type = ir.Shape(shape), ir.TensorType(float32)
    y = build("Transpose", convolved.outputs[0], perm=[0, 2, 1])
    outputs = [y, convolved.outputs[1], attended.outputs[0], attended.outputs[1]]
    for value, name in zip(outputs, ("y", "next_conv", "a", "next_state"), strict=True):
        value.name, value.type = name, ir.TensorType(float32)
    graph.extend(build.take())
    graph.outputs.extend(outputs)
    if by_rows:
        ids = add_input(graph, "ids", ir.DataType.INT64, [batch, length])
        query, past = (add_input(graph, name, ir.DataType.INT32, [batch]) for name in ("query", "past"))
        rows = row_tokens(build, ids, query, past)
        build.insert_before(graph[0])
        rewritten = RowStates(graph, rows)
        for node in [node for node in graph if node.domain == "com.microsoft"]:
            rewritten.rewrite(node)
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.quick
def test_each_row_of_state_operators_is_bit_for_bit_as_alone() -> None:
    generator = np.random.default_rng(0)

    def drawn(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32)

    width, total = HEADS * SIZE, sum(COUNTS)
    widths = {"x": CHANNELS, "q": width, "k": width, "v": width, "decay": HEADS, "beta": HEADS}
    tokens = {name: drawn(1, total, size) for name, size in widths.items()}
    tokens["decay"] = -np.abs(tokens["decay"])
    states = {"conv": drawn(4, CHANNELS, KERNEL - 1), "state": drawn(4, HEADS, SIZE, SIZE)}
    weight = {"weight": drawn(CHANNELS, 1, KERNEL)}
    lengths = {"query": np.array(COUNTS, np.int32), "past": np.zeros(4, np.int32), "ids": np.ones((4, 7), np.int64)}
    y, conv, a, state = operators(True).run(None, {**tokens, **states, **weight, **lengths})
    one, at = operators(False), 0
    for row, count in enumerate(COUNTS):
        own = {name: value[row : row + 1] for name, value in states.items()}
        if count == 0:
            assert np.array_equal(conv[row], states["conv"][row])
            assert np.array_equal(state[row], states["state"][row])
            continue
        part = {name: value[:, at : at + count] for name, value in tokens.items()}
        expected = one.run(None, {**part, **own, **weight})
        found = (y[:, at : at + count], conv[row : row + 1], a[:, at : at + count], state[row : row + 1])
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        at += count


@pytest.mark.parametrize(
    ("name", "config"),
    [("Qwen3_5ForCausalLM", GRALORA), ("OlmoHybridForCausalLM", GRALORA), ("Qwen3NextForCausalLM", LORA)],
    ids=["Qwen3.5 GraLoRA", "OLMo-Hybrid GraLoRA", "Qwen3-Next LoRA"],
)
def test_adapters_of_a_delta_rules_gates_are_data(name: str, config: AdapterConfig, tmp_path: Path) -> None:
    adapted = rewrite(trace(tiny_decoder(name), task=TASK), config)
    report = export_onnx(adapted, tmp_path / "export", adapters="data")  # verified with the adapter
    assert "model_rows.onnx: greedy tokens" in report.details
    model = onnx.load(tmp_path / "export" / "model.onnx", load_external_data=False)
    assert {"LinearAttentionGate", "LinearAttention", "GatedRMSNorm"} <= {node.op_type for node in model.graph.node}


def test_every_convolution_keeps_its_state_as_the_layers_around_it(tmp_path: Path) -> None:
    kinds = ["linear_attention", "linear_attention", "full_attention"]  # the batch's size is read from one of them
    model = tiny_decoder("Qwen3_5ForCausalLM", num_hidden_layers=3, layer_types=kinds)
    export_onnx(trace(model, task=TASK), tmp_path / "export")
    for name in ("model.onnx", "model_rows.onnx"):
        states = {key: shape for key, (_, *shape) in inputs_of(tmp_path / "export" / name).items() if "conv" in key}
        assert len(states) == 2
        assert all(positions == 3 and channels > 3 for positions, channels in states.values())
