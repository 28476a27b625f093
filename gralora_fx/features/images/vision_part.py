"""The part of a model that reads pixels, traced as a model of its own over the same parameters.

It makes of one image what its decoder reads in the place of the image's tokens:

    pixel_values [tiles, channels, height, width]                  -> image_features [tokens, hidden]
    pixel_values [patches, values], image_grid_thw [1, 3]          -> the same, of an image of any size
    either                                                         -> also deepstack_features [layers, tokens, hidden]
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from gralora_fx.base.compat.torch_graphs import is_mutable
from gralora_fx.core.graph.module_tree import kept_modes
from gralora_fx.core.graph.surgery import map_parameters, placeholder_parameters
from gralora_fx.core.tracing.check import gap
from gralora_fx.core.tracing.trace import trace
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import TraceError, first_line, marked
from gralora_fx.features.images import vision_grids
from gralora_fx.features.images.image_inputs import drawn_patches
from gralora_fx.features.images.tasks_and_inputs import DEEPSTACK, IMAGE_FEATURES, IMAGES, VISION_ENCODER, reads_images
from gralora_fx.features.images.vision_layers import traceable_layers

Features = Callable[..., dict[str, Tensor]]
_GRIDS = ((2, 3), (4, 5), (9, 6), (1, 1))  # sizes of images in tokens: an example's, and others to compare


class VisionForm(ABC):
    """How a model's part that reads pixels is called, for one image.

    Attributes:
        model: The model.
        features: Computes the outputs of the part from its inputs, by name.
    """

    features: Features

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model that reads images."""
        self.model = model

    @abstractmethod
    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Draw inputs of images: the first is what the part is traced with, the others are compared."""

    @abstractmethod
    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return what the model's own code makes of such inputs, by the same names."""


def vision_part(traced: TracedModel) -> dict[str, TracedModel]:
    """Return the trace of what reads pixels, by the name of its file; none of a model that reads texts alone.

    Raises:
        TraceError: There is such a part, and it cannot be traced.
    """
    source = traced.source
    if isinstance(source, str):
        if getattr(traced.config, "vision_config", None) is not None:
            raise TraceError(f"{_NOT_TRACED}: {source}; trace the model itself")
        return {}
    model = source.model
    if not isinstance(model, PreTrainedModel) or not reads_images(model):
        return {}
    try:
        part = _traced_part(model, form_of(model))
    except TraceError as error:
        raise TraceError(f"{_NOT_TRACED}: {marked(error)}") from error
    return {VISION_ENCODER: _over_parameters(part, model, traced)}


_NOT_TRACED = "the part that reads pixels cannot be traced"


def form_of(model: PreTrainedModel) -> VisionForm:
    """Return how the part of a model that reads pixels is called.

    Raises:
        TraceError: It is not known.
    """
    tower = next((part for part in model.modules() if isinstance(part, PreTrainedModel) and _reads_grids(part)), None)
    return _TileForm(model) if tower is None else _GridForm(model, tower)


def _reads_grids(part: nn.Module) -> bool:
    return {"grid_thw"} <= inspect.signature(part.forward).parameters.keys()


class _GridForm(VisionForm):
    """A tower that reads the patches of an image of any size, and how many they are in height and width."""

    def __init__(self, model: PreTrainedModel, tower: PreTrainedModel) -> None:
        super().__init__(model)
        self.tower, self.features = tower, self._of_patches

    def _of_patches(self, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Tensor]:
        merge, count = self._setting("spatial_merge_size") or 1, pixel_values.shape[0]
        patches = vision_grids.places(image_grid_thw, count, merge)
        # what transformers' code would compute of the grid's numbers
        known: dict[str, Any] = {
            "position_ids": patches,
            "cu_seqlens": nn.functional.pad(image_grid_thw.prod(1), (1, 0)),
            "max_seqlen": count,
        }
        window, patch_size = self._setting("window_size"), self._setting("patch_size")
        if window is not None and patch_size is not None:
            side, merged = window // merge // patch_size, count // (merge * merge)
            found = vision_grids.windows(image_grid_thw, merge, side, merged)
            known |= {"window_index": found.order, "cu_window_seqlens": found.ends, "max_window_seqlen": found.most}
        if (side := self._setting("num_grid_per_side")) is not None:
            known["interp_indices"], known["interp_weights"] = vision_grids.table_taps(
                image_grid_thw,
                patches,
                side,
                self._setting("interpolation_mode") or "bilinear",
                self._setting("interpolation_padding") or "border",
                corners=self._setting("interpolation_align_corners") is True,
            )
        return _outputs(self.tower(pixel_values.to(self.tower.dtype), grid_thw=image_grid_thw, **known))

    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        return _outputs(self.model.get_image_features(**inputs, return_dict=True))

    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        vision: Any = self.tower.config
        channels: Any = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
        width = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        merge = self._setting("spatial_merge_size") or 1
        for size in _GRIDS:
            yield drawn_patches(size, merge, width, generator)

    def _setting(self, name: str) -> Any:
        """Return a setting of the tower or of a module in it, as transformers' exporters look for it."""
        return next((value for part in self.tower.modules() if (value := getattr(part, name, None)) is not None), None)


