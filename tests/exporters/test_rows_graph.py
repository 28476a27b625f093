"""The second graph of a decoder's export, whose rows have lengths of their own, over the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from damaged_exports import forget_digests
from peft_oracle import peft_model
from tiny_models import tiny_model
from traces import fresh, fresh_trace
from wrong_rows import ShiftedSteps

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, fold_onnx, verify_onnx
from gralora_fx.exporters.verify import comparable
from gralora_fx.format.export_directory import ROWS_NAME
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.session_decoders import RowsDecoder
from gralora_fx.serving import load

CACHED = "text-generation-with-past"
PROMPTS = ([5, 9, 33, 71, 8, 12, 40], [17], [3, 88, 61])
STEPS, CAPACITY = 6, 24
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def answers(
    directory: Path, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None] | None = None
) -> list[list[int]]:
    """Greedy tokens of a plain session over the rows' graph: all prompts at once, in pieces of three tokens."""
    session = onnxruntime.InferenceSession(str(directory / ROWS_NAME))
    count, chunk = len(prompts), 3
    caches = {
        value.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((count, value.shape[1], CAPACITY, value.shape[3]), DTYPES[value.type])
        )
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    fixed: dict[str, Any] = {}
    if adapters is not None:
        fixed = Adapters(directory, read_manifest(directory)).rows(adapters, count)
    waiting, past, found = [list(prompt) for prompt in prompts], [0] * count, [[] for _ in prompts]
    while any(len(row) < STEPS for row in found):
        reads = [row[:chunk] for row in waiting]
        ids = np.zeros((count, max(map(len, reads))), np.int64)
        for row, tokens in enumerate(reads):
            ids[row, : len(tokens)] = tokens
        lengths = [len(tokens) for tokens in reads]
        feed = {
            "input_ids": ids,
            "query_seqlens": np.array(lengths, np.int32),
            "past_seqlens": np.array(past, np.int32),
        }
        logits = run(session, {**feed, **fixed}, caches)
        for row, tokens in enumerate(reads):
            waiting[row], past[row] = waiting[row][len(tokens) :], past[row] + len(tokens)
            if tokens and not waiting[row]:
                last = logits[row, -1 if logits.shape[1] == 1 else len(tokens) - 1]
                found[row].append(int(last.argmax()))
                waiting[row] = [found[row][-1]] if len(found[row]) < STEPS else []  # then it is idle
    return found


def run(session: Any, feed: Mapping[str, Any], caches: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """One run over shared buffers."""
    binding = session.io_binding()
    for name, value in {**feed, **caches}.items():
        given = onnxruntime.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        binding.bind_ortvalue_input(name, given)
    binding.bind_output("logits")
    for name, value in caches.items():
        binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), value)
    session.run_with_iobinding(binding)
    logits: np.ndarray[Any, Any] = binding.get_outputs()[0].numpy()
    return logits


def generated(model: Any, prompt: Sequence[int]) -> list[int]:
    """Return transformers' greedy tokens of one prompt alone."""
    ids = torch.tensor([list(prompt)])
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def stored(file: Path) -> dict[str, tuple[tuple[str, str], ...]]:
    """Return where those weights of a graph lie that are not within it."""
    model = onnx.load(file, load_external_data=False)
    return {
        tensor.name: tuple((entry.key, entry.value) for entry in tensor.external_data)
        for tensor in model.graph.initializer
        if tensor.external_data
    }


@pytest.mark.quick
@pytest.mark.parametrize(("name", "logits"), [("llama", "last"), ("llama", "all")])
def test_rows_of_unequal_length_answer_as_transformers_does(name: str, logits: Any, tmp_path: Path) -> None:
    model, traced = fresh(name, task=CACHED)
    report = export_onnx(traced, tmp_path / "onnx", logits=logits)
    assert answers(tmp_path / "onnx", PROMPTS) == [generated(model, prompt) for prompt in PROMPTS]
    assert report.rows == read_manifest(tmp_path / "onnx").rows
    assert "model_rows.onnx is for batches whose rows differ" in report.details
    assert report.verification is not None
    assert report.verification.rows is not None
    assert report.verification.rows.equal == report.verification.rows.compared > 0
    assert f"{ROWS_NAME}: greedy tokens: 8 of 8 equal" in report.details


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "mixtral", "phi3", "qwen3"])
def test_every_kind_of_decoder(name: str, tmp_path: Path) -> None:
    model, traced = fresh(name, task=CACHED)
    export_onnx(traced, tmp_path / "onnx", verify="full")
    assert answers(tmp_path / "onnx", PROMPTS) == [generated(model, prompt) for prompt in PROMPTS]


