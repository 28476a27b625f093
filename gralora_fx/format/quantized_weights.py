"""The quantized weights of an export: their formats, and their effect compared with the float32 model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from gralora_fx.errors import listed


@dataclass(frozen=True)
class LayerFormat:
    """The format of a matrix that differs from the default."""

    form: str  # the format, in words
    # the loss saved compared with the default format, by the measure that chose it; None if nothing was measured
    gain: float | None = None
    reason: str | None = None  # why the integers of the checkpoint are not kept; None if they are, or there are none
    inexact: int | None = None  # the size of its blocks, if they are wider than `WIDEST_EXACT`


# by bits, the widest blocks for which ONNX Runtime multiplies one row in the same order as several rows
WIDEST_EXACT = {4: 32, 8: 64}
# Processors on which ONNX Runtime adds products of uint8 and int8 exactly; others add two in 16 bits, which saturate
EXACT_SUMS = "x86 with VNNI and on ARM"


@dataclass(frozen=True)
class QuantizedWeights:
    """Form in which an export's matrices are quantized, and their number."""

    kind: str  # `"int4"`, `"int8"`, `"int8-dynamic"`, or `"kept"`, the integers of a quantized checkpoint
    block_size: int | None  # values along a matrix's input axis that share a scale; None if a whole column does
    accuracy_level: int | None  # ONNX Runtime's accuracy level for products with blocks; None without blocks
    zero_points: bool | None  # whether blocks have a zero point each; None where there are none
    multiplications: int  # nodes that multiply with quantized values
    lookups: int  # nodes that look up rows of blocks
    values: int  # values of the matrices that are multiplied with
    bits: float | None = None  # mean bits of their integers; None if not recorded
    stored_bits: float | None = None  # the same with scales, zero points and padding
    chosen_by: str | None = None  # how formats were chosen, in words; None if all matrices have the default
    # the matrices that have a format of their own, by the names of the parameters
    layers: Mapping[str, LayerFormat] = field(default_factory=dict)
    # whether scales lie in 16 bits behind a cast: ONNX Runtime folds it unless a session's options say otherwise, and
    # reads them wrongly then; `load` keeps such sessions right
    needs_folding: bool = False
    # SHA-256 of integers, scales and zero points that were rounded by search, which nothing else says again, by the
    # names of the integers
    digests: Mapping[str, str] = field(default_factory=dict)
    # the processors on which every program adds its products exactly; None for all of them
    exact_on: str | None = None

    def __str__(self) -> str:
        """Return the bits used, and the matrices with formats of their own."""
        lines = [f"{self.kind}: {self.values:,} values"]
        if self.bits is not None:
            lines[0] += f" in {self.bits:.2f} bits, {self.stored_bits:.2f} with scales and zero points"
        lines[0] += "" if self.chosen_by is None else f"; chosen by {self.chosen_by}"
        for name, layer in self.layers.items():
            lines += [] if layer.gain is None else [f"  {name}: {layer.form} (saves {layer.gain:.2e})"]
        label = "  " if self.kind == "kept" else "  others: "
        others = Counter((layer.form, layer.reason) for layer in self.layers.values() if layer.gain is None)
        for (form, reason), count in sorted(others.items(), key=str):
            lines.append(f"{label}{count} in {form}" + ("" if reason is None else f": {reason}"))
        bits = int(self.kind[3]) if self.kind.startswith("int") else 8
        wide = {layer.inexact for layer in self.layers.values() if layer.inexact is not None}
        exact = WIDEST_EXACT[4 if wide else bits]
        if self.block_size is not None and self.block_size > WIDEST_EXACT[bits]:
            wide.add(self.block_size)
        if wide:
            lines.append(
                f"  in blocks of {listed(map(str, sorted(wide)))} the last digits of a token depend on how many are "
                f"read with it; in those of {exact} they do not"
            )
        if self.needs_folding:
            lines.append(
                "  other programs read them right in sessions that fold constants, as ONNX Runtime's do by default"
            )
        if self.exact_on is not None:
            lines.append(
                f"  products are added exactly by gralora-fx on every processor, by other programs on {self.exact_on}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class OutputQuality:
    """The difference of a quantized export's output from the float32 model's."""

    name: str  # name of the output
    rows: int  # number of compared rows: for logits one per class or token prediction, else vectors
    argmax_agreement: float | None  # share of rows whose largest logit is at the same index; None for other outputs
    # largest change of a probability, by softmax over a row's logits; None for other outputs
    probability_change: float | None
    mean_cosine: float | None  # mean cosine similarity of a row with the model's; None for logits
    min_cosine: float | None  # the smallest; None for logits
    # mean size of the difference of a row, relative to the model's; None for logits, or if not recorded
    mean_error: float | None = None

    def __str__(self) -> str:
        """Return the figures in a line."""
        if self.argmax_agreement is not None:
            return (
                f"{self.name}: argmax equal in {100 * self.argmax_agreement:.1f} % of {self.rows} rows, "
                f"largest change of a probability {self.probability_change:.4f}"
            )
        error = "" if self.mean_error is None else f", relative error {self.mean_error:.4f}"
        similarity = f"cosine similarity {self.mean_cosine:.4f}, at least {self.min_cosine:.4f}"
        return f"{self.name}: {similarity}{error}, {self.rows} rows"


@dataclass(frozen=True)
class TokenQuality:
    """The difference of a quantized decoder's tokens from the float32 model's with the same adapter."""

    # the adapter, of an export that takes adapters as data; None for the base, or for folded adapters
    adapter: str | None
    texts: int  # number of texts
    positions: int  # positions at which the next token was compared, after the same tokens
    argmax_agreement: float  # share of positions at which the likeliest token is the same
    kl_divergence: float  # mean of KL(float32 || quantized) of the next token's probabilities, in nats
    greedy_tokens: int  # greedy tokens compared after each text
    # number of them that both give before the first difference: the median over the texts
    equal_greedy_tokens: float

    def __str__(self) -> str:
        """Return the figures in a line."""
        label = "" if self.adapter is None else f"with the adapter {self.adapter!r}: "
        return (
            f"{label}likeliest token equal at {100 * self.argmax_agreement:.1f} % of {self.positions} positions, "
            f"KL divergence {self.kl_divergence:.4f} nats a token; the first {self.equal_greedy_tokens:g} of "
            f"{self.greedy_tokens} greedy tokens equal (median)"
        )


@dataclass(frozen=True)
class Quality:
    """The difference of a quantized export from the float32 model."""

    inputs: str  # the compared inputs, such as `200 given texts`
    outputs: tuple[OutputQuality, ...] = ()  # the outputs, without those of a cache; none for a decoder with one
    # for a decoder with a cache, its tokens: one entry for folded adapters, else the base and each adapter
    tokens: tuple[TokenQuality, ...] = ()
    # the same of what runs beside a decoder, and tokens of prompts that it reads partly; None without anything
    companions: Quality | None = None

    @property
    def outcome(self) -> str:
        """The agreement with the float32 model's answers in a few words, to follow the quantization's name."""
        if self.tokens:
            least = min(self.tokens, key=lambda found: found.argmax_agreement)
            share = f"{100 * least.argmax_agreement:.1f} % of {least.positions:,} positions"
            return f"keeps float32's next token at {share}, KL divergence {least.kl_divergence:.4f}"
        agreements = [(one.argmax_agreement, one.rows) for one in self.outputs if one.argmax_agreement is not None]
        if agreements:
            fewest, rows = min(agreements)
            return f"keeps {100 * fewest:.1f} % of float32's {rows:,} answers"
        cosines = [found.min_cosine for found in self.outputs if found.min_cosine is not None]
        return f"differs from float32 by a cosine of {min(cosines):.4f} at least" if cosines else "was compared"

    def __str__(self) -> str:
        """Return the inputs, and a line for each output or adapter."""
        lines = [f"quantized, compared with the float32 model on {self.inputs}:"]
        beside = [] if self.companions is None else [str(self.companions)]
        return "\n".join([*lines, *(f"  {found}" for found in (*self.outputs, *self.tokens)), *beside])
