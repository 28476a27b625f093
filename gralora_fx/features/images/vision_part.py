"""The part of a model that reads pixels, traced as a model of its own over the same parameters.

It makes of one image what its decoder reads in place of the image's tokens:

    pixel_values [tiles, channels, height, width]                  -> image_features [tokens, hidden]
    pixel_values [patches, values], image_grid_thw [1, 3]          -> the same, of an image of any size
    pixel_values [patches, values], image_position_ids [patches, 2]   likewise
    pixel_values [channels, height, width]                            likewise
    pixel_values [tiles, ...], aspect_ratio_ids [1, 1]             -> also image_keys, image_values and image_tiles
    some                                                           -> also deepstack_features [layers, tokens, hidden]
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from gralora_fx.base.compat.torch_graphs import is_mutable
from gralora_fx.base.sources.lazy_tensors import is_lazy, reading
from gralora_fx.core.graph.module_tree import kept_modes
from gralora_fx.core.graph.surgery import map_parameters
from gralora_fx.core.tracing.check import gap
from gralora_fx.core.tracing.trace import trace
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import TraceError, first_line, marked
from gralora_fx.features.images.cross_attention import reads_across
from gralora_fx.features.images.cross_form import CrossForm
from gralora_fx.features.images.image_inputs import has_grid_positions
from gralora_fx.features.images.image_prompts import token_merge
from gralora_fx.features.images.image_rows import grid_positions
from gralora_fx.features.images.tasks_and_inputs import IMAGES, VISION_ENCODER, reads_images
from gralora_fx.features.images.vision_forms import VisionForm, form_of, in_dtype, of_one_image
from gralora_fx.features.images.vision_layers import traceable_layers


def vision_part(traced: TracedModel) -> dict[str, TracedModel]:
    """Return the trace of the vision encoder by its file's name; none for texts alone, a `TraceError` if it fails."""
    source = traced.source
    if isinstance(source, str):
        if getattr(traced.config, "vision_config", None) is not None:
            raise TraceError(f"{_NOT_TRACED}: {source}; trace the model itself")
        return {}
    model = source.model
    if not isinstance(model, PreTrainedModel) or not reads_images(model):
        return {}
    try:
        part = _traced_part(model, CrossForm(model) if reads_across(model) else form_of(model))
    except TraceError as error:
        raise error.reworded(f"{_NOT_TRACED}: {marked(error)}") from error
    return {VISION_ENCODER: _over_parameters(part, model, traced)}


_NOT_TRACED = "the part that reads pixels cannot be traced"


def _traced_part(model: PreTrainedModel, form: VisionForm) -> TracedModel:
    """Trace the part, and compare it with what the model's own code makes of several images."""
    generator = torch.Generator().manual_seed(0)
    example, *others = (in_dtype(each, model) for each in form.examples(generator))
    with kept_modes(model):
        with patch.object(model, "forward", form.features), traceable_layers(model), of_one_image(model):
            part = _without_unread_layers(trace(model, example, blocks=(), **_held(example)))
        if any(parameter.is_meta and not is_lazy(parameter) for parameter in model.parameters()):
            return part.eval()
        model.eval()
        part = part.eval()
        with reading(model):
            for inputs in (example, *others):
                try:
                    with torch.no_grad():
                        expected, actual = form.own(**inputs), part(**inputs)
                except Exception as error:  # a model raises what it likes
                    raise TraceError(
                        f"{type(model).__name__} fails on {_sizes(inputs)}: {first_line(error)}"
                    ) from error
                if (problem := gap(expected, actual)) is not None:
                    raise TraceError(f"its trace differs from {type(model).__name__} on {_sizes(inputs)}: {problem}")
            if (problem := form.check(generator) or _wrong_positions(model)) is not None:
                raise TraceError(f"a prompt has other features or positions in {type(model).__name__}: {problem}")
    return part


def _wrong_positions(model: Any) -> str | None:
    """Compare the positions of a prompt with two images with those of a model's own code; None if they are alike."""
    owner = next((part for part in (model, getattr(model, "model", None)) if hasattr(part, "get_rope_index")), None)
    if owner is None or not has_grid_positions(model):
        return None
    config, merge = model.config, token_merge(model.config.to_dict())
    token, start, text = config.image_token_id, getattr(config, "vision_start_token_id", 1) or 1, 1
    ids, grids = [text], []
    for height, width in ((2, 3), (4, 2)):
        ids += [text, start, *[token] * (height * width), text]
        grids.append([1, height * merge, width * merge])
    tensor = torch.tensor([ids])
    known = {
        "input_ids": tensor,
        "attention_mask": torch.ones_like(tensor),
        "mm_token_type_ids": (tensor == token).int(),
        "image_grid_thw": torch.tensor(grids),
    }
    names = inspect.signature(owner.get_rope_index).parameters
    try:
        expected, _ = owner.get_rope_index(**{name: value for name, value in known.items() if name in names})
    except Exception as error:  # noqa: BLE001  # a model raises what it likes
        return f"its positions cannot be computed ({first_line(error)})"
    found = torch.from_numpy(grid_positions(np.array(ids) == token, np.array(grids), merge))[:, None]
    if expected.shape == found.shape and torch.equal(expected.long(), found):
        return None
    return "positions of images are counted in another way"


def _without_unread_layers(part: TracedModel) -> TracedModel:
    """Erase layers whose output nothing reads, such as the last of a tower whose features are those before it."""
    graph = part.graph_module.graph
    graph.eliminate_dead_code(_has_effect)
    # which has the tensors that the graph reads alone
    return part.with_graph(fx.GraphModule(part.graph_module, graph, "TracedGraph"), part.tree)


def _has_effect(node: fx.Node) -> bool:
    """Return whether a node has an effect beyond its value; drawing random numbers for dropout does not count."""
    return node.op in ("placeholder", "output") or is_mutable(node.target)


def _held(example: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return options of `trace`: tiles have one size."""
    pixels = example[IMAGES]
    return {"image_size": tuple(pixels.shape[2:])} if pixels.ndim == 4 else {}


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
