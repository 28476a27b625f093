"""What quantization changes: an export as it is run, compared with the float32 model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OutputQuality:
    """How an output of a quantized export differs from the float32 model's.

    Attributes:
        name: Name of the output.
        rows: How many rows were compared: of logits, those of a class or token each; else vectors.
        argmax_agreement: Share of rows whose largest logit is at the same index; None for other outputs.
        probability_change: Largest change of a probability, by softmax over a row's logits; None for other outputs.
        mean_cosine: Mean cosine similarity of a row with the model's; None for logits.
        min_cosine: The smallest; None for logits.
    """

    name: str
    rows: int
    argmax_agreement: float | None
    probability_change: float | None
    mean_cosine: float | None
    min_cosine: float | None

    def __str__(self) -> str:
        """The figures in a line."""
        if self.argmax_agreement is not None:
            return (
                f"{self.name}: argmax equal in {100 * self.argmax_agreement:.1f} % of {self.rows} rows, "
                f"largest change of a probability {self.probability_change:.4f}"
            )
        return (
            f"{self.name}: cosine similarity {self.mean_cosine:.4f}, at least {self.min_cosine:.4f}, {self.rows} rows"
        )


@dataclass(frozen=True)
class Quality:
    """How a quantized export differs from the float32 model.

    Attributes:
        inputs: What was compared, such as `200 given texts`.
        outputs: The outputs, without those of a cache.
    """

    inputs: str
    outputs: tuple[OutputQuality, ...]

    def __str__(self) -> str:
        """The inputs, and a line for each output."""
        lines = [f"quantized, compared with the float32 model on {self.inputs}:"]
        return "\n".join([*lines, *(f"  {output}" for output in self.outputs)])