def test_a_window_of_positions(tmp_path: Path) -> None:
    model, traced = fresh("mistral", task=CACHED, sliding_window=4)
    export_onnx(traced, tmp_path / "onnx", verify="full")
    assert answers(tmp_path / "onnx", PROMPTS) == [generated(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "fp16"},
        {"precision": "bf16"},
        {"quantize": "int4", "block_size": 16},
        {"quantize": "int8", "block_size": 16},
        {"precision": "fp16", "quantize": "int4", "block_size": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_graphs_read_the_same_bytes(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Projections that are packed, heads that are tied to an embedding, blocks: each is stored once."""
    report = export_onnx(fresh_trace(name, task=CACHED, vocab_size=320), tmp_path / "onnx", **options)
    first, second = (stored(tmp_path / "onnx" / file) for file in ("model.onnx", ROWS_NAME))
    assert first == second
    assert first
    assert [file for file in report.files if "onnx_data" in file] == ["model.onnx_data"]
    end = max(int(dict(place)["offset"]) + int(dict(place)["length"]) for place in first.values())
    assert report.files["model.onnx_data"] == end
    assert abs(report.files[ROWS_NAME] - report.files["model.onnx"]) < 10_000
    manifest = read_manifest(tmp_path / "onnx")
    assert manifest.files is not None
    assert ROWS_NAME in manifest.files
    assert set(manifest.inputs) >= {"input_ids", "attention_mask"}  # those of model.onnx


@pytest.mark.parametrize("adapters", ["data", "inputs"])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_rows_with_an_adapter_each_answer_as_peft_does(adapters: Any, quantize: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    fields = {
        "one": {"r": 4, "gralora_k": 2, "alpha": 8, "target_modules": "all-linear"},
        "two": {
            "method": "LORA",
            "r": 3,
            "lora_alpha": 12,
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
        },
    }
    oracles: dict[str | None, Any] = {None: model}
    adapted: GraloraModel | None = None
    for seed, (name, sizes) in enumerate(fields.items()):
        oracles[name] = peft_model(tiny_model("llama"), seed + 1, **sizes)
        oracles[name].save_pretrained(str(tmp_path / name))
        if adapted is None:
            adapted = GraloraModel.from_pretrained(
                fresh_trace("llama", task=CACHED), tmp_path / name, adapter_name=name
            )
        else:
            adapted.load_adapter(tmp_path / name, name)
    assert adapted is not None
    adapted.set_adapter(list(fields))
    report = export_onnx(
        adapted, tmp_path / "onnx", adapters=adapters, quantize=quantize, block_size=16 if quantize else None
    )
    assert report.verification is not None
    for part in (report.verification, *report.verification.adapters.values()):
        assert part.rows is not None
        assert part.rows.equal == part.rows.compared > 0
    shapes = {
        value.name: value.shape for value in onnxruntime.InferenceSession(tmp_path / "onnx" / ROWS_NAME).get_inputs()
    }
    assert shapes["adapter_ids"] == ["batch_size"]
    assert shapes["model.layers.0.self_attn.q_proj.gralora_A_general"][:2] == ["adapters", 32]
    names = ["two", None, "one"]
    found = answers(tmp_path / "onnx", PROMPTS, names)
    if quantize is None:
        assert found == [generated(oracles[name], prompt) for name, prompt in zip(names, PROMPTS, strict=True)]
    alone = [answers(tmp_path / "onnx", [prompt], [name])[0] for name, prompt in zip(names, PROMPTS, strict=True)]
    assert found == alone
    assert found != answers(tmp_path / "onnx", PROMPTS, [None] * 3)


def test_a_step_without_an_adapter_computes_none(tmp_path: Path) -> None:
    """Whatever adapter an idle row has."""
    config = GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", init_weights=False)
    model = rewrite(fresh_trace("llama", task=CACHED), config)
    export_onnx(model, tmp_path / "onnx", adapters="data", verify=False)
    adapters = Adapters(tmp_path / "onnx", read_manifest(tmp_path / "onnx"))
    current = adapters.stack_of([adapters["default"]])
    feed = {"input_ids": [[5, 9], [7, 0], [0, 0]], "query_seqlens": [2, 1, 0], "past_seqlens": [0, 0, 0]}
    sums, logits = [], []
    for ids in ([0, 0, 0], [0, 0, 1], [0, 1, 0]):
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / ROWS_NAME, options)
        caches = {
            value.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((3, value.shape[1], 8, value.shape[3]), np.float32)
            )
            for value in session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        types = {value.name: np.int32 if value.type == "tensor(int32)" else np.int64 for value in session.get_inputs()}
        arrays = {name: np.array(value, types[name]) for name, value in {**feed, "adapter_ids": ids}.items()}
        logits.append(run(session, {**arrays, **current.values}, caches))
        events = json.loads(Path(session.end_profiling()).read_text())
        sums.append(sum(event.get("args", {}).get("op_name") == "Sum" for event in events))
    assert sums[:2] == [0, 0]
    assert sums[2] > 0
    assert np.array_equal(logits[0][:2], logits[1][:2])
    assert np.array_equal(logits[0][0], logits[2][0])
    assert not np.allclose(logits[0][1], logits[2][1], atol=1e-3)


def test_a_streamed_export_has_both_graphs_byte_for_byte(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    for stream in (False, True):
        model = load_traced(str(tmp_path / "base"), None, CACHED, stream=stream)
        export_onnx(model, tmp_path / str(stream), verify=False, quantize="int8", block_size=16)
    for file in ("model.onnx", ROWS_NAME, "model.onnx_data"):
        assert (tmp_path / "True" / file).read_bytes() == (tmp_path / "False" / file).read_bytes()


def bloom() -> Any:
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=101)
    return transformers.BloomForCausalLM(config).eval()


def sliced() -> Any:
    return tiny_model("llama", hidden_size=48, head_dim=12)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(bloom, "computes attention itself"), (sliced, r"model\.layers\.0\.self_attn \(its head size is 12")],
)
@pytest.mark.parametrize("adapters", ["merged", "data"])
def test_a_model_without_such_a_graph_is_exported_and_the_reason_said(
    make: Any, reason: str, adapters: Any, tmp_path: Path
) -> None:
    traced = trace(make(), task=CACHED)
    config = GraloraConfig(r=2, gralora_k=2, target_modules=r".*(query_key_value|q_proj)", init_weights=False)
    model = traced if adapters == "merged" else rewrite(traced, config)
    report = export_onnx(model, tmp_path / "onnx", adapters=adapters)
    assert report.rows is not None
    assert report.rows.file is None
    assert report.rows == read_manifest(tmp_path / "onnx").rows
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.details)
    assert "no model_rows.onnx: " in report.details
    assert "adapters='data'" not in report.details  # which it is
    assert not (tmp_path / "onnx" / ROWS_NAME).exists()
    assert any(skip.place == ROWS_NAME for entry in report.passes for skip in entry.skipped)
    assert report.verification is not None
    assert report.verification.rows is None
    load(tmp_path / "onnx", check=True)


def test_activations_are_rounded_row_by_row_in_it(tmp_path: Path) -> None:
    report = export_onnx(fresh_trace("llama", task=CACHED), tmp_path / "onnx", quantize="int8-dynamic")
    assert report.rows is not None
    assert report.rows.file == ROWS_NAME
    served = load(tmp_path / "onnx")
    assert served.generate([[5, 9, 12], [7]], max_new_tokens=6) == [
        served.generate(prompt, max_new_tokens=6) for prompt in ([5, 9, 12], [7])
    ]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_models_have_no_such_graph_and_no_reason(name: str, tmp_path: Path) -> None:
    task = "text2text-generation-with-past" if name == "t5" else None
    report = export_onnx(fresh_trace(name, task=task), tmp_path / "onnx", verify=False)
    assert report.rows is None
    assert "rows" not in json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())
    for file in (tmp_path / "onnx").glob("*.onnx"):  # each has its weights in a file of its own name
        assert {dict(place)["location"] for place in stored(file).values()} == {f"{file.name}_data"}


def test_an_export_by_rows_leaves_none_of_an_earlier_one(tmp_path: Path) -> None:
    traced = fresh_trace("llama", task=CACHED)
    export_onnx(traced, tmp_path / "onnx", verify=False)
    assert (tmp_path / "onnx" / ROWS_NAME).exists()
    export_onnx(trace(sliced(), task=CACHED), tmp_path / "onnx", verify=False, overwrite=True)
    assert not (tmp_path / "onnx" / ROWS_NAME).exists()


def test_an_export_with_a_missing_or_another_graph_is_told(tmp_path: Path) -> None:
    traced = fresh_trace("llama", task=CACHED)
    export_onnx(traced, tmp_path / "onnx", verify=False)
    shutil.copytree(tmp_path / "onnx", tmp_path / "missing")
    (tmp_path / "missing" / ROWS_NAME).unlink()
    with pytest.raises(ExportError, match=r"model_rows\.onnx is missing"):
        verify_onnx(tmp_path / "missing", traced, "quick")
    forget_digests(tmp_path / "missing")
    with pytest.raises(ExportError, match=r"no model_rows\.onnx in"):
        verify_onnx(tmp_path / "missing", traced, "quick")
    changed = onnx.load(tmp_path / "onnx" / ROWS_NAME, load_external_data=False)
    for node in changed.graph.node:
        for attribute in [attribute for attribute in node.attribute if attribute.name == "scale"]:
            attribute.f *= 3
    onnx.save(changed, tmp_path / "onnx" / ROWS_NAME)
    forget_digests(tmp_path / "onnx")
    found = verify_onnx(tmp_path / "onnx", traced, "quick")
    assert not found.passed
    assert found.tokens is not None
    assert found.tokens.passed
    assert found.rows is not None
    assert not found.rows.passed


def test_a_wrong_adapter_of_a_row_fails_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", init_weights=False)
    model = rewrite(fresh_trace("llama", task=CACHED), config)
    monkeypatch.setattr(comparable, "RowSteps", ShiftedSteps)
    with pytest.raises(ExportError, match="results differ from the model's"):
        export_onnx(model, tmp_path / "onnx", adapters="data")


def test_a_changed_cache_of_an_idle_row_fails_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = fresh_trace("llama", task=CACHED)
    export_onnx(traced, tmp_path / "onnx", verify=False)
    step = RowsDecoder.step

    def careless(decoder: RowsDecoder, tokens: Any, *more: Any) -> Any:
        idle = next((row for row in range(decoder.rows) if row not in tokens), None)
        if idle is not None:
            next(iter(decoder.cached(idle).values()))[:, 0] += 1
        return step(decoder, tokens, *more)

    monkeypatch.setattr(RowsDecoder, "step", careless)
    with pytest.raises(ExportError, match=r"a step changes past_key_values\.0\.key of a row that reads nothing"):
        verify_onnx(tmp_path / "onnx", traced, "quick")


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_a_fold_changes_both_graphs(quantize: Any, tmp_path: Path) -> None:
    model = rewrite(
        fresh_trace("llama", task=CACHED),
        GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", init_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    options = {"quantize": quantize, **({"block_size": 16} if quantize == "int4" else {})}
    with model.disable_adapter():
        export_onnx(model, tmp_path / "base", verify=False, **options)
    report = fold_onnx(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", requantize=quantize is not None, force=True
    )
    assert stored(tmp_path / "out" / ROWS_NAME) == stored(tmp_path / "out" / "model.onnx")
    assert "folded 14 layers (14 as recorded)" in report.details
    found = verify_onnx(tmp_path / "out", model, "quick")
    assert found.rows is not None
    if quantize is None:
        assert found.passed
        export_onnx(merge(model), tmp_path / "merged", verify=False)
        assert answers(tmp_path / "out", PROMPTS) == answers(tmp_path / "merged", PROMPTS)
    assert found.tokens is not None
    assert found.rows.step_errors == pytest.approx(found.tokens.step_errors, abs=1e-4)


@pytest.mark.parametrize(
    "rows",
    [{"file": "../model_rows.onnx", "reason": None}, {"file": None, "reason": None}, {"file": 3}, "model_rows.onnx"],
)
def test_a_manifest_that_names_another_graph_is_refused(rows: Any, tmp_path: Path) -> None:
    export_onnx(fresh_trace("llama", task=CACHED), tmp_path / "onnx", verify=False)
    path = tmp_path / "onnx" / "gralora_export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": rows}))
    with pytest.raises(ExportError, match=r"rows.*export the model again"):
        read_manifest(tmp_path / "onnx")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_nothing_is_computed_twice_for_a_session_to_find(name: str, tmp_path: Path) -> None:
    """Sessions over rows do not search for common subexpressions, which takes a sixth of the time of opening one."""
    config = GraloraConfig(r=8, gralora_k=2, alpha=8, target_modules="all-linear", init_weights=False)
    export_onnx(rewrite(fresh_trace(name, task=CACHED), config), tmp_path / "onnx", adapters="data", verify=False)
    counts = []
    for left_out in ([], ["CommonSubexpressionElimination"]):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(str(tmp_path / "onnx" / ROWS_NAME), options, disabled_optimizers=left_out)
        counts.append(len(onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node))
    assert counts[0] == counts[1]
