"""Exports of models that are never in memory: the same bytes as of those that are, and clear refusals."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from traces import fresh_trace

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.base.compat.torch_graphs import memory_of, tree_leaves
from gralora_fx.base.sources import safetensors_files as shards
from gralora_fx.base.sources.lazy_tensors import EntrySource, lazy_parameter, sampled_values, value_entries, values_of
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.core.loading.models import load_model, load_streamed
from gralora_fx.core.tracing import check
from gralora_fx.errors import CheckpointError, ExportError, MergeError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.verify import comparable, quality, tolerances

CACHED = "text-generation-with-past"
FILES = ("model.onnx", "model.onnx_data", "gralora_export.json", "genai_config.json", "config.json")
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
ADAPTER = GraloraConfig(r=8, gralora_k=2, hybrid_r=2, alpha=8, target_modules="all-linear", init_weights=False)


def saved(
    name: str, directory: Path, config: AdapterConfig | None = None, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """Return a tiny model in several shards and an adapter of it."""
    model = tiny_model(name).to(dtype)
    model.save_pretrained(directory / "base", max_shard_size="20KB")
    rewrite(fresh_trace(name, task=CACHED), config or ADAPTER).save_pretrained(directory / "adapter")
    return str(directory / "base"), str(directory / "adapter")


@pytest.mark.parametrize(
    ("name", "adapter", "options"),
    [
        ("llama", None, {"quantize": "int8-dynamic"}),
        ("llama", ADAPTER, {"adapters": "data"}),
        ("llama", ADAPTER, {"precision": "bf16"}),
        ("llama", DoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), {"precision": "fp16"}),
        ("llama", LORA, {"quantize": "int4", "adapters": "data"}),
        ("gpt2", ADAPTER, {"quantize": "int4", "bits": 5}),
        ("mixtral", LORA, {"quantize": "int8"}),
        ("mixtral", ADAPTER, {"precision": "fp16"}),
    ],
)
def test_a_streamed_export_is_the_other_byte_for_byte(
    name: str, adapter: AdapterConfig | None, options: dict[str, Any], tmp_path: Path
) -> None:
    """The files, what was compared, the bits that were chosen and what quantization changes."""
    dtype = torch.bfloat16 if options.get("quantize") == "int4" else torch.float32
    base, saved_adapter = saved(name, tmp_path, adapter, dtype)
    for stream in (False, True):
        model = load_traced(base, saved_adapter if adapter else None, CACHED, stream=stream)
        assert export_onnx(model, tmp_path / str(stream), **options).verification
    for file in FILES:
        assert (tmp_path / "False" / file).read_bytes() == (tmp_path / "True" / file).read_bytes(), file


def test_weights_of_half_precision_files_are_cast_as_loading_casts_them(tmp_path: Path) -> None:
    base, adapter = saved("llama", tmp_path, dtype=torch.bfloat16)
    export_onnx(load_traced(base, adapter, CACHED, stream=True), tmp_path / "onnx", verify=False)
    assert verify_onnx(tmp_path / "onnx", load_traced(base, adapter, CACHED)).passed


@pytest.mark.parametrize(
    ("name", "adapter", "options"),
    [
        ("bert", LORA, {"precision": "fp16"}),
        ("vit", ADAPTER, {"quantize": "int4", "block_size": 16}),
        ("albert", LORA, {"quantize": "int4", "block_size": 16, "adapters": "data"}),
        ("bart", None, {"quantize": "int8"}),
    ],
)
def test_a_model_that_is_no_decoder_streams_too(
    name: str, adapter: AdapterConfig | None, options: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {"encoder_layers" if name == "bart" else "num_hidden_layers": 1}
    tiny_model(name, **sizes).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    if adapter is not None:
        rewrite(fresh_trace(name, **sizes), adapter).save_pretrained(tmp_path / "adapter")
    base, of = str(tmp_path / "base"), None if adapter is None else str(tmp_path / "adapter")
    for stream in (False, True):
        assert export_onnx(load_traced(base, of, None, stream=stream), tmp_path / str(stream), **options).verification
    files = sorted(path.relative_to(tmp_path / "False") for path in (tmp_path / "False").rglob("*") if path.is_file())
    for file in files:
        assert (tmp_path / "False" / file).read_bytes() == (tmp_path / "True" / file).read_bytes(), file


def test_a_difference_is_compared_with_float64_one_weight_at_a_time(tmp_path: Path) -> None:
    """A tolerance of nothing is exceeded by float32's own rounding, which the float64 runs measure."""
    base, adapter = saved("llama", tmp_path)
    streamed, whole = (load_traced(base, adapter, CACHED, stream=stream) for stream in (True, False))
    export_onnx(whole, tmp_path / "onnx", verify=False)
    with mock.patch.dict(tolerances._TOLERANCES, {"fp32": 0.0}):
        report = verify_onnx(tmp_path / "onnx", streamed, "quick")
    assert report.passed
    assert report.rounding
    assert all(check.rounding > 0 for check in report.rounding)


