"""Parts of messages that are images: those of OpenAI's chats, and those of its responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from gralora_fx.service.protocols.openai.messages import History, Said
from gralora_fx.service.protocols.openai.strict_model import (
    INPUT_TEXT,
    TEXT_PART,
    Idle,
    ListOf,
    StrictModel,
    wrong_field,
)

_IDLE: Idle = {"detail": None}  # an image is read in the size that the model's processor makes of it


class ImageUrl(StrictModel):
    """Address of an image."""

    without_effect: ClassVar[Idle] = _IDLE

    url: str


class _Part(StrictModel):
    """A part of a message: text, or an image."""

    if TYPE_CHECKING:  # the field itself is the part's
        type: str

    @model_validator(mode="after")
    def _has_the_field_of_its_type(self) -> _Part:
        needed, other = ("image_url", "text") if "image" in self.type else ("text", "image_url")
        if getattr(self, needed) is None:
            raise wrong_field(needed, "missing", "it is missing")
        if getattr(self, other) is not None:
            raise wrong_field(other, "type", f"a part of the type {self.type} has none; leave it out")
        return self


class ChatPart(_Part):
    """A part of a message of a chat: text, or an image."""

    without_effect: ClassVar[Idle] = TEXT_PART

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @property
    def image(self) -> tuple[str, str] | None:
        """The field of an image below the part, and its URL; None of text."""
        return None if self.image_url is None else ("image_url.url", self.image_url.url)


class ResponsePart(_Part):
    """A part of a message of a response's input: text, or an image."""

    without_effect: ClassVar[Idle] = {**INPUT_TEXT, **_IDLE}

    type: Literal["input_text", "output_text", "input_image"]
    text: str | None = None
    image_url: str | None = None

    @property
    def image(self) -> tuple[str, str] | None:
        """The field of an image below the part, and its URL; None of text."""
        return None if self.image_url is None else ("image_url", self.image_url)


class _ImageContent(StrictModel):
    """The content of a message, some of whose parts may be images."""

    if TYPE_CHECKING:  # the field itself is the message's
        role: str | None
        content: str | list[ChatPart] | list[ResponsePart] | None

    @model_validator(mode="after")
    def _has_images_of_users_alone(self) -> _ImageContent:
        if self.role != "user" and any(image is not None for _, image in self._parts()):
            raise wrong_field("content", "role", f"a message of the role {self.role} has no images; leave them out")
        return self

    def _parts(self) -> list[tuple[str, tuple[str, str] | None]]:
        """Return the text and the image of each part."""
        content = self.content
        return (
            [] if content is None or isinstance(content, str) else [(part.text or "", part.image) for part in content]
        )

    def said(self, history: History, field: str) -> Said:
        """Return the content as templates take it: where it has images, in parts."""
        parts = self._parts()
        if all(image is None for _, image in parts):
            return self.content if isinstance(self.content, str) else "".join(text for text, _ in parts)
        for number, (_, image) in enumerate(parts):
            if image is not None:
                history.attached.append((f"{field}.content.{number}.{image[0]}", image[1]))
        return [{"type": "text", "text": text} if image is None else {"type": "image"} for text, image in parts]


class ChatImages(_ImageContent):
    """The content of a message of a chat."""

    content: str | ListOf[ChatPart] | None = None


class ResponseImages(_ImageContent):
    """The content of an item of a response's input."""

    content: str | ListOf[ResponsePart] | None = None


FIELDS = {"ChatMessage": ChatImages, "InputItem": ResponseImages}
