"""`RewritePlan`: what a rewrite will do at every site, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from gralora_fx.config import AdapterConfig
from gralora_fx.graph.sites import LinearSite
from gralora_fx.methods import AdapterDims, method_of


@dataclass(frozen=True)
class PlannedSite:
    """A site that gets an adapter.

    Attributes:
        site: The site.
        r: Its rank; of GraLoRA, that of the block rows.
        k: Blocks in each direction; 1 for LoRA.
        hybrid_r: Rank of the plain LoRA beside them.
        scale: Factor of its output.
        parameters: Number of trainable values.
    """

    site: LinearSite
    r: int
    k: int
    hybrid_r: int
    scale: float
    parameters: int

    @property
    def dims(self) -> AdapterDims:
        """The adapter's sizes."""
        return AdapterDims(self.r, self.k, self.hybrid_r)


@dataclass(frozen=True)
class RejectedSite:
    """A site that gets no adapter, and why."""

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
        """Number of values of the rewritten model: the base's and those added."""
        return self.base_parameters + self.trainable_parameters

    def __str__(self) -> str:
        """A table: every site, its shape, and its ranks or the reason why it gets no adapter."""
        rows = [("site", "kind", "in", "out", "calls", "adapter")]
        method = method_of(self.config)
        adapted = {planned.site.path: method.text(planned.dims) for planned in self.selected}
        reasons = {rejected.site.path: f"- {rejected.reason}" for rejected in self.rejected}
        sites = [planned.site for planned in self.selected] + [rejected.site for rejected in self.rejected]
        for site in sites:
            note = adapted.get(site.path, reasons.get(site.path, ""))
            if site.path in adapted and not site.calls:
                note += " (the traced forward never calls it)"
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
