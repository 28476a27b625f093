"""Forms in which a vision encoder is called for one image: patches, an image of any size, or tiles."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_fx.base.patches import patched_here
from gralora_fx.core.graph.module_tree import kept_modes
from gralora_fx.core.graph.surgery import placeholder_parameters
from gralora_fx.core.tracing.check import gap
from gralora_fx.errors import TraceError
from gralora_fx.features.images.image_inputs import drawn_patches, drawn_places
from gralora_fx.features.images.image_prompts import token_merge
from gralora_fx.features.images.tasks_and_inputs import (
    DEEPSTACK,
    GRID_THW,
    IMAGE_FEATURES,
    IMAGES,
    NEWLINE,
    PATCH_PLACES,
)
from gralora_fx.features.images.tile_packing import TilePacking
from gralora_fx.features.images.vision_functions import grids_by_arithmetic
from gralora_fx.format.input_names import IDS

Features = Callable[..., dict[str, Tensor]]
_SIDES = {"florence_vision": 768}  # of images, by types of towers whose configuration leaves that to the processor
_GRIDS = ((2, 3), (4, 5), (9, 6), (1, 1))  # sizes of images in tokens: an example's, and others to compare


class VisionForm(ABC):
    """Form in which a model's vision encoder is called for one image."""

    features: Features  # computes the outputs of the part from its inputs, by name

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @abstractmethod
    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Draw inputs of images: the first is what the part is traced with, the others are compared."""

    def check(self, generator: torch.Generator) -> str | None:
        """Return what is wrong with what a prompt makes of the outputs, beside the model's own code."""
        return None

    @abstractmethod
    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return what the model's own code makes of such inputs, by the same names."""


def form_of(model: PreTrainedModel) -> VisionForm:
    """Return how the part of a model that reads pixels is called; raise `TraceError` if that is unknown."""
    base: Any = getattr(model, "model", model)
    if hasattr(base, "visual_indicator_token_ids"):
        raise TraceError("tokens around its images have embeddings of their own (visual_indicator_token_ids)")
    if "pixel_mask" in _taken(model):
        raise TraceError("a mask hides what pads its images (pixel_mask)")
    if (tower := _tower(model, "grid_thw")) is not None:
        return _GridForm(model, tower)
    if PATCH_PLACES in _taken(model):
        return _PlacedForm(model)
    if hasattr(base, "pack_image_features"):
        return _PackedForm(model)
    is_sized = _tower(model, "image_sizes") is not None or _masks(getattr(base, "connector", nn.Identity()))
    return _SizedForm(model) if is_sized else _TileForm(model)


def _tower(model: nn.Module, taken: str) -> PreTrainedModel | None:
    """Return the first model within a model that takes an argument and no ids."""
    towers = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    names = ((part, inspect.signature(part.forward).parameters) for part in towers)
    return next((part for part, known in names if taken in known and IDS not in known), None)


class _GridForm(VisionForm):
    """A tower that reads the patches of an image of any size, and how many they are in height and width."""

    def __init__(self, model: PreTrainedModel, tower: PreTrainedModel) -> None:
        super().__init__(model)
        self.tower, self.features = tower, self._of_patches  # the tower says how large a patch is
        self.merge = token_merge(model.config.to_dict())

    def _of_patches(self, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Tensor]:
        with grids_by_arithmetic(self.model, pixel_values.shape[0]):
            return self.own(pixel_values=pixel_values, image_grid_thw=image_grid_thw)

    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        more = {}
        if "image_merge_sizes" in _taken(self.model):
            more["image_merge_sizes"] = torch.full_like(inputs[GRID_THW][:, 0], self.merge)
        return _outputs(_reader(self.model)(**inputs, **more, return_dict=True))

    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        vision: Any = self.tower.config
        channels: Any = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
        patch_shape = (channels, vision.patch_size, vision.patch_size)
        flat, merge = channels * vision.patch_size**2, self.merge
        shapes = ((flat * getattr(vision, "temporal_patch_size", 1),), patch_shape, (2 * flat,))
        shape = next(
            (each for each in shapes if self._takes(drawn_patches(_GRIDS[0], merge, each, generator))), shapes[0]
        )
        for size in _GRIDS:
            yield drawn_patches(size, merge, shape, generator)

    def _takes(self, inputs: Mapping[str, Tensor]) -> bool:
        """Return whether the model's code takes patches of such a shape; it runs without the model's values too."""
        try:
            with kept_modes(self.model), torch.no_grad():
                self.own(**in_dtype(inputs, self.model))
        except Exception:  # noqa: BLE001  # a model raises what it likes
            return False
        return True


