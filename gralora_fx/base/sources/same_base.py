"""Comparison of the base that an adapter was trained for with the model that it is used with, loading neither.

Names come first: hub ids with their revisions, and resolved paths. If they differ, `config.json` and a sample of the
weights decide, as far as the files are available locally.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gralora_fx.base.features import parts
from gralora_fx.base.sources.model_files import MODEL_FILE, RECORD, read_json_object
from gralora_fx.errors import ConfigError, GraloraError, Message, listed, marked, option, shown, warn_caller

if TYPE_CHECKING:
    from gralora_fx.base.sources.base_quantization import BaseQuantization

SAME, DIFFERENT, UNKNOWN = "same", "different", "unknown"
NAME, REVISION, CONFIG, WEIGHTS, QUANTIZATION = "name", "revision", "config.json", "weights", "quantization"

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--(.+)")

# fields of config.json that set shapes; others, such as labels and token ids, may differ for one base
_SIZES = (
    *("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "vocab_size"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    *("num_decoder_layers", "num_encoder_layers"),
    *("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "hidden_dim"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("num_key_value_heads", "head_dim", "d_kv"),
    *("patch_size", "num_channels", "num_mel_bins", "hidden_sizes", "depths"),
)

_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|shared|embed_in|embed_out)\.weight$")


def is_embedding(parameter: str) -> bool:
    """Return whether a parameter's name is that of an embedding, which PEFT may save beside an adapter."""
    return _EMBEDDINGS.search(parameter) is not None


@dataclass(frozen=True)
class BaseSource:
    """Known facts of a base model."""

    name: str | None  # its directory or hub id as it was given; None without a name, as for a model made in memory
    revision: str | None = None  # revision or commit of the hub repository, if known
    fields: Mapping[str, Any] | None = None  # its configuration in use; None for that of its directory
    # its quantization in use as a record (see `BaseQuantization.of`); None for that of its configuration
    record: Any = None
    is_resized: bool = False  # whether its vocabulary may have been resized since: its size and embeddings tell nothing

    @cached_property
    def directory(self) -> Path | None:
        """Its local directory: the path given, or a snapshot in the hub's cache; None if there is none."""
        if not self.name:
            return None
        try:
            path = Path(self.name)
            if path.is_dir():
                return path.resolve()
        except (OSError, ValueError):  # too long for a path, or with a zero byte
            return None
        return None if self.hub_id is None else _cached_snapshot(self.hub_id, self.revision)

    @cached_property
    def hub_id(self) -> str | None:
        """Its hub id: the name, or the repository of the cached snapshot at that path."""
        if not self.name:
            return None
        try:
            path = Path(self.name)
            if not path.is_dir():
                return self.name if _HUB_ID.fullmatch(self.name) else None
            parents = path.resolve().parents
        except (OSError, ValueError):
            return None
        match = _SNAPSHOT.fullmatch(parents[1].name) if len(parents) > 1 and parents[0].name == "snapshots" else None
        return None if match is None else match[1].replace("--", "/")

    @cached_property
    def commit(self) -> str | None:
        """The commit of its files, if known."""
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        is_snapshot = self.hub_id is not None and self.directory is not None
        return self.directory.name if is_snapshot and self.directory is not None else None

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """Its configuration, if known."""
        if self.fields or self.directory is None:  # an empty one identifies nothing
            return self.fields
        return read_config_fields(self.directory)

    @cached_property
    def quantization(self) -> BaseQuantization | None:
        """Its quantization in use; None for floats, and if unknown."""
        record = self.record or (self.config or {}).get(RECORD)
        if record:
            from gralora_fx.base.sources.base_quantization import recorded_quantization  # for quantized bases only

            return recorded_quantization(record)
        if self.directory is None or not (read_config_fields(self.directory) or {}).get("quantization_config"):
            return None
        from gralora_fx.base.sources.saved_weights import stored_quantization

        return stored_quantization(self.directory)


