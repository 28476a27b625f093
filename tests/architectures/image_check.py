"""One model that reads images, tiny and random, exported whole, and its answers beside transformers' own generation."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from gralora_fx import trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.images.captioners import encoder_decoder_of
from gralora_fx.features.images.image_prompts import encoder_source
from gralora_fx.serving import OrtModel, load
from tests.architectures.decoder_check import ANSWER
from tests.architectures.image_pixels import features_of, pixels_of, pixels_of_both
from tests.architectures.image_prompts import IMAGE

_TASK, _PAIR = "image-text-to-text-with-past", "image-to-text-with-past"
_REFUSED = re.compile(r"the part that reads pixels cannot be traced: (.*); nothing of it would be compared", re.DOTALL)
_BEFORE, _BETWEEN, _AFTER = [5, 6], [7, 8], [9, 10, 11]
_START, _END = 87, 88  # around an image, for models that look for them


@dataclass(frozen=True)
class CheckedImages:
    """The results of the export of a model that reads images.

    Attributes:
        reason: Why the part that reads pixels is not exported; empty if it is.
        answers: How answers to prompts with images differ from transformers'; empty if they do not.
        takes: What the exported part takes, by name.
        one_length: Why there is no graph whose rows have lengths of their own; empty if there is one.
    """

    reason: str
    answers: str = ""
    takes: tuple[str, ...] = ()
    one_length: str = ""


def check_images(model: PreTrainedModel, directory: Path) -> CheckedImages:
    """Export a model with verification, and compare its greedy tokens with transformers' own.

    Args:
        model: A model that reads images.
        directory: Where to export to.

    Raises:
        GraloraError: It cannot be exported at all.
    """
    if model.config.is_encoder_decoder or encoder_decoder_of(model, _PAIR) is not model:
        return _check_pair(model, directory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "images of .* were not tried", UserWarning)  # they are here
        traced = trace(model, task=_TASK)
    try:
        report = export_onnx(traced, directory, verify="quick")
    except ExportError as error:
        if (refused := _REFUSED.search(str(error))) is None:
            raise
        export_onnx(trace(model, task="text-generation-with-past"), directory, verify="quick")
        return CheckedImages(refused[1])
    rows = (report.rows.reason if report.rows is not None else None) or ""
    served = load(directory, threads=1)
    if served.generation.given_prompts is None:
        return CheckedImages("it has no part that is known to read pixels", one_length=rows)
    takes = tuple(value.name for value in served.companion_session("vision_encoder").get_inputs())
    return CheckedImages("", "; ".join(_differences(served, model)), takes, rows)


def _check_pair(model: PreTrainedModel, directory: Path) -> CheckedImages:
    """Check an encoder-decoder in the same way: its encoder reads pixels, or a prompt with images."""
    export_onnx(trace(model, task=_PAIR), directory, verify="quick")
    served, differences = load(directory, threads=1), []
    taken = tuple(value.name for value in served.first_session.encoder.get_inputs())
    if "pixel_values" in taken:
        shape = [3 if isinstance(size, str) else size for size in served.first_session.encoder.get_inputs()[0].shape]
        prompts = [{"pixel_values": torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(1))}]
    else:
        first, second = (pixels_of(model, seed) for seed in (0, 1))
        prompts = [_prompt(model, images) for images in ([first], [first, second], [])]
        if served.generation.given_prompts is None:
            return CheckedImages("it has no part that is known to read pixels", one_length="rows run in turn")
        taken = tuple(value.name for value in served.companion_session("vision_encoder").get_inputs())
    decoder, reader = served.decoder(rows=1), served.generation.encoder_inputs
    assert reader is not None
    for number, prompt in enumerate(prompts):
        source: Any = {name: value.numpy() for name, value in prompt.items()}
        if "input_ids" in prompt and "pixel_values" in prompt:
            ids = prompt["input_ids"][0].numpy()
            given = served.generation.given_prompts.given(ids, source, None)
            source = encoder_source(reader, ids.tolist(), given).arrays
        row, tokens = decoder.open(None, source), [reader.rules.start]
        while len(tokens) <= ANSWER:
            tokens.append(int(np.argmax(decoder.step({row: tokens[-1:]})[row])))
        decoder.close(row)
        model.generation_config.decoder_start_token_id = reader.rules.start
        wanted = _answer_of_transformers(model, prompt)
        if tokens[1:] != wanted:
            differences.append(f"prompt {number}: {tokens[1:]} instead of {wanted}")
    return CheckedImages("", "; ".join(differences), taken, "rows run in turn")


def _differences(served: OrtModel, model: PreTrainedModel) -> Iterator[str]:
    """Compare answers to a prompt with an image, to one with two, and to both beside a text."""
    first, second = (pixels_of(model, seed) for seed in (0, 1))
    prompts = [_prompt(model, [first]), _prompt(model, [first, second]), _prompt(model, [])]
    expected = [_answer_of_transformers(model, prompt) for prompt in prompts]
    for name, number in (("one image", 0), ("two images", 1)):
        found = _answers(served, [prompts[number]])[0]
        if found != expected[number]:
            yield f"{name}: {found} instead of {expected[number]}"
    if _answers(served, prompts) != expected:
        yield "rows together differ from rows alone"


def _prompt(model: PreTrainedModel, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Process a text with images in it."""
    ids = [*_BEFORE]
    for pixels in images:
        ids += [_START, *[IMAGE] * features_of(model, pixels), _END, *_BETWEEN]
    tensor = torch.tensor([ids + _AFTER])
    taken = inspect.signature(model.forward).parameters
    types = {name: (tensor == IMAGE).long() for name in ("token_type_ids", "mm_token_type_ids") if name in taken}
    if model.config.model_type == "paligemma":  # which tells its prompt from its answer
        types = {"token_type_ids": torch.zeros_like(tensor)} if images else {}
    if model.config.model_type == "mllama" and images:
        tiles = [[int(pixels["aspect_ratio_mask"].sum()) for pixels in images]]
        seen = get_cross_attention_token_mask(tensor[0].tolist(), IMAGE)
        dense = convert_sparse_cross_attention_mask_to_dense([seen], tiles, 4, tensor.shape[1])
        types = {"cross_attention_mask": torch.from_numpy(dense)}
    return {
        "input_ids": tensor,
        "attention_mask": torch.ones_like(tensor),
        **types,
        **(pixels_of_both(model, images) if images else {}),
    }