class _SizedForm(VisionForm):
    """A tower that reads images of any size, each by itself `[channels, height, width]`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.features = self._of_image

    def _of_image(self, pixel_values: Tensor) -> dict[str, Tensor]:
        if "pixel_attention_mask" in _taken(self.model):
            return _of_idefics(self.model, pixel_values[None])
        sizes = [(pixel_values.shape[1], pixel_values.shape[2])]
        return _outputs(_reader(self.model)(pixel_values=pixel_values[None], image_sizes=sizes, return_dict=True))

    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        if "pixel_attention_mask" in _taken(self.model):
            return _outputs(_reader(self.model)(pixel_values=inputs[IMAGES][None, None], return_dict=True))
        sizes = torch.tensor([inputs[IMAGES].shape[1:]])
        return _outputs(_reader(self.model)(pixel_values=inputs[IMAGES][None], image_sizes=sizes, return_dict=True))

    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        vision: Any = self.model.config.vision_config
        step = vision.patch_size * (getattr(self.model.config, "spatial_merge_size", 1) or 1)
        for height, width in _GRIDS[:3]:  # of one token, some models make no image
            sides = height * step, width * step
            yield {IMAGES: torch.randn(getattr(vision, "num_channels", 3), *sides, generator=generator)}


def _reader(model: Any) -> Any:
    """Return the model's own code that computes features of pixels."""
    return getattr(model, "get_image_features", None) or model.model.get_image_features


def _taken(model: Any) -> set[str]:
    """Return the names of what that code takes, or what it hands its arguments to."""
    readers = [getattr(part, "get_image_features", None) for part in (model, getattr(model, "model", None))]
    return {name for each in readers if each for name in inspect.signature(inspect.unwrap(each)).parameters}


