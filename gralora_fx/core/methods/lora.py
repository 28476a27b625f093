"""Plain LoRA (Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), with PEFT's `LoraConfig`.

    A [r, in], B [out, r]        dW = scale * B @ A

with the scale `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA (Kalajdzievski, 2023, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA"). DoRA is in `dora.py`. The other forms in PEFT's `LoraConfig` compute
something else and are refused by name (`core/config/foreign_fields.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.config.checks import check_dropout, check_flag, check_integer, check_number, check_tokens
from gralora_fx.core.methods.arrays import moved
from gralora_fx.core.methods.method import LayerCall, SummableMethod
from gralora_fx.errors import ConfigError, an, shown, warn_caller

if TYPE_CHECKING:
    from torch import Tensor

# Initializations: ones that leave the base unchanged, and ones that move part of its weights into the adapter.
_INITIAL = (True, False, "gaussian")
_LEAVE_THE_BASE = ("eva", "orthogonal", "mica")
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """A LoRA adapter: its rank, its scale and the linear call sites it is added to.

    Field names, defaults and meanings are those of `peft.LoraConfig`. An adapter of a layer with `in` inputs and `out`
    outputs has `A [r, in]` and `B [out, r]`.

    Args:
        r: Rank of the update.
        target_modules: Module names (exact, or the end of a path after a dot), a regular expression that must match a
            whole path, `"all-linear"`, or None for PEFT's choice for the model's type.
        exclude_modules: Modules to leave out of `target_modules`: names as there, or a regular expression.
        lora_alpha: Numerator of the scale `lora_alpha / r`.
        lora_dropout: Probability with which an adapter input is zeroed in training, in `[0, 1)`.
        fan_in_fan_out: Whether the weights are stored `[in, out]`, as in transformers' `Conv1D`. It is determined from
            the layers themselves, and only kept for PEFT's file format.
        bias: Which biases train: `"none"`, `"all"`, or `"lora_only"` for those of the adapted layers.
        use_rslora: Whether the scale is `lora_alpha / sqrt(r)`.
        modules_to_save: Modules that train as a whole, each adapter with its own copy.
        init_lora_weights: True starts with `B` zero, so that nothing changes, `"gaussian"` too, with `A` drawn from a
            normal distribution of standard deviation `1/r`; False draws `B` at random as well.
        layers_to_transform: Layer index or indices to adapt; None or an empty list adapts all.
        layers_pattern: Name or names of the container whose children `layers_to_transform` counts.
        rank_pattern: `r` of the layers that a key names, where it differs: by whole path, by the end of a path after a
            dot, or by a regular expression for such an end. The first key that matches counts.
        alpha_pattern: `lora_alpha` of such layers.
        task_type: PEFT's task type. It adds the task's head to `modules_to_save`, as PEFT does.
        base_model_name_or_path: The model that the adapter belongs to.
        revision: Revision of that model.
        inference_mode: Whether the adapter was saved for inference.
        use_dora: Whether the norms of the weights' rows train too: `LoraConfig(use_dora=True)` is a `DoraConfig`.
        base_quantization: How that model was quantized when the adapter was trained, as returned by
            `BaseQuantization.to_dict`; None if it was not, or if that is unknown. None is not saved, and PEFT ignores
            the field.
        target_parameters: Names of parameters to adapt (exact, or the end of a name after a dot), such as stacked
            matrices `"moe.down_proj"`: those that are no module's `weight` to name by `target_modules`.
        alora_invocation_tokens: Token ids whose last occurrence in a row activates the adapter (activated LoRA); a row
            without them runs the base. None for an adapter that acts on every token.

    Raises:
        ConfigError: A field has an invalid value, or two fields contradict each other.

    Example:
        >>> LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).scale
        2.0
    """

    r: int = 8
    target_modules: set[str] | str | None = None
    exclude_modules: set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    use_dora: bool = False
    base_quantization: Any = None
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None

    PEFT_TYPE = "LORA"
    TITLE = "LoRA"
    BIAS_MODES = ("none", "all", "lora_only")
    ADAPTED_BIASES = "lora_only"
    PATTERNS: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {
        "rank_pattern": partial(check_integer, least=1),
        "alpha_pattern": check_number,
    }
    PATTERN_OF: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    SIZE_FIELDS = ("r", "lora_alpha", "use_rslora", *PATTERNS)
    DROPOUT = "lora_dropout"
    SAVED_IF_USED = ("use_dora", "base_quantization", "target_parameters", "alora_invocation_tokens")
    _FORMS: ClassVar[dict[str, type[LoraConfig]]] = {}  # by the field that selects one

    def __init_subclass__(cls, asked_for_by: str | None = None, **kwargs: Any) -> None:
        """Register a form of LoRA by the field that selects it."""
        super().__init_subclass__(**kwargs)
        if asked_for_by is not None:
            LoraConfig._FORMS[asked_for_by] = cls

    @classmethod
    def form_of(cls, fields: Mapping[str, Any]) -> type[Self]:
        """Return the form that the fields select, since PEFT has one class for all forms.

        Args:
            fields: Arguments by name.
        """
        from gralora_fx.core.methods.registry import known_methods

        known_methods()  # importing their modules registers their forms
        form: type[Any] = next((form for name, form in cls._FORMS.items() if fields.get(name) is True), cls)
        return form if issubclass(form, cls) else cls

    @property
    def scale(self) -> float:
        """Factor of the adapter's output, unless a pattern overrides it."""
        return self.scale_of(self.r, self.lora_alpha)

    def scale_of(self, r: int, alpha: float) -> float:
        """Return `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.

        Args:
            r: The rank of a layer's adapter.
            alpha: Its `lora_alpha`.
        """
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def check_sizes(self) -> None:
        """Check the sizes, the scale and the dropout.

        Raises:
            ConfigError: One has an invalid value.
        """
        check_integer("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        check_flag("use_rslora", self.use_rslora)
        check_tokens(self.alora_invocation_tokens, self.target_parameters)
        for name, form in self._FORMS.items():
            if not isinstance(self, form) and getattr(self, name) is not False:
                raise ConfigError(
                    f"{name} must be False, or True in LoraConfig({name}=True) itself, but got "
                    f"{shown(getattr(self, name))} in {an(type(self).__name__)}"
                )
        if not any(self.init_lora_weights is value or self.init_lora_weights == "gaussian" for value in _INITIAL):
            raise ConfigError(
                f"init_lora_weights must be True, False or 'gaussian', but got {shown(self.init_lora_weights)}; "
                "prepare other forms with PEFT, and load what it saves"
            )

    @classmethod
    def translate(cls, fields: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
        """Return the fields with PEFT's other spellings, and its other initializations, in terms of this class.

        Args:
            fields: The fields.
            origin: Their source, for messages.

        Raises:
            ConfigError: The initial tensors were computed from the base's weights, which then changed.
        """
        kept = {**fields, **{name: {} for name in cls.PATTERNS if fields.get(name, {}) is None}}
        initial = kept.get("init_lora_weights", True)
        if isinstance(initial, str):
            if initial.lower().startswith(_CHANGE_THE_BASE):
                raise ConfigError(
                    f"{origin}: init_lora_weights={shown(initial)} took part of the base's weights into the adapter, "
                    "so that it does not fit the base as it is; save it with PEFT's "
                    "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it plain LoRA"
                )
            if initial.lower() in _LEAVE_THE_BASE:
                warn_caller(
                    f"{origin}: init_lora_weights={shown(initial)} concerns a fresh adapter only and is read as True"
                )
                kept["init_lora_weights"] = True
            elif initial.lower() == "gaussian":
                kept["init_lora_weights"] = "gaussian"
        return {**kept, "use_dora": bool(kept.get("use_dora"))}


class LoraSizes(NamedTuple):
    """Sizes of a LoRA adapter: its rank."""

    r: int


class LoraFactors(NamedTuple):
    """Tensors of a LoRA adapter at one site."""

    A: Tensor  # `[r, in]`
    B: Tensor  # `[out, r]`

    @property
    def features(self) -> tuple[int, int]:
        """Widths `in` and `out` of the layer."""
        return self.A.shape[-1], self.B.shape[-2]

    @property
    def grid(self) -> int:
        """One block: the whole weight."""
        return 1

    @property
    def is_zero(self) -> bool:
        """True if the update is zero because a factor is, as before training."""
        return not (bool(self.A.any()) and bool(self.B.any()))

    def products(self, rows: slice, columns: slice, shape: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pair whose product is the unscaled update on a block."""
        yield self.B[rows], self.A[:, columns]

    def lora_form(self) -> tuple[Tensor, Tensor]:
        """Return the tensors themselves."""
        return self.A, self.B


class Lora(SummableMethod):
    """The LoRA method, including rsLoRA."""

    config = LoraConfig
    tensors = LoraFactors
    keys = {"A": "lora_A.weight", "B": "lora_B.weight"}  # noqa: RUF012  # typed in the base class
    NESTS_PARAMETERS = True
    RUNS_ON_NUMPY = True

    def sizes(self, config: LoraConfig, value_of: Callable[[str], Any]) -> tuple[LoraSizes, float]:
        """Return rank and scale of the adapter at a site."""
        r = value_of("r")
        return LoraSizes(r), config.scale_of(r, value_of("lora_alpha"))

    def shapes(self, in_features: int, out_features: int, sizes: LoraSizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors at a layer."""
        return {"A": (sizes.r, in_features), "B": (out_features, sizes.r)}

    def initial(self, features: tuple[int, int], sizes: LoraSizes, config: LoraConfig, **_: Any) -> LoraFactors:
        """Return new tensors, drawn as in `peft.tuners.lora`: one seed gives the same tensors."""
        return self.initial_of_stack(features, sizes, config, 1)

    def initial_of_stack(
        self, features: tuple[int, int], sizes: LoraSizes, config: LoraConfig, stack: int, /, **_: Any
    ) -> LoraFactors:
        """Return new tensors for stacked matrices, with PEFT's draws."""
        from torch import nn

        # PEFT makes two linear layers, whose initial draws are those of `init_lora_weights=False`, and draws A again
        rank = sizes.r * stack
        A, B = nn.Linear(features[0], rank, bias=False).weight, nn.Linear(rank, features[1], bias=False).weight
        A, B = A.detach(), B.detach()
        if config.init_lora_weights is True:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        elif config.init_lora_weights:
            nn.init.normal_(A, std=1 / sizes.r)
        if config.init_lora_weights:
            nn.init.zeros_(B)
        return LoraFactors(A, B)

    def forward(
        self, call: LayerCall, factors: LoraFactors, scale: float, *, sizes: LoraSizes, dropout: float = 0.0
    ) -> Tensor:
        """Return `y + scale * x @ A.T @ B.T` (see `add_low_rank`)."""
        from gralora_fx.core.methods.low_rank import add_low_rank

        return add_low_rank(call, factors.A, factors.B, scale, dropout=dropout)

    def new_weight(
        self, weight: Tensor, factors: LoraFactors, scale: float, *, stack: int | None = None, **_: Any
    ) -> Tensor:
        """Return `weight + scale * B @ A`."""
        import torch

        if stack is not None:
            return torch.baddbmm(weight, factors.B, factors.A, alpha=scale)
        return torch.add(weight, torch.mm(factors.B, factors.A), alpha=scale)

    def stored_shapes(
        self, in_features: int, out_features: int, sizes: LoraSizes, stack: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors as stored; for a stack `A [stack * r, in]` and `B [out, r * stack]`."""
        return self.shapes(in_features, out_features, LoraSizes(sizes.r * (stack or 1)))

    def of_stack(self, factors: LoraFactors, stack: int) -> LoraFactors:
        """Return `A [stack, r, in]` and `B [stack, out, r]`; in PEFT's tensors the stack is first in A, last in B."""
        A, B = factors
        rows, columns = A.shape[0] // stack, A.shape[1]
        return LoraFactors(A.reshape(stack, rows, columns), moved(B.reshape(-1, rows, stack), -1, 0))

    def text(self, sizes: LoraSizes) -> str:
        """Return the sizes in words, such as `r=8`."""
        return f"r={sizes.r}"

    def from_lora_form(self, A: Tensor, B: Tensor) -> LoraFactors:
        """Return these tensors, whose update is `B @ A`."""
        return LoraFactors(A, B)

    def config_of(self, config: LoraConfig, rank: int) -> LoraConfig:
        """Return a configuration with this rank at every layer and scale 1, and the other fields of a given one."""
        patterns: dict[str, Any] = {name: {} for name in LoraConfig.PATTERNS}
        return config.changed(r=rank, lora_alpha=rank, use_rslora=False, **patterns)
