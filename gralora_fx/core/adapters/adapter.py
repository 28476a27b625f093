"""One adapter of a rewritten model: its tensors in the module tree, and how it is inserted into a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gralora_fx.base.sources import ACTING
from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.core.adapters.insert_adapter import InsertAdapter, Insertion
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.config.checks import KEY_PREFIX
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.graph.surgery import ROOT, container_at
from gralora_fx.core.methods import AdapterMethod, AdapterTensors, Update, first_tensor, method_of
from gralora_fx.core.planning.rewrite_plan import PlannedSite, RewritePlan
from gralora_fx.errors import RewriteError

if TYPE_CHECKING:
    from gralora_fx.base.sources.same_base import BaseComparison

_Entry = TypeVar("_Entry")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ModelAdapter:
    """An adapter whose tensors are owned by a module tree, and are looked up there at every access."""

    name: str
    plan: RewritePlan  # the sites and modules that it adapts
    factors: FactorTable  # its trainable tensors as they are stored, by site path
    # its own copies of base parameters (`modules_to_save`, trained biases), by module path, then by the base
    # parameter's full name
    copies: Mapping[str, CopyTable]
    # how the base compared with the one that it was made for, if it was read from a file
    base: BaseComparison | None = None

    def __repr__(self) -> str:
        return f"ModelAdapter({self.name!r}, {self.plan!r})"

    @classmethod
    def create(
        cls,
        root: nn.Module,
        name: str,
        plan: RewritePlan,
        tree: ModuleTree,
        initial: Mapping[str, AdapterTensors] | None = None,
    ) -> ModelAdapter:
        """Register an adapter's tensors, given or new, in the tree; over a half-precision layer they are float32."""
        method = method_of(plan.config)
        paths: dict[str, dict[str, str]] = {}
        tensors: dict[str, Tensor] = {}
        for planned in plan.selected:
            site_path = planned.site.path
            factors = _initial(planned, method, plan.config) if initial is None else initial[site_path]
            paths[site_path] = factor_paths(name, site_path, method, factors)
            tensors |= {path: getattr(factors, field) for field, path in paths[site_path].items()}
        copies: dict[str, list[str]] = {}
        for module in plan.saved_modules:
            copies[module] = [base for base in tree.parameters if base.startswith(f"{module}.")]
        for bias in plan.trained_biases:
            owned = copies.setdefault(bias.rpartition(".")[0], [])
            owned += [bias] if bias not in owned else []
        with torch.inference_mode(False):  # a parameter made in inference mode never trains
            for owned in copies.values():
                copied: dict[int, nn.Parameter] = {}  # one copy of a parameter with two names in a module, as in PEFT
                for base in owned:
                    original = tree.parameters[base]
                    if id(original) not in copied:
                        copied[id(original)] = nn.Parameter(values_of(original, base).clone())
                    tensors[copy_path(name, base)] = copied[id(original)]
            for path, tensor in tensors.items():
                own = tensor.clone() if tensor.is_inference() else tensor
                put(root, path, own if isinstance(own, nn.Parameter) else nn.Parameter(own))
        tables = {module: CopyTable(root, {b: copy_path(name, b) for b in owned}) for module, owned in copies.items()}
        return cls(name, plan, FactorTable(root, method, paths), tables)

    @property
    def config(self) -> AdapterConfig:
        """Its configuration."""
        return self.plan.config

    @property
    def method(self) -> AdapterMethod:
        """Its method."""
        return self.factors.method

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every trainable tensor with its attribute path in the tree."""
        for path in self.factors.attributes():
            yield path, self.factors.tensor(path)
        for owned in self.copies.values():
            for base, parameter in owned.items():
                yield copy_path(self.name, base), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every trainable parameter; for a parametrization, its originals rather than its result."""
        yield from self.factors.container(self.name).parameters()

    @property
    def is_zero(self) -> bool:
        """True if the adapter has no effect: all updates are zero, as before training, and it copies no parameter."""
        return not self.copies and all(factors.is_zero for factors in self.factors.values())

    def update(self, site_path: str) -> Update:
        """Return the weight update at a site."""
        planned, factors = self.planned[site_path], self.factors[site_path]
        if planned.stack is not None:
            factors = self.method.of_stack(factors, planned.stack)
        return Update(factors, planned.scale, planned.stack)

    def gradients(self, site_path: str) -> dict[str, Tensor | None]:
        """Return the gradients of a site's tensors by field of the method's named tuple, None for a missing one."""
        fields = self.factors[site_path]._asdict().items()
        return {field: tensor.grad for field, tensor in fields if tensor is not None and tensor.is_leaf}

    @cached_property
    def planned(self) -> dict[str, PlannedSite]:
        """The adapted sites by path."""
        return {planned.site.path: planned for planned in self.plan.selected}

    def over(self, sites: Mapping[str, LinearSite], root: nn.Module) -> ModelAdapter:
        """Return the same adapter for another module tree that owns its tensors, with that tree's sites."""
        selected = tuple(dataclasses.replace(p, site=sites[p.site.path]) for p in self.plan.selected)
        rejected = tuple(dataclasses.replace(r, site=sites[r.site.path]) for r in self.plan.rejected)
        plan = dataclasses.replace(self.plan, selected=selected, rejected=rejected)
        copies = {module: CopyTable(root, owned.paths) for module, owned in self.copies.items()}
        return ModelAdapter(self.name, plan, FactorTable(root, self.method, self.factors.paths), copies, self.base)

    def insertion(self) -> InsertAdapter:
        """Return the pass that inserts the adapter into a graph."""
        insertions = []
        for planned in self.plan.selected:
            site, dtype = planned.site, first_tensor(self.factors[planned.site.path]).dtype
            own_dtype = dtype if dtype != site.weight.dtype else None
            insertions.append(Insertion(site, self.factors.paths[site.path], planned.sizes, planned.scale, own_dtype))
        acting = None
        if self.config.acts_from:
            from gralora_fx.core.adapters.acting_tokens import acting_of

            acting = acting_of(self.config)
        return InsertAdapter(self.name, self.method, tuple(insertions), self.config.dropout, acting)

    def everywhere(self) -> ModelAdapter:
        """Return the adapter set to act on all tokens."""
        if not self.config.acts_from:
            return self
        plan = dataclasses.replace(self.plan, config=self.config.changed(**{ACTING: None}))
        return dataclasses.replace(self, plan=plan)

    def requires_grad_(self, requires_grad: bool) -> None:
        """Set whether its tensors require gradients."""
        self.factors.container(self.name).requires_grad_(requires_grad)


