"""Few bits of decoders with states: every layer is quantized, figures are those of the model, and rows are as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load
from tests.architectures.tiny_decoders import tiny_decoder

LENGTH = 24


@pytest.mark.parametrize(
    ("name", "quantize", "bits", "equal"),
    [
        ("FalconH1ForCausalLM", "int4", 4.5, 0.6),
        ("GraniteMoeHybridForCausalLM", "int8-dynamic", 8, 0.9),
        ("Mamba2ForCausalLM", "int8", 8, 0.85),
    ],
)
def test_a_hybrid_holds_in_few_bits(name: str, quantize: Any, bits: float, equal: float, tmp_path: Path) -> None:
    model = tiny_decoder(name, eos_token_id=None)
    traced = trace(model, task="text-generation-with-past")
    targets = [site.path for site in traced.sites if "proj" in site.path.split(".")[-1]]
    adapted = rewrite(traced, GraloraConfig(r=4, gralora_k=2, alpha=4, target_modules=targets, init_weights=False))
    report = export_onnx(adapted, tmp_path / "onnx", adapters="data", quantize=quantize)
    spent, quality = report.quantization, report.quality
    assert spent is not None
    assert quality is not None
    assert spent.values == sum({id(site.weight): site.weight.numel() for site in traced.sites}.values())
    assert 4 <= (spent.bits or 0) <= bits
    assert [found.adapter for found in quality.tokens] == [None, "default"]
    assert min(found.argmax_agreement for found in quality.tokens) >= equal

    served = load(tmp_path / "onnx", threads=1)
    ids = drawn(model)
    with torch.no_grad():
        expected = model(ids).logits.double().log_softmax(-1)
    found = torch.from_numpy(logits_of(served, ids.tolist(), [None] * len(ids))).double().log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert divergence == pytest.approx(quality.tokens[0].kl_divergence, rel=1)
    texts, names = ids[:3].tolist(), ["default", None, "default"]
    together = logits_of(served, texts, names)
    for row, (text, adapter) in enumerate(zip(texts, names, strict=True)):
        alone = logits_of(served, [text], [adapter])[0]
        assert np.array_equal(together[row], alone)
    assert not np.allclose(together[0], logits_of(served, texts[:1], [None])[0], atol=1e-3)


def drawn(model: Any) -> torch.Tensor:
    """Texts that a model draws, `[8, LENGTH]`."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 90, (8, 1), generator=generator)
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            probabilities = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return ids


def logits_of(served: Any, texts: list[list[int]], adapters: list[str | None]) -> Any:
    """Compute logits of rows that are read token by token beside each other, `[rows, LENGTH, vocabulary]`."""
    decoder = served.decoder(rows=len(texts), capacity=32)
    rows = [decoder.open(adapter) for adapter in adapters]
    steps = []
    for place in range(LENGTH):
        logits = decoder.step({row: text[place : place + 1] for row, text in zip(rows, texts, strict=True)})
        steps.append([logits[row].reshape(-1) for row in rows])
    return np.array(steps).swapaxes(0, 1)
