"""`plan`: a configuration held against the sites of a model, before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from gralora_fx.adapter import Rank, parameter_count
from gralora_fx.config import GraloraConfig
from gralora_fx.errors import TargetError
from gralora_fx.sites import LinearSite
from gralora_fx.targets import (
    TargetRule,
    nearest_names,
    numbered_containers,
    resolve_targets,
    saved_modules,
    unmatched_names,
)
from gralora_fx.tracing.traced import TracedModel


@dataclass(frozen=True)
class PlannedSite:
    """A site that gets an adapter.

    Attributes:
        site: The site.
        r: Rank of its blocks.
        k: Blocks in each direction.
        hybrid_r: Rank of the plain LoRA beside them.
    """

    site: LinearSite
    r: int
    k: int
    hybrid_r: int

    @property
    def rank(self) -> Rank:
        """The adapter's sizes."""
        return Rank(self.r, self.k, self.hybrid_r)

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        return parameter_count(self.site.in_features, self.site.out_features, self.rank)


@dataclass(frozen=True)
class RejectedSite:
    """A site that is left as it is, and why."""

    site: LinearSite
    reason: str


@dataclass(frozen=True)
class RewritePlan:
    """What a rewrite will do.

    Attributes:
        config: The configuration.
        selected: The sites that get an adapter.
        rejected: Every other site, with the reason.
        saved_modules: Paths of the modules that train as copies.
        saved_parameters: Number of values of those copies.
        trained_biases: Names of the biases that train as copies, by the path of their module.
        base_parameters: Number of values of the base model.
    """

    config: GraloraConfig
    selected: tuple[PlannedSite, ...]
    rejected: tuple[RejectedSite, ...]
    saved_modules: tuple[str, ...]
    saved_parameters: int
    trained_biases: tuple[str, ...]
    bias_parameters: int
    base_parameters: int

    @property
    def trainable_parameters(self) -> int:
        """Number of values that will train."""
        return sum(planned.parameters for planned in self.selected) + self.saved_parameters + self.bias_parameters

    @property
    def total_parameters(self) -> int:
        """Number of values of the rewritten model: the base's and those added."""
        return self.base_parameters + self.trainable_parameters

    def __str__(self) -> str:
        """A table: every site, its shape, its ranks or the reason it is left."""
        rows = [("site", "kind", "in", "out", "calls", "adapter")]
        taken = {planned.site.path: f"r={planned.r} k={planned.k}" for planned in self.selected}
        hybrid = {planned.site.path: f" hybrid_r={planned.hybrid_r}" for planned in self.selected if planned.hybrid_r}
        reasons = {rejected.site.path: f"- {rejected.reason}" for rejected in self.rejected}
        sites = [planned.site for planned in self.selected] + [rejected.site for rejected in self.rejected]
        for site in sites:
            note = taken.get(site.path, reasons.get(site.path, "")) + hybrid.get(site.path, "")
            sizes = (str(site.in_features), str(site.out_features), str(len(site.calls)))
            rows.append((site.path, site.kind, *sizes, note))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if column in (0, 1) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=False))
            )
            + f"  {row[5]}"
            for row in rows
        ]
        lines += [f"trains a copy of {path}" for path in self.saved_modules]
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines.append(
            f"{len(self.selected)} of {len(sites)} sites adapted; trainable parameters: "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} ({share:.2f} %)"
        )
        return "\n".join(lines)


