"""PEFT's rules for which modules a configuration names, over module paths alone."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.config.checks import ANY_CONTAINER, CONTAINER, SAVED_MODULE, fullmatch, match, within
from gralora_fx.errors import TargetError

if TYPE_CHECKING:
    from gralora_fx.core.graph.module_tree import ModuleTree  # it imports torch, which the rules by path do without

_SEQ_CLS_HEADS = ("score", "classifier")  # the order in which PEFT looks for a head

# PEFT's choice where `target_modules` is None, by transformers' model type.
_Q_AND_V = ("q_proj", "v_proj")
_DEFAULTS: Mapping[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("bart", "opt", "gpt_neo", "gptj", "stablelm"), _Q_AND_V),
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3"), _Q_AND_V),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _Q_AND_V),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "chatglm", "falcon", "gpt_neox", "RefinedWeb", "RefinedWebModel"), ("query_key_value",)),
    "blip-2": ("q", "v", *_Q_AND_V),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": (*_Q_AND_V, "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}


@dataclass(frozen=True)
class TargetRule:
    """A configuration's choice of modules, resolved for one model."""

    # names to match exactly or as the end of a path; empty with a pattern or `all-linear`
    names: frozenset[str] = frozenset()
    pattern: str | None = None  # regular expression that a whole path must match, or None
    all_linear: bool = False  # whether every linear layer is selected
    left_out: Mapping[str, str] = field(default_factory=dict)  # paths that `all-linear` leaves out, with the reason
    excluded: frozenset[str] = frozenset()  # names of `exclude_modules`, matched like `names`
    excluded_pattern: str | None = None  # regular expression of `exclude_modules`, or None
    saved: tuple[str, ...] = ()  # names of `modules_to_save`, which are never adapted
    indices: frozenset[int] | None = None  # layer indices to select, or None for all
    layer_patterns: tuple[str, ...] = ()  # containers whose children are counted; empty for any

    def rejection(self, path: str, *, is_linear_layer: bool = True) -> str | None:
        """Return why the module at `path` is not selected, or None if it is."""
        if self.is_excluded(path):
            return "exclude_modules names it"
        for name in self.saved:
            if match(within(SAVED_MODULE, name), path):
                return f"it belongs to modules_to_save ({name})"
        if not self.is_named(path):
            return "target_modules does not name it"
        if self.all_linear:
            if path in self.left_out:
                return self.left_out[path]
            if not is_linear_layer:
                return "it is a functional call, which all-linear leaves out; name it to adapt it"
        if self.indices is None or not self._is_counted(path):
            return None
        index = self.layer_index(path)
        if index is None:
            return "its path has no layer index, and layers_to_transform is set"
        return None if index in self.indices else f"layer {index} is not in layers_to_transform"

    def is_named(self, path: str) -> bool:
        """Return whether the names, the pattern or `all-linear` cover a path, whatever its layer."""
        if self.all_linear:
            return True
        if self.pattern is not None:
            return fullmatch(self.pattern, path)
        return any(ends_with(path, name) for name in self.names)

    def is_excluded(self, path: str) -> bool:
        """Return whether `exclude_modules` covers a path."""
        if self.excluded_pattern is not None:
            return fullmatch(self.excluded_pattern, path)
        return any(ends_with(path, name) for name in self.excluded)

    def layer_index(self, path: str) -> int | None:
        """Return the layer index of a path: its first number below a (matching) container."""
        for container in self.layer_patterns or (None,):
            if (index := counts_below(container, path)) is not None:
                return index
        return None

    def _is_counted(self, path: str) -> bool:
        """Return whether the layer filter applies: PEFT selects a path that is named in full whatever its layer."""
        return self.all_linear or path not in self.names


def counts_below(container: str | None, path: str) -> int | None:
    """Return the layer index of a path below a container (None: any), by PEFT's expressions; None if there is none."""
    layer = match(ANY_CONTAINER if container is None else within(CONTAINER, container), path)
    return None if layer is None else int(layer["index"])