def test_a_large_export_is_compared_and_measured_with_its_weights_in_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No session copies them, one is open at a time, and what is compared and measured is the same."""
    base, _ = saved("llama", tmp_path, dtype=torch.bfloat16)
    usual = export_onnx(load_traced(base, None, CACHED, stream=True), tmp_path / "usual", quantize="int4")
    monkeypatch.setattr(comparable, "_COPIED", 0)
    monkeypatch.setattr(quality, "_COPIED_ALONE", 0)
    opened = mock.Mock(wraps=quality.open_session)
    monkeypatch.setattr(quality, "open_session", opened)
    sessions: list[weakref.ref[Any]] = []
    open_session = comparable.open_session

    def open_alone(*arguments: Any, **options: Any) -> Any:
        assert not any(session() for session in sessions)
        session = open_session(*arguments, **options)
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(comparable, "open_session", open_alone)
    mapped = export_onnx(load_traced(base, None, CACHED, stream=True), tmp_path / "mapped", quantize="int4")
    options = opened.call_args.args[1].session_options
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert len(sessions) > 2
    assert not any(session() for session in sessions)
    assert mapped.verification is not None
    assert mapped.verification.rows is not None
    assert usual.quality is not None
    assert mapped.quality is not None
    ((one,), (other,)) = usual.quality.tokens, mapped.quality.tokens
    assert one.positions == other.positions
    assert other.kl_divergence == pytest.approx(one.kl_divergence, rel=0.05)  # 4e-5 nats, of float32 logits


@pytest.mark.parametrize(("name", "options"), [("distilbert", {}), ("vit", {}), ("llama", {"quantize": "int4"})])
def test_no_more_than_two_weights_are_read_at_once(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while they are written, nor while bits are chosen, nor while the model is run to be compared."""
    tiny_model(name).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    alive: list[Any] = []
    most, read = 0, shards.StoredTensor.__call__

    def watched(stored: shards.StoredTensor) -> torch.Tensor:
        nonlocal most
        values = read(stored)
        alive.append(memory_of(values))
        most = max(most, sum(not storage.expired() for storage in alive))
        return values

    model = load_traced(str(tmp_path / "base"), None, None, stream=True)
    monkeypatch.setattr(shards.StoredTensor, "__call__", watched)
    export_onnx(model, tmp_path / "onnx", **options)
    assert alive
    assert most <= 2


def test_a_graph_of_other_operators_streams_too(tmp_path: Path) -> None:
    weight = torch.randn(4, 8)
    graph_module = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU()))
    getattr(graph_module, "0").weight = lazy_parameter(lambda: weight, (4, 8), torch.float32)
    x = torch.randn(3, 8)
    export_onnx(trace(graph_module, {"input": x}), tmp_path / "onnx", verify=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, getattr(graph_module, "0").bias))
    assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), expected, atol=1e-6)


