"""Limits of sizes: what a model's code branches on, in a trace, its rewritten model, its export and its file."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from gralora_fx import DoraConfig, GraloraConfig, LoraConfig, merge, rewrite, trace
from gralora_fx.errors import GraloraError, ServingError, TraceError
from gralora_fx.exporters import export_onnx
from gralora_fx.format.manifest import read_manifest
from gralora_fx.serving import load

CONFIGS = [LoraConfig(r=2, target_modules=["first"]), GraloraConfig(r=2, gralora_k=2, target_modules=["first"])]
CONFIGS.append(DoraConfig(r=2, target_modules=["first"]))


class Between(nn.Module):
    """A function of hidden states between two layers."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(16, 16), nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self))


class Pair(Between):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.first(y)))


def cut(h: Tensor, _: nn.Module) -> Tensor:
    return h[:, -16:] if h.shape[1] > 16 else h


def example(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(batch * 100 + length))


@pytest.mark.parametrize(
    ("function", "condition", "inside", "outside"),
    [
        (cut, "length <= 16", [1, 2, 16], [17, 40]),
        (lambda h, _: h * 2 if h.shape[1] % 2 else h, "even length", [2, 4, 100], [1, 13]),
        (lambda h, _: h * 2 if h.shape[1] > 10 else h, "length > 10", [11, 99], [1, 10]),
        (lambda h, m: h * 2 if m.training and h.shape[1] > 16 else h, "length <= 16", [1, 16], [17]),
        (lambda h, _: h * 2 if h.shape[1] == 1 else h, "length >= 2", [2, 3], [1]),
        (lambda h, _: h * 2 if h.numel() > 1000 else h, "16 * batch * length <= 1000", [1, 31], [32]),
        (lambda h, _: h * int(h.shape[1] / 2), "trunc(length / 2) == 6", [12, 13], [11, 14]),
        (lambda h, _: sum(p.sum(1, True) * i for i, p in enumerate(h.split(4, 1))), "(3 + length) // 4 == 3", [9], [8]),
        (lambda h, _: h.narrow(1, 0, 3), "length >= 3", [3, 50], [2]),
        (lambda h, _: h + torch.ones(20, 16)[: h.shape[1]], "length <= 20", [1, 20], [21]),
    ],
    ids=["cut", "odd", "longer", "training", "one", "numel", "int", "split", "narrow", "table"],
)
def test_a_size_that_the_code_depends_on_is_a_limit(
    function: Callable[[Tensor, nn.Module], Tensor], condition: str, inside: list[int], outside: list[int]
) -> None:
    model = Between(function)
    traced = trace(model, (example(2, 12),))
    assert condition in [limit.condition for limit in traced.signature.limits]
    for training in (False, True):
        model.train(training)
        traced.train(training)
        for length in inside:
            x = example(2, length)
            assert torch.allclose(traced(x), model(x), atol=1e-5), length
        for length in outside:
            with pytest.raises(TraceError, match=rf"input 'x' has .*length {length}\b.* takes "):
                traced(example(2, length))


