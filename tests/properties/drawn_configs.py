"""Configurations that fit a drawn model, and any valid ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from drawn_nets import ALPHAS, Case
from hypothesis import strategies as st

from gralora_fx import GraloraConfig, GraloraModel, LinearSite, TracedModel, plan, rewrite


def names_for(site: LinearSite, base: TracedModel) -> list[str]:
    """Return the names by which a configuration can name a site in full."""
    return [site.path, *(base.tree.names_of(site.weight) if site.kind == "functional" else ())]


def ends(path: str) -> list[str]:
    """Return a path and what follows each of its dots."""
    parts = path.split(".")
    return [".".join(parts[index:]) for index in range(len(parts))]


def ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def common_divisors(sites: Iterable[LinearSite]) -> list[int]:
    width = math.gcd(*(size for site in sites for size in (site.in_features, site.out_features)))
    return [k for k in (2, 3, 1, 4, 6, 8) if width % k == 0]


@st.composite
def targets(draw: st.DrawFn, base: TracedModel) -> tuple[set[str] | str, list[str]]:
    """`target_modules` of some kind, and the paths of the sites that it means."""
    sites = [site for site in base.sites if site.in_features > 0]
    all_paths = {*base.tree.types, *(name for site in sites for name in names_for(site, base))}
    layers = [site.path for site in sites if site.kind != "functional"]
    form = draw(st.sampled_from(["names", "regex", "all-linear"]))
    if form == "all-linear" and layers and base.config is None:
        return draw(st.sampled_from(["all-linear", "All-Linear"])), layers
    if form == "regex":
        chosen = draw(st.lists(st.sampled_from([site.path for site in sites]), min_size=1, max_size=3, unique=True))
        return "|".join(re.escape(path) for path in chosen), [site.path for site in sites if site.path in chosen]
    known = {name: site.path for site in sites for name in names_for(site, base)}
    candidates = dict.fromkeys(end for name in known for end in ends(name))
    valid = [name for name in candidates if {path for path in all_paths if ends_with(path, name)} <= set(known)]
    chosen = draw(st.lists(st.sampled_from(valid), min_size=1, max_size=3, unique=True))
    meant = {known[path] for path in known for name in chosen if ends_with(path, name)}
    return set(chosen), [site.path for site in sites if site.path in meant]


def counting_key(keys: Iterable[str], names: list[str]) -> str | None:
    """Return the key that counts for a site: one of its names, else the first that matches the end of one."""
    for name in names:
        if name in keys:
            return name
        for key in keys:
            if re.fullmatch(rf"(.*\.)?({key})", name):
                return key
    return None


@st.composite
def groups(
    draw: st.DrawFn, selected: list[LinearSite], base: TracedModel, within_peft: bool
) -> dict[str | None, list[LinearSite]]:
    """Sites by the key of a pattern that counts for them, None where none does; every key counts for one at least."""
    candidates = dict.fromkeys(end for site in selected for end in ends(site.path))
    candidates |= dict.fromkeys(f".*{site.path[-2:]}" for site in selected)
    keys = draw(st.lists(st.sampled_from(list(candidates)), max_size=0 if within_peft else 3, unique=True))
    while True:
        by_key: dict[str | None, list[LinearSite]] = {key: [] for key in keys}
        for site in selected:
            by_key.setdefault(counting_key(keys, names_for(site, base)), []).append(site)
        if all(by_key.values()):
            return by_key
        keys = [key for key in keys if by_key[key]]


@st.composite
def sizes(draw: st.DrawFn, selected: list[LinearSite], base: TracedModel, within_peft: bool = False) -> dict[str, Any]:
    """`r`, `gralora_k` and `alpha` with their patterns, so that every width and rank is divisible."""
    by_k = draw(groups(selected, base, within_peft), label="sites by gralora_k")
    ks = {key: draw(st.sampled_from(common_divisors(sites))) for key, sites in by_k.items()}
    k_of = {site.path: ks[key] for key, sites in by_k.items() for site in sites}
    k = ks.pop(None) if None in ks else draw(st.sampled_from([1, 2]))
    by_r = draw(groups(selected, base, within_peft), label="sites by r")
    rs = {key: draw(st.integers(1, 3)) * math.lcm(*(k_of[site.path] for site in sites)) for key, sites in by_r.items()}
    r = math.lcm(rs.pop(None) if None in rs else 1, k)
    by_alpha = draw(groups(selected, base, within_peft), label="sites by alpha")
    return {
        "r": r,
        "gralora_k": k,
        "hybrid_r": draw(st.sampled_from([0, 0, 1, 3])),
        "alpha": draw(ALPHAS),
        "rank_pattern": rs,
        "gralora_k_pattern": ks,
        "alpha_pattern": {key: draw(ALPHAS) for key in by_alpha if key is not None},
    }


@st.composite
def exclusions(draw: st.DrawFn, paths: list[str]) -> tuple[set[str] | str | None, list[str]]:
    """`exclude_modules` that leaves out some of the paths but not all, and the paths that stay."""
    excluded = draw(st.one_of(st.just([]), st.lists(st.sampled_from(paths), max_size=len(paths) - 1, unique=True)))
    kept = [path for path in paths if path not in excluded]
    if any(ends_with(path, name) for path in kept for name in excluded) or not excluded:
        return None, paths
    return (set(excluded) if draw(st.booleans()) else "|".join(map(re.escape, excluded))), kept


def savable(base: TracedModel, kept: list[str]) -> list[str]:
    """Names that `modules_to_save` can take: modules whose parameters are their own and which a graph can replace."""
    calls = {str(node.target) for node in base.graph_module.graph.find_nodes(op="call_module")}
    names = []
    for path in base.tree.types:
        own = [parameter for name, parameter in base.tree.parameters.items() if name.startswith(f"{path}.")]
        is_shared = any(
            not all(name.startswith(f"{path}.") for name in base.tree.names_of(parameter)) for parameter in own
        )
        saved = [other for other in base.tree.types if path and other.endswith(path)]
        inside = [name for name in kept if any(f"{name}.".startswith(f"{other}.") for other in saved)]
        reaches = any(f"{call}.".startswith(f"{other}.") for call in calls for other in saved)
        if path and own and not is_shared and len(inside) < len(kept) and not reaches:
            names.append(path)
    return names


@st.composite
def configs(
    draw: st.DrawFn, base: TracedModel, *, with_copies: bool = True, within_peft: bool = False
) -> GraloraConfig:
    """Return a valid configuration for a model, of PEFT's fields alone if wanted."""
    named, paths = draw(targets(base), label="targets")
    excluded, kept = (None, paths) if within_peft else draw(exclusions(paths), label="excluded and kept")
    fields: dict[str, Any] = {"target_modules": named, "exclude_modules": excluded}
    if with_copies:
        candidates = savable(base, kept)
        saved = draw(st.one_of(st.none(), st.sampled_from(candidates))) if candidates else None
        if saved is not None:
            whole = [path for path in base.tree.types if path.endswith(saved)]
            kept = [path for path in kept if not any(f"{path}.".startswith(f"{module}.") for module in whole)]
            fields["modules_to_save"] = [saved]
        has_calls = bool(base.graph_module.graph.find_nodes(op="call_module"))
        modes = ["none", "gralora_only"] if has_calls else ["none", "gralora_only", "all"]
        fields["bias"] = draw(st.sampled_from(modes))
    fields["fan_in_fan_out"] = any(site.kind == "conv1d" for site in base.sites if site.path in kept)
    if base.config is not None:  # what transformers adds to the rules is tested elsewhere: ask what is selected
        kept = [planned.site.path for planned in plan(base, GraloraConfig(r=1, gralora_k=1, **fields)).selected]
    selected = [site for site in base.sites if site.path in kept]
    fields |= draw(sizes(selected, base, within_peft))
    fields["gralora_dropout"] = draw(st.sampled_from([0.0, 0.1]))
    fields["init_weights"] = draw(st.booleans())
    return GraloraConfig(**fields)


