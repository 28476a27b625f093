"""Chats for an encoder-decoder that reads images: one message, whose text is the prompt, and its image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.tokenizers import is_chat
from gralora_fx.errors import ServingError
from gralora_fx.features.images.image_limits import ServedImages
from gralora_fx.features.images.image_prompts import encoder_source
from gralora_fx.features.images.image_sources import ImageSources
from gralora_fx.features.images.request_images import RequestImages
from gralora_fx.run.engine.limits import PromptLimit
from gralora_fx.run.generate.encoder_inputs import EncoderInputs
from gralora_fx.run.generate.prompts import EncoderInput
from gralora_fx.run.generate.request_errors import WrongFieldError
from gralora_fx.run.model import OrtModel


def reader_of(model: OrtModel, settings: ServiceSettings) -> RequestImages | None:
    """Return what reads images of requests to an open export; None if it reads none."""
    inputs, prompts = model.encoder_inputs, model.generation.given_prompts
    if prompts is None and (inputs is None or not inputs.reads_media):
        return None
    # of files that strangers damage; what is wrong with a picture is an error, or is nothing
    warnings.filterwarnings("ignore", module=r"PIL\.")
    given = prompts, model.tokenizer, settings.part(ServedImages)
    return RequestImages(*given) if inputs is None else EncoderRequests(inputs, *given)


class EncoderRequests(RequestImages):
    """Reads requests for an encoder of pixels, or of texts with an image in them."""

    def __init__(self, inputs: EncoderInputs, prompts: Any, tokenizer: Any, served: ServedImages) -> None:
        """Take what reads inputs of the encoder, what reads prompts with images if it reads texts, and the rest."""
        super().__init__(prompts, tokenizer, served)
        self._inputs = inputs

    def files(self, attached: Sequence[tuple[str, str]]) -> list[bytes]:
        """Return the file of the only image."""
        if len(attached) > 1:
            problem = f"the model reads one image for an answer, and the request has {len(attached)}; send one"
            raise WrongFieldError(attached[1][0], problem)
        return super().files(attached)

    def form(self, prompt: Any) -> Any:
        """Return a prompt without an image as it is tokenized; raise if the encoder reads pixels alone."""
        if isinstance(self._inputs, ImageSources):
            raise ServingError(
                "the model reads an image, and the request has none; send one in the message of a chat (image_url) or "
                "of a response (input_image)"
            )
        return _text_of(prompt) if is_chat(prompt) else prompt

    def read(
        self,
        chat: Sequence[Mapping[str, Any]],
        described: Sequence[Any],
        opened: Sequence[Any],
        adapter: str | None,
        limit: PromptLimit,
    ) -> tuple[list[int], EncoderInput]:
        """Return the tokens of the message, and what the encoder reads."""
        text, inputs = _text_of(chat), self._inputs
        limit.check_text(text, self._tokenizer)
        if isinstance(inputs, ImageSources):
            return inputs.beginning(text or None, self._tokenizer), inputs.of_image(opened[0])
        ids, given = self._prompts.read_one(text, opened, adapter)
        return ids, encoder_source(inputs, ids, given)


def _text_of(chat: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a chat's only message."""
    if len(chat) != 1 or chat[0].get("role") != "user":
        raise ServingError(
            "the model answers one message of the role user, and the chat has the roles "
            f"{', '.join(str(message.get('role')) for message in chat)}; send one message, without instructions"
        )
    content = chat[0].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