def resolve_targets(config: AdapterConfig, tree: ModuleTree, model_type: str | None) -> TargetRule:
    """Resolve a configuration's targets for one model."""
    if config.target_modules is None and (model_type or "") not in _DEFAULTS and not config.target_parameters:
        raise TargetError(
            f"target_modules is None and no default is known for model type {model_type!r}; name the modules, "
            f"for example {_examples(tree)}, or take 'all-linear'"
        )
    rule = rule_of(config, model_type)
    return dataclasses.replace(rule, left_out=_left_out(config, tree)) if rule.all_linear else rule


def rule_of(config: AdapterConfig, model_type: str | None) -> TargetRule:
    """Return a configuration's targets by paths alone; `all-linear` still includes the head, which needs the model."""
    targets = config.target_modules
    if targets is None:
        default = _DEFAULTS.get(model_type or "", ())
        targets = default if isinstance(default, str) else set(default)
    is_pattern = isinstance(targets, str) and not config.adapts_all_linear
    excluded = config.exclude_modules
    return TargetRule(
        names=frozenset() if isinstance(targets, str) else frozenset(targets),
        pattern=str(targets) if is_pattern else None,
        all_linear=config.adapts_all_linear,
        excluded=frozenset() if isinstance(excluded, str) else frozenset(excluded or ()),
        excluded_pattern=excluded if isinstance(excluded, str) else None,
        saved=config.saved_module_names,
        indices=None if is_pattern else config.layer_indices,
        layer_patterns=config.layer_patterns,
    )


def exact_targets(paths: Iterable[str], tree: ModuleTree) -> set[str] | str:
    """Return `target_modules` for exactly these paths: a set, or an expression if a path is also the end of another."""
    targets = set(paths)
    if any(ends_with(other, path) for path in targets for other in tree.types if other not in targets):
        return "|".join(re.escape(path) for path in sorted(targets))
    return targets


def unmatched_names(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the names that match no path, sorted."""
    remaining = list(paths)
    return sorted(name for name in names if not any(ends_with(path, name) for path in remaining))


def nearest_names(name: str, paths: Iterable[str]) -> list[str]:
    """Return up to three module names similar to a misspelt one."""
    candidates: dict[str, None] = {}
    for path in paths:
        candidates.setdefault(path.rpartition(".")[2])
        if "." in name:
            candidates.setdefault(path)
    return difflib.get_close_matches(name, [c for c in candidates if not c.isdigit()], n=3, cutoff=0.4)


def numbered_containers(paths: Iterable[str]) -> list[str]:
    """Return names of the containers whose children are numbered, sorted."""
    names = {match[1] for path in paths if (match := re.match(r"(?:.*?\.)?([^.]+)\.\d+(?:\.|$)", path))}
    return sorted(names)


def saved_modules(config: AdapterConfig, tree: ModuleTree) -> tuple[str, ...]:
    """Return paths of the modules that `modules_to_save` selects, by PEFT's bare `endswith`, outermost first."""
    outermost: list[str] = []
    for path in tree.types:
        if path and any(path.endswith(name) for name in config.saved_module_names):
            if not any(path.startswith(f"{outer}.") for outer in outermost):
                outermost.append(path)
    return tuple(outermost)


def trains_whole_at(path: str, names: Iterable[str]) -> bool:
    """Return whether a module is, or lies in, one that `modules_to_save` selects by PEFT's bare `endswith`."""
    parts = path.split(".")
    outer = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(module.endswith(name) for module in outer for name in names)


def ends_with(path: str, name: str) -> bool:
    """Return whether a name is a path, or its end after a dot."""
    return path == name or path.endswith(f".{name}")


def _left_out(config: AdapterConfig, tree: ModuleTree) -> dict[str, str]:
    if tree.output_embedding is not None:
        return {tree.output_embedding: "it is the output embedding, which all-linear leaves out; name it to adapt it"}
    if config.task_type == "SEQ_CLS":
        for head in _SEQ_CLS_HEADS:
            if head in tree.types:
                return {head: "it is the classification head, which all-linear leaves out; name it to adapt it"}
    return {}


def _examples(tree: ModuleTree) -> str:
    names = dict.fromkeys(path.rpartition(".")[2] for path in tree.types if path in tree.linear)
    return str([name for name in names if not name.isdigit()][:4])
