"""The base class of all methods' configurations: PEFT's fields for targets, layers and biases, with their checks."""

from __future__ import annotations

import copy
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gralora_fx.base.sources import ACTING
from gralora_fx.core.config.checks import (
    ALL_LINEAR,
    CONFIG_NAME,
    CONTAINER,
    SAVED_MODULE,
    check_expression,
    check_expressions,
    check_integer,
    check_names,
    check_parameters,
    check_pattern,
)
from gralora_fx.errors import ConfigError, shown

if TYPE_CHECKING:
    from gralora_fx.base.sources.same_base import BaseSource

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# The heads that PEFT adds to `modules_to_save` for a task.
_HEADS = ("classifier", "score")
_TASK_HEADS = {"SEQ_CLS": _HEADS, "TOKEN_CLS": _HEADS, "QUESTION_ANS": ("qa_outputs",)}


class AdapterConfig(ABC):
    """The configuration of an adapter of any method: a frozen dataclass with at least the fields below.

    A subclass lists its fields in PEFT's order, names those that set its sizes, and checks its own in `check_sizes`.

    Attributes:
        PEFT_TYPE: PEFT's name of the method, as in the files.
        TITLE: The method's name in texts.
        BIAS_MODES: Values of `bias`.
        ADAPTED_BIASES: The value of `bias` that trains only the biases of adapted layers.
        PATTERNS: Fields that give a size by the path of a layer, with the check of each value.
        PATTERN_OF: The pattern field that overrides a field, by that field's name.
        SIZE_FIELDS: Fields without which an adapter's tensors have no meaning: sizes and scale.
        BEYOND_PEFT: Fields that PEFT does not have; saved only if used.
        SAVED_IF_USED: Other fields that are saved only if used.
        DROPOUT: Name of the field for the dropout.
    """

    PEFT_TYPE: ClassVar[str]
    TITLE: ClassVar[str]
    BIAS_MODES: ClassVar[tuple[str, ...]] = ("none",)
    ADAPTED_BIASES: ClassVar[str] = ""
    PATTERNS: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {}
    PATTERN_OF: ClassVar[Mapping[str, str]] = {}
    SIZE_FIELDS: ClassVar[tuple[str, ...]]
    BEYOND_PEFT: ClassVar[tuple[str, ...]] = ()
    SAVED_IF_USED: ClassVar[tuple[str, ...]] = ()
    DROPOUT: ClassVar[str]
    saves_embeddings: ClassVar[bool] = False  # of its file, as PEFT's does where a vocabulary was resized

    target_modules: set[str] | str | None
    exclude_modules: set[str] | str | None
    fan_in_fan_out: bool
    bias: str
    modules_to_save: list[str] | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    inference_mode: bool
    base_quantization: Any = None  # a field only of methods that list it
    target_parameters: list[str] | None = None  # as the field before it

    def __new__(cls, *_: Any, **fields: Any) -> Self:
        """Create an object of the class that the fields select (see `form_of`)."""
        form = cls.form_of(fields)
        known = [entry.name for entry in dataclasses.fields(form)]  # type: ignore[arg-type]
        if not fields.keys() <= set(known):
            from gralora_fx.core.config.foreign_fields import check_keywords

            check_keywords(fields, known, form.__name__)
        return super().__new__(form)

    @classmethod
    def form_of(cls, fields: Mapping[str, Any]) -> type[Self]:
        """Return the class that fields select: this one, or a subclass where PEFT has one class for several."""
        return cls

    def __post_init__(self) -> None:
        """Convert collections to the types of PEFT's file, then check every field."""
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, (list, tuple, set, frozenset)):
                check_names(name, names)
                object.__setattr__(self, name, set(names))
        for name, kinds in (("layers_to_transform", (tuple, range, set, frozenset)), ("layers_pattern", (tuple,))):
            if isinstance(getattr(self, name), kinds):
                object.__setattr__(self, name, list(getattr(self, name)))
        for name in ("modules_to_save", "target_parameters"):
            if isinstance(names := getattr(self, name), (tuple, set, frozenset)):
                object.__setattr__(self, name, sorted(names))
        if self.base_quantization is not None:
            from gralora_fx.base.sources.base_quantization import BaseQuantization

            object.__setattr__(self, "base_quantization", BaseQuantization.of(self.base_quantization).to_dict())
        self.check_sizes()
        self._check_choices()
        self._check_targets()
        self._check_layers()
        for name, check_value in self.PATTERNS.items():
            check_pattern(name, getattr(self, name), check_value)

    @property
    def made_for(self) -> BaseSource:
        """The base that the adapter was made for, as far as it is named."""
        from gralora_fx.base.sources.same_base import BaseSource

        name, record = self.base_model_name_or_path, self.base_quantization
        return BaseSource(name, self.revision, record=record, is_resized=self.saves_embeddings)

    @abstractmethod
    def check_sizes(self) -> None:
        """Check the fields of the method itself.

        Raises:
            ConfigError: A field has an invalid value.
        """

    @classmethod
    def describes(cls, fields: Mapping[str, Any]) -> bool:
        """Return whether the fields of a file are those of an adapter of this method."""
        return str(fields.get("peft_type")).upper() == cls.PEFT_TYPE

    @classmethod
    def translate(cls, fields: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
        """Return a file's fields in terms of this class, if another program or another form of the method wrote them.

        Args:
            fields: The fields.
            origin: Their source, for messages.

        Raises:
            ConfigError: This class cannot express what they mean.
        """
        return fields

    @property
    def peft_type(self) -> str:
        """PEFT's name for the method."""
        return self.PEFT_TYPE

    @property
    def dropout(self) -> float:
        """Probability of zeroing an adapter's input value in training."""
        return getattr(self, self.DROPOUT)  # type: ignore[no-any-return]

    @property
    def trains_adapted_biases(self) -> bool:
        """True if exactly the biases of the adapted layers train."""
        return self.bias == self.ADAPTED_BIASES

    @property
    def acts_from(self) -> tuple[int, ...]:
        """The token ids whose last occurrence in a row activates the adapter; empty if it acts on all tokens."""
        return tuple(getattr(self, ACTING, None) or ())

    @property
    def used_patterns(self) -> list[str]:
        """The non-empty fields that give sizes by path."""
        return [name for name in self.PATTERNS if getattr(self, name)]

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields that give the tensors their meaning, which names and shapes alone do not."""
        return {name: getattr(self, name) for name in self.SIZE_FIELDS}

    @property
    def adapts_all_linear(self) -> bool:
        """True if `target_modules` is the shorthand for every linear layer."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    @property
    def layer_indices(self) -> frozenset[int] | None:
        """The indices of `layers_to_transform`, or None if it is not set."""
        if (layers := self.layers_to_transform) is None or layers == []:
            return None
        return frozenset([layers] if isinstance(layers, int) else layers)

    @property
    def layer_patterns(self) -> tuple[str, ...]:
        """The names in `layers_pattern`; empty if any container counts."""
        patterns = self.layers_pattern
        return (patterns,) if isinstance(patterns, str) and patterns else tuple(patterns or ())

    @property
    def saved_module_names(self) -> tuple[str, ...]:
        """`modules_to_save` with the heads that `task_type` adds, as PEFT adds them."""
        return tuple(dict.fromkeys([*(self.modules_to_save or ()), *self.task_heads]))

    @property
    def task_heads(self) -> tuple[str, ...]:
        """The names that PEFT adds to `modules_to_save` for the task type; a model has one of them."""
        return _TASK_HEADS.get(self.task_type or "", ())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `adapter_config.json` in PEFT's format, keys and sets sorted; an older file is replaced atomically.

        Args:
            directory: The directory, created if it does not exist.

        Raises:
            ConfigError: It cannot be written.
        """
        from gralora_fx.base.sources.atomic_save import save_together

        save_together(directory, {"": {CONFIG_NAME: self.write_json}}, ConfigError)

    def write_json(self, path: Path) -> None:
        """Write the text of PEFT's `adapter_config.json` into a file."""
        path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Return the text of PEFT's `adapter_config.json`, keys and sets sorted."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}  # type: ignore[arg-type]
        optional = {*self.BEYOND_PEFT, *self.SAVED_IF_USED}
        fields = {name: value for name, value in values.items() if value or name not in optional}
        fields["peft_type"] = self.peft_type
        for name in ("target_modules", "exclude_modules"):
            if isinstance(fields.get(name), set):
                fields[name] = sorted(fields[name])
        # the keys of a pattern keep their order, since the first match counts
        return json.dumps(dict(sorted(fields.items())), indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, revision: str | None = None) -> Self:
        """Read `adapter_config.json` from a directory or a hub repository.

        A file that PEFT wrote keeps PEFT's meaning; a combination that PEFT ignores is dropped with a warning.

        Args:
            directory: Local directory or hub id.
            revision: Revision of the hub repository.

        Raises:
            ConfigError: There is no such file, it is not a JSON object, or it is a configuration of another method.
        """
        from gralora_fx.core.config.reading import config_fields

        return cls.from_fields(*config_fields(directory, revision=revision))

    @classmethod
    def from_peft(cls, peft_config: Any) -> Self:
        """Convert a live object of PEFT's class of the same name, without importing peft.

        Args:
            peft_config: The PEFT object.

        Raises:
            ConfigError: It is a configuration of another method, or of none.
        """
        from gralora_fx.core.config.reading import peft_fields

        return cls.from_fields(*peft_fields(peft_config, f"a peft.{cls.__name__}"))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], origin: str) -> Self:
        """Build a configuration from a file's fields, with their meaning in PEFT (or in the paper's code).

        Args:
            fields: The fields.
            origin: Their source, for messages.

        Raises:
            ConfigError: They are a configuration of another method, or cannot be used.
        """
        from gralora_fx.core.config.reading import read_as

        config: Self = read_as(cls, fields, origin)
        return config

    def changed(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, unchecked: the constructor may refuse values that PEFT wrote."""
        config = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(config, name, value)
        return config

    def _check_choices(self) -> None:
        if self.bias not in self.BIAS_MODES:
            raise ConfigError(f"bias must be one of {', '.join(self.BIAS_MODES)}, but got {shown(self.bias)}")
        if (task := self.task_type) is not None and task not in TASK_TYPES:
            raise ConfigError(f"task_type must be one of {', '.join(TASK_TYPES)} or None, but got {shown(task)}")
        for name in ("fan_in_fan_out", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, but got {shown(getattr(self, name))}")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name} must be a string or None, but got {shown(getattr(self, name))}")

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not value and name == "target_modules" and not self.target_parameters:
                raise ConfigError("target_modules is empty; name modules, or take 'all-linear'")
            if isinstance(value, str) and not (name == "target_modules" and self.adapts_all_linear):
                check_expression(name, value)
            elif value is not None and not isinstance(value, (str, set)):
                raise ConfigError(f"{name} must be a list of names, a string or None, but got {shown(value)}")
        check_parameters(self.target_parameters, self.DROPOUT, self.dropout)
        if (saved := self.modules_to_save) is not None:
            if not isinstance(saved, list):
                raise ConfigError(f"modules_to_save must be a list of names or None, but got {shown(saved)}")
            check_names("modules_to_save", saved)
            check_expressions("modules_to_save", saved, SAVED_MODULE)

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