def plan(traced: TracedModel, config: GraloraConfig) -> RewritePlan:
    """Decide for every site whether it gets an adapter; nothing is changed.

    Args:
        traced: A traced model.
        config: What to adapt.

    Returns:
        The plan; printing it shows every site and, for those left out, the reason.

    Raises:
        TargetError: The configuration cannot be met: nothing matches, a named module is no linear layer, widths are
            not divisible by `gralora_k`, or no layer of `layers_to_transform` exists. Every problem is listed.
    """
    if not isinstance(traced, TracedModel):
        raise TargetError(f"cannot plan for a {type(traced).__name__}; give what trace() returned")
    if not isinstance(config, GraloraConfig):
        raise TargetError(f"expected a GraloraConfig, but got a {type(config).__name__}; see GraloraConfig.from_peft")
    rule = resolve_targets(config, traced.tree, getattr(traced.config, "model_type", None))
    sites = {site.path: site for site in traced.sites}
    saved = saved_modules(config, traced.tree)
    rejected = [
        RejectedSite(site, reason)
        for path, site in sites.items()
        if (reason := rule.rejection(path, is_linear_layer=site.kind != "functional") or _trains_whole(path, saved))
    ]
    left = {entry.site.path for entry in rejected}
    rank = Rank(config.r, config.gralora_k, config.hybrid_r)
    selected = tuple(PlannedSite(site, *rank) for path, site in sites.items() if path not in left)
    problems = [*_missing(rule, traced, sites, saved), *_unsupported(rule, traced, sites), *_indivisible(selected)]
    if problems:
        raise TargetError(_joined(problems))
    _warn_of_gaps(rule, config, traced, sites)
    rejected += [RejectedSite(site, _EXPERTS) for site in _expert_weights(traced)]
    biases = _trained_biases(config, traced, selected)
    parameters = {id(p): p for p in traced.tree.parameters.values()}
    copied = {id(p): p for path in saved for p in _parameters_under(traced, path).values()}
    trained = {id(p): p for name in biases if (p := traced.tree.parameters[name]) is not None}
    return RewritePlan(
        config=config,
        selected=selected,
        rejected=tuple(rejected),
        saved_modules=saved,
        saved_parameters=sum(p.numel() for p in copied.values()),
        trained_biases=biases,
        bias_parameters=sum(p.numel() for key, p in trained.items() if key not in copied),
        base_parameters=sum(p.numel() for p in parameters.values()),
    )


_EXPERTS = "its weight has 3 dimensions, one matrix for each expert; GraLoRA adapts linear layers of 2"


def _trains_whole(path: str, saved: Iterable[str]) -> str | None:
    """Why a site inside a saved module gets no adapter: `modules_to_save` selects by the end of a name."""
    module = next((module for module in saved if path == module or path.startswith(f"{module}.")), None)
    return None if module is None else f"{module} trains as a whole, since modules_to_save selects it"


def _missing(rule: TargetRule, traced: TracedModel, sites: dict[str, LinearSite], saved: Iterable[str]) -> list[str]:
    """Problems of a rule that reaches no module at all."""
    paths = [path for path in dict.fromkeys([*traced.tree.types, *sites]) if path]
    named = [path for path in paths if rule.is_named(path)]
    if not named or (rule.all_linear and not sites):
        if rule.pattern is not None:
            names = dict.fromkeys(path.rpartition(".")[2] for path in sites)
            return [
                f"target_modules {rule.pattern!r} matches no whole module path; the linear layers are called "
                f"{', '.join(names) or 'nothing: the model has none'}"
            ]
        return [_no_match(name, paths) for name in sorted(rule.names)] or ["the model has no linear layer to adapt"]
    reasons = {rule.rejection(path) or _trains_whole(path, saved) for path in named}
    if None not in reasons:
        if rule.indices is not None and not rule.indices & _existing_layers(rule, named):
            return [_no_layer(rule, named)]
        return [f"every module that target_modules names is left out: {'; '.join(sorted(filter(None, reasons)))}"]
    return []


def _no_match(name: str, paths: Iterable[str]) -> str:
    near = nearest_names(name, paths)
    hint = f"nearest names: {', '.join(near)}" if near else "print(traced.sites) lists the linear layers"
    return f"target_modules {name!r} matches no module; {hint}"


