"""Images compared with the model: features of several sizes, and greedy tokens of prompts with one image or two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.core.tracing.inputs.cache import empty_cache, positions
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import base_trace
from gralora_fx.exporters.verify.cases import Case, vocabulary_of
from gralora_fx.exporters.verify.outputs import last_logits, run_model
from gralora_fx.exporters.verify.together import TogetherRun
from gralora_fx.features.images.image_inputs import drawn_patches, drawn_places
from gralora_fx.features.images.image_prompts import token_merge
from gralora_fx.features.images.image_rows import Outputs, given_of, grid_positions
from gralora_fx.features.images.pictures import read_pictures
from gralora_fx.features.images.program_graphs import DECODER, EMBED_TOKENS, EMBEDDING, image_token
from gralora_fx.features.images.tasks_and_inputs import (
    ASPECT,
    GIVEN_PLACES,
    GRID,
    GRID_THW,
    IMAGE_FEATURES,
    IMAGES,
    PATCH_PLACES,
    PREFIX,
    SEEN,
    VISION_ENCODER,
)
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS, PAST, beside_ids
from gralora_fx.run.sessions.ort_values import as_array, as_tensor, empty_values, run_arrays, run_values

_SIDES = ((2, 3), (5, 4), (3, 9))  # heights and widths of images, in tokens
_TILES = (1, 3, 2)
_RATIOS = (2, 1, 3)  # aspect ratio ids
_STEPS, _QUICK_STEPS = 8, 3  # tokens of an answer
_PICTURES = 4  # that a quantized export is asked about


class ImageChecks:
    """Checks of a model that reads images against its export."""

    @staticmethod
    def cases(part: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[Case]:
        """Give images of several sizes, or several numbers of tiles."""
        for inputs in _drawn(part, generator)[: 2 if quick else 3]:
            pixels = list(inputs[IMAGES].shape)
            yield (
                (f"an image of {inputs[GRID_THW][0].tolist()} patches" if GRID_THW in inputs else f"tiles {pixels}"),
                inputs,
            )

    @staticmethod
    def measured(part: TracedModel, tokenizer: Any, seed: int) -> tuple[list[dict[str, Tensor]], str]:
        """Return drawn pictures as the model's processor reads them; random pixels without one."""
        found, description = read_pictures(part, tokenizer, seed)
        return found or _drawn(part, torch.Generator().manual_seed(seed)), description

    @staticmethod
    def compare_tokens(run: TogetherRun) -> None:
        """Compare greedy tokens after prompts with an image, with two, and with one between texts."""
        part, session = run.models[VISION_ENCODER], run.sessions[VISION_ENCODER]
        images = list(run.inputs) or _drawn(base_trace(part), run.generator)
        taken = {value.name: value for value in session.get_inputs()}
        prompts = [("one image", images[:1]), ("two images", images[1::-1])]
        if run.inputs:
            prompts = [(f"picture {index}", [image]) for index, image in enumerate(images[:_PICTURES], 1)]
        for description, own in prompts:
            read = [run_model(part, description, **inputs) for inputs in own]
            expected = [{name: value.detach().float().numpy() for name, value in dict(each).items()} for each in read]
            fed = [{name: as_array(name, value, taken[name]) for name, value in inputs.items()} for inputs in own]
            actual = [run_arrays(session, arrays, description) for arrays in fed]
            if "decoder_input_ids" in base_trace(run.model).input_names:
                _compare_source(run, description, expected, actual)
            else:
                _compare_prompt(run, description, own, expected, actual)


