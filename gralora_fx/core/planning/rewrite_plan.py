"""`RewritePlan`: the effect of a rewrite at every site, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.graph.sites import LinearSite, ParameterSite, site_table
from gralora_fx.core.methods import Sizes, method_of
from gralora_fx.errors import RewriteError


@dataclass(frozen=True)
class PlannedSite:
    """A site that gets an adapter."""

    site: LinearSite
    sizes: Sizes  # the adapter's sizes, a record of its method's
    scale: float  # factor of its update
    parameters: int  # number of trainable values
    # name of the parameter by which `target_parameters` selects it; None where `target_modules` does
    parameter: str | None = None

    @property
    def stack(self) -> int | None:
        """Number of matrices in its parameter; None for a single one."""
        return self.site.stack if isinstance(self.site, ParameterSite) else None

    @property
    def r(self) -> int:
        """Its rank: 0 for a method without one; for GraLoRA, the rank of a block row."""
        return getattr(self.sizes, "r", 0)

    @property
    def k(self) -> int:
        """Blocks in each direction; 1 for methods other than GraLoRA."""
        return getattr(self.sizes, "k", 1)

    @property
    def hybrid_r(self) -> int:
        """Rank of the plain LoRA beside GraLoRA's blocks."""
        return getattr(self.sizes, "hybrid_r", 0)


@dataclass(frozen=True)
class ChosenParameters:
    """The parameters that `target_parameters` selects in a model."""

    # the sites by the names of the parameters, in the order of the model's modules; one whose parameter is the weight
    # of a linear layer is that layer
    sites: Mapping[str, LinearSite] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)  # why one cannot have an adapter, by path of the site
    problems: tuple[str, ...] = ()  # errors, a sentence each
    # warnings: names that match nothing while others do, fields that do not concern parameters
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class RejectedSite:
    """A site that gets no adapter, and why."""

    site: LinearSite
    reason: str


@dataclass(frozen=True)
class RewritePlan:
    """The effect of a rewrite at every site.

    Attributes:
        config: The configuration.
        selected: The sites that get an adapter.
        rejected: Every other site, with the reason.
        saved_modules: Paths of the modules that train as copies.
        saved_parameters: Number of values in those copies.
        trained_biases: Names of the biases that train as copies, by the path of their module.
        bias_parameters: Number of values in those biases.
        base_parameters: Number of values in the base model.
    """

    config: AdapterConfig
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
        """Number of values in the rewritten model: the base's and those added."""
        return self.base_parameters + self.trainable_parameters

    def check_fits(self, sites: Iterable[LinearSite]) -> None:
        """Check that the plan is for a model.

        Args:
            sites: The model's linear layers, and its other parameters.

        Raises:
            RewriteError: A site of the plan is not one of them.
        """
        weights = {site.path: site.weight for site in sites}
        for planned in self.selected:
            if weights.get(planned.site.path) is not planned.site.weight:
                raise RewriteError(f"{planned.site.path} of the plan is not a site of this model; plan it again")

    def __repr__(self) -> str:
        return f"RewritePlan({type(self.config).__name__}, {self.totals})"

    def __str__(self) -> str:
        """Return a table of every site: its shape, and its ranks or the reason why it gets no adapter."""
        method = method_of(self.config)
        adapted = {planned.site.path: method.text(planned.sizes) for planned in self.selected}
        adapted |= {p.site.path: f"{adapted[p.site.path]}, {p.stack} matrices" for p in self.selected if p.stack}
        adapted |= {
            planned.site.path: f"{adapted[planned.site.path]} (the traced forward never calls it)"
            for planned in self.selected
            if not planned.site.calls
        }
        reasons = {rejected.site.path: f"- {rejected.reason}" for rejected in self.rejected}
        table = site_table(
            [*(p.site for p in self.selected), *(r.site for r in self.rejected)], {"adapter": adapted | reasons}
        )
        return "\n".join([table, *(f"trains a copy of {path}" for path in self.saved_modules), self.totals])

    @property
    def totals(self) -> str:
        """Numbers of adapted sites and trainable values, in one line."""
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        return (
            f"{len(self.selected)} of {len(self.selected) + len(self.rejected)} sites adapted; trainable parameters: "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} ({share:.2f} %)"
        )
