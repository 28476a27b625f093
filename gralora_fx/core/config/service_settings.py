"""The settings of a service, and those for spans in OpenTelemetry's environment variables."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from gralora_fx.base.amounts import read_size, size_problem
from gralora_fx.base.compat.packages import installation, missing_packages
from gralora_fx.core.config.option import Option, check_options
from gralora_fx.errors import ConfigError, option, shown, warn_caller

# options that have no effect on a model that does not answer prompts
OF_DECODERS = ("max_context", "chunk", "prefix_cache", "max_memory", "speculative_tokens")
_count = partial(Option, metavar="N", least=1)  # an option that is a whole number above 0
_ROWS, _ROWS_OF_DECODER, _CHUNK = 8, 16, 64
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\sA-Z/?#@]+")
_Record = TypeVar("_Record")
_PREFIX_CACHE, _NO_CACHE = "512MiB", ("0", "none")


def _timeout_problem(value: Any) -> str | None:
    if isinstance(value, (int, float)) and 0 < value < math.inf:
        return None
    return f"{option('timeout')} must be a number of seconds above 0, but got {shown(value)}"


def _key_problem(value: str) -> str | None:
    if value.isascii() and value.isprintable() and value:
        return None
    return "the API key must be one or more visible characters of ASCII; leave it out for none"


def _origin_problem(value: Any) -> str | None:
    if isinstance(value, str):
        return f"allow_origin is a sequence of origins, but got {shown(value)}"
    wrong = next((one for one in value if one != "*" and _ORIGIN.fullmatch(one) is None), None)
    if wrong is None:
        return None
    return (
        f"{option('allow_origin')} must be * or an origin as browsers name it, such as https://example.org or "
        f"http://localhost:5173, in lower case and without a path, but got {shown(wrong)}"
    )


def _cache_problem(value: Any) -> str | None:
    if value in _NO_CACHE or read_size(value) is not None:
        return None
    return f"{option('prefix_cache')} must be a number of bytes, such as 512MiB or 2GB, or none, but got {shown(value)}"


@dataclass(frozen=True)
class ServiceSettings:
    """The models that a service serves, and its limits.

    Attributes:
        directory: The export directory; its name is the base's name.
        adapters: `.onnx_adapter` files, or directories that PEFT saved an adapter to, by the adapters' names; they are
            served beside the export's own adapters, and replace those of the same name.
        adapter_root: The directory whose adapters requests may name, and load; None if there is none.
        max_adapters: The most adapters in memory; None for 64, or for the number at the start if that is larger.
        max_adapter_rank: The largest rank of an adapter; None for no limit.
        max_adapter_memory: The most bytes of all adapters in memory, such as `512MiB`; None for no limit.
        max_batch: The most rows of an encoder's batch, None for 8; the most requests that a decoder answers together,
            None for 16.
        max_queue: The most requests, or rows of an encoder, that may wait.
        max_context: For a decoder, the most tokens of a prompt and its answer together; None for the model's context.
        chunk: For a decoder, the most tokens of prompts that a step reads beside answers; None for 64.
        prefix_cache: For a decoder, the most bytes of the cache that prompts with a common prefix share, such as `2GB`;
            `0` or `none` for no cache, None for 512 MiB if the export supports one.
        max_memory: For a decoder, the most bytes of the rows' caches, the copies of their adapters, and the prefix
            cache, such as `2GB`; None for no bound.
        speculative_tokens: For a decoder, the most tokens of an answer that are proposed for a step, copied from
            earlier in its text; 0 for none, None for 16.
        timeout: Seconds after which a request is given up, unless it sets fewer; None for no limit.
        threads: Threads of an operator; None for one on each core that the process may use.
        api_key: The key that requests must give; None for none.
        max_body: The most bytes of a request's body, also once it is decompressed.
        allow_origin: Origins whose pages may use the service in a browser, such as `https://example.org`; `*` for any.
        more: Records of options that features add; defaults for missing ones.
    """

    directory: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)
    adapter_root: Annotated[
        Path | None,
        Option(
            "Let requests name, load and unload adapters in this directory: .onnx_adapter files, PEFT's directories.",
            metavar="DIR",
        ),
    ] = None
    max_adapters: Annotated[
        int | None,
        _count(
            "Keep at most this many adapters in memory; those of the root go first, the least recently used one first.",
            left_out="64, or those given at the start if they are more",
        ),
    ] = None
    max_adapter_rank: Annotated[int | None, _count("Refuse adapters of a larger rank.", left_out="no limit")] = None
    max_adapter_memory: Annotated[
        str | None,
        Option(
            "Keep adapters in at most this much memory, such as 512MiB.",
            metavar="SIZE",
            left_out="no limit",
            problem=partial(size_problem, "max_adapter_memory"),
        ),
    ] = None
    max_batch: Annotated[
        int | None, _count("Run at most this many rows, such as answers, together.", left_out="16; 8 for an encoder")
    ] = None
    max_queue: Annotated[int, _count("Let at most this many requests wait; others get status 429.")] = 64
    max_context: Annotated[
        int | None,
        _count(
            "Allow at most this many tokens of a prompt with its answer, for a model that generates.",
            left_out="the model's context",
        ),
    ] = None
    chunk: Annotated[
        int | None,
        _count(
            "Read at most this many tokens of new prompts in a step beside answers, for a model that generates.",
            left_out="64",
        ),
    ] = None
    prefix_cache: Annotated[
        str | None,
        Option(
            "Cache common prefixes of prompts in at most this much memory, such as 2GB; 0 or none caches nothing.",
            metavar="SIZE",
            left_out="512MiB",
            problem=_cache_problem,
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        Option(
            "Keep all caches in at most this much memory: of rows, of what prompts share, of adapters that rows use.",
            metavar="SIZE",
            left_out="no bound",
            problem=partial(size_problem, "max_memory"),
        ),
    ] = None
    speculative_tokens: Annotated[
        int | None,
        Option(
            "Guess at most this many tokens of an answer from its text, and check them in one step; 0 guesses none.",
            metavar="N",
            left_out="as many as pay, up to 16",
            least=0,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        Option(
            "Cancel a request after this many seconds, with status 504.",
            metavar="SECONDS",
            left_out="no limit",
            problem=_timeout_problem,
        ),
    ] = None
    threads: Annotated[
        int | None, _count("Compute on this many threads.", left_out="one on each core that may be used")
    ] = None
    api_key: Annotated[
        str | None,
        Option(
            "Ask every request for this key, as Authorization: Bearer KEY.",
            metavar="KEY",
            environment="GRALORA_FX_API_KEY",
            problem=_key_problem,
        ),
    ] = field(default=None, repr=False)
    max_body: Annotated[
        int,
        Option(
            "Refuse a request whose body has more bytes than this, also once it is decompressed.",
            metavar="BYTES",
            least=1,
        ),
    ] = 16 * 2**20
    allow_origin: Annotated[
        tuple[str, ...],
        Option(
            "Let pages of this origin use the service, such as https://example.org, or * for any; may be repeated.",
            metavar="ORIGIN",
            problem=_origin_problem,
        ),
    ] = ()
    more: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        check_options(self, ConfigError)
        if self.max_memory is not None and (read_size(self.prefix_cache) or 0) > (self.memory_bytes or 0):
            raise ConfigError(
                f"{option(prefix_cache=self.prefix_cache)} is more than {option(max_memory=self.max_memory)}, of "
                "which it is a part; give less, or leave it out"
            )

    def part(self, kind: type[_Record]) -> _Record:
        """Return the record of a feature's options.

        Args:
            kind: The class of the record, which has defaults for all of them.
        """
        return next((record for record in self.more if isinstance(record, kind)), None) or kind()

    @property
    def adapter_bytes(self) -> int | None:
        """The most bytes of all adapters in memory; None for no limit."""
        return read_size(self.max_adapter_memory)

    @property
    def rows(self) -> int:
        """The most rows of an encoder's batch."""
        return self.max_batch or _ROWS

    @property
    def decoder_rows(self) -> int:
        """The most requests that a decoder answers together."""
        return self.max_batch or _ROWS_OF_DECODER

    @property
    def prompt_tokens(self) -> int:
        """The most tokens of prompts that a decoder's step reads."""
        return self.chunk or _CHUNK

    @property
    def proposed(self) -> int | None:
        """The most tokens of an answer that are proposed for a step; None to choose by measured benefit."""
        return self.speculative_tokens

    @property
    def memory_bytes(self) -> int | None:
        """The most bytes of all caches; None for no bound."""
        return read_size(self.max_memory)

    @property
    def prefix_bytes(self) -> int | None:
        """The most bytes of the prefix cache; None for no cache."""
        if self.prefix_cache in _NO_CACHE:
            return None
        size = read_size(self.prefix_cache or _PREFIX_CACHE)
        return size if size is None or self.memory_bytes is None else min(size, self.memory_bytes)

    @property
    def base_name(self) -> str:
        """The name of the model without an adapter."""
        return self.directory.absolute().name


@dataclass(frozen=True)
class ConnectionLimits:
    """The bounds on connections.

    Attributes:
        connections: The most connections; requests on others are answered with 503.
        read_timeout: Seconds in which a request must arrive, from its first byte to its last.
    """

    connections: int = 512
    read_timeout: float = 30.0


EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def span_exporters() -> list[str]:
    """Return the names of the span exporters set in the environment; empty if spans are off."""
    names = [name for text in os.environ.get(EXPORTER, "").split(",") if (name := text.strip())]
    is_disabled = "none" in names or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or _asking() is None:
        return []
    return names or ["otlp"]


def warn_of_missing_spans() -> bool:
    """Warn if the environment asks for spans and OpenTelemetry is not installed; return whether that is so."""
    if not span_exporters() or "opentelemetry-sdk" not in missing_packages("otel"):
        return False
    warn_caller(
        f"{_asking()} is set, but requests are not traced, since opentelemetry-sdk is not installed: "
        f"{installation('otel')}"
    )
    return True


def _asking() -> str | None:
    """Return the environment variable that asks for spans; None if none does."""
    return next((name for name in (EXPORTER, *_ENDPOINTS) if os.environ.get(name, "").strip(" ,")), None)
