"""A trace in the making, which the stages of `trace` pass on: each returns the next draft."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from gralora_fx.graph.pipeline import PassReport
from gralora_fx.sources.sentence_modules import SentenceModules
from gralora_fx.tracing.inputs.image_sizes import ImageSize, ImageSizes
from gralora_fx.tracing.inputs.signature import CallSignature


class Axes(enum.Enum):
    """Which axes of a trace may vary."""

    NONE = "none"
    SEQUENCES = "all but height and width of images"
    IMAGES = "all"


@dataclass(frozen=True)
class Draft:
    """What is known of a trace so far.

    Attributes:
        model: The model, or the graph that was given for one.
        sample: Inputs of the graph by name, from which it is captured.
        constants: Arguments that become part of the graph.
        signature: The call signature.
        task: The task, or None.
        sentence: The modules after the transformer that make a sentence encoder of it, or None.
        image_size: The requested size of images.
        axes: Which axes may vary.
        evaluates: Whether the model is captured in evaluation mode; else in training mode, where every dropout has its
            probability.
        graph_module: The graph, once it is captured.
        passes: What the passes that normalized it did.
        problem: How the graph differs from the model, once it was compared; None if it does not.
        image_sizes: Heights and widths of images that the graph takes; None if it takes no images.
    """

    model: nn.Module
    sample: Mapping[str, Any]
    signature: CallSignature
    constants: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    sentence: SentenceModules | None = None
    image_size: ImageSize = None
    axes: Axes = Axes.SEQUENCES
    evaluates: bool = False
    graph_module: fx.GraphModule | None = None
    passes: tuple[PassReport, ...] = ()
    problem: str | None = None
    image_sizes: ImageSizes | None = None

    @property
    def captured(self) -> fx.GraphModule:
        """The graph, of a draft in which it is captured."""
        assert self.graph_module is not None
        return self.graph_module