@dataclass(frozen=True)
class BaseComparison:
    """Comparison of an adapter's base with the model that it is used with."""

    made_for: str | None  # the base that the adapter's configuration names, or None
    revision: str | None  # the revision that it names, or None
    used_with: str | None  # the model's name, or None if it has none
    # what was compared: `"name"`, `"revision"`, `"config.json"`, `"weights"`, `"quantization"`
    compared: tuple[str, ...]
    outcome: str  # `"same"`, `"different"` or `"unknown"`
    reason: str = ""  # why it is not known to be the same, in words; empty if it is
    # distance of the model's weights from the base's, relative to their norm, if one of both is quantized and they
    # could be compared; None otherwise
    change: float | None = None

    @property
    def is_proven_different(self) -> bool:
        """Return whether configurations, weights or quantization differ, rather than only names or commits."""
        return self.outcome == DIFFERENT and not {CONFIG, WEIGHTS, QUANTIZATION}.isdisjoint(self.compared)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a record."""
        return {**asdict(self), "compared": list(self.compared)}

    def settle(self, adapter: object, *, strict: bool, error: type[GraloraError]) -> None:
        """Warn unless the base is the same; with `strict`, raise instead."""
        if self.outcome == SAME:
            return
        if strict:
            raise error(
                f"{self.text(adapter)}; give the base that it was made for, or leave {option(strict_base=True)} out"
            )
        if self.made_for and (self.used_with or self.outcome == DIFFERENT):
            warn_caller(self.text(adapter))

    def text(self, adapter: object) -> str:
        """Say which base an adapter was made for and with which it is used, for a message."""
        if not self.made_for:
            return f"{adapter} is used with {self.used_with or 'a model without a name'}: {marked(self.reason)}"
        made_for = f"{self.made_for} (revision {self.revision})" if self.revision else self.made_for
        may_be = "another base" if self.outcome == DIFFERENT else "which may be another base"
        used_with = self.used_with or "a model without a name"
        return f"{adapter} was made for {made_for}, and is used with {used_with}, {may_be}: {marked(self.reason)}"


def compare_bases(made: BaseSource, used: BaseSource) -> BaseComparison:
    """Compare the base that an adapter or an export was made for with the model that it is used with."""
    compared, outcome, reason = _compared(made, used)
    change = None
    if outcome != DIFFERENT and made.quantization and not made.quantization.has_weights_of(used.quantization):
        compared, outcome = (*compared, QUANTIZATION), DIFFERENT
        reason, change = _differently_quantized(made, used)
    return BaseComparison(made.name or None, made.revision or None, used.name, compared, outcome, reason, change)


def _differently_quantized(made: BaseSource, used: BaseSource) -> tuple[str, float | None]:
    """Describe how two quantizations of one base differ, and return the relative change of the weights."""
    from gralora_fx.base.sources.saved_weights import differing_weights

    other = "float" if used.quantization is None else str(used.quantization)
    one, two = made.directory or used.directory, used.directory or made.directory
    change: float | None = None
    if one is None or two is None:
        measured = f"the difference is not measured, since no weights of {made.name or used.name} are at hand"
    else:
        try:
            found = differing_weights(one, two, made.quantization, used.quantization)
        except ConfigError as error:
            found, measured = None, f"the difference is not measured ({marked(error)})"
        else:
            measured = "the difference is not measured, since their weights cannot be compared"
        change = None if found is None else found.change
    if change is not None:
        measured = f"they differ by {100 * change:.2g} % of their norm"
    remedy = "take its quantized checkpoint"
    if made.quantization is not None and made.quantization.texts:  # floats can be rounded so
        remedy = f"take {option(base_quantization=str(made.quantization))} with the float base, or its checkpoint"
        remedy += " in few bits"
    reason = f"its base was in {made.quantization}, and the weights here are {other}: {measured}; {remedy}"
    return Message(reason), change


def read_config_fields(directory: Path) -> Mapping[str, Any] | None:
    """Return the fields of a directory's `config.json`; None if it is missing or unreadable."""
    try:
        return read_json_object(directory / MODEL_FILE, GraloraError)
    except GraloraError:
        return None