@pytest.mark.parametrize(
    "function",
    [
        lambda h, _: h * 1.0 if h.shape[1] > 16 else h,
        lambda h, _: h * 1.0 if h.shape[1] == 1 else h,
        lambda h, _: h[:, : h.shape[1] // 2 + 1] / h.shape[1],
        lambda h, _: h.flatten(1).reshape(h.shape),
        lambda h, _: h[:, :4],
    ],
    ids=["equal branches", "one position", "half", "reshape", "slice"],
)
def test_what_makes_no_difference_is_no_limit(function: Callable[[Tensor, nn.Module], Tensor]) -> None:
    model = Between(function).eval()
    traced = trace(model, (example(2, 12),))
    assert traced.signature.limits == ()
    for batch, length in ((1, 1), (1, 17), (5, 64)):
        assert torch.allclose(traced(example(batch, length)), model(example(batch, length)), atol=1e-5)


@pytest.mark.parametrize(
    ("function", "condition", "wrong"),
    [
        (lambda x, y: x * 2 if x.shape[1] == y.shape[1] else x, "x length == y length", (5, 7)),
        (lambda x, y: x + y.sum(1, True) if x.shape[1] > y.shape[1] else x * 3, "x length > y length", (5, 5)),
        (
            lambda x, y: torch.cat([x, y], 1) * (2 if x.shape[1] + y.shape[1] <= 32 else 3),
            "x length + y length <= 32",
            (20, 13),
        ),
        (lambda x, y: x + y, "x length == y length or x length == 1 or y length == 1", (5, 7)),
    ],
    ids=["equal", "longer", "sum", "broadcast"],
)
def test_a_condition_over_two_inputs_names_both(
    function: Callable[[Tensor, Tensor], Tensor], condition: str, wrong: tuple[int, int]
) -> None:
    model = Pair(function).eval()
    second = 7 if ">" in condition or "+" in condition else 12
    traced = trace(model, (example(2, 12), example(2, second)))
    assert condition in [limit.condition for limit in traced.signature.limits]
    assert torch.allclose(traced(example(3, 12), example(3, second)), model(example(3, 12), example(3, second)))
    with pytest.raises(TraceError, match=rf"'x' has length {wrong[0]} and input 'y' has length {wrong[1]}"):
        traced(example(2, wrong[0]), example(2, wrong[1]))


def test_sizes_that_broadcasting_repeats_are_taken() -> None:
    model = Pair(lambda x, y: x + y).eval()
    traced = trace(model, (example(2, 12), example(2, 12)))
    for x, y in ((example(2, 5), example(1, 5)), (example(1, 1), example(2, 5))):
        assert torch.allclose(traced(x, y), model(x, y), atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_rewritten_a_merged_and_a_copied_model_keep_limits(config: LoraConfig) -> None:
    traced = trace(Between(cut), (example(2, 12),))
    model = rewrite(traced, config).train()
    model(example(1, 16)).sum().backward()
    kept = [model, merge(model), copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), copy.deepcopy(model)]
    for each in kept:
        with pytest.raises(TraceError, match="input 'x' has length 17, but the model takes length <= 16"):
            each(example(1, 17))
    assert "x length <= 16" in repr(traced)


def test_an_export_keeps_limits(tmp_path: Path) -> None:
    source = Between(cut).eval()
    export_onnx(trace(source, (example(2, 12),)), tmp_path / "onnx")
    assert [limit.condition for limit in read_manifest(tmp_path / "onnx").limits] == ["length <= 16"]
    model = load(tmp_path / "onnx")
    for length in (1, 16):
        expected = source(example(3, length)).detach().numpy()
        assert np.allclose(model(x=example(3, length).numpy())[0], expected, atol=1e-5)
    with pytest.raises(ServingError, match="input 'x' has length 17, but the model takes length <= 16"):
        model(x=example(3, 17).numpy())


@pytest.mark.parametrize(
    "test", ["x <= 3", ["__import__", "os"], ["<=", ["size", "x", "1"], 3], ["<=", 2, 3], [["<="]], ["size", "x", -1]]
)
def test_a_limit_that_no_export_writes_is_refused(tmp_path: Path, test: object) -> None:
    export_onnx(trace(Between(cut).eval(), (example(2, 12),)), tmp_path / "onnx", verify=False)
    path = tmp_path / "onnx" / "gralora_export.json"
    content = json.loads(path.read_text())
    content["limits"][0]["test"] = test
    path.write_text(json.dumps(content))
    with pytest.raises(GraloraError, match="limits"):
        load(tmp_path / "onnx")


def test_fixed_sizes_are_refused_by_name() -> None:
    traced = trace(Between(cut), (example(2, 12),), dynamic=False)
    with pytest.raises(TraceError, match=r"input 'x' has shape \[2, 11, 16\], but the trace takes \[2, 12, 16\]"):
        traced(example(2, 11))


@pytest.mark.parametrize("form", ["program", "module", "file"])
def test_a_program_that_was_exported_keeps_its_guards_and_ranges(form: str) -> None:
    length = torch.export.Dim("length", min=4, max=40)
    auto = torch.export.Dim.AUTO
    branching = torch.export.export(Between(cut), (example(3, 12),), dynamic_shapes={"x": {0: auto, 1: auto}})
    ranged = torch.export.export(
        Pair(lambda x, _: x), (example(3, 12), example(3, 12)), dynamic_shapes=({1: length}, {1: length})
    )
    for program, sizes, inputs in ((branching, (1, 16, 17), 1), (ranged, (4, 40, 41), 2)):
        if form == "file":
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            given = torch.export.load(file)
        else:
            given = program.module() if form == "module" else program
        traced = trace(given, tuple(example(3, 12) for _ in range(inputs)))
        for size in sizes[:2]:
            traced(*[example(3, size)] * inputs)
        with pytest.raises(TraceError, match=rf"has length {sizes[2]}, but the model takes length <= {sizes[1]}"):
            traced(*[example(3, sizes[2])] * inputs)


def test_of_many_limits_on_a_size_the_tightest_is_kept() -> None:
    def counted(h: Tensor, _: nn.Module) -> Tensor:
        for step in range(1, 9):
            h = h + step if step < h.shape[1] else h
        return h

    traced = trace(Between(counted), (example(2, 12),))
    assert [limit.condition for limit in traced.signature.limits] == ["length > 8"]


def test_a_table_of_positions_limits_the_length() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=50, max_position_embeddings=24))
    traced = trace(model.eval(), task="text-classification")
    assert [limit.condition for limit in traced.signature.limits] == ["length <= 24"]
    ids = torch.randint(3, 50, (1, 24))
    assert torch.allclose(traced(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    with pytest.raises(TraceError, match="input 'input_ids' has length 25"):
        traced(input_ids=torch.randint(3, 50, (1, 25)))


SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda h: h[:, -4:].roll(1, 1),
    "first": lambda h: h[:, :4],
    "middle": lambda h: h[:, 2:6].sum(1),
    "both ends": lambda h: torch.cat([h[:, -2:], h[:, :2]], 1),
    "halves": lambda h: h[:, :4].sum(1, keepdim=True) + h[:, 4:].sum(1, keepdim=True),
    "one": lambda h: h[:, 1:2].sum(1),
    "bounded": lambda h: h[:, :16] * 2,
    "mean": lambda h: h[:, -4:].mean(1),
    "its size": lambda h: h[:, -4:].sum(1) / h[:, -4:].shape[1],
    "step": lambda h: h[:, -4::2] + 1,
    "reshaped": lambda h: h[:, :4].reshape(h.shape[0], -1, 8, 2).flatten(2),
    "in place": lambda h: F.silu(h[:, -4:].clone().relu_(), inplace=True)[:, 0],
    "view": lambda h: h[:, -4:].view_as(h[:, -4:]),
    "tensor_split": lambda h: h.tensor_split(2, 1)[0],
}


@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize("name", SLICES)
def test_slices_are_right_in_every_session_at_every_length(name: str, length: int, tmp_path: Path) -> None:
    """The example is shorter than the slice, or longer."""
    source = Between(lambda h, _: SLICES[name](h)).eval()
    traced = trace(source, (example(2, length),))
    assert traced.signature.limits == ()
    export_onnx(traced, tmp_path / "onnx")
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), options)
        for length in (1, 2, 3, 4, 5, 7, 17):
            (found,) = session.run(None, {"x": example(3, length).numpy()})
            assert np.allclose(found, source(example(3, length)).detach(), atol=1e-5), length


