"""The report of a fold: where each layer's weight was found, and how much of the update survives rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gralora_fx.base.progress.report import Invocation, Report, Summary, slowest, times, written, written_lines
from gralora_fx.base.sources.same_base import BaseComparison
from gralora_fx.format.export_usage import comparison_of

_STAGES = {"find": "finding weights", "fold": "folding"}


@dataclass(frozen=True)
class FoldedSite:
    """A layer that an adapter was folded into."""

    path: str  # the layer
    file: str  # the ONNX file
    initializer: str  # the initializer that holds its weight now
    start: int  # first of its output features there
    stop: int  # end of them
    how: str  # how the weight was found: `"as recorded"`, `"by name"` or `"by value"`
    # for a quantized weight, the share of the update that survives rounding, `<after - before, dW> / <dW, dW>`; None
    # for a float weight
    survival: float | None = None


@dataclass(frozen=True)
class FoldReport(Report):
    """The result of `fold_onnx`.

    Attributes:
        output_dir: The directory written.
        adapter_name: The adapter's name in the manifest; None without a manifest.
        sites: Every layer and where its weight was found; a layer in several files has an entry for each.
        replaced: Trained parameters that replaced the base's.
        bytes_changed: Bytes of recomputed weights.
        survival: The share of the whole update that survives rounding; None if nothing is quantized.
        files: Files of the directory with their sizes in bytes.
        seconds: Seconds of each stage.
        adapters: Names of all adapters that the result holds, in the order of folding; empty without a manifest.
        base: How the adapter's base compares with the export's.
        unread: Adapted layers that the export leaves out, since no output depends on them.
        usage: How to call the result, in Python and on the command line.
    """

    output_dir: Path
    adapter_name: str | None
    sites: tuple[FoldedSite, ...]
    replaced: tuple[str, ...]
    bytes_changed: int
    survival: float | None
    files: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    base: BaseComparison | None = None
    unread: tuple[str, ...] = ()
    usage: Invocation | None = None

    @property
    def summary(self) -> Summary:
        """Lines on the folded layers, the files written, how to use the result, and notes."""
        count = len({site.path for site in self.sites})
        return Summary(
            f"folded {count} layer{'s' * (count > 1)}",
            written(self.output_dir, self.files),
            self.usage,
            list(self._notes),
            slowest(self.seconds, _STAGES),
            None if self.adapter_name is None else comparison_of(self.output_dir),
        )

    @property
    def _notes(self) -> Iterator[str]:
        if self.survival is not None:
            yield f"rounding leaves {100 * self.survival:.0f} % of the update"
        if len(self.adapters) > 1:
            yield f"now holds {len(self.adapters)} adapters, and a comparison needs each: {', '.join(self.adapters)}"
        if self.unread:
            yield f"{len(self.unread)} layer{'s' * (len(self.unread) > 1)} left out, on which no output depends"
        if self.adapter_name is None:
            yield "no manifest, since the export has none: compare the result with the merged model yourself"

    @property
    def details(self) -> str:
        """Lines on the files written, how weights were found, and how much of the update survives rounding."""
        lines = written_lines(self.output_dir, self.files)
        ways = Counter(how for _, how in dict.fromkeys((site.path, site.how) for site in self.sites))
        found = ", ".join(f"{count} {how}" for how, count in ways.items())
        count = len({site.path for site in self.sites})
        lines.append(f"folded {count} layers ({found}), {self.bytes_changed:,} bytes of weights changed")
        if len(self.adapters) > 1:
            lines.append(f"now holds {len(self.adapters)} adapters: {', '.join(self.adapters)}")
        if self.replaced:
            lines.append(f"replaced {', '.join(self.replaced)}")
        if self.unread:
            lines.append(f"left out {', '.join(self.unread)}, on which no output depends")
        if self.adapter_name is None:
            lines.append("no manifest, since the export has none: compare the result with the merged model")
        if self.survival is not None:
            shares = sorted((site.survival, site.path) for site in self.sites if site.survival is not None)
            least, path = shares[0]
            lines.append(
                f"rounding leaves {100 * self.survival:.0f} % of the update, at least {100 * least:.0f} % ({path})"
            )
        lines.append(times(self.seconds))
        return "\n".join(lines)
