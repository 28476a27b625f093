"""A saved adapter whose tensors stay in the file: its sites come from the header, tensors are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.base.sources.same_base import is_embedding
from gralora_fx.core.adapters.adapter_files import SAVED_COPY, current_key, modules_of, read_files, recorded_parameters
from gralora_fx.core.adapters.agreement import KnownLayers, check_agreement, warn_of_unused
from gralora_fx.core.adapters.parameter_keys import names_of_parameters, names_parameter, parameters_in
from gralora_fx.core.adapters.saved_embeddings import training
from gralora_fx.core.config import CONFIG_NAME, AdapterConfig
from gralora_fx.core.config.checks import KEY_PREFIX, pattern_key
from gralora_fx.core.methods import AdapterMethod, AdapterTensors, Sizes, Update, method_of
from gralora_fx.core.methods.arrays import to_torch
from gralora_fx.core.planning.targets import ends_with, trains_whole_at
from gralora_fx.errors import CheckpointError, an, bulleted, command, listed, option

_ORIGINAL = ".original_module."  # the base's values of a saved module, which PEFT repeats where all biases train


@dataclass(frozen=True)
class StoredSite:
    """An adapter's tensors at one site, in their file."""

    tensors: Mapping[str, StoredTensor]  # each tensor, by its field in the method's named tuple
    features: tuple[int, int]  # the layer's widths, `in` and `out`
    sizes: Sizes  # the adapter's sizes there
    scale: float  # factor of its update
    stack: int | None = None  # number of matrices in the parameter; None for a single one
    key: str = ""  # prefix of its keys; not the site's name if PEFT's keys have only the order of a module's parameters