def _drawn(part: TracedModel, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Draw inputs of the vision encoder: images of several sizes, or several numbers of tiles."""
    example = part.graph_inputs
    pixels = example[IMAGES]
    if pixels.ndim == 3:  # one image, whose sides have no common divisor but that of images
        step = math.gcd(*pixels.shape[1:])
        sides = [(pixels.shape[0], height * step, width * step) for height, width in _SIDES]
        drawn = [{IMAGES: torch.randn(*each, generator=generator)} for each in sides]
    elif PATCH_PLACES in example:
        drawn = [drawn_places(size, _merge_of(part), pixels.shape[1], generator) for size in _SIDES]
    elif ASPECT in example:
        ratios = _RATIOS if pixels.shape[0] > 1 else (1, 1, 1)  # an image of one tile has one
        drawn = [{IMAGES: torch.randn(pixels.shape, generator=generator), ASPECT: torch.tensor([[n]])} for n in ratios]
    elif GRID_THW in example:
        drawn = [drawn_patches(size, _merge_of(part), pixels.shape[1:], generator) for size in _SIDES]
    else:
        drawn = [{IMAGES: torch.randn(count, *pixels.shape[1:], generator=generator)} for count in _TILES]
    return [{**each, IMAGES: each[IMAGES].to(pixels.dtype)} for each in drawn]


def _merge_of(model: TracedModel) -> int:
    return token_merge(model.config.to_dict() if model.config is not None else {})


def _compare_prompt(
    run: TogetherRun,
    description: str,
    images: Sequence[Mapping[str, Tensor]],
    expected: Sequence[Outputs],
    actual: Sequence[Outputs],
) -> None:
    """Compare the answers to a prompt of some text, images with text between them, and text."""
    model = base_trace(run.model)
    ids, places = _prompt([len(each[IMAGE_FEATURES]) for each in expected], model, run.generator)
    grids = [each[GRID_THW] for each in images if GRID_THW in each]
    grid = torch.cat(grids).numpy() if grids and GRID in model.example_inputs else None
    merge = _merge_of(model)
    reference, given = (given_of(places, outputs, grid, merge) for outputs in (expected, actual))
    inputs_of = partial(_inputs, model, grid, merge)
    read = _reader(run, description, partial(inputs_of, given), ids, given)
    run.tally.cases.append(description)
    if DECODER in run.sessions and run.adapter is None:
        inputs, features = inputs_of(reference, ids), np.concatenate([outputs[IMAGE_FEATURES] for outputs in actual])
        wanted = _logits(partial(run_model, run.model, description), inputs)
        for name, embeds in _embeddings_of_programs(run, description, inputs_of(given, ids), features).items():
            found = _last_of_programs(run, description, inputs_of(given, ids), embeds)
            run.tally.add_step(0, f"{description}, by {name}", wanted, found, partial(_logits, inputs=inputs))
    for index in range(_QUICK_STEPS if run.quick else _STEPS):
        inputs = inputs_of(reference, ids)
        wanted = _logits(partial(run_model, run.model, description), inputs)
        run.tally.add_step(index, description, wanted, read(ids), partial(_logits, inputs=inputs))
        ids = [*ids, int(wanted.argmax(-1))]


def _compare_source(run: TogetherRun, description: str, expected: Sequence[Outputs], actual: Sequence[Outputs]) -> None:
    """Compare the answers of an encoder-decoder to a prompt of some text, images with text between them, and text."""
    model = base_trace(run.model)
    ids, places = _prompt([len(each[IMAGE_FEATURES]) for each in expected], model, run.generator)
    tensor = torch.tensor([ids])
    known = {IDS: tensor.masked_fill(torch.from_numpy(places)[None], GIVEN), "attention_mask": torch.ones_like(tensor)}
    reference, found = (
        {**known, EMBEDS: torch.from_numpy(given_of(places, outputs, None, 1)[EMBEDS])}
        for outputs in (expected, actual)
    )
    run.tally.cases.append(description)
    read = tensor[:, :1]  # of the answer
    for index in range(_QUICK_STEPS if run.quick else _STEPS):
        inputs = {**model.constants, **reference, PAST: empty_cache(model.example_inputs[PAST], 1)}
        of_model = partial(_last_logits, inputs={**inputs, "decoder_input_ids": read})
        logits = run_values(run.session, {**found, "decoder_input_ids": read}, description)["logits"]
        wanted = of_model(partial(run_model, run.model, description))
        run.tally.add_step(index, description, wanted, as_tensor(logits)[:, -1].float(), of_model)
        read = torch.cat([read, wanted.argmax(-1, keepdim=True)], dim=1)


def _last_logits(call: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """Return the model's logits after the last token `[1, vocabulary]`."""
    last: Tensor = call(**inputs)["logits"][:, -1].float()
    return last


def _prompt(
    counts: Sequence[int], model: TracedModel, generator: torch.Generator
) -> tuple[list[int], NDArray[np.bool_]]:
    high, token = vocabulary_of(model) or 4, image_token(model.config)

    def text(length: int) -> list[int]:
        drawn: list[int] = torch.randint(min(3, high - 1), high, (length,), generator=generator).tolist()
        return [each - (each == token) for each in drawn]  # which stands for no text

    ids = text(3)
    places = [False] * len(ids)
    for count in counts:
        ids += [*[0] * count, *text(2)]
        places += [*[True] * count, False, False]
    return ids, np.array(places)


def _reader(
    run: TogetherRun,
    description: str,
    inputs_of: Callable[[Sequence[int]], dict[str, Any]],
    prompt: Sequence[int],
    given: Mapping[str, NDArray[Any]],
) -> Callable[[Sequence[int]], Tensor]:
    """Return what reads a text that goes on, as rows are served if there are any: its last logits `[1, vocabulary]`."""
    if run.open_rows is None:
        return lambda ids: _last_of_session(run.session, description, inputs_of(ids))
    decoder = run.open_rows(1, len(prompt) + _STEPS)
    row = decoder.open(run.adapter, given, start=0)
    known = 0

    def read(ids: Sequence[int]) -> Tensor:
        nonlocal known
        logits = decoder.step({row: list(ids[known:])})[row]
        known = len(ids)
        return torch.from_numpy(logits[-1] if logits.ndim == 2 else logits).float().reshape(1, -1)

    return read


def _last_of_session(session: Any, description: str, inputs: Mapping[str, Any]) -> Tensor:
    feed = {name: value for name, value in inputs.items() if name != PAST}
    logits = run_values(session, {**feed, **empty_values(session, 1)}, description)["logits"]
    return last_logits(as_tensor(logits).float(), inputs["attention_mask"])[:, -1]


def _embeddings_of_programs(
    run: TogetherRun, description: str, inputs: Mapping[str, Any], features: NDArray[Any]
) -> dict[str, Tensor]:
    """Return embeddings of all tokens as onnxruntime-genai and transformers.js make them, by their graphs' names."""
    is_given, of_images = inputs[IDS] == GIVEN, torch.from_numpy(features)
    ids = inputs[IDS].masked_fill(is_given, image_token(base_trace(run.model).config))
    table = as_tensor(run_values(run.sessions[EMBED_TOKENS], {IDS: ids}, description)[EMBEDS]).clone()
    table[is_given] = of_images
    joined = run_values(run.sessions[EMBEDDING], {IDS: ids, IMAGE_FEATURES: of_images}, description)[EMBEDS]
    return {EMBEDDING: as_tensor(joined), EMBED_TOKENS: table}


def _last_of_programs(run: TogetherRun, description: str, inputs: Mapping[str, Any], embeds: Tensor) -> Tensor:
    """Return the last logits by the decoder that other programs run after the embeddings of all tokens."""
    decoder = run.sessions[DECODER]
    places = inputs.get(GRID)
    if places is not None:
        places = torch.where(places < 0, inputs["position_ids"], places)
    feed = {
        **{name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs},
        **({} if places is None else {"position_ids": places}),
        EMBEDS: embeds,
        **empty_values(decoder, 1),
    }
    logits = run_values(decoder, feed, description)["logits"]
    return last_logits(as_tensor(logits).float(), inputs["attention_mask"])[:, -1]


def _logits(call: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """Return the model's logits after ids that are read at once `[1, vocabulary]`."""
    return last_logits(call(**inputs)["logits"], inputs["attention_mask"])[:, -1].float()


def _inputs(
    model: TracedModel,
    grid: NDArray[np.int64] | None,
    merge: int,
    given: Mapping[str, NDArray[Any]],
    ids: Sequence[int],
) -> dict[str, Any]:
    """Return what the model takes of a text that is read at once."""
    count = len(ids)
    places = np.zeros(count, bool)
    places[: given[GIVEN_PLACES].shape[1]] = given[GIVEN_PLACES][0]
    is_given = torch.from_numpy(places)[None]
    mask = torch.ones(1, count, dtype=torch.long)
    inputs: dict[str, Any] = {IDS: torch.tensor([ids]).masked_fill(is_given, GIVEN), "attention_mask": mask}
    if "position_ids" in model.example_inputs:
        inputs["position_ids"] = positions(mask, count)
    for name, spec in beside_ids(model.example_inputs).items():
        example = model.example_inputs[name]
        inputs[name] = spec.of_text(example, inputs)
        if name == GRID and grid is not None:
            inputs[name] = torch.from_numpy(grid_positions(places, grid, merge)[:, None])
        elif name == SEEN and name in given:  # an answer sees what the prompt's last token does
            last = np.minimum(np.arange(count), given[name].shape[1] - 1)
            inputs[name] = torch.from_numpy(given[name][:, last]).to(example.dtype)
        elif name in given:
            values = torch.from_numpy(given[name])
            if spec.axis is None:
                inputs[name] = values
            else:
                inputs[name] = inputs[name].to(values.dtype, copy=True)
                inputs[name].narrow(spec.axis + 1, 0, values.shape[spec.axis + 1]).copy_(values)
        elif spec.follows != IDS:
            types = (torch.arange(count) < given[GIVEN_PLACES].shape[1])[None] if name == PREFIX else is_given
            inputs[name] = types.to(example.dtype)
    return {**model.constants, **inputs, PAST: empty_cache(model.example_inputs[PAST], 1)}
