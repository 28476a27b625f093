"""`GraloraConfig`: what to adapt and how, with the fields of PEFT's `adapter_config.json` for GraLoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from gralora_fx.core.config.adapter_config import AdapterConfig
from gralora_fx.core.config.checks import check_dropout, check_flag, check_integer, check_number, check_tokens
from gralora_fx.errors import ConfigError


@dataclass(frozen=True)
class GraloraConfig(AdapterConfig):
    """A GraLoRA adapter: its sizes, its scale and the linear call sites it is inserted at.

    Field names, defaults and meanings are those of `peft.GraloraConfig`. An adapter of a layer with `in` inputs and
    `out` outputs has `A [k, in/k, r]` and `B [k, r, out/k]`, and with `hybrid_r > 0` a plain LoRA pair
    `A_general [hybrid_r, in]`, `B_general [out, hybrid_r]` beside it.

    Args:
        r: Rank of each block row; the parameters are those of a LoRA of rank `r`, the rank of the update up to `k * r`.
        hybrid_r: Rank of the additional plain LoRA; 0 leaves it out.
        target_modules: Module names (exact, or the end of a path after a dot), a regular expression that must match a
            whole path, `"all-linear"`, or None for PEFT's choice for the model's type.
        alpha: Numerator of the scale `alpha / (r + hybrid_r)`.
        gralora_dropout: Probability with which an adapter input is zeroed in training, in `[0, 1)`.
        gralora_k: Number of blocks in each direction; divides `r` and the widths of every target.
        fan_in_fan_out: Whether the weights are stored `[in, out]`, as in `Conv1D`. It is determined from the layers
            themselves, and only kept for PEFT's file format.
        bias: Which biases train: `"none"`, `"all"`, or `"gralora_only"` for those of the adapted layers.
        modules_to_save: Modules that train as a whole, each adapter with its own copy.
        init_weights: True starts with `B` zero, so that nothing changes; False draws `B` at random too.
        layers_to_transform: Layer index or indices to adapt; None or an empty list adapts all.
        layers_pattern: Name or names of the container whose children `layers_to_transform` counts.
        task_type: PEFT's task type. It adds the task's head to `modules_to_save`, as PEFT does.
        base_model_name_or_path: The model that the adapter belongs to.
        revision: Revision of that model.
        inference_mode: Whether the adapter was saved for inference.
        exclude_modules: Modules to leave out of `target_modules`: names as there, or a regular expression.
        rank_pattern: `r` of the layers that a key names, where it differs: by whole path, by the end of a path after a
            dot, or by a regular expression for such an end. The first key that matches counts.
        alpha_pattern: `alpha` of such layers.
        gralora_k_pattern: `gralora_k` of such layers, for widths that `gralora_k` does not divide.
        base_quantization: How that model was quantized when the adapter was trained, as returned by
            `BaseQuantization.to_dict`; None if it was not, or if that is unknown. None is not saved, and PEFT ignores
            the field.
        target_parameters: Names of parameters to adapt (exact, or the end of a name after a dot), as in PEFT's LoRA:
            each matrix of a stack gets an adapter of its own.
        alora_invocation_tokens: Token ids whose last occurrence in a row activates the adapter, as in PEFT's LoRA; a
            row without them runs the base. None for an adapter that acts on every token.

    The last seven go beyond PEFT's GraLoRA: they are in the saved file only if they are used, and PEFT then warns that
    it ignores them.

    Raises:
        ConfigError: A field has an invalid value, or two fields contradict each other.

    Example:
        >>> config = GraloraConfig(r=32, hybrid_r=8, alpha=80, target_modules=["q_proj", "v_proj"])
        >>> config.scale
        2.0
    """

    r: int = 32
    hybrid_r: int = 0
    target_modules: set[str] | str | None = None
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    exclude_modules: set[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    gralora_k_pattern: dict[str, int] = field(default_factory=dict)
    base_quantization: Any = None
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None

    PEFT_TYPE = "GRALORA"
    TITLE = "GraLoRA"
    BIAS_MODES = ("none", "all", "gralora_only")
    ADAPTED_BIASES = "gralora_only"
    PATTERNS: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {
        "rank_pattern": partial(check_integer, least=1),
        "alpha_pattern": check_number,
        "gralora_k_pattern": partial(check_integer, least=1),
    }
    PATTERN_OF: ClassVar[Mapping[str, str]] = {
        "r": "rank_pattern",
        "alpha": "alpha_pattern",
        "gralora_k": "gralora_k_pattern",
    }
    SIZE_FIELDS = ("r", "hybrid_r", "alpha", "gralora_k", *PATTERNS)
    BEYOND_PEFT = ("exclude_modules", *PATTERNS)
    SAVED_IF_USED = ("base_quantization", "target_parameters", "alora_invocation_tokens")
    DROPOUT = "gralora_dropout"

    @property
    def scale(self) -> float:
        """Factor of the adapter's output, `alpha / (r + hybrid_r)`, unless a pattern overrides it."""
        return self.alpha / (self.r + self.hybrid_r)

    def check_sizes(self) -> None:
        """Check the sizes, the scale and the dropout.

        Raises:
            ConfigError: One has an invalid value, or `gralora_k` does not divide `r`.
        """
        check_integer("r", self.r, 1)
        check_integer("gralora_k", self.gralora_k, 1)
        check_integer("hybrid_r", self.hybrid_r, 0)
        if self.r % self.gralora_k:
            raise ConfigError(
                f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}; "
                f"take r={max(1, round(self.r / self.gralora_k)) * self.gralora_k} or another gralora_k"
            )
        check_number("alpha", self.alpha)
        check_dropout("gralora_dropout", self.gralora_dropout)
        check_flag("init_weights", self.init_weights)
        check_tokens(self.alora_invocation_tokens, self.target_parameters)

    @classmethod
    def translate(cls, fields: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
        """Return fields of the paper's own code in PEFT's terms; fields that PEFT wrote stay unchanged.

        Args:
            fields: The fields.
            origin: Their source, for messages.
        """
        if "gralora_alpha" not in fields or "alpha" in fields:
            return fields
        from gralora_fx.core.config.reading import from_paper

        return from_paper(fields, origin)
