"""Arguments of a traced model: what a call may give, and what is part of the graph."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import text_batch, tiny_model
from torch import Tensor, fx, nn
from traces import relative_error, source, traced
from transformers import BatchEncoding, PreTrainedModel

from gralora_fx import GraloraConfig, TracedModel, rewrite, trace
from gralora_fx.errors import TraceError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load
from tests.architectures.tiny_decoders import tiny_decoder


def module(forward: Callable[..., Any]) -> nn.Module:
    """Return a module with one linear layer and this forward."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.fc = nn.Linear(8, 8)

    Made.forward = forward  # type: ignore[method-assign, assignment]
    return Made().eval()


def flagged(self: Any, x: Tensor, flag: bool = True, scale: Any = 2.0, mask: Tensor | None = None) -> Tensor:
    y: Tensor = self.fc(x) * scale
    y = y if flag else -y
    return y if mask is None else y * mask


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


# -- values that are part of the graph --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["traced", "rewritten"])
def test_only_the_traced_value_of_an_argument_is_taken(adapted: bool) -> None:
    model = module(flagged)
    result: Any = trace(model, (X,))
    if adapted:
        result = rewrite(result, GraloraConfig(r=2, target_modules={"fc"}))
    for call in (lambda: result(X, True), lambda: result(X, flag=True, scale=2.0, mask=None), lambda: result(X)):
        assert torch.allclose(call(), model(X), atol=1e-6)
    for wrong, message in (
        ({"flag": False}, r"input 'flag' was True when the model was traced .*cannot be False; trace again"),
        ({"flag": None}, r"input 'flag' was True .*cannot be None"),
        ({"flag": 1}, r"input 'flag' was True .*cannot be 1"),
        ({"scale": 3.0}, r"input 'scale' was 2.0 .*cannot be 3.0"),
        ({"scale": torch.tensor(2.0)}, r"input 'scale' was 2.0 .*cannot be a Tensor"),
        ({"mask": X}, "input 'mask' was not part of the trace, which takes x; trace again with it"),
        ({"other": None}, "input 'other' was not part of the trace"),
        ({"other": False}, "input 'other' was not part of the trace"),
    ):
        with pytest.raises(TraceError, match=message):
            result(X, **wrong)
    with pytest.raises(TraceError, match=r"input 'flag' was True .*cannot be False"):
        result(X, False)


def test_an_argument_is_found_by_its_place_in_the_sources_forward() -> None:
    model = module(flagged)
    result = trace(model, {"x": X, "mask": X})
    assert torch.allclose(result(X, True, 2.0, 2 * X), model(X, True, 2.0, 2 * X), atol=1e-6)
    with pytest.raises(TraceError, match="input 'flag' was True"):
        result(X, X)
    with pytest.raises(TraceError, match=r"input 'mask' is missing.* default, None, is not: give it, or trace again"):
        result(X)


def test_an_argument_that_was_given_is_not_left_out() -> None:
    model = module(flagged)
    result = trace(model, (X,), {"flag": False, "scale": 3.0})
    assert result.example_inputs["flag"] is False
    assert result.input_names == ("x",)
    assert torch.allclose(result(X, False, 3.0), -3 * model.fc(X), atol=1e-6)
    assert torch.allclose(result(**result.example_inputs), -3 * model.fc(result.example_inputs["x"]), atol=1e-6)
    with pytest.raises(TraceError, match=r"input 'scale' was 3.0 .*left out, the model takes 2.0: give scale=3.0"):
        result(X, False)
    again = trace(model, {"x": X, "flag": True, "scale": 2.0})
    assert torch.allclose(again(X), model(X), atol=1e-6)


def test_none_is_a_value_where_it_is_not_the_default() -> None:
    model = module(lambda self, x, scale=2.0: self.fc(x) if scale is None else self.fc(x) * scale)
    result = trace(model, {"x": X, "scale": None})
    assert torch.allclose(result(X, None), model.fc(X), atol=1e-6)
    with pytest.raises(TraceError, match=r"input 'scale' was None .*left out, the model takes 2.0"):
        result(X)


def test_a_tensor_that_was_optional_is_refused_by_name_when_left_out() -> None:
    model = module(flagged)
    result = trace(model, (X,), {"scale": torch.tensor(3.0), "mask": X})
    scale = torch.tensor(5.0)
    assert torch.allclose(result(X, scale=scale, mask=X), model(X, scale=scale, mask=X), atol=1e-6)
    with pytest.raises(TraceError, match=r"input 'scale' is missing; .*default, 2.0, is not"):
        result(X, mask=X)
    with pytest.raises(TraceError, match=r"input 'scale' is a float, but the trace takes a tensor; torch.tensor"):
        result(X, scale=2.0, mask=X)
    with pytest.raises(
        TraceError, match=r"input 'x' is a numpy ndarray, but the trace takes a tensor; torch.from_numpy"
    ):
        result(X.numpy(), scale=scale, mask=X)