@st.composite
def adapted(draw: st.DrawFn, case: Case, within_peft: bool = False) -> GraloraModel:
    """Return a rewritten model whose adapter and copies differ from their initial values."""
    return trained(rewrite(case.traced, draw(configs(case.traced, within_peft=within_peft), label="config")))


def trained(model: GraloraModel, adapter_name: str = "default", seed: int = 3) -> GraloraModel:
    """Move an adapter's tensors and copies, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter(adapter_name).named_parameters():
            parameter += (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def compiles(expression: str) -> bool:
    """Return whether it is an expression, by itself and as a part of one."""
    try:
        re.compile(expression)
        re.compile(f"(?:.*){expression}")
    except re.error:
        return False
    return True


NAMES = st.text(min_size=1, max_size=6)
EXPRESSIONS = st.one_of(st.sampled_from(["z.fc", "fc", r".*\.q_proj", "é"]), NAMES.filter(compiles))
OPTIONAL_TEXT = st.one_of(st.none(), st.text(max_size=6))
POSITIVE = st.one_of(st.integers(1, 10**6), st.floats(0, 1e300, exclude_min=True))


def patterns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Dicts whose order is drawn too, for the first key that matches counts."""
    return st.lists(st.tuples(EXPRESSIONS, values), max_size=4).map(dict)


@st.composite
def free_configs(draw: st.DrawFn) -> GraloraConfig:
    """Any valid configuration, for a model or for none."""
    k = draw(st.integers(1, 16))
    targets = draw(st.one_of(st.none(), st.sets(NAMES, min_size=1, max_size=4), NAMES.filter(compiles)))
    is_regex = isinstance(targets, str)
    if not is_regex:
        targets = draw(st.sampled_from([targets, "all-linear", "ALL-linear"]))
    layers = None if is_regex else draw(st.one_of(st.none(), st.integers(0, 99), st.lists(st.integers(0, 99))))
    layers_pattern = draw(st.one_of(st.none(), EXPRESSIONS, st.lists(EXPRESSIONS, max_size=2)))
    return GraloraConfig(
        r=k * draw(st.integers(1, 64)),
        gralora_k=k,
        hybrid_r=draw(st.integers(0, 64)),
        alpha=draw(POSITIVE),
        gralora_dropout=draw(st.floats(0, 1, exclude_max=True)),
        target_modules=targets,
        exclude_modules=draw(st.one_of(st.none(), st.sets(NAMES, max_size=3), st.text(max_size=6).filter(compiles))),
        bias=draw(st.sampled_from(["none", "all", "gralora_only"])),
        modules_to_save=draw(st.one_of(st.none(), st.lists(EXPRESSIONS, max_size=3))),
        init_weights=draw(st.booleans()),
        fan_in_fan_out=draw(st.booleans()),
        inference_mode=draw(st.booleans()),
        layers_to_transform=layers,
        layers_pattern=None if layers in (None, []) else layers_pattern,
        task_type=draw(st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"])),
        base_model_name_or_path=draw(OPTIONAL_TEXT),
        revision=draw(OPTIONAL_TEXT),
        rank_pattern=draw(patterns(st.integers(1, 512))),
        alpha_pattern=draw(patterns(POSITIVE)),
        gralora_k_pattern=draw(patterns(st.integers(1, 16))),
    )
