"""The cost of quantization in a decoder's tokens: the report's figures, with transformers' model as the oracle."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from damaged_exports import shift_weight
from tiny_tokenizers import tiny_tokenizer
from traces import fresh, fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.core.tracing.inputs.cache import empty_cache
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.kinds.decoder import DECODER
from gralora_fx.exporters.verify.outputs import flat
from gralora_fx.exporters.verify.quality import measure_quality
from gralora_fx.format.manifest import read_manifest
from gralora_fx.format.quantized_weights import TokenQuality
from gralora_fx.serving import load

CACHED = "text-generation-with-past"
CONFIG = GraloraConfig(r=8, gralora_k=2, hybrid_r=2, alpha=16, target_modules="all-linear", init_weights=False)
TEXTS = ["rates rose again", "the match", "a new phone is on sale"]
GIVEN = [text for text in TEXTS for _ in range(2)]  # every second one chooses formats


def adapted(name: str = "llama") -> GraloraModel:
    return rewrite(fresh_trace(name, task=CACHED), CONFIG)


def figures(report: Any, index: int = 0) -> TokenQuality:
    found: TokenQuality = report.quality.tokens[index]
    return found


def by_hand(model: Any, directory: Path, rows: list[list[int]], greedy: int) -> tuple[int, float, float, float]:
    """Positions, agreement, divergence and median of equal greedy tokens; whole texts at once, without a cache."""
    served, equal, divergences, runs = load(directory), [], [], []
    for row in rows:
        whole = model.generate(torch.tensor([row]), max_new_tokens=greedy, min_new_tokens=greedy, do_sample=False)
        expected = model(whole).logits[0, :-1]
        actual = torch.from_numpy(served(input_ids=whole.numpy()).logits)[0, :-1]
        same = expected.argmax(-1) == actual.argmax(-1)
        log_p, log_q = (logits.double().log_softmax(-1)[: len(row)] for logits in (expected, actual))
        divergences += torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).tolist()
        equal += same[: len(row)].tolist()
        after = same[len(row) - 1 :].tolist()
        runs.append(after.index(False) if False in after else greedy)
    return len(equal), sum(equal) / len(equal), sum(divergences) / len(divergences), statistics.median(runs)


@pytest.mark.parametrize("kind", ["int4", "int8", "int8-dynamic"])
@torch.no_grad()
def test_figures_are_those_of_transformers_model_and_the_served_export(kind: Any, tmp_path: Path) -> None:
    model, traced = fresh("llama", task=CACHED)
    model.generation_config.eos_token_id = None
    tokenizer, texts = tiny_tokenizer(), TEXTS if kind == "int8" else GIVEN
    report = export_onnx(traced, tmp_path / "onnx", quantize=kind, logits="all", tokenizer=tokenizer, texts=texts)
    found = figures(report)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    positions, agreement, divergence, median = by_hand(model, tmp_path / "onnx", rows, found.greedy_tokens)
    assert report.quality is not None
    assert report.quality.inputs == "3 given texts"
    assert (found.adapter, found.texts, found.positions) == (None, 3, positions)
    # int8-dynamic rounds by the range of a whole step, which one token has by itself
    close = 0.5 if kind == "int8-dynamic" else 0.02
    assert found.kl_divergence == pytest.approx(divergence, rel=close)
    if kind != "int8-dynamic":
        assert found.argmax_agreement == pytest.approx(agreement)
        assert found.equal_greedy_tokens == median
    assert found.kl_divergence > 0


def test_a_decoder_draws_texts_and_the_manifest_and_the_print_have_the_figures(tmp_path: Path) -> None:
    report = export_onnx(adapted(), tmp_path / "onnx", quantize="int4")
    found = figures(report)
    assert report.quality is not None
    assert report.quality.inputs == "16 texts of 24 tokens that it drew"
    assert (found.texts, found.positions, found.greedy_tokens) == (16, 16 * 24, 24)
    assert read_manifest(tmp_path / "onnx").quality == report.quality
    assert f"16 texts of 24 tokens that it drew:\n  {found}" in report.details
    assert "nats a token" in str(found)
    again = export_onnx(adapted(), tmp_path / "onnx", quantize="int4")
    assert figures(again) == found


def test_more_bits_cost_less(tmp_path: Path) -> None:
    costs = [
        figures(export_onnx(adapted(), tmp_path / kind, quantize=kind)).kl_divergence  # type: ignore[arg-type]
        for kind in ("int4", "int8")
    ]
    assert costs[1] < costs[0] / 10


def test_a_damaged_export_shows(tmp_path: Path) -> None:
    model = adapted()
    report = export_onnx(model, tmp_path / "onnx", quantize="int8")
    shift_weight(tmp_path / "onnx", "_Q8")
    damaged = measure_quality(tmp_path / "onnx", model, DECODER.verification, texts=None, tokenizer=None).tokens[0]
    assert damaged.kl_divergence > 10 * figures(report).kl_divergence
    assert damaged.argmax_agreement < figures(report).argmax_agreement


@pytest.mark.parametrize("mode", ["data", "inputs"])
@pytest.mark.parametrize("has_blocks", [False, True])
@torch.no_grad()
def test_a_float_adapter_over_a_quantized_base_is_measured_with_the_adapter(
    mode: Any, has_blocks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In LoRA's form and in GraLoRA's, whichever the export would take."""
    monkeypatch.setattr("gralora_fx.exporters.kinds.data_sites.takes_blocks", lambda *_, **__: has_blocks)
    model, tokenizer = adapted(), tiny_tokenizer()
    report = export_onnx(
        model,
        tmp_path / "onnx",
        adapters=mode,
        quantize="int4",
        logits="all",
        tokenizer=tokenizer,
        texts=GIVEN,
    )
    inputs = read_manifest(tmp_path / "onnx").adapter_inputs
    assert inputs is not None
    assert inputs.k == (2 if has_blocks else 0)
    assert report.quality is not None
    base, with_adapter = report.quality.tokens
    assert (base.adapter, with_adapter.adapter) == (None, "default")
    assert "with the adapter 'default': likeliest token equal" in report.details
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    adapter = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "onnx" / "adapters" / "default.onnx_adapter"))
    tensors = {name: value.numpy() for name, value in adapter.get_parameters().items()}
    divergences: list[float] = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(len(text))[None],
        }
        cache = empty_cache(model.traced.example_inputs["past_key_values"], 1)
        feed = {name: value.numpy() for name, value in flat({**inputs, "past_key_values": cache}).items()}
        (q,) = session.run(["logits"], {**feed, **tensors})
        p = model(**inputs, past_key_values=cache).logits
        log_p, log_q = (logits[0].double().log_softmax(-1) for logits in (p, torch.from_numpy(q)))
        divergences += torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).tolist()
    assert with_adapter.kl_divergence == pytest.approx(sum(divergences) / len(divergences), rel=0.02)
    assert model.active_adapters == ["default"]


