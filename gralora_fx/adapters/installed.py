"""One adapter in a rewritten model: its tensors, and how it is inserted into a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from gralora_fx.adapters.adapter_paths import copy_path, factor_paths, put
from gralora_fx.adapters.storage import CopyTable, FactorTable
from gralora_fx.config import AdapterConfig
from gralora_fx.graph.module_tree import ModuleTree
from gralora_fx.graph.sites import LinearSite
from gralora_fx.methods import AdapterMethod, AdapterTensors, Update, first_tensor, method_of
from gralora_fx.passes.insert_adapter import InsertAdapter, Insertion
from gralora_fx.passes.redirect_parameters import RedirectParameters
from gralora_fx.planning.rewrite_plan import PlannedSite, RewritePlan
from gralora_fx.sources.lazy_tensors import values_of
from gralora_fx.sources.same_base import BaseComparison

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class InstalledAdapter:
    """An adapter whose tensors are owned by a module tree and read from there at every access.

    Attributes:
        name: The adapter's name.
        plan: What it adapts.
        factors: Its trainable tensors, by site path.
        copies: Its own copies of base parameters (of `modules_to_save`, and trained biases), by module path, then by
            the full name of the base's parameter.
        base: What was compared of the base that it was made for, if it was read from a file.
    """

    name: str
    plan: RewritePlan
    factors: FactorTable
    copies: Mapping[str, CopyTable]
    base: BaseComparison | None = None

    def __repr__(self) -> str:
        """One line without tensors."""
        return f"InstalledAdapter({self.name!r}, {self.plan!r})"

    @classmethod
    def create(
        cls,
        root: nn.Module,
        name: str,
        plan: RewritePlan,
        tree: ModuleTree,
        initial: Mapping[str, AdapterTensors] | None = None,
    ) -> InstalledAdapter:
        """Store an adapter's tensors, given ones or newly initialized ones; no graph reads them yet.

        Adapters of a half-precision layer are float32, as PEFT's are.

        Args:
            root: The module tree that will own them.
            name: The adapter's name.
            plan: What it adapts.
            tree: The modules of the base model.
            initial: Tensors by site path; None to initialize them.
        """
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
        copied: dict[int, nn.Parameter] = {}  # one copy of a parameter with two names
        for base in (base for owned in copies.values() for base in owned):
            original = tree.parameters[base]
            if id(original) not in copied:
                copied[id(original)] = nn.Parameter(values_of(original, base).clone())
            tensors[copy_path(name, base)] = copied[id(original)]
        for path, tensor in tensors.items():
            put(root, path, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
        tables = {module: CopyTable(root, {b: copy_path(name, b) for b in owned}) for module, owned in copies.items()}
        return cls(name, plan, FactorTable(root, method, paths), tables)

    @property
    def config(self) -> AdapterConfig:
        """The adapter's configuration."""
        return self.plan.config

    @property
    def method(self) -> AdapterMethod:
        """The adapter's method."""
        return self.factors.method

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trainable tensor by its attribute path in the tree."""
        for path in self.factors.attributes():
            yield path, self.factors.tensor(path)
        for owned in self.copies.values():
            for base, parameter in owned.items():
                yield copy_path(self.name, base), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable parameter; for a parametrization, its originals rather than its result."""
        yield from self.factors.container(self.name).parameters()

    @property
    def is_zero(self) -> bool:
        """Whether it has no effect: every update is zero, as before training, and it has no copies."""
        return not self.copies and all(factors.is_zero for factors in self.factors.values())

    def update(self, site_path: str) -> Update:
        """The weight update at a site."""
        return Update(self.factors[site_path], self.planned()[site_path].scale)

    def planned(self) -> dict[str, PlannedSite]:
        """The adapted sites by path."""
        return self._planned

    @cached_property
    def _planned(self) -> dict[str, PlannedSite]:
        return {planned.site.path: planned for planned in self.plan.selected}

    def over(self, sites: Mapping[str, LinearSite], root: nn.Module) -> InstalledAdapter:
        """The same adapter over sites with the same paths in another tree, which owns the tensors.

        Args:
            sites: Sites by path.
            root: The tree.
        """
        selected = tuple(dataclasses.replace(p, site=sites[p.site.path]) for p in self.plan.selected)
        rejected = tuple(dataclasses.replace(r, site=sites[r.site.path]) for r in self.plan.rejected)
        plan = dataclasses.replace(self.plan, selected=selected, rejected=rejected)
        copies = {module: CopyTable(root, owned.paths) for module, owned in self.copies.items()}
        return InstalledAdapter(self.name, plan, FactorTable(root, self.method, self.factors.paths), copies, self.base)

    def insertion(self) -> InsertAdapter:
        """The pass that inserts its subgraphs."""
        insertions = []
        for planned in self.plan.selected:
            site, dtype = planned.site, first_tensor(self.factors[planned.site.path]).dtype
            own_dtype = dtype if dtype != site.weight.dtype else None
            insertions.append(Insertion(site, self.factors.paths[site.path], planned.sizes, planned.scale, own_dtype))
        return InsertAdapter(self.name, self.method, tuple(insertions), self.config.dropout)

    def redirections(self, tree: ModuleTree) -> list[RedirectParameters]:
        """The passes that redirect a graph to its copies of base parameters."""
        return [
            RedirectParameters(tree, module, self.name, {base: copy_path(self.name, base) for base in owned})
            for module, owned in self.copies.items()
        ]

    def requires_grad_(self, requires_grad: bool) -> None:
        """Set whether the adapter's tensors require gradients."""
        self.factors.container(self.name).requires_grad_(requires_grad)


def _initial(planned: PlannedSite, method: AdapterMethod, config: AdapterConfig) -> AdapterTensors:
    site = planned.site
    device = None if site.weight.is_meta else site.weight.device
    dtype = torch.float32 if site.weight.dtype in _HALF else site.weight.dtype

    def weight() -> Tensor:
        values = values_of(site.weight, site.path)
        return values.t() if site.kind == "conv1d" else values

    features = site.in_features, site.out_features
    drawn = method.initial(features, planned.sizes, config, weight=weight, scale=planned.scale)
    return method.tensors(*(None if tensor is None else tensor.to(device, dtype) for tensor in drawn))
