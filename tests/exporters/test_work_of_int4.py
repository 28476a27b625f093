"""The work of choosing bits, rounding and measuring the quality, counted rather than timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import LlamaForCausalLM

from gralora_fx import TracedModel, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.kinds.decoder import DECODER
from gralora_fx.exporters.quantize import calibration
from gralora_fx.exporters.quantize.round_in_order import Moments
from gralora_fx.exporters.quantize.sensitivity import draw
from gralora_fx.exporters.verify import drawn_texts, quality, quality_figures
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps, ModelSteps
from gralora_fx.exporters.verify.mapped_sessions import ReopenedSession
from tests.architectures.tiny_decoders import tiny_decoder


def _traced(width: int) -> TracedModel:
    model = tiny_decoder("LlamaForCausalLM", hidden_size=64, intermediate_size=width)
    assert isinstance(model, LlamaForCausalLM)
    return trace(model, task="text-generation-with-past")


@pytest.mark.parametrize(("width", "texts"), [(64, 16), (700, 22), (2048, 48)])
def test_as_many_tokens_are_drawn_as_the_widest_layer_has_inputs(width: int, texts: int) -> None:
    assert calibration._count(_traced(width)) == texts


def test_a_small_model_is_run_for_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, int] = {}

    def count(owner: Any, name: str, label: str, size: Any) -> None:
        function = getattr(owner, name)

        def counted(*args: Any) -> Any:
            taken[label] = taken.get(label, 0) + size(*args)
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    def tokens(_: object, ids: torch.Tensor, mask: torch.Tensor) -> int:
        return ids.numel()

    traced = _traced(64)
    count(ModelSteps, "__call__", "drawn", tokens)
    count(Moments, "add", "rounded by", lambda _, rows: len(rows))
    report = export_onnx(traced, tmp_path / "first", quantize="int4", verify=False)
    length = 31  # half of its context
    assert report.quantization is not None
    assert report.quantization.chosen_by == f"16 texts of {length} tokens that the model drew"
    inputs = 4 * sum("q_proj" in site.path for site in traced.sites)  # the head has 8 bits, rounded to the nearest
    assert taken == {"drawn": 16 * (length - 1), "rounded by": 16 * length * inputs}
    taken.clear()
    count(DecoderSteps, "__call__", "compared", tokens)
    monkeypatch.setattr(drawn_texts, "CONTINUED", 8)
    session = onnxruntime.InferenceSession(tmp_path / "first" / "model.onnx")
    texts = drawn_texts.drawn_to_compare(traced)
    assert taken == {"drawn": 16 * (24 - 1)}
    quality.token_quality(session, traced, texts)
    assert taken == {"drawn": 16 * (24 - 1 + 24 + 8 - 1), "compared": 16 * (24 + 8 - 1)}


def test_the_texts_of_the_comparison_are_drawn_with_those_that_choose_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the texts that the model draws for a comparison alone."""
    traced, drawn = _traced(64), []
    function = drawn_texts.draw_texts

    def noted(model: Any, wanted: Any) -> Any:
        drawn.append({name: (each.seed, each.length) for name, each in wanted.items()})
        return function(model, wanted)

    monkeypatch.setattr(drawn_texts, "draw_texts", noted)
    report = export_onnx(traced, tmp_path / "onnx", quantize="int4")
    assert drawn == [{"ids": (1, 31), "compared": (0, 24)}]
    alone = quality.measure_quality(tmp_path / "onnx", traced, DECODER.verification, texts=None, tokenizer=None)
    assert drawn[1:] == [{"compared": (0, 24)}]
    assert report.quality == alone


def test_an_export_that_reads_before_the_model_does_gives_the_same_figures(tmp_path: Path) -> None:
    """As where memory does not hold both: its session is closed before the model is run."""
    traced, runs = _traced(64), []
    export_onnx(traced, tmp_path / "onnx", quantize="int4", verify=False)
    session = ReopenedSession(lambda: onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx"))
    texts = drawn_texts.drawn_to_compare(traced)
    beside = quality.token_quality(session, traced, texts)

    def close() -> None:
        runs.append("closed")
        session.close()

    traced.graph_module.register_forward_pre_hook(lambda *_: runs.append("model"))
    assert quality.token_quality(session, traced, texts, close=close) == beside
    assert runs == ["closed", *["model"] * 3]


def test_sessions_that_take_turns_with_pytorch_leave_it_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    session = onnxruntime.InferenceSession

    def noted(model: Any, options: Any = None, **others: Any) -> Any:
        if isinstance(model, str):  # other models are constants that are computed once
            opened.append(options.get_session_config_entry("session.force_spinning_stop"))
        return session(model, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    export_onnx(_traced(64), tmp_path / "onnx", quantize="int8")
    assert len(opened) >= 2
    assert set(opened) == {"1"}


def test_draws_have_the_probabilities_of_their_logits() -> None:
    logits = torch.tensor([0.2, 0.5, 0.0, 0.3]).log()
    drawn = draw(logits.expand(20_000, 4), torch.Generator().manual_seed(0))
    shares = np.bincount(drawn.numpy(), minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.2, 0.5, 0.0, 0.3], atol=0.015)
    assert shares[2] == 0
    for row in ([0.0, float("nan")], [0.0, float("inf")], [float("-inf")] * 2):
        with pytest.raises(RuntimeError, match="its probabilities are not finite"):
            draw(torch.tensor([[1.0, 2.0], row]), torch.Generator())


def test_a_divergence_is_that_of_pytorch() -> None:
    p, q = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), torch.randn(3, 50)
    p[0, 3] = q[0, 3] = float("-inf")
    p[1, 4] = float("-inf")
    kept = [torch.arange(50) != 3, torch.arange(50) != 4, torch.arange(50) >= 0]
    expected = [
        torch.nn.functional.kl_div(
            b.double().log_softmax(-1)[mask], a.double().log_softmax(-1)[mask], log_target=True, reduction="sum"
        )
        for a, b, mask in zip(p, q, kept, strict=True)
    ]
    torch.testing.assert_close(quality_figures.kl_divergence(p, q), torch.stack(expected))
    assert quality_figures.kl_divergence(p[:0], q[:0]).shape == (0,)