class _PlacedForm(VisionForm):
    """A tower that reads patches and the column and row of each, and pools them by blocks, as Gemma 4's does."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._base: Any = model.model
        self._merge, self.features = token_merge(model.config.to_dict()), self._of_patches

    def _of_patches(self, pixel_values: Tensor, image_position_ids: Tensor) -> dict[str, Tensor]:
        if not hasattr(self._base, "vision_tower"):  # each patch is a token
            return _outputs(self._base.embed_vision(pixel_values[None], image_position_ids[None]))
        tower, merge = self._base.vision_tower, self._merge

        def pooled(hidden_states: Tensor, pixel_position_ids: Tensor, **_: Any) -> tuple[Tensor, slice]:
            column, row = pixel_position_ids[0].unbind(1)
            block = column // merge + (column.max() + 1) // merge * (row // merge)
            blocks = torch.arange(hidden_states.shape[1] // merge**2, device=block.device)
            means = (block == blocks[:, None]).float() / merge**2 @ hidden_states.float()
            return means.to(hidden_states.dtype).float() * tower.pooler.root_hidden_size, slice(None)  # none is padding

        with patch.object(tower.pooler, "forward", pooled):
            found = tower(pixel_values=pixel_values[None], pixel_position_ids=image_position_ids[None])
        return {IMAGE_FEATURES: self._base.embed_vision(inputs_embeds=found.last_hidden_state).flatten(0, -2)}

    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        return _outputs(_reader(self.model)(**{name: value[None] for name, value in inputs.items()}, return_dict=True))

    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        vision: Any = self.model.config.vision_config
        side = vision.patch_size * (1 if hasattr(self._base, "vision_tower") else vision.pooling_kernel_size)
        for size in _GRIDS:
            yield drawn_places(size, self._merge, 3 * side**2, generator)


class _PackedForm(VisionForm):
    """A tower that reads tiles, whose features a prompt lays out by the size of the image (see `TilePacking`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._base: Any = getattr(model, "model", model)
        self._packing, self.features = TilePacking.of(model.config.to_dict()), self.own

    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        def as_they_are(image_features: Any, *_: Any, **__: Any) -> tuple[Any, None]:
            return image_features, None

        sizes = [(self._packing.tile, self._packing.tile)]
        with patch.object(self._base, "pack_image_features", as_they_are), of_one_image(self.model):
            outputs = _outputs(self._base.get_image_features(**inputs, image_sizes=sizes, return_dict=True))
        return {**outputs, NEWLINE: self._base.image_newline[None]}

    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        channels, side = getattr(self.model.config.vision_config, "num_channels", 3), self._packing.tile
        for tiles in (2, 1, 3):
            yield {IMAGES: torch.randn(tiles, channels, side, side, generator=generator)}

    def check(self, generator: torch.Generator) -> str | None:
        packing, newline = self._packing, torch.randn(2, generator=generator)
        code = self._base.pack_image_features
        known = inspect.signature(code).parameters
        options = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": f"anyres_max_{packing.most}"}
        options = {name: value for name, value in options.items() if name in known}
        for height, width in (packing.pinpoints[0], packing.pinpoints[-1]):
            for size in ((height, width), (height, width * 2 // 3), (height * 3 // 5, width)):
                features = torch.randn(packing.count(size), packing.side**2, 2, generator=generator)
                (expected,), _ = code([features], torch.tensor([size]), image_newline=newline, **options)
                found = torch.from_numpy(packing.packed(features.numpy(), newline[None].numpy(), size))
                if (problem := gap({IMAGE_FEATURES: expected}, {IMAGE_FEATURES: found})) is not None:
                    return f"the layout of an image of {size[0]} x {size[1]}: {problem}"
        return None


class _TileForm(VisionForm):
    """A tower that reads tiles of one size: an image, or the parts that it was cut into and the whole."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._base: Any = getattr(model, "model", model)  # whose attributes are the tower and the projector
        self.features = partial(_of_idefics, model) if hasattr(self._base, "connector") else self._projected()

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
            return isinstance(self._call(**in_dtype(example, self.model)).pooler_output, (list, tuple))

    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        return _outputs(self._call(**inputs))

    def _call(self, pixel_values: Tensor) -> Any:
        pixels = pixel_values[None] if hasattr(self._base, "connector") else pixel_values
        return self._base.get_image_features(pixel_values=pixels, return_dict=True)

    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        vision = self.model.config.vision_config
        size = getattr(vision, "image_size", _SIDES.get(vision.model_type))
        if size is None:
            raise TraceError(f"the size of the images of {type(self.model).__name__} is not known")
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        for tiles in (2, 1, 3):
            yield {IMAGES: torch.randn(tiles, getattr(vision, "num_channels", 3), height, width, generator=generator)}


def _of_idefics(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """Compute what the code of Idefics' models does for tiles or images of which none is padding."""
    base, size = model.model, model.config.vision_config.patch_size
    sides = [pixel_values.shape[axis] // size for axis in (2, 3)]
    mask = torch.ones(pixel_values.shape[0], *sides, dtype=torch.bool, device=pixel_values.device)
    outputs = base.vision_model(pixel_values=pixel_values, patch_attention_mask=mask, return_dict=True)
    masks = {"attention_mask": mask.flatten(1)} if _masks(base.connector) else {}
    return {IMAGE_FEATURES: base.connector(outputs.last_hidden_state, **masks).flatten(0, -2)}


def _masks(connector: nn.Module) -> bool:
    """Return whether a connector is told which patches there are: images have any size then, and are padded."""
    return "attention_mask" in inspect.signature(connector.forward).parameters


def _outputs(found: Any) -> dict[str, Tensor]:
    outputs = {IMAGE_FEATURES: _joined(found.pooler_output).flatten(0, -2)}
    layers = getattr(found, "deepstack_features", None)
    return outputs if layers is None else {**outputs, DEEPSTACK: torch.stack([_joined(layer) for layer in layers])}


def _joined(features: Any) -> Tensor:
    """Join features that are listed by image."""
    return features if isinstance(features, Tensor) else torch.cat(list(features))


@contextmanager
def of_one_image(model: nn.Module) -> Iterator[None]:
    """Let features not be split by image, and hide positions of a text, within the block."""
    split: Callable[..., Any] = Tensor.split

    def whole(tensor: Tensor, sizes: Any, dim: int = 0) -> Any:
        return (tensor,) if isinstance(sizes, (list, tuple)) and len(sizes) == 1 else split(tensor, sizes, dim)

    as_tensor = torch.as_tensor

    def unread(data: Any, *args: Any, **options: Any) -> Tensor:
        """Sizes of images are read for the split alone."""
        is_known = not (isinstance(data, list) and data and isinstance(data[0], tuple))
        return as_tensor(data if is_known else [[0, 0]], *args, **options)

    with ExitStack() as changed:
        for owner, name, value in ((torch, "split", whole), (Tensor, "split", whole), (torch, "as_tensor", unread)):
            changed.enter_context(patched_here(owner, name, value))
        if hasattr(model, "get_rope_index"):
            changed.enter_context(patch.object(type(model), "get_rope_index", property()))
        yield


def in_dtype(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs with numbers in a model's data type."""
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
