"""`--image` of `gralora-fx generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from gralora_fx.base.sources.model_files import usable_path
from gralora_fx.core.config.option import Option
from gralora_fx.errors import ConfigError


@dataclass(frozen=True)
class PromptImages:
    """Images of a prompt."""

    # the paths of their files
    image: Annotated[
        tuple[str, ...],
        Option(
            "Ask about this image, with a model that reads images: the prompt is a message of a chat, or for an "
            "encoder-decoder what its answer begins with; may be repeated.",
            metavar="FILE",
            left_out="none",
        ),
    ] = ()

    TASK: ClassVar = "image-text-to-text-with-past"
    IS_BESIDE: ClassVar = True
    ALONE: ClassVar = "image-to-text-with-past"

    def content(self) -> list[bytes]:
        """Read the files, before anything slow is imported."""
        found: list[bytes] = []
        for path in self.image:
            try:
                found.append(usable_path(path, ConfigError).read_bytes())
            except OSError as error:
                raise ConfigError(f"{path} cannot be read ({error.strerror}); give the path of an image") from error
        return found

    def inputs(self, model: Any, content: list[bytes]) -> dict[str, Any]:
        """Return the images as arguments of `generate`."""
        if model.encoder_inputs is not None and len(content) > 1:
            raise ConfigError(f"the model reads one image for an answer, and {len(content)} were given; give one")
        return {"images": content if model.encoder_inputs is None else content[0]}