class _TileForm(VisionForm):
    """A tower that reads tiles of one size: an image, or the parts that it was cut into and the whole."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._base: Any = getattr(model, "model", model)  # whose attributes are the tower and the projector
        self.features = self._of_idefics if hasattr(self._base, "connector") else self._projected()

    def _projected(self) -> Features:
        """Return what ends at the projector, if the model's code then makes a list of its output, an item a tile."""
        projector = getattr(self._base, "multi_modal_projector", None)
        if projector is None or not self._makes_list():
            return self.own

        def projected(pixel_values: Tensor) -> dict[str, Tensor]:
            noted: list[Tensor] = []
            project = projector.forward

            def note(*args: Any, **options: Any) -> Tensor:
                noted.append(project(*args, **options))
                return noted[-1][:1]  # of which a list has one item, whatever the number of tiles

            with patch.object(projector, "forward", note):
                self._call(pixel_values)
            return {IMAGE_FEATURES: noted[-1].flatten(0, -2)}

        return projected

    def _makes_list(self) -> bool:
        """Return whether the model's code lists the features of tiles; it runs without the model's values too."""
        example = next(self.examples(torch.Generator().manual_seed(0)))
        with kept_modes(self.model), placeholder_parameters(self.model), torch.no_grad():
            self.model.eval()
            return isinstance(self._call(**_in_dtype(example, self.model)).pooler_output, (list, tuple))

    def _of_idefics(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute what the model's code does for tiles of which none is padding."""
        base, size = self._base, self._base.config.vision_config.patch_size
        sides = [pixel_values.shape[axis] // size for axis in (2, 3)]
        mask = torch.ones(pixel_values.shape[0], *sides, dtype=torch.bool, device=pixel_values.device)
        outputs = base.vision_model(pixel_values=pixel_values, patch_attention_mask=mask, return_dict=True)
        return {IMAGE_FEATURES: base.connector(outputs.last_hidden_state).flatten(0, -2)}

    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        return _outputs(self._call(**inputs))

    def _call(self, pixel_values: Tensor) -> Any:
        pixels = pixel_values[None] if hasattr(self._base, "connector") else pixel_values
        return self._base.get_image_features(pixel_values=pixels, return_dict=True)

    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        vision = self.model.config.vision_config
        size = getattr(vision, "image_size", None)
        if size is None:
            raise TraceError(f"the size of the images of {type(self.model).__name__} is not known")
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        for tiles in (2, 1, 3):
            yield {IMAGES: torch.randn(tiles, getattr(vision, "num_channels", 3), height, width, generator=generator)}


def _outputs(found: Any) -> dict[str, Tensor]:
    outputs = {IMAGE_FEATURES: _joined(found.pooler_output).flatten(0, -2)}
    layers = getattr(found, "deepstack_features", None)
    return outputs if layers is None else {**outputs, DEEPSTACK: torch.stack([_joined(layer) for layer in layers])}


def _joined(features: Any) -> Tensor:
    """Join features that are listed by image."""
    return features if isinstance(features, Tensor) else torch.cat(list(features))


def _traced_part(model: PreTrainedModel, form: VisionForm) -> TracedModel:
    """Trace the part, and compare it with what the model's own code makes of several images."""
    generator = torch.Generator().manual_seed(0)
    example, *others = (_in_dtype(each, model) for each in form.examples(generator))
    with kept_modes(model):
        with patch.object(model, "forward", form.features), traceable_layers(model):
            part = _without_unread_layers(trace(model, example, blocks=(), **_held(example)))
        if any(parameter.is_meta for parameter in model.parameters()):
            return part.eval()
        model.eval()
        part = part.eval()
        for inputs in (example, *others):
            try:
                with torch.no_grad():
                    expected, actual = form.own(**inputs), part(**inputs)
            except Exception as error:  # a model raises what it likes
                raise TraceError(f"{type(model).__name__} fails on {_sizes(inputs)}: {first_line(error)}") from error
            if (problem := gap(expected, actual)) is not None:
                raise TraceError(f"its trace differs from {type(model).__name__} on {_sizes(inputs)}: {problem}")
    return part


def _without_unread_layers(part: TracedModel) -> TracedModel:
    """Erase layers whose output nothing reads, such as the last of a tower whose features are those before it."""
    graph = part.graph_module.graph
    graph.eliminate_dead_code(_has_effect)
    # which has the tensors that the graph reads alone
    return part.with_graph(fx.GraphModule(part.graph_module, graph, "TracedGraph"), part.tree)


def _has_effect(node: fx.Node) -> bool:
    """Return whether a node does more than to compute its value; what dropout draws is of no use by itself."""
    return node.op in ("placeholder", "output") or is_mutable(node.target)


def _held(example: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return options of `trace`: tiles have one size."""
    pixels = example[IMAGES]
    return {"image_size": tuple(pixels.shape[2:])} if pixels.ndim == 4 else {}


def _in_dtype(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _sizes(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())


def _over_parameters(part: TracedModel, model: PreTrainedModel, traced: TracedModel) -> TracedModel:
    """Return a part over the parameters of the trace of its decoder, which may be others than its source's."""
    own = traced.tree.parameters
    new = {p: own[name] for name, p in model.named_parameters(remove_duplicate=False) if own.get(name, p) is not p}
    if not new:
        return part
    map_parameters(part.graph_module, lambda parameter, _: new.get(parameter, parameter))
    return part.with_graph(part.graph_module, dataclasses.replace(part.tree, parameters=own))