def _answer_of_transformers(model: PreTrainedModel, prompt: Mapping[str, Tensor]) -> list[int]:
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.forced_eos_token_id = None, 0, None
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=ANSWER, do_sample=False)
    before = prompt["input_ids"].shape[1] if "input_ids" in prompt and not model.config.is_encoder_decoder else 1
    return [int(token) for token in tokens[0, before:]]


def _answers(served: OrtModel, prompts: list[dict[str, Tensor]]) -> list[list[int]]:
    """Greedy tokens of rows that share steps."""
    reader = served.generation.given_prompts
    decoder = served.decoder(rows=len(prompts))
    left: dict[int, list[int]] = {}
    answers: dict[int, list[int]] = {}
    for prompt in prompts:
        ids = prompt["input_ids"][0].numpy()
        made: dict[str, Any] = {name: value.numpy() for name, value in prompt.items()}
        has_images = "pixel_values" in prompt or IMAGE in ids
        row = decoder.open(None, reader.given(ids, made, None) if has_images else None)
        left[row], answers[row] = ids.tolist(), []
    while left:
        read = {row: tokens[: decoder.chunk] for row, tokens in left.items()}
        for row, logits in decoder.step(read).items():
            left[row] = left[row][len(read[row]) :]
            if not left[row]:
                answers[row].append(int(np.argmax(logits if logits.ndim == 1 else logits[-1])))
                left[row] = [answers[row][-1]]
            if len(answers[row]) == ANSWER:
                del left[row]
    return [answers[row] for row in sorted(answers)]