def test_a_narrow_counted_from_the_end_is_right_in_an_export(tmp_path: Path) -> None:
    source = Between(lambda h, _: h.narrow(1, -4, 4)).eval()
    traced = trace(source, (example(2, 9),))
    assert [limit.condition for limit in traced.signature.limits] == ["length >= 4"]
    export_onnx(traced, tmp_path / "onnx")
    found = load(tmp_path / "onnx")(x=example(2, 6).numpy())["output"]
    assert np.allclose(found, source(example(2, 6)).detach(), atol=1e-5)


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.states, self.steps = nn.Linear(16, 16), getattr(nn, kind)(16, 16, **options)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        first = self.states(states)[None]
        return self.steps(x, (first, first) if isinstance(self.steps, nn.LSTM) else first)[0]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_states_of_another_batch_are_a_limit(kind: str, batch_first: bool) -> None:
    """PyTorch's operators check nothing: they would read beyond the states."""
    shape = (2, 5, 16) if batch_first else (5, 2, 16)
    traced = trace(Recurrent(kind, batch_first=batch_first).eval(), (torch.randn(shape), torch.randn(2, 16)))
    with pytest.raises(TraceError, match="but the model takes"):
        traced(torch.randn(3 if batch_first else 5, 5 if batch_first else 3, 16), torch.randn(2, 16))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, max_position_embeddings=64)
    ).eval()


PACKED = {"input_ids": torch.arange(3, 12)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])}


@pytest.mark.parametrize("with_past", [False, True])
def test_a_row_of_several_texts_is_refused(with_past: bool, tmp_path: Path) -> None:
    ids, positions = torch.randint(3, 50, (2, 9)), torch.arange(9).repeat(2, 1)
    inputs = None if with_past else {"input_ids": ids, "position_ids": positions}
    traced = trace(llama(), inputs, task="text-generation-with-past" if with_past else "text-generation")
    model = rewrite(traced, LoraConfig(r=2, target_modules=["q_proj"]))
    export_onnx(model, tmp_path / "onnx")
    exported = load(tmp_path / "onnx")
    for mask in ({}, {"attention_mask": torch.ones(1, 9, dtype=torch.long)}):
        for run in (traced, model.eval(), model.train(), merge(model), exported):
            with pytest.raises(GraloraError, match="input 'position_ids' begins anew within a row"):
                run(**PACKED, **mask)
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions - 3}
    padded["attention_mask"][:, :3], padded["position_ids"][:, :3] = 0, 1
    source = llama()(**padded).logits
    assert torch.allclose(traced(**padded).logits[:, 3:], source[:, 3:], atol=1e-5)


def test_training_without_a_cache_keeps_texts_in_a_row_apart() -> None:
    source = llama()
    traced = trace(source, task="text-generation-with-past")
    model = rewrite(traced, LoraConfig(r=2, target_modules=["q_proj"])).train()
    alone = [source(PACKED["input_ids"][:, part]).logits for part in (slice(5), slice(5, 9))]
    assert torch.allclose(model(**PACKED, use_cache=False).logits, torch.cat(alone, 1), atol=1e-5)


def test_a_square_root_of_a_length_is_refused_or_right() -> None:
    model = Between(lambda h, _: h / math.sqrt(h.shape[1]))
    with pytest.raises(TraceError, match="valid for the example's sizes only"):
        trace(model, (example(2, 12),))
