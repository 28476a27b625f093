"""Low-bit weights: their effect on SmolLM2's tokens, compared with other quantizers at the same size."""

from __future__ import annotations

from benchmarks import few_bits_nf4, few_bits_quality, few_bits_speed
from benchmarks.harness import Report


def run() -> Report:
    """Measure bits, bytes, the share of positions with float32's token, and KL divergence."""
    report = Report("few_bits", "few bits: SmolLM2-135M on held-out news")
    few_bits_quality.measure(report)
    few_bits_speed.add_speed(report)
    few_bits_nf4.measure(report)
    return report