def _compared(made: BaseSource, used: BaseSource) -> tuple[tuple[str, ...], str, str]:
    """Return what was compared, the outcome and the reason."""
    if not made.name and made.fields is None:
        return (), UNKNOWN, "its adapter_config.json names no base model, so there is nothing to compare"
    name, its = made.hub_id, used.hub_id
    is_named_alike = name is not None and its is not None and name.casefold() == its.casefold()
    if is_named_alike or (made.directory is not None and made.directory == used.directory):
        has_fields = made.fields is not None or used.fields is not None  # the name may refer to another model now
        if has_fields and made.config is not None and used.config is not None:
            if different := _differing_fields(made, used):
                return (NAME, CONFIG), DIFFERENT, different
        return _revisions(made, used) if is_named_alike else ((NAME,), SAME, "")
    compared = (NAME,) if made.name and used.name else ()
    if made.config is None or used.config is None:
        lacking = (made if made.config is None else used).name or "the model"
        return compared, UNKNOWN, f"no config.json of {lacking} is available, so only the names can be compared"
    different = _differing_fields(made, used)
    if different is None:
        known = "their configurations have no common field that would tell them apart"
    else:
        compared, known = (*compared, CONFIG), "both have the same model_type and sizes"
    if different:
        return compared, DIFFERENT, different
    one, other = made.directory, used.directory
    from gralora_fx.base.sources.saved_weights import differing_weights

    left_out = is_embedding if made.is_resized else None
    weights = None if one is None or other is None else differing_weights(one, other, left_out=left_out)
    if weights is None:
        return compared, UNKNOWN, f"{known}, but the weights cannot be compared"
    compared = (*compared, WEIGHTS)
    if weights.differing:
        differing = f"{weights.differing} of {weights.common} weights have other values"
        return compared, DIFFERENT, f"{known}, but {differing}"
    return compared, SAME, ""


def _revisions(made: BaseSource, used: BaseSource) -> tuple[tuple[str, ...], str, str]:
    """Compare revisions of one hub repository; an adapter without a revision matches any."""
    if not made.revision or made.revision == used.revision:
        return (NAME, REVISION) if made.revision else (NAME,), SAME, ""
    if made.commit is None or used.commit is None:
        return (NAME,), UNKNOWN, f"which commit is its revision {shown(made.revision)}, or the model's, is not known"
    if made.commit == used.commit:
        return (NAME, REVISION), SAME, ""
    return (NAME, REVISION), DIFFERENT, f"the model is of commit {used.commit[:12]}, not {made.commit[:12]}"


def _differing_fields(made: BaseSource, used: BaseSource) -> str | None:
    """Describe how two configurations differ: "" if they do not, None if they have no fields in common.

    A model contained in another is the same base: each whole is compared with the other whole and with its parts, but
    never parts with parts, such as the vision towers of two sizes of a model.
    """
    one, other = made.config or {}, used.config or {}
    sizes = [name for name in ("model_type", *_sizes()) if name != "vocab_size" or not made.is_resized]
    pairs = [(one, other), *((one, part) for part in _parts(other)), *((part, other) for part in _parts(one))]
    found = [differences for a, b in pairs if (differences := _differences(a, b, sizes)) is not None]
    if not found or not all(found):
        return "" if found else None
    closest = next((differences for differences in found if not differences[0].startswith("model_type ")), found[0])
    return listed(closest, 6)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the configurations of a model's parts, recursively."""
    for value in config.values():
        if isinstance(value, Mapping):
            if "model_type" in value:
                yield value
            yield from _parts(value)


def _sizes() -> tuple[str, ...]:
    return (*_SIZES, *(name for names in parts("config sizes") for name in names))


def _differences(
    one: Mapping[str, Any], other: Mapping[str, Any], sizes: Sequence[str], prefix: str = ""
) -> list[str] | None:
    """Return fields that differ, also in parts of the same name; None if they have none in common."""
    fields = [name for name in sizes if one.get(name) is not None and other.get(name) is not None]
    pairs = {name: (_plain(one[name]), _plain(other[name])) for name in fields}
    found = [
        f"{prefix}{name} {first} and {second}"
        for name, (first, second) in pairs.items()
        if first != second and not (prefix and name == "model_type" and _is_renamed(str(first), str(second)))
    ]
    is_known = bool(fields)
    for name, part in one.items():
        same = other.get(name)
        if isinstance(part, Mapping) and isinstance(same, Mapping) and ("model_type" in part or "model_type" in same):
            within = _differences(part, same, sizes, f"{prefix}{name}.")
            is_known = is_known or within is not None
            found += within or []
    return found if is_known else None


def _is_renamed(one: str, other: str) -> bool:
    """Return whether two model types are one, since newer transformers versions use longer names for parts."""
    return one.startswith(f"{other}_") or other.startswith(f"{one}_")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _cached_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """Return a repository's snapshot in the hub's cache; None if it was not downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE  # seldom needed

    folder = Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    name = revision or "main"
    try:
        reference = folder / "refs" / name
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else name
        snapshot = folder / "snapshots" / commit
        return snapshot if snapshot.is_dir() else None
    except (OSError, ValueError):
        return None
