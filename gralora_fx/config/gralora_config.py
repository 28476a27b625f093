"""`GraloraConfig`: what to adapt and how, read from and written to PEFT's `adapter_config.json`."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gralora_fx.config.checks import check_alpha, check_integer, check_names, check_number
from gralora_fx.config.expressions import CONTAINER, END_OF_PATH, SAVED_MODULE, check_expression, check_expressions
from gralora_fx.config.reading import ALL_LINEAR, as_peft_reads, from_paper, read_fields, warn_of_unknown
from gralora_fx.errors import ConfigError, shown, warn_caller
from gralora_fx.sources.atomic_save import read_together, save_together
from gralora_fx.sources.hub import resolve_directory

CONFIG_NAME = "adapter_config.json"
BIAS_MODES = ("none", "all", "gralora_only")
_BEYOND_PEFT = ("exclude_modules", "rank_pattern", "alpha_pattern", "gralora_k_pattern")
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# What PEFT adds to `modules_to_save` for a task: the head that such a model trains.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class GraloraConfig:
    """A GraLoRA adapter: its sizes, its scale and the linear call sites it stands at.

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
        fan_in_fan_out: Whether the weights are stored `[in, out]`, as in `Conv1D`. Read from the layers themselves;
            kept for the sake of PEFT's file format.
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

    The last four go beyond PEFT's GraLoRA: they stand in the saved file only where they are used, and PEFT warns there
    that it ignores them.

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

    def __post_init__(self) -> None:
        """Turn collections into those of PEFT's file, then check every field."""
        for name in ("target_modules", "exclude_modules"):
            given = getattr(self, name)
            if isinstance(given, (list, tuple, set, frozenset)):
                check_names(name, given)
                object.__setattr__(self, name, set(given))
        if isinstance(self.layers_to_transform, (tuple, range, set, frozenset)):
            object.__setattr__(self, "layers_to_transform", list(self.layers_to_transform))
        if isinstance(self.layers_pattern, tuple):
            object.__setattr__(self, "layers_pattern", list(self.layers_pattern))
        if isinstance(self.modules_to_save, (tuple, set, frozenset)):
            object.__setattr__(self, "modules_to_save", sorted(self.modules_to_save))
        self._check_sizes()
        self._check_choices()
        self._check_targets()
        self._check_layers()
        self._check_patterns()

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method."""
        return "GRALORA"

    @property
    def scale(self) -> float:
        """Factor of the adapter's output, `alpha / (r + hybrid_r)`, where no pattern says otherwise."""
        return self.alpha / (self.r + self.hybrid_r)

    @property
    def adapts_all_linear(self) -> bool:
        """Whether `target_modules` is the shorthand for every linear layer."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    @property
    def layer_indices(self) -> frozenset[int] | None:
        """The indices of `layers_to_transform`, or None where it is off."""
        if self.layers_to_transform is None or self.layers_to_transform == []:
            return None
        given = self.layers_to_transform
        return frozenset([given] if isinstance(given, int) else given)

    @property
    def layer_patterns(self) -> tuple[str, ...]:
        """The names of `layers_pattern`; empty where any container counts."""
        given = self.layers_pattern
        return (given,) if isinstance(given, str) and given else tuple(given or ())

    @property
    def saved_module_names(self) -> tuple[str, ...]:
        """`modules_to_save` with the heads that `task_type` adds, as PEFT adds them."""
        return tuple(dict.fromkeys([*(self.modules_to_save or ()), *self.task_heads]))

    @property
    def task_heads(self) -> tuple[str, ...]:
        """The names that PEFT adds to `modules_to_save` for the task type; a model has one of them."""
        return _TASK_HEADS.get(self.task_type or "", ())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `adapter_config.json` in PEFT's format, keys and sets sorted; an older one is replaced at once.

        Args:
            directory: Where to write; made if it does not exist.

        Raises:
            ConfigError: It cannot be written.
        """
        save_together(directory, {"": {CONFIG_NAME: self.write_json}}, ConfigError)

    def write_json(self, path: Path) -> None:
        """Write the text of PEFT's `adapter_config.json` into a file."""
        path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of PEFT's `adapter_config.json`, keys and sets sorted."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        fields = {name: value for name, value in values.items() if value or name not in _BEYOND_PEFT}
        fields["peft_type"] = self.peft_type
        for name in ("target_modules", "exclude_modules"):
            if isinstance(fields.get(name), set):
                fields[name] = sorted(fields[name])
        # the keys of a pattern keep their order, for the first that matches counts
        return json.dumps(dict(sorted(fields.items())), indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, revision: str | None = None) -> GraloraConfig:
        """Read `adapter_config.json` from a directory or a hub repository.

        A file that PEFT wrote keeps PEFT's meaning; a combination that PEFT ignores is dropped with a warning. A file
        of the paper's own code (`gralora_alpha`, an `r` that includes `hybrid_r`) is converted with a warning.

        Args:
            directory: Local directory or hub id.
            revision: Revision of the hub repository.

        Raises:
            ConfigError: There is no such file, it is no JSON object, or it is not a GraLoRA configuration.
        """
        path = resolve_directory(directory, ConfigError, revision=revision, patterns=[CONFIG_NAME])
        return cls.from_fields(read_together(path, [CONFIG_NAME], read_fields), str(path / CONFIG_NAME))

    @classmethod
    def from_peft(cls, peft_config: Any) -> GraloraConfig:
        """Convert a live `peft.GraloraConfig`, without importing peft.

        Args:
            peft_config: The object that PEFT made.

        Raises:
            ConfigError: It is not a GraLoRA configuration.
        """
        if not hasattr(peft_config, "peft_type") or not hasattr(peft_config, "__dict__"):
            raise ConfigError(f"{shown(peft_config)} is no PEFT configuration; give a peft.GraloraConfig")
        if isinstance(peft_config, type):
            raise ConfigError(f"{peft_config.__name__} is a class; give an object, such as {peft_config.__name__}()")
        fields = {name: getattr(value, "value", value) for name, value in vars(peft_config).items() if name[:1] != "_"}
        fields = {"peft_type": getattr(peft_config.peft_type, "value", peft_config.peft_type), **fields}
        return cls.from_fields(fields, f"the given {type(peft_config).__name__}")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], origin: str) -> GraloraConfig:
        """The configuration that PEFT (or the paper's code) means by the fields of a file.

        Args:
            fields: The fields.
            origin: Where they come from, for messages.

        Raises:
            ConfigError: They are not a GraLoRA configuration.
        """
        peft_type = fields.get("peft_type")
        if str(peft_type).upper() != "GRALORA":
            kind = f"{shown(peft_type)} with use_dora" if fields.get("use_dora") else shown(peft_type)
            raise ConfigError(f"{origin}: peft_type is {kind}, not 'GRALORA'; give a GraLoRA adapter")
        known = {entry.name for entry in dataclasses.fields(cls)}
        absent = {name for name in _BEYOND_PEFT if fields.get(name) is None}
        values = {name: value for name, value in fields.items() if name in known - absent}
        if "gralora_alpha" in fields and "alpha" not in fields:
            values = from_paper(values, fields["gralora_alpha"], origin)
            known.add("gralora_alpha")
        warn_of_unknown(fields, known, origin)
        kept, only_in_peft, notes = as_peft_reads(values)
        for note in notes:
            warn_caller(f"{origin}: {note}")
        try:
            return cls(**kept).changed(**only_in_peft)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from error

    def changed(self, **changes: Any) -> GraloraConfig:
        """A copy with other values, which are taken as they are: what PEFT wrote may be what nobody may write anew."""
        config = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(config, name, value)
        return config

    def _check_sizes(self) -> None:
        check_integer("r", self.r, 1)
        check_integer("gralora_k", self.gralora_k, 1)
        check_integer("hybrid_r", self.hybrid_r, 0)
        if self.r % self.gralora_k:
            raise ConfigError(
                f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}; "
                f"take r={max(1, round(self.r / self.gralora_k)) * self.gralora_k} or another gralora_k"
            )
        check_alpha("alpha", self.alpha)
        check_number("gralora_dropout", self.gralora_dropout)
        if not 0 <= self.gralora_dropout < 1:
            raise ConfigError(f"gralora_dropout must be in [0, 1), but got {self.gralora_dropout}; take 0 for none")

    def _check_choices(self) -> None:
        if self.bias not in BIAS_MODES:
            raise ConfigError(f"bias must be one of {', '.join(BIAS_MODES)}, but got {shown(self.bias)}")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ConfigError(
                f"task_type must be one of {', '.join(TASK_TYPES)} or None, but got {shown(self.task_type)}"
            )
        for name in ("fan_in_fan_out", "init_weights", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, but got {shown(getattr(self, name))}")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name} must be a string or None, but got {shown(getattr(self, name))}")

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            given = getattr(self, name)
            if given is not None and not given and name == "target_modules":
                raise ConfigError("target_modules is empty; name modules, or take 'all-linear'")
            if isinstance(given, str) and not (name == "target_modules" and self.adapts_all_linear):
                check_expression(name, given)
            elif given is not None and not isinstance(given, (str, set)):
                raise ConfigError(f"{name} must be a list of names, a string or None, but got {shown(given)}")
        if self.modules_to_save is not None:
            if not isinstance(self.modules_to_save, list):
                raise ConfigError(
                    f"modules_to_save must be a list of names or None, but got {shown(self.modules_to_save)}"
                )
            check_names("modules_to_save", self.modules_to_save)
            check_expressions("modules_to_save", self.modules_to_save, SAVED_MODULE)

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is not None:
            if isinstance(layers, bool) or not isinstance(layers, (int, list)):
                raise ConfigError(
                    f"layers_to_transform must be an index, a list of them or None, but got {shown(layers)}"
                )
            for index in [layers] if isinstance(layers, int) else layers:
                check_integer("layers_to_transform", index, 0)
        pattern = self.layers_pattern
        if isinstance(pattern, list):
            check_names("layers_pattern", pattern)
        elif pattern is not None and not isinstance(pattern, str):
            raise ConfigError(f"layers_pattern must be a name, a list of names or None, but got {shown(pattern)}")
        check_expressions("layers_pattern", self.layer_patterns, CONTAINER)
        if self.layer_patterns and self.layer_indices is None:
            raise ConfigError(
                f"layers_pattern={shown(pattern)} has no effect without layers_to_transform; give the layer indices too"
            )
        is_regex = isinstance(self.target_modules, str) and not self.adapts_all_linear
        if is_regex and self.layer_indices is not None:
            raise ConfigError(
                f"layers_to_transform={shown(layers)} does not go with target_modules={shown(self.target_modules)}: a "
                "regular expression selects layers itself; write the indices into it, or give a list of names"
            )

    def _check_patterns(self) -> None:
        self._check_pattern("rank_pattern", lambda name, value: check_integer(name, value, 1))
        self._check_pattern("alpha_pattern", check_alpha)
        self._check_pattern("gralora_k_pattern", lambda name, value: check_integer(name, value, 1))

    def _check_pattern(self, field_name: str, check_value: Callable[[str, Any], None]) -> None:
        """Refuse what is not a dict from module names (or regular expressions) to valid values."""
        value = getattr(self, field_name)
        if not isinstance(value, dict):
            raise ConfigError(f"{field_name} must be a dict from module names to values, but got {shown(value)}")
        check_names(field_name, value)
        check_expressions(field_name, value, END_OF_PATH)
        for key, entry in value.items():
            check_value(f"{field_name}[{shown(key)}]", entry)