@dataclass(frozen=True)
class StoredAdapter:
    """A saved adapter, open for reading."""

    directory: Path
    config: AdapterConfig  # its configuration
    method: AdapterMethod
    sites: Mapping[str, StoredSite]  # its sites by module path or parameter name, sorted
    copies: Mapping[str, StoredTensor]  # trained parameters (`modules_to_save`, biases) by their names in the base
    # the base's own values that PEFT saves beside an adapter, by their names in the base
    repeats: Mapping[str, StoredTensor]
    others: Mapping[str, StoredTensor]  # every tensor that belongs to no site, by its key in the file
    # tensors of parameters whose names are not in the file, by the path in their keys and field
    unnamed: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """Names of adapted parameters outside linear layers, as far as they are known."""
        return [path for path in self.sites if self.is_at_parameter(path)]

    @property
    def layers(self) -> dict[str, StoredSite]:
        """The sites that are linear layers, by path."""
        return {path: site for path, site in self.sites.items() if not self.is_at_parameter(path)}

    def features_of(self, tensors: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """Return the widths in and out of a site's matrices, from its tensors' shapes."""
        return _without_values(self.method, tensors).features

    def is_at_parameter(self, path: str) -> bool:
        """Return whether a site is a parameter outside linear layers, such as a stack of matrices."""
        return self.sites[path].stack is not None or any(
            ends_with(path, n) for n in self.config.target_parameters or ()
        )

    def named(self, parameters: Sequence[str]) -> StoredAdapter:
        """Return the adapter with its parameters named, given the base's parameters."""
        if not self.unnamed:
            return self
        problems: list[str] = []
        sites = dict(self.sites)
        modules = parameters_in(self.unnamed, self.config)
        for path, name in names_of_parameters(modules, self.config, parameters).items():
            if name is None:
                problems.append(f"{path}: the base has no such module with the parameters of target_parameters")
            elif site := _site(name, self.unnamed[path], self.config, self.method, problems, key=path):
                sites[_path_of(name, site)] = site
        _check(self.directory, problems)
        return replace(self, sites=dict(sorted(sites.items())), unnamed={})

    def with_own_embeddings(self, is_of_base: Callable[[str, StoredTensor], bool | None]) -> StoredAdapter:
        """Return the adapter with those of its saved embeddings that a base does not hold as trained parameters.

        Those that the base holds are left out; those that cannot be compared (None) stay among the repeats.
        """
        of_base = {
            name: is_of_base(name, tensor)
            for name, tensor in self.repeats.items()
            if is_embedding(name) and name.rpartition(".")[0] not in self.sites
        }
        own = {name: self.repeats[name] for name, is_same in of_base.items() if is_same is False}
        repeats = {name: tensor for name, tensor in self.repeats.items() if of_base.get(name) is None}
        config = training(self.config, own, self.directory)
        return replace(self, config=config, copies={**self.copies, **own}, repeats=repeats)

    def without(self, paths: Container[str]) -> StoredAdapter:
        """Return the adapter without the updates and trained parameters of some layers."""
        sites = {path: site for path, site in self.sites.items() if path not in paths}
        copies = {name: tensor for name, tensor in self.copies.items() if name.rpartition(".")[0] not in paths}
        repeats = {name: tensor for name, tensor in self.repeats.items() if name.rpartition(".")[0] not in paths}
        return replace(self, sites=sites, copies=copies, repeats=repeats)

    def check_no_parameters(self, purpose: str, error: type[Exception]) -> None:
        """Raise if it adapts parameters other than the weights of linear layers."""
        if self.unnamed or self.parameters:  # keys may have only the module; the configuration has its parameters
            names = self.parameters if not self.unnamed else self.config.target_parameters or list(self.unnamed)
            raise error(
                f"{self.directory} adapts parameters of the model's own code ({listed(list(names), 2)}), such as "
                f"stacked matrices, and {purpose} is for linear layers; merge it (export the model merged, "
                f"{option(adapters='merged')}, or write its files with {command('merge_checkpoint')}), or train "
                "without target_parameters, which PEFT itself fills for target_modules='all-linear' of an MoE model"
            )

    def update(self, path: str) -> Update:
        """Read the weight update at a site, as numpy arrays, or as tensors for a method that needs them."""
        site = self.sites[path]
        arrays: dict[str, Any] = {field: tensor.array() for field, tensor in site.tensors.items()}
        if not self.method.RUNS_ON_NUMPY:
            arrays = {field: to_torch(array) for field, array in arrays.items()}
        factors = self.method.tensors(**arrays)
        if site.stack is not None:
            factors = self.method.of_stack(factors, site.stack)
        return Update(factors, site.scale, site.stack)

    def check_layers(self, known: KnownLayers) -> None:
        """Check that exactly the layers of a model that the configuration selects have tensors."""
        check_agreement(self.config, self.sites, self.directory, known, trained=modules_of(self.others))


@contextmanager
def open_adapter(directory: str | Path, *, revision: str | None = None) -> Iterator[StoredAdapter]:
    """Open a saved adapter of any method; its base is not needed."""
    path, config, layout = read_files(directory, lambda layout: layout, revision=revision)
    method = method_of(config)
    problems = [
        f"{key} is {tensor.dtype}, not a float tensor"
        for key, tensor in layout.tensors.items()
        if tensor.dtype not in FLOATS
    ]
    _check(path, problems)
    _check_kinds(path, layout.tensors)
    keys = {key: current_key(key) for key in layout.tensors}
    layout = replace(layout, tensors={new: replace(layout.tensors[key], key=new) for key, new in keys.items()})
    with layout.opened() as opened:
        found, others = _by_site(opened.tensors, method)
        names: dict[str, str | None] = {}
        if config.target_parameters and method.NESTS_PARAMETERS:
            modules = parameters_in(found, config)
            names = names_of_parameters(modules, config, recorded_parameters(layout, config))
        sites: dict[str, StoredSite] = {}
        for key in sorted(found):
            if (name := names.get(key, key)) is not None:
                if entry := _site(name, found[key], config, method, problems, key=key):
                    sites[_path_of(name, entry)] = entry
        unnamed = {key: found[key] for key, name in names.items() if name is None}
        copies, repeats = _copies(others, config, found, problems)
        if not found and not problems:
            problems.append(f"no tensor of {an(config.TITLE)} adapter")
        _check(path, problems)
        if not unnamed:
            check_agreement(config, sites, path, trained=modules_of(others))
            warn_of_unused(config, sites, str(path))
        problems += [
            f"{key} holds values that are not finite"
            for key, tensor in opened.tensors.items()
            if not tensor.is_finite()
        ]
        _check(path, problems)
        yield StoredAdapter(path, config, method, dict(sorted(sites.items())), copies, repeats, others, unnamed)


def _check(path: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            f"the tensors of {path} cannot be used with its {CONFIG_NAME}; copy or save the adapter again:\n"
            f"{bulleted(problems)}"
        )


def _check_kinds(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise if an adapter is at an embedding or a convolution, whose tensors in PEFT have other names or shapes."""
    kinds = {
        key.removeprefix(KEY_PREFIX).partition(".lora_")[0]: "an embedding" if embedding else "a convolution"
        for key, tensor in tensors.items()
        if (embedding := ".lora_embedding_" in key) or (".lora_A." in key and len(tensor.shape) > 2)
    }
    if kinds:
        raise CheckpointError(
            f"{path} adapts {listed([f'{kind} ({layer})' for layer, kind in kinds.items()])}, and only linear layers "
            "are supported; merge the adapter with PEFT (merge_and_unload) and use the merged model, or train without "
            "these layers"
        )


def _by_site(
    tensors: Mapping[str, StoredTensor], method: AdapterMethod
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """Return a file's tensors by site and field, and those that belong to no site by key."""
    sites: dict[str, dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(KEY_PREFIX)
        field = next((field for field, end in method.keys.items() if name.endswith(f".{end}")), None)
        if field is None or name == key:
            others[key] = tensor
        else:
            sites.setdefault(name.removesuffix(f".{method.keys[field]}"), {})[field] = tensor
    return sites, others


def _path_of(name: str, site: StoredSite) -> str:
    """Return a site's path: a parameter's name, or the layer whose weight it is."""
    return name.removesuffix(".weight") if site.stack is None else name


def _site(
    path: str,
    tensors: Mapping[str, StoredTensor],
    config: AdapterConfig,
    method: AdapterMethod,
    problems: list[str],
    *,
    key: str,
) -> StoredSite | None:
    """Return a site with the sizes of the configuration; None, with the problems noted, if its tensors do not fit."""

    def value_of(field: str) -> Any:
        pattern: Mapping[str, Any] = getattr(config, config.PATTERN_OF.get(field, ""), {})
        match = pattern_key(pattern, path)
        return getattr(config, field) if match is None else pattern[match]

    sizes, scale = method.sizes(config, value_of)
    expected = method.shapes(0, 0, sizes)  # only the fields and the numbers of dimensions matter
    unfit = [f"missing {KEY_PREFIX}{key}.{method.keys[field]}" for field in expected if field not in tensors]
    unfit += [f"unexpected {KEY_PREFIX}{key}.{method.keys[field]}" for field in tensors if field not in expected]
    if not unfit:
        unfit = method.problems(0, 0, sizes)
    stack = None if unfit or not names_parameter(config, path) else _stack(tensors, expected, method)
    stored = method.stored_shapes(0, 0, sizes, stack)
    if not unfit and all(len(tensors[field].shape) == len(shape) for field, shape in stored.items()):
        features = _without_values(method, tensors).features
        stored = method.stored_shapes(*features, sizes, stack)
        if all(tensors[field].shape == shape for field, shape in stored.items()):
            return StoredSite(tensors, features, sizes, scale, stack, key)
    shapes = ", ".join(f"{method.keys[field]} {list(tensor.shape)}" for field, tensor in tensors.items())
    problems += unfit or [f"{path} has {shapes}, which is not {method.text(sizes)}"]
    return None


def _stack(
    tensors: Mapping[str, StoredTensor], of_one: Mapping[str, tuple[int, ...]], method: AdapterMethod
) -> int | None:
    """Return the number of matrices that a parameter's tensors adapt; None for a single one."""
    name, shape = next(iter(of_one.items()))
    if not method.NESTS_PARAMETERS:
        return tensors[name].shape[0] if len(tensors[name].shape) > len(shape) else None
    count = tensors[name].shape[0] // max(1, shape[0])
    return count if count > 1 else None


def _without_values(method: AdapterMethod, tensors: Mapping[str, StoredTensor]) -> AdapterTensors:
    empty = np.zeros((), np.float32)
    return method.tensors(**{field: np.broadcast_to(empty, tensor.shape) for field, tensor in tensors.items()})


def _copies(
    others: Mapping[str, StoredTensor], config: AdapterConfig, sites: Iterable[str], problems: list[str]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return trained copies of base parameters, and repeats of the base's values, by the base's names."""
    copies: dict[str, StoredTensor] = {}
    repeats: dict[str, StoredTensor] = {}
    layers = set(sites)
    for key, tensor in others.items():
        name = key.removeprefix(KEY_PREFIX)
        module, _, last = name.rpartition(".")
        layer, _, inner = module.rpartition(".")
        if name == key or not module:
            problems.append(f"unexpected {key}")
        elif inner == "base_layer" and layer in layers:
            is_trained = last == "bias" and (config.bias == "all" or config.trains_adapted_biases)
            (copies if is_trained else repeats)[f"{layer}.{last}"] = tensor
        elif _ORIGINAL in name:  # of a saved module itself, or of a layer within it
            repeats[name.replace(_ORIGINAL, ".", 1)] = tensor
        elif trains_whole_at(module, config.saved_module_names) or (last == "bias" and config.bias == "all"):
            copies[SAVED_COPY.sub(".", name.replace(".modules_to_save.bias", ".bias"), count=1)] = tensor
        elif is_embedding(name):
            repeats[name] = tensor
        else:
            problems.append(f"unexpected {key}")
    return copies, {name: tensor for name, tensor in repeats.items() if name not in copies}
