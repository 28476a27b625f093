"""Images of chats in the service: fetched, opened within limits, and put into the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gralora_fx.core.loading.tokenizers import is_chat
from gralora_fx.errors import ServingError, in_command
from gralora_fx.features.images.image_files import images_of
from gralora_fx.features.images.image_limits import ServedImages
from gralora_fx.features.images.image_urls import bytes_of_url
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.limits import PromptLimit
from gralora_fx.run.generate.prompts import EncoderInput
from gralora_fx.run.generate.request_errors import WrongFieldError

_MARK = "gralora-fx"


class RequestImages:
    """Reads images of chats (see `service.engines.AttachmentReader`)."""

    kinds = ("image_url",)

    def __init__(self, prompts: Any, tokenizer: Any, served: ServedImages) -> None:
        """Take what reads prompts with opened images, a tokenizer and the bounds."""
        self._prompts, self._tokenizer, self._served = prompts, tokenizer, served
        self._writes_text = _writes(tokenizer, _MARK)

    def files(self, attached: Sequence[tuple[str, str]]) -> list[bytes]:
        """Return the files of images, each given by its field and its URL."""
        self._served.check_count(len(attached))
        return [self._file(field, url) for field, url in attached]

    def _file(self, field: str, url: str) -> bytes:
        try:
            return bytes_of_url(url, self._served.check_bytes, self._served.allow_image_host)
        except ServingError as error:
            raise WrongFieldError(field, in_command(error)) from error  # a service is started there alone

    def opened(self, files: Sequence[bytes], fields: Sequence[str]) -> Sequence[Any]:
        """Open the files of images, whose fields errors name."""
        return images_of(files, self._served, names=fields)

    def form(self, prompt: Any) -> Any:
        """Return a chat in the form in which the template writes its texts: some take nothing but lists of parts."""
        if self._writes_text or not is_chat(prompt):
            return prompt
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in prompt
        ]

    def read(
        self,
        chat: Sequence[Mapping[str, Any]],
        described: Sequence[Any],
        opened: Sequence[Any],
        adapter: str | None,
        limit: PromptLimit,
    ) -> tuple[list[int], Source | EncoderInput | None]:
        """Return the tokens of a chat with opened images, and the inputs in place of some of them."""
        for message in chat:
            content = message.get("content") or ""
            texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            limit.check_text("".join(texts), self._tokenizer)
        ids, given = self._prompts.read_one(self.form(chat), opened, adapter, described)
        return ids, given


def _writes(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer's template writes a content that is text, rather than a list of parts."""
    try:
        written = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    except Exception:  # noqa: BLE001  # templates raise what they like; a chat will say what it is
        return False
    return text in str(written)
