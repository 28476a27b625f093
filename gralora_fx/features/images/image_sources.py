"""Images as inputs of an encoder-decoder that writes down what it sees: lines of text, forms, captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NoReturn

import numpy as np

from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.core.loading.tokenizers import is_ids
from gralora_fx.errors import ServingError, first_line, remedy, shown
from gralora_fx.features.images.processors import load_image_processor
from gralora_fx.features.images.tasks_and_inputs import IMAGES
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.generate.encoder_inputs import EncoderInputs
from gralora_fx.run.generate.prompts import AnswerCall, EncoderInput, GenerateInputs, Prompts

_EXAMPLE = 32  # height and width of an example


@dataclass(frozen=True)
class ImageSources(EncoderInputs):
    """Reads images for an encoder that takes their pixels, one for each answer; a prompt begins the answer."""

    replaces_start: bool = False  # whether a prompt of the model stands in place of its start token, as Donut's do

    reads_media: ClassVar[bool] = True

    @classmethod
    def fields_of(cls, manifest: Manifest, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return whether a prompt replaces the start token."""
        return {"replaces_start": "donut" in str((config.get("encoder") or {}).get("model_type"))}

    @classmethod
    def reads(cls, inputs: Mapping[str, Any]) -> bool:
        """Return whether an encoder takes pixels."""
        return IMAGES in inputs

    @cached_property
    def _processor(self) -> Any:
        return load_image_processor(self.directory, ServingError)

    def refuse(self) -> NoReturn:
        """Raise a `ServingError`, since texts are not read."""
        raise ServingError(
            f"{self.directory} reads images, not text; give {remedy(f'images, or {IMAGES}', '--image FILE')}"
        )

    def read(self, inputs: GenerateInputs, call: AnswerCall) -> Prompts:
        """Read the arguments of `generate` (see `Generation.read`)."""
        call.start.check_unused("the model reads images", "language", "task", "forced_bos_token_id")
        for name in ("input_ids", "attention_mask"):
            inputs.check_unused("the beginning of an answer is a prompt, as text or ids", name)
        if inputs.media is None and not inputs.features:
            self.refuse()
        if inputs.media is not None and inputs.features:
            raise ServingError(f"images and {IMAGES} are both given; give one of them")
        sources = [self._of_image(image) for image in _listed(inputs.media)] or self.of_features(inputs.features)
        beginnings = inputs.prompts
        is_one = beginnings is None or isinstance(beginnings, str) or is_ids(beginnings)
        given = [beginnings] * (len(sources) if beginnings is None else 1) if is_one else list(beginnings)
        if len(given) != len(sources):
            raise ServingError(f"{len(given)} prompts and {len(sources)} images were given; give one for each answer")
        rows = [self.beginning(each, call.tokenizer) for each in given]
        is_text = not inputs.features and not any(is_ids(each) for each in given)
        if is_text:
            self.check_writes(call.tokenizer, IMAGES)
        is_single = is_one and (beginnings is not None or not (inputs.features or _is_list(inputs.media)))
        return Prompts(rows, is_single, is_text, sources)

    def example(self, ids: Sequence[int]) -> EncoderInput:
        """Return an example input: a black image."""
        return self._of_image(np.zeros((_EXAMPLE, _EXAMPLE, 3), np.uint8))

    def _of_image(self, image: Any) -> EncoderInput:
        """Open an image as a caller gives it, and return its pixels."""
        from gralora_fx.features.images.image_files import images_of
        from gralora_fx.features.images.image_limits import ImageLimits

        if _is_list(image):
            if len(image) != 1:
                raise ServingError(f"the model reads one image for an answer, and {len(image)} were given")
            (image,) = image
        return self.of_image(images_of([image], ImageLimits())[0])

    def of_image(self, opened: Any) -> EncoderInput:
        """Return the pixels of an opened image."""
        try:
            pixels = self._processor(images=[opened], return_tensors="np")[IMAGES]
        except Exception as error:  # processors raise what they like
            raise ServingError(f"the processor does not take the image ({first_line(error)})") from error
        return self.of_features({IMAGES: pixels})[0]

    def beginning(self, prompt: Any, tokenizer: TextTokenizer | None) -> list[int]:
        """Return the tokens with which an answer begins, as transformers has them."""
        if prompt is None:
            return [self.rules.start]
        if is_ids(prompt):
            ids = [int(token) for token in prompt]
        elif isinstance(prompt, str) and tokenizer is not None:
            ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        else:
            raise ServingError(f"a prompt is the beginning of an answer, a text or ids, but got {shown(prompt)}")
        if (wrong := self.limits.outside(ids)) is not None:
            raise ServingError(f"the prompt holds token {wrong}, outside the vocabulary of {self.limits.vocabulary}")
        is_whole = bool(ids) and (self.replaces_start or ids[0] == self.rules.start)
        return ids if is_whole else [self.rules.start, *ids]


def _is_list(images: Any) -> bool:
    return isinstance(images, (list, tuple))


def _listed(images: Any) -> Sequence[Any]:
    return images if _is_list(images) else [] if images is None else [images]