def _initial(planned: PlannedSite, method: AdapterMethod, config: AdapterConfig) -> AdapterTensors:
    site = planned.site
    device = None if site.weight.is_meta else site.weight.device
    dtype = torch.float32 if site.weight.dtype in _HALF else site.weight.dtype

    def weight() -> Tensor:
        values = values_of(site.weight, site.path)
        return values.mT if site.is_transposed else values

    features, sizes, scale = (site.in_features, site.out_features), planned.sizes, planned.scale
    if planned.stack is None:
        drawn = method.initial(features, sizes, config, weight=weight, scale=scale)
    else:
        drawn = method.initial_of_stack(features, sizes, config, planned.stack, weight=weight, scale=scale)
    return method.tensors(*(None if tensor is None else tensor.to(device, dtype) for tensor in drawn))


class _Table(Mapping[str, _Entry]):
    """Tensors of a module tree by key; pickle and copies omit the tree, and the owner rebuilds the table."""

    def __init__(self, root: nn.Module, paths: Mapping[str, Any]) -> None:
        """Map each key to attribute paths in the tree that owns the tensors."""
        self.paths = paths
        self._root = root

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_root", "_last")}

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __contains__(self, key: object) -> bool:
        """Return whether a key exists, without reading its tensors."""
        return key in self.paths


