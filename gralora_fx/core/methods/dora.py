"""DoRA (Liu et al., 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"), which PEFT has as a LoRA with `use_dora`.

    A [r, in], B [out, r], magnitude [out]        W' = magnitude / ||W + scale * B @ A|| * (W + scale * B @ A)

where `||.||` is the norm of each row of `[out, in]`, and the scale is LoRA's. In training the norm is a constant: no
gradient goes through it (section 4.3). The update depends on the weight, so it has no LoRA form. Once the norms are
known, it is a plain LoRA beside a factor of each output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gralora_fx.base.sources import ACTING
from gralora_fx.core.methods.arrays import Array, accumulator_of, cast, concatenated, row_norms, without_gradients
from gralora_fx.core.methods.lora import Lora, LoraConfig, LoraSizes
from gralora_fx.core.methods.method import AdapterMethod, LayerCall
from gralora_fx.errors import ConfigError, shown

if TYPE_CHECKING:
    from torch import Tensor

_LORA = Lora()
_ROWS = 1024  # of the weight in memory at once while norms are computed


@dataclass(frozen=True)
class DoraConfig(LoraConfig, asked_for_by="use_dora"):
    """A DoRA adapter: a LoRA adapter that trains the norms of the rows of the weights too.

    An adapter of a layer with `in` inputs and `out` outputs has `A [r, in]`, `B [out, r]` and a magnitude `[out]`. The
    file is that of a `peft.LoraConfig` with `use_dora=True`.

    Args:
        use_dora: True; it tells the file from that of a LoRA adapter. All other fields are those of `LoraConfig`.

    Raises:
        ConfigError: A field has an invalid value, or two fields contradict each other.
    """

    use_dora: bool = True

    TITLE = "DoRA"
    SIZE_FIELDS = (*LoraConfig.SIZE_FIELDS, "use_dora")

    def check_sizes(self) -> None:
        """Check the sizes, the scale and the dropout.

        Raises:
            ConfigError: One has an invalid value, or it is a plain LoRA adapter's.
        """
        super().check_sizes()
        if self.use_dora is not True:
            raise ConfigError(f"use_dora must be True, but got {shown(self.use_dora)}; take LoraConfig for plain LoRA")
        if self.acts_from:
            raise ConfigError(
                f"use_dora=True does not work with {ACTING}={shown(list(self.acts_from))}, as in PEFT; "
                "take plain LoRA or GraLoRA for an adapter that tokens activate"
            )
        if self.target_parameters:
            raise ConfigError(
                f"use_dora=True does not work with target_parameters={shown(self.target_parameters)}, as in PEFT; take "
                "plain LoRA or GraLoRA for parameters, and DoRA for linear layers only"
            )

    @classmethod
    def describes(cls, fields: Mapping[str, Any]) -> bool:
        """Return whether the fields of a file are those of a DoRA adapter.

        Args:
            fields: The fields.
        """
        return super().describes(fields) and bool(fields.get("use_dora"))


class DoraFactors(NamedTuple):
    """Tensors of a DoRA adapter at one layer."""

    A: Tensor  # `[r, in]`
    B: Tensor  # `[out, r]`
    magnitude: Tensor  # `[out]`, the norms of the new weight's rows

    @property
    def features(self) -> tuple[int, int]:
        """Widths `in` and `out` of the layer."""
        return self.A.shape[1], self.B.shape[0]

    @property
    def is_zero(self) -> bool:
        """False: without the weight it is not known whether the magnitudes are its norms."""
        return False

    def new_weight(self, weight: Array, scale: float) -> Array:
        """Return the layer's weight `[out, in]` with the adapter; no gradient goes through the norm."""
        return _new_weight(weight, DoraFactors(*(cast(tensor, weight.dtype) for tensor in self)), scale)

    @without_gradients
    def scaled_form(self, weight: Callable[[slice], Array], scale: float) -> tuple[Array, Array, Array]:
        """Return A, `ratio * scale * B` and `ratio - 1`, with the ratio of magnitudes to norms."""
        A, B, magnitude = (cast(tensor, accumulator_of(tensor)) for tensor in self)
        parts = []
        for start in range(0, len(B), _ROWS):
            rows = slice(start, min(start + _ROWS, len(B)))
            parts.append(magnitude[rows] / row_norms(weight(rows) + scale * (B[rows] @ A)))
        ratio = concatenated(parts)
        return A, ratio.reshape(-1, 1) * (scale * B), ratio - 1


def _new_weight(weight: Array, factors: DoraFactors, scale: float) -> Array:
    updated = weight + scale * (factors.B @ factors.A)
    return (factors.magnitude / row_norms(updated)).reshape(-1, 1) * updated


class Dora(AdapterMethod):
    """The DoRA method."""

    config = DoraConfig
    tensors = DoraFactors
    keys = {**Lora.keys, "magnitude": "lora_magnitude_vector"}  # noqa: RUF012  # typed in the base class
    IS_ADDITIVE = False
    RUNS_ON_NUMPY = True

    def sizes(self, config: DoraConfig, value_of: Callable[[str], Any]) -> tuple[LoraSizes, float]:
        """Return rank and scale of the adapter at a layer."""
        return _LORA.sizes(config, value_of)

    def shapes(self, in_features: int, out_features: int, sizes: LoraSizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors at a layer."""
        return {**_LORA.shapes(in_features, out_features, sizes), "magnitude": (out_features,)}

    def initial(
        self,
        features: tuple[int, int],
        sizes: LoraSizes,
        config: DoraConfig,
        *,
        weight: Callable[[], Tensor],
        scale: float,
    ) -> DoraFactors:
        """Return new tensors: A and B are LoRA's, and the magnitudes are the norms of the weight with them."""
        A, B = _LORA.initial(features, sizes, config)
        base = weight().detach()
        base = base.to("cpu", accumulator_of(base))
        return DoraFactors(A, B, row_norms(base + scale * (B @ A)))

    def forward(
        self, call: LayerCall, factors: DoraFactors, scale: float, *, sizes: LoraSizes, dropout: float = 0.0
    ) -> Tensor:
        """Compute `y + (ratio - 1) * (x @ W.T) + ratio * scale * x @ A.T @ B.T`, with the ratio of magnitudes to norms.

        As in PEFT, dropout applies to `x` in both products, not to `y`. Without it the first product is `y` minus the
        bias.
        """
        from torch.nn.functional import linear

        from gralora_fx.core.methods.low_rank import drop_inputs

        A, B, weight = factors.A, call.of_rows(factors.B), call.of_rows(call.matrix)
        norms = row_norms(weight.detach() + scale * (B.detach() @ A.detach()))
        ratio = call.of_rows(factors.magnitude) / norms
        x = drop_inputs(call.x, dropout)
        if dropout:
            product = linear(x, weight)
        elif call.bias is not None:
            product = call.y - call.bias
        else:
            product = call.y
        result: Tensor = call.y + (ratio - 1) * product + ratio * (linear(linear(x, A), B) * scale)
        return result.type_as(call.y)

    def new_weight(self, weight: Tensor, factors: DoraFactors, scale: float, **_: Any) -> Tensor:
        """Return the new weight (see `DoraFactors`)."""
        new: Tensor = _new_weight(weight, factors, scale)
        return new

    def text(self, sizes: LoraSizes) -> str:
        """Return the sizes in words, such as `r=8 and magnitudes`."""
        return f"{_LORA.text(sizes)} and magnitudes"
