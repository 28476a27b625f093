"""One adapter in a rewritten graph: where its tensors are, and how its parts go in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx, nn

from gralora_fx.adapter import Factors, Update, initial_factors
from gralora_fx.config import GraloraConfig
from gralora_fx.deferred import values_of
from gralora_fx.errors import RewriteError
from gralora_fx.module_tree import ModuleTree
from gralora_fx.passes.insert import insert_adapter
from gralora_fx.passes.own import own_parameters
from gralora_fx.planning.rewrite_plan import PlannedSite, RewritePlan
from gralora_fx.store import as_parameters, copy_path, drop, factor_paths, put

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class InstalledAdapter:
    """An adapter whose tensors stand in a graph module.

    Attributes:
        name: The adapter's name.
        plan: What it adapts.
        factors: Its trainable tensors, by site path.
        copies: Its own copies of base parameters (of `modules_to_save`, and trained biases), by module path, then by
            the full name of the base's parameter.
    """

    name: str
    plan: RewritePlan
    factors: dict[str, Factors] = field(default_factory=dict)
    copies: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        graph_module: fx.GraphModule,
        name: str,
        plan: RewritePlan,
        tree: ModuleTree,
        given: Mapping[str, Factors] | None = None,
    ) -> InstalledAdapter:
        """Store tensors, those given by site path or freshly drawn ones; the graph does not call them yet.

        Adapters of a half-precision layer are float32, as PEFT's are.
        """
        adapter = cls(name, plan)
        for planned in plan.selected:
            factors = _initial(planned, plan.config) if given is None else given[planned.site.path]
            adapter.factors[planned.site.path] = as_parameters(factors)
        made: dict[int, nn.Parameter] = {}  # one copy of a parameter with two names

        def copy_of(base: str) -> nn.Parameter:
            original = tree.parameters[base]
            if id(original) not in made:
                made[id(original)] = nn.Parameter(values_of(original, base).clone())
            return made[id(original)]

        for module in plan.saved_modules:
            names = [base for base in tree.parameters if base.startswith(f"{module}.")]
            adapter.copies[module] = {base: copy_of(base) for base in names}
        for bias in plan.trained_biases:
            adapter.copies.setdefault(bias.rpartition(".")[0], {}).setdefault(bias, copy_of(bias))
        for path, parameter in adapter.named_parameters():
            put(graph_module, path, parameter)
        return adapter

    @property
    def config(self) -> GraloraConfig:
        """The adapter's configuration."""
        return self.plan.config

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable parameter by its attribute path in the graph module."""
        for site_path, factors in self.factors.items():
            for field_name, path in factor_paths(self.name, site_path, factors).items():
                yield path, getattr(factors, field_name)
        for owned in self.copies.values():
            for base, parameter in owned.items():
                yield copy_path(self.name, base), parameter

    def update(self, site_path: str) -> Update:
        """The weight update at a site."""
        return Update(self.factors[site_path], self.planned()[site_path].scale)

    def planned(self) -> dict[str, PlannedSite]:
        """The adapted sites by path."""
        return self._planned

    @cached_property
    def _planned(self) -> dict[str, PlannedSite]:
        return {planned.site.path: planned for planned in self.plan.selected}

    def attach(self, graph_module: fx.GraphModule) -> None:
        """Insert the adapter's subgraphs."""
        config = self.config
        for planned in self.plan.selected:
            site, factors = planned.site, self.factors[planned.site.path]
            differs = factors.A.dtype != site.weight.dtype
            insert_adapter(
                graph_module,
                site,
                self.name,
                factor_paths(self.name, site.path, factors),
                rank=planned.rank,
                scale=planned.scale,
                dropout=config.gralora_dropout,
                dtype=factors.A.dtype if differs else None,
            )

    def own(self, graph_module: fx.GraphModule, tree: ModuleTree) -> None:
        """Let the graph read the adapter's copies of base parameters."""
        for module, owned in self.copies.items():
            paths = {base: copy_path(self.name, base) for base in owned}
            is_used = own_parameters(graph_module, tree, module, self.name, paths)
            if not is_used and any(str(node.target) == module for node in graph_module.graph.nodes):
                raise RewriteError(
                    f"{module} is a module call in this graph, so modules_to_save and bias cannot replace its "
                    "parameters; trace the model from its nn.Module instead"
                )

    def drop(self, graph_module: fx.GraphModule) -> None:
        """Remove the adapter's tensors."""
        drop(graph_module, self.name)

    def requires_grad_(self, requires_grad: bool) -> None:
        """Let the adapter's tensors train or not."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad)


def _initial(planned: PlannedSite, config: GraloraConfig) -> Factors:
    site = planned.site
    return initial_factors(
        site.in_features,
        site.out_features,
        planned.rank,
        zero_update=config.init_weights,
        device=None if site.weight.is_meta else site.weight.device,
        dtype=torch.float32 if site.weight.dtype in _HALF else site.weight.dtype,
    )