def test_a_text_longer_than_the_context_is_cut(tmp_path: Path) -> None:
    model = rewrite(fresh_trace("llama", task=CACHED, max_position_embeddings=32), CONFIG)
    report = export_onnx(
        model, tmp_path / "onnx", quantize="int4", tokenizer=tiny_tokenizer(), texts=["long " * 50] * 4
    )
    found = figures(report)
    assert found.positions + 2 * found.greedy_tokens <= 2 * 32
    assert found.positions > 1


def test_an_encoder_decoder_is_measured_on_answers_without_padding(tmp_path: Path) -> None:
    traced = fresh_trace("t5", task="text2text-generation-with-past", num_layers=1)
    quality = export_onnx(traced, tmp_path / "onnx", quantize="int4").quality
    assert quality is not None
    logits, features = quality.outputs
    assert (logits.name, logits.rows, features.rows) == ("logits", 384, 384)
    assert (logits.argmax_agreement or 0) > 0.6
    assert (features.min_cosine or 0) > 0.9


def test_what_cannot_be_measured_is_refused_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"texts=\.\.\. is for decoders and models without a cache, and the task .*is an encoder-"
    ):
        export_onnx(
            fresh_trace("t5", task="text2text-generation-with-past", num_layers=1),
            tmp_path / "onnx",
            quantize="int4",
            tokenizer=tiny_tokenizer(),
            texts=TEXTS,
        )
    with pytest.raises(ExportError, match="the tokenizer gives no token for text 1"):
        export_onnx(adapted(), tmp_path / "onnx", quantize="int4", tokenizer=tiny_tokenizer(), texts=["", ""])
    assert export_onnx(adapted(), tmp_path / "onnx", quantize="int4", verify=False).quality is None