def test_a_plain_modules_mask_is_not_taken_for_one_of_ones() -> None:
    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(torch.nn.functional.one_hot(input_ids, 8).float())
        return y if attention_mask is None else y * (1 + attention_mask[..., None])

    def plain(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(torch.nn.functional.one_hot(input_ids, 8).float())
        return y if attention_mask is None else y * attention_mask[..., None]

    inputs = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    with pytest.raises(TraceError, match="input 'attention_mask' is missing"):
        trace(module(forward), inputs)(inputs["input_ids"])
    model = module(plain)
    assert torch.allclose(trace(model, inputs)(inputs["input_ids"]), model(inputs["input_ids"]), atol=1e-6)


# -- flags of transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [("output_hidden_states", True), ("output_attentions", True), ("return_dict", False), ("use_cache", True)],
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_flag_of_transformers_that_is_not_the_traces_is_refused(name: str, flag: str, value: bool) -> None:
    batch = text_batch(2, 5)
    result = traced(name)
    with pytest.raises(TraceError, match=rf"input '{flag}' was {not value} .*cannot be {value}; trace again"):
        result(**batch, **{flag: value})
    expected = result(**batch).logits
    for same in (not value, None):
        assert torch.equal(result(**batch, **{flag: same}).logits, expected)


def test_a_cached_trace_takes_the_flags_of_its_step() -> None:
    model = tiny_model("llama")
    result = trace(model, task="text-generation-with-past")
    ids = torch.tensor([[5, 9, 12]])
    assert relative_error(result(ids, use_cache=True, return_dict=True).logits, model(ids).logits) < 1e-5
    with pytest.raises(TraceError, match=r"input 'use_cache' was True .*cannot be False"):
        result(ids, use_cache=False)
    with pytest.raises(TraceError, match=r"input 'logits_to_keep' was 0 .*cannot be 1"):
        result(ids, logits_to_keep=1)


def test_positions_that_are_left_out_are_those_of_the_model() -> None:
    model = tiny_model("gpt2")
    result = trace(model, task="text-generation-with-past")
    batch = text_batch(3, 6, "left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        ours, theirs = result(**inputs).logits, model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert relative_error(ours[real], theirs[real]) < 1e-5


def test_positions_that_are_left_out_go_on_after_a_cache_where_a_model_begins_anew() -> None:
    """Bamba counts the positions of every call from zero; `generate` gives them."""
    model = tiny_decoder("BambaForCausalLM")
    result = trace(model, task="text-generation-with-past").eval()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache, logits = model(input_ids=ids).logits, None, []
        for part in (ids[:, :5], ids[:, 5:8], ids[:, 8:]):
            step = result(input_ids=part, past_key_values=cache)
            cache = step["past_key_values"]
            logits.append(step["logits"])
        wrong = model(input_ids=ids[:, 5:], cache=model(input_ids=ids[:, :5], use_cache=True).cache).logits
    assert relative_error(torch.cat(logits, dim=1), whole) < 1e-5
    assert relative_error(wrong, whole[:, 5:]) > 1e-3


def test_flags_of_transformers_may_be_traced() -> None:
    model, batch = tiny_model("bert"), text_batch(2, 5)
    result = trace(model, {**batch, "output_hidden_states": True, "return_dict": False})
    expected = model(**batch, output_hidden_states=True, return_dict=False)
    outputs = result(**batch, output_hidden_states=True, return_dict=False)
    assert isinstance(outputs, tuple)
    assert len(outputs) == len(expected)
    assert relative_error(outputs[1][-1], expected[1][-1]) < 1e-5
    with pytest.raises(TraceError, match=r"'output_hidden_states' was True .*left out, the model takes False"):
        result(**batch, return_dict=False)
    with pytest.raises(TraceError, match=r"use_cache=True does not fit .* hold no cache.*-with-past"):
        trace(tiny_model("llama"), {**batch, "use_cache": True})
    with pytest.raises(TraceError, match="labels are not part of a trace; leave them out"):
        trace(model, {**batch, "labels": torch.zeros(2, dtype=torch.long)})


def test_a_flag_of_the_configuration_is_the_traced_value() -> None:
    model, batch = tiny_model("bert"), text_batch(2, 5)
    model.config.output_hidden_states = True
    result = trace(model, batch)
    assert result(**batch, output_hidden_states=True).hidden_states is not None
    with pytest.raises(TraceError, match=r"'output_hidden_states' was True .*cannot be False"):
        result(**batch, output_hidden_states=False)


# -- example inputs ---------------------------------------------------------------------------------------------------


def test_positional_and_keyword_examples_together() -> None:
    model = module(flagged)
    for args, kwargs in (((X,), {"mask": X}), ((), {"x": X, "mask": X}), (None, {"x": X, "mask": X})):
        result = trace(model, args, kwargs)
        assert torch.allclose(result(X, mask=X), model(X, mask=X), atol=1e-6)
        assert torch.allclose(result(x=X, mask=X), model(X, mask=X), atol=1e-6)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ({"x": X}, {"mask": X}, "are a dict of keyword arguments already; put those of kwargs into it"),
        ((X,), (X,), "kwargs are a tuple; give a dict"),
        ((X,), {"x": X}, r"do not fit Made\.forward\(x, flag, scale, mask\): multiple values"),
        ({}, None, r"do not fit Made\.forward\(x, flag, scale, mask\): missing a required argument: 'x'"),
        ((), None, "missing a required argument: 'x'"),
        ((X.numpy(),), None, "example input 'x' is a numpy array; give torch.from_numpy of it"),
        ((X,), {"scale": np.ones(8)}, "example input 'scale' is a numpy array"),
        ((2.0,), None, "hold no tensor"),
        ({3: X}, None, "an example input is named 3; give a dict whose keys are names"),
        (([X, object()],), None, "example input 'x.1' is an object, which torch.export cannot take"),
    ],
)
def test_examples_that_do_not_fit_are_named(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(module(flagged), args, kwargs)


def test_examples_of_other_kinds_of_mappings() -> None:
    batch = text_batch(2, 5)
    expected = traced("bert")(**batch).logits
    for mapping in (BatchEncoding(dict(batch)), collections.UserDict(batch)):
        assert relative_error(trace(source("bert"), mapping)(**batch).logits, expected) < 1e-5


def test_keyword_only_and_unnamed_keywords() -> None:
    only = module(lambda self, x, *, k: self.fc(x) + k)
    result = trace(only, (X,), {"k": X})
    assert torch.allclose(result(X, k=2 * X), only(X, k=2 * X), atol=1e-6)
    with pytest.raises(TraceError, match=r"takes 2 inputs .*, but got 2 by position"):
        result(X, X)
    anything = module(lambda self, x, **rest: self.fc(x) + rest["b"] * rest.get("factor", 1))
    result = trace(anything, {"x": X, "b": X, "factor": 3})
    assert torch.allclose(result(X, b=2 * X, factor=3), anything(X, b=2 * X, factor=3), atol=1e-6)
    assert torch.allclose(result(X[:1], b=X[:1], factor=3), anything(X[:1], b=X[:1], factor=3), atol=1e-6)
    named = module(lambda self, input: self.fc(input))
    assert torch.allclose(trace(named, {"input": X})(input=X), named(X), atol=1e-6)
    assert torch.allclose(trace(named, {"input": X})(X), named(X), atol=1e-6)
    with pytest.raises(TraceError, match=r"Made.forward takes 'x' by position only"):
        trace(module(lambda self, x, /: self.fc(x)), (X,))
    with pytest.raises(TraceError, match=r"takes \*xs, whose items are named as its argument 'xs_1'"):
        trace(module(lambda self, *xs, xs_1=None: self.fc(xs[0])), (X, X))


def test_arguments_of_a_star_are_inputs_by_number(tmp_path: Path) -> None:
    total = module(lambda self, *xs: self.fc(sum(x * (1 + index) for index, x in enumerate(xs))))
    result = trace(total, (X, 2 * X, 3 * X))
    assert result.signature.inputs == ("xs_0", "xs_1", "xs_2")
    assert torch.allclose(result(X[:1], X[:1], X[:1]), total(X[:1], X[:1], X[:1]), atol=1e-6)
    with pytest.raises(TraceError, match="input 'xs_2' is missing"):
        result(X, X)
    with pytest.raises(TraceError, match=r"takes 3 inputs \(xs_0, xs_1, xs_2\), but got 4 by position"):
        result(X, X, X, X)
    export_onnx(result, tmp_path / "onnx")
    exported = load(tmp_path / "onnx")(xs_0=X, xs_1=X, xs_2=2 * X)[0]
    assert relative_error(torch.as_tensor(exported), total(X, X, 2 * X)) < 1e-5
    rest = module(
        lambda self, x, mask=None, *more, k=1.0, **others: self.fc(x + more[0]["a"] * more[1]) * k + others["b"]
    )
    arguments = (X, None, {"a": 2 * X}, 3)
    result = copy.deepcopy(trace(rest, arguments, {"k": 2.0, "b": X}))
    assert torch.allclose(result(*arguments, k=2.0, b=X), rest(*arguments, k=2.0, b=X), atol=1e-6)
    with pytest.raises(TraceError, match="input 'more_1' was 3 when the model was traced"):
        result(X, None, {"a": X}, 4, k=2.0, b=X)


def test_an_example_that_requires_gradients_is_left_as_it_is() -> None:
    x = X.clone().requires_grad_()
    result = trace(module(flagged), (x,))
    assert x.requires_grad
    assert x.grad is None
    y = X.clone().requires_grad_()
    result(y).sum().backward()
    assert y.grad is not None


def test_an_axis_that_the_trace_fixed_stays() -> None:
    model = module(lambda self, x: self.fc(x) * (1.0 if x.shape[0] > 2 else 2.0))
    result = trace(model, (X,), dynamic=False)
    with pytest.raises(TraceError, match=r"input 'x' has shape \[2, 8\], but the trace takes \[3, 8\]"):
        result(X[:2])
    with pytest.raises(TraceError, match=r"input 'x' has shape \[3, 1, 8\], but the trace takes \[any, 8\]"):
        trace(module(flagged), (X,))(X[:, None])


def test_a_source_keeps_its_forward() -> None:
    model = module(flagged)
    trace(model, (X,), {"flag": False})
    assert "forward" not in vars(model)
    with pytest.raises(TraceError):
        trace(model, (X[:, :5],))
    assert "forward" not in vars(model)
    result = copy.deepcopy(trace(model, (X,)))
    assert isinstance(result, TracedModel)
    assert not isinstance(model, PreTrainedModel)


def test_a_tensor_given_for_two_arguments_is_two_inputs() -> None:
    model = module(lambda self, x, parts: self.fc(x) + parts["a"] * parts["b"][0])
    result = trace(model, {"x": X, "parts": {"a": X, "b": (X,)}})
    inputs = {"x": X, "parts": {"a": 2 * X, "b": (X + 1,)}}
    assert torch.allclose(result(**inputs), model(**inputs), atol=1e-6)


# -- graphs -----------------------------------------------------------------------------------------------------------


def program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    return torch.export.export(model, args, kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, X, X), None, "the graph takes x, mask, but 3 example inputs are given by position; give one for each"),
        ((X,), None, "the graph takes x, mask, but the example inputs lack mask; give every input"),
        ({}, None, "the example inputs lack x, mask"),
        ((X,), {"x": X}, "example input 'x' is given twice"),
        ((X, X.numpy()), None, "example input 'mask' is a numpy array"),
        ([X, X], None, "example_inputs are a list; give a dict or a tuple"),
        ((X, X[:, :3]), None, "the graph fails on the example inputs with RuntimeError"),
    ],
)
@pytest.mark.parametrize("kind", ["symbolic", "program", "exported"])
def test_examples_of_a_graph_are_checked(kind: str, args: Any, kwargs: Any, message: str) -> None:
    model = module(lambda self, x, mask: self.fc(x) * mask)
    exported = program(model, (X, X.clone()))
    graph = {"symbolic": fx.symbolic_trace(model), "program": exported, "exported": exported.module()}[kind]
    with pytest.raises(TraceError, match=message):
        trace(graph, args, kwargs)


