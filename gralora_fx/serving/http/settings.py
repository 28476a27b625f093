"""The settings of a service."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gralora_fx.errors import ConfigError, shown

_ROWS, _ROWS_OF_DECODER, _CHUNK = 8, 16, 64


@dataclass(frozen=True)
class ServiceSettings:
    """What a service serves, and within which bounds.

    Attributes:
        directory: The export directory; its name is the base's name.
        adapters: `.onnx_adapter` files, or directories that PEFT saved an adapter to, by the adapters' names; they are
            served beside the export's own, and instead of one of the same name.
        max_batch: The most rows of a batch, None for 8; for a decoder requests that it answers together, None for 16.
        max_queue: The most requests, or rows of an encoder, that may wait.
        max_context: Of a decoder, tokens of a prompt and its answer together; None for the model's context.
        chunk: Of a decoder, the most tokens of prompts that a step reads; None for 64.
        timeout: Seconds after which a request is given up, unless it names fewer; None for no limit.
        threads: Threads of an operator; None for one on each core that the process may use.
        adapter_root: The directory that requests may load adapters from; None if they may load none.
        api_key: The key that requests must give; None for none.
        max_body: The most bytes of a request's body, also once it is decompressed.
    """

    directory: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)
    max_batch: int | None = None
    max_queue: int = 64
    max_context: int | None = None
    chunk: int | None = None
    timeout: float | None = None
    threads: int | None = None
    adapter_root: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    max_body: int = 16 * 2**20

    def __post_init__(self) -> None:
        """Check the counts and the key.

        Raises:
            ConfigError: A count is not a whole number of at least 1, or the key is empty or not ASCII.
        """
        for name in ("max_batch", "max_queue", "max_context", "chunk", "threads", "max_body"):
            value = getattr(self, name)
            if (value is not None or name in ("max_queue", "max_body")) and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, but got {shown(value)}")
        if self.timeout is not None and not (isinstance(self.timeout, (int, float)) and 0 < self.timeout < math.inf):
            raise ConfigError(f"timeout must be a number of seconds above 0, but got {shown(self.timeout)}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("the API key must be one or more visible characters of ASCII; leave it out for none")

    @property
    def rows(self) -> int:
        """The most rows of a batch, where there are batches."""
        return self.max_batch or _ROWS

    @property
    def decoder_rows(self) -> int:
        """The most requests that a decoder answers together."""
        return self.max_batch or _ROWS_OF_DECODER

    @property
    def prompt_tokens(self) -> int:
        """The most tokens of prompts that a step reads, where there are steps."""
        return self.chunk or _CHUNK

    @property
    def base_name(self) -> str:
        """The name of the model without an adapter."""
        return self.directory.absolute().name