def _no_layer(rule: TargetRule, named: list[str]) -> str:
    existing = sorted(_existing_layers(rule, named))
    asked = sorted(rule.indices or ())
    if existing:
        return f"layers_to_transform {asked} names no layer that exists; there are {_ranges(existing)}"
    containers = ", ".join(numbered_containers(named)) or "none"
    return (
        f"layers_to_transform {asked} with layers_pattern {list(rule.layer_patterns) or None} finds no numbered "
        f"layers; the containers with numbered children are: {containers}"
    )


def _existing_layers(rule: TargetRule, named: Iterable[str]) -> set[int]:
    return {index for path in named if (index := rule.layer_index(path)) is not None}


def _ranges(indices: list[int]) -> str:
    if not indices:
        return "none"
    return f"{indices[0]} to {indices[-1]}" if indices == list(range(indices[0], indices[-1] + 1)) else str(indices)


def _unsupported(rule: TargetRule, traced: TracedModel, sites: dict[str, LinearSite]) -> list[str]:
    """Modules that are named, in full or by their end, and are no linear layer."""
    if rule.all_linear:
        return []
    problems = []
    for path, kind in traced.tree.types.items():
        if path and path not in sites and rule.rejection(path) is None:
            inside = dict.fromkeys(site.removeprefix(f"{path}.") for site in sites if site.startswith(f"{path}."))
            remedy = f"name its linear layers, such as {', '.join(list(inside)[:3])}" if inside else "leave it out"
            problems.append(f"{path} is a {kind.rpartition('.')[2]}, not a linear layer; {remedy}")
    return problems


def _indivisible(selected: Iterable[PlannedSite]) -> list[str]:
    return [
        f"{planned.site.path}: in_features={planned.site.in_features}, out_features={planned.site.out_features} "
        f"must both be divisible by gralora_k={planned.k}; take another gralora_k or leave the layer out"
        for planned in selected
        if planned.site.in_features % planned.k or planned.site.out_features % planned.k
    ]


def _warn_of_gaps(rule: TargetRule, config: GraloraConfig, traced: TracedModel, sites: dict[str, LinearSite]) -> None:
    """Warn of list entries and layer indices that match nothing while others do."""
    paths = [path for path in dict.fromkeys([*traced.tree.types, *sites]) if path]
    if config.target_modules is not None:
        for name in unmatched_names(rule, paths):
            warnings.warn(_no_match(name, paths), stacklevel=4)
    if rule.indices is not None:
        named = [path for path in paths if rule.is_named(path)]
        missing = sorted(rule.indices - _existing_layers(rule, named))
        if missing:
            warnings.warn(
                f"layers_to_transform {missing} does not exist and is skipped; there are "
                f"{_ranges(sorted(_existing_layers(rule, named)))}",
                stacklevel=4,
            )


def _expert_weights(traced: TracedModel) -> list[LinearSite]:
    """Stacked expert matrices, which look like linear layers to a reader and are none."""
    found = []
    for name, parameter in traced.tree.parameters.items():
        owner = traced.tree.types.get(name.rpartition(".")[0], "")
        if parameter.ndim == 3 and parameter.shape[0] > 1 and "Conv" not in owner and "xpert" in owner:
            sizes = (parameter.shape[2], parameter.shape[1])
            found.append(LinearSite(name, "functional", *sizes, weight=parameter, bias=None, calls=()))
    return found


def _parameters_under(traced: TracedModel, path: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in traced.tree.parameters.items() if name.startswith(f"{path}.")}


def _trained_biases(config: GraloraConfig, traced: TracedModel, selected: Iterable[PlannedSite]) -> tuple[str, ...]:
    if config.bias == "all":
        return tuple(name for name in traced.tree.parameters if name.rpartition(".")[2] == "bias")
    if config.bias == "gralora_only":
        return tuple(f"{p.site.path}.bias" for p in selected if p.site.bias is not None)
    return ()


def _joined(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n" + "\n".join(f"- {p}" for p in problems)