def test_nothing_of_the_weights_is_in_memory(tmp_path: Path) -> None:
    base, _ = saved("llama", tmp_path)
    model = load_streamed(base, CACHED)
    whole = load_model(base, CACHED)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    buffers = zip(model.buffers(), whole.buffers(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in buffers)
    for (name, mine), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(values_of(mine, name), other)
    traced = trace(model, task=CACHED)
    assert all(parameter.is_meta for parameter in traced.graph_module.parameters())
    assert [node.name for node in traced.graph_module.graph.nodes] == [
        node.name for node in trace(whole, task=CACHED).graph_module.graph.nodes
    ]


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_trace_is_compared_with_the_streamed_model_as_with_one_in_memory(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    task, signatures, compared = CACHED if name == "llama" else None, [], []
    for load in (load_model, load_streamed):
        with mock.patch.object(check, "gap", wraps=check.gap) as gap:
            signatures.append(trace(load(tmp_path, task), task=task).signature)
        compared.append([tree_leaves(expected)[0] for expected, _ in (call.args for call in gap.call_args_list)])
    assert signatures[0] == signatures[1]
    assert [logits.shape for logits in compared[0]] == [logits.shape for logits in compared[1]]
    assert all(logits.std() > 0.01 for logits in compared[1])  # it is no model of zeros


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    base, _ = saved("gpt2", tmp_path)
    model = load_streamed(base, CACHED)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_adapter_of_a_streamed_model_has_values(tmp_path: Path) -> None:
    base, adapter = saved("llama", tmp_path)
    model = load_traced(base, adapter, CACHED, stream=True)
    assert isinstance(model, GraloraModel)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (Path(adapter), tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_trained_biases_of_a_streamed_model_begin_as_the_files_have_them(tmp_path: Path) -> None:
    base, _ = saved("gpt2", tmp_path)
    config = GraloraConfig(r=4, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    model = rewrite(trace(load_streamed(base, CACHED), task=CACHED), config)
    assert not any(parameter.is_meta for parameter in model.parameters() if parameter.requires_grad)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_without_a_cache_names_weights_without_a_source(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = tiny_model("vit")
    with pytest.raises(ExportError, match=r"is on the meta device and has no source of values; load"):
        export_onnx(trace(model), tmp_path / "onnx", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_meta_weights_without_a_source_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    model.model.rotary_emb = tiny_model("llama").model.rotary_emb  # buffers have values
    with pytest.raises(ExportError, match=r"is on the meta device and has no source of values; load"):
        export_onnx(trace(model, task=CACHED), tmp_path / "onnx", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)missing model.norm.weight.*lm_head.weight has shape \[100, 32\]"):
        load_streamed(tmp_path, CACHED)


def test_quantized_files_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is I8 in model.safetensors, not a float tensor"):
        load_streamed(tmp_path, CACHED)


def test_experts_of_a_matrix_each_are_read_one_by_one(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "base")  # an expert each in the files, all experts in one parameter
    streamed = load_streamed(tmp_path / "base", CACHED)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parameter, own = streamed.get_parameter(name), model.get_parameter(name)
    assert [entry.shape for entry in value_entries(parameter, name)] == [own.shape[1:]] * len(own)
    assert torch.equal(values_of(parameter, name), own)


def test_a_sample_of_experts_keeps_none_of_them() -> None:
    arrays: list[weakref.ref[Any]] = []
    most = 0

    def entries() -> Iterator[torch.Tensor]:
        nonlocal most
        for index in range(4):
            array = np.full((8, 8), index, np.float32)
            arrays.append(weakref.ref(array))
            yield torch.from_numpy(array)
            del array
            most = max(most, sum(ref() is not None for ref in arrays))

    stack = lazy_parameter(EntrySource(entries), torch.Size((4, 8, 8)), torch.float32)
    assert sampled_values(stack, "experts", 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert most <= 2


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if ".experts.1." not in k}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"matrices of model.layers.0.mlp.experts.\w+ are incomplete"):
        load_streamed(tmp_path, CACHED)


def test_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle, which is not read"):
        load_streamed(tmp_path, CACHED)


@pytest.mark.parametrize("target", ["../other.safetensors", "/etc/other.safetensors"])
def test_an_index_that_points_outside_is_refused(target: str, tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    index = {"weight_map": {"lm_head.weight": target}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        load_streamed(tmp_path, CACHED)


# -- deferred weights -------------------------------------------------------------------------------------------------


def test_values_are_made_whenever_they_are_read_and_cast_then() -> None:
    calls = []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.tensor([1.0, 2.0])

    parameter = lazy_parameter(make, (2,), torch.float16)
    assert parameter.is_meta
    for count in (1, 2):
        values = values_of(parameter, "weight")
        assert (values.dtype, values.tolist(), len(calls)) == (torch.float16, [1.0, 2.0], count)


def test_weights_are_folded_one_by_one_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gralora_fx.core.adapters import folded_weights as fold_module

    folded: list[weakref.ref[torch.Tensor]] = []
    most_alive = 0
    original = fold_module.fold

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal most_alive
        result = original(*arguments, **options)
        folded.append(weakref.ref(result))
        most_alive = max(most_alive, sum(reference() is not None for reference in folded))
        return result

    monkeypatch.setattr(fold_module, "fold", watched)
    model = rewrite(fresh_trace("llama", task=CACHED), ADAPTER)
    export_onnx(model, tmp_path / "onnx", verify=False)
    assert len(folded) == len(model.updates())
    assert most_alive <= 2


def test_a_folded_weight_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    model = rewrite(fresh_trace("llama", task=CACHED), ADAPTER)
    path = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.adapter("default").factors[path].A.fill_(float("inf"))
    with pytest.raises(MergeError, match=f"the merged weight of {path} is not finite"):
        export_onnx(model, tmp_path / "onnx", verify=False)
    assert list(tmp_path.iterdir()) == []