def test_a_program_keeps_its_constants_and_its_nested_inputs() -> None:
    def forward(self: Any, pair: list[Tensor], n: int, mask: Tensor | None) -> Tensor:
        y: Tensor = self.fc(pair[0]) + n * pair[1]
        return y if mask is None else y * mask

    model = module(forward)
    result = trace(program(model, ([X, 2 * X],), {"n": 3, "mask": None}))
    assert torch.allclose(result([X, 2 * X], n=3, mask=None), model([X, 2 * X], 3, None), atol=1e-6)
    with pytest.raises(TraceError, match=r"input 'n' was 3 .*cannot be 4"):
        result([X, X], n=4, mask=None)
    with pytest.raises(TraceError, match="input 'n' is missing"):
        result([X, X])
    with pytest.raises(TraceError, match="input 'pair' has 3 items, but the trace takes 2"):
        result([X, X, X], n=3)


def test_a_program_that_reads_one_tensor_for_two_inputs_is_refused() -> None:
    model = module(lambda self, x, mask: self.fc(x) * mask)
    with pytest.raises(
        TraceError, match="exported with one tensor for 'x' and 'mask', so it reads one of them for both"
    ):
        trace(program(model, (X, X)))
    assert trace(program(model, (X, X.clone()))).input_names == ("x", "mask")