class FactorTable(_Table[AdapterTensors]):
    """An adapter's tensors by site path."""

    # attribute paths in the tree, by site path and field of the method's named tuple
    paths: Mapping[str, Mapping[str, str]]

    def __init__(self, root: nn.Module, method: AdapterMethod, paths: Mapping[str, Mapping[str, str]]) -> None:
        """Map each site to attribute paths in the tree that owns the tensors."""
        super().__init__(root, paths)
        self.method = method  # the adapter's method
        self._last: dict[str, AdapterTensors] = {}

    def __getitem__(self, site_path: str) -> AdapterTensors:
        factors = self.method.tensors(**{field: self.tensor(path) for field, path in self.paths[site_path].items()})
        last = self._last.get(site_path)
        if last is None or any(a is not b for a, b in zip(last, factors, strict=True)):
            self._last[site_path] = last = factors
        return last

    def attributes(self) -> Iterator[str]:
        """Yield the attribute path of every tensor."""
        for paths in self.paths.values():
            yield from paths.values()

    def tensor(self, path: str) -> Tensor:
        """Return the tensor at an attribute path."""
        return tensor_in(self._root, path)

    def container(self, adapter: str) -> nn.Module:
        """Return the module that contains all of an adapter's tensors, copies of base parameters included."""
        return self._root.get_submodule(f"{ROOT}.{adapter}")

    def owners(self, site_path: str) -> Iterator[tuple[nn.Module, str]]:
        """Yield the modules that own a site's tensors, each with the tensor's attribute name."""
        for path in self.paths[site_path].values():
            owner, _, name = path.rpartition(".")
            yield self._root.get_submodule(owner), name


class CopyTable(_Table[nn.Parameter]):
    """An adapter's own copies of a module's parameters, by the base parameters' full names."""

    paths: Mapping[str, str]  # attribute paths of the copies in the tree, by the same names

    def __getitem__(self, base: str) -> nn.Parameter:
        return tensor_in(self._root, self.paths[base])  # type: ignore[return-value]


def tensor_in(root: nn.Module, path: str) -> Tensor:
    """Return the tensor at an attribute path of a module tree; for a parametrization, its result."""
    *owners, name = path.split(".")
    module = root
    for owner in owners:
        module = module._modules[owner]  # type: ignore[assignment]
    tensor: Tensor = getattr(module, name)
    return tensor


def adapter_names(names: object) -> list[str]:
    """Return one adapter name or several as a list."""
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, (list, tuple, set, frozenset, dict)) or not all(isinstance(name, str) for name in listed):
        raise RewriteError(f"expected the name of an adapter or a list of names, but got {names!r}")
    return list(listed)


# -- attribute paths: `gralora.<adapter>.<site path>.gralora_A` and so on ------------------------------------------


def put(root: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Register a parameter at a dotted path, creating missing modules."""
    owner, _, attribute = path.rpartition(".")
    container_at(root, owner).register_parameter(attribute, parameter)


def drop(root: nn.Module, adapter: str) -> None:
    """Remove all of an adapter's tensors from the tree."""
    adapters = root._modules.get(ROOT)
    if adapters is not None:
        adapters._modules.pop(adapter, None)
        if not adapters._modules:
            del root._modules[ROOT]


def factor_paths(adapter: str, site_path: str, method: AdapterMethod, factors: AdapterTensors) -> dict[str, str]:
    """Return attribute paths for an adapter's tensors at a site, by field of the method's named tuple."""
    present = {field for field, tensor in factors._asdict().items() if tensor is not None}
    return {field: f"{ROOT}.{adapter}.{site_path}.{name}" for field, name in method.names().items() if field in present}


def copy_path(adapter: str, name: str) -> str:
    """Return the attribute path of an adapter's copy of the base parameter `name`."""
    return f"{ROOT}.{adapter}.{name}"


def checkpoint_parameters(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Return an adapter's trainable tensors by the keys of PEFT's file."""
    parameters: dict[str, Tensor] = {}
    keys = _keys_of_parameters(adapter)
    for site_path, factors in adapter.factors.items():
        for field, tensor in factors._asdict().items():
            if tensor is not None:
                parameters[f"{KEY_PREFIX}{keys.get(site_path, site_path)}.{adapter.method.keys[field]}"] = tensor
    for module, owned in adapter.copies.items():
        for base, parameter in owned.items():
            is_layers_own = module in adapter.factors and base == f"{module}.bias"
            name = f"{module}.base_layer.bias" if is_layers_own else base
            parameters[f"{KEY_PREFIX}{name}"] = parameter
    return parameters


def _keys_of_parameters(adapter: ModelAdapter) -> dict[str, str]:
    """Return the prefixes of PEFT's keys for an adapter's parameters, by parameter name."""
    names = [p.site.path for p in adapter.plan.selected if p.site.kind == "parameter"]
    if not names:
        return {}
    from gralora_fx.core.adapters.parameter_keys import parameter_keys

    return parameter_keys(names, nests=adapter.method.NESTS_PARAMETERS)
