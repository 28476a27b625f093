"""`to_lora`: convert a saved adapter to a plain LoRA checkpoint, from its tensors alone."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.progress.report import Invocation, Report, Summary, written, written_lines
from gralora_fx.base.sources import ACTING
from gralora_fx.core.adapters.adapter_files import adapter_writers
from gralora_fx.core.adapters.parameter_keys import names_parameter, parameter_keys
from gralora_fx.core.adapters.stored_adapter import StoredAdapter, open_adapter
from gralora_fx.core.config import CONFIG_NAME, AdapterConfig
from gralora_fx.core.config.checks import KEY_PREFIX, check_integer, fullmatch
from gralora_fx.core.methods.arrays import to_numpy
from gralora_fx.core.methods.forms import Truncated, truncate, update_norm
from gralora_fx.core.methods.lora import Lora, LoraConfig
from gralora_fx.core.methods.method import Update
from gralora_fx.core.planning.targets import rule_of
from gralora_fx.errors import CheckpointError, ConfigError, command, option
from gralora_fx.exporters.artifact.staging import check_converted, file_sizes, staged

if TYPE_CHECKING:
    import torch

_LORA = Lora()
Pair = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class LoraSite:
    """A site of the result."""

    path: str  # its module path
    exact_rank: int  # rank of the exact LoRA form: `k*r + hybrid_r` of GraLoRA
    rank: int  # rank that was written
    error: float  # `||dW - dW_N|| / ||dW||`, in the Frobenius norm; 0 for the exact form


@dataclass(frozen=True)
class LoraReport(Report):
    """The result of `to_lora`.

    Attributes:
        output_dir: The directory written.
        files: Its files with their sizes in bytes.
        sites: The adapted layers.
        error: Relative error over all sites: `||dW - dW_N|| / ||dW||` with all updates in one vector.
        dtype_name: Dtype of the LoRA tensors, such as `float32`.
    """

    output_dir: Path
    files: dict[str, int]
    sites: tuple[LoraSite, ...]
    error: float
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the LoRA tensors."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def ranks(self) -> dict[str, int]:
        """The rank at each site, by path."""
        return {site.path: site.rank for site in self.sites}

    @property
    def errors(self) -> dict[str, float]:
        """The relative error at each site, by path."""
        return {site.path: site.error for site in self.sites}

    @property
    def summary(self) -> Summary:
        """Lines on the loss, the files written, and how the result is used."""
        place = str(self.output_dir)
        result = f"exact: a LoRA with the adapter's own updates, {self._sizes}"
        if not self._is_exact:
            site = max(self.sites, key=lambda one: one.error)
            result = f"truncated to {self._sizes}: {self.error:.1e} of the update lost, {site.error:.1e} at {site.path}"
        usage = Invocation(f"from peft import PeftModel; PeftModel.from_pretrained(model, {place!r})")
        return Summary(result, written(self.output_dir, self.files), usage)

    @property
    def _is_exact(self) -> bool:
        return all(site.rank == site.exact_rank for site in self.sites)

    @property
    def _sizes(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"{shown} at {len(self.sites)} layers, {self.dtype_name}"

    @property
    def details(self) -> str:
        """Lines on the files and the ranks; if ranks were truncated, the error of each layer too."""
        lines = written_lines(self.output_dir, self.files)
        lines.append(f"{self._sizes}, scale 1")
        if self._is_exact:
            return "\n".join([*lines, "exact: the updates are those of the adapter"])
        width = max(len(site.path) for site in self.sites)
        lines.append(f"{'layer':<{width}}{'exact rank':>12}{'rank':>6}{'error':>10}")
        lines += [f"{s.path:<{width}}{s.exact_rank:>12}{s.rank:>6}{s.error:>10.2e}" for s in self.sites]
        return "\n".join([*lines, f"error over all layers, relative: {self.error:.2e}"])


def to_lora(
    adapter_dir: str | Path, output_dir: str | Path, *, rank: int | None = None, overwrite: bool = False
) -> LoraReport:
    """Write a saved adapter as a plain LoRA checkpoint, which PEFT and servers of LoRA load.

    A GraLoRA adapter is a LoRA of rank `k*r + hybrid_r` with block-sparse factors, exactly. The scale is folded into
    `lora_B`, so `lora_alpha` is the rank; half-precision tensors become float32 if the scale would round them. No base
    model is needed.

    Args:
        adapter_dir: PEFT-format adapter: a local directory or a hub id.
        output_dir: Where to write: a new or empty directory.
        rank: Rank to truncate every update to, by its singular values; None for the exact form. LoRA and rsLoRA
            adapters can be truncated too.
        overwrite: Whether an earlier adapter in `output_dir` is replaced.

    Returns:
        The ranks, and the error of truncation.

    Raises:
        ConfigError: The adapter's configuration cannot be read, `rank` is not positive or above every exact rank, or
            the adapter is a LoRA already and no rank is given, or its update is not of low rank.
        CheckpointError: The adapter's tensors are missing, damaged, not finite or do not fit its configuration.
        ExportError: The output may not be written, or writing fails.
    """
    if rank is not None:
        check_integer(option("rank"), rank, 1)
    with open_adapter(adapter_dir) as adapter:
        check = functools.partial(check_converted, sources=[adapter.directory], marker=CONFIG_NAME, overwrite=overwrite)
        check(output_dir)
        _check_form(adapter, rank)
        pairs, sites, error = _converted(adapter, rank)
        order = [name for name in adapter.config.target_parameters or () if name in pairs]
        tensors = _by_key(pairs, order) | {key: tensor.array() for key, tensor in adapter.others.items()}
        config = _lora_config(adapter.config, {site.path: site.rank for site in sites})
        with staged(output_dir, check) as stage:
            for name, write in adapter_writers(config, lambda: tensors).items():
                write(stage / name)
    dtype = next(iter(pairs.values()))[0].dtype
    return LoraReport(Path(output_dir), file_sizes(output_dir), tuple(sites), error, dtype.name)


def _check_form(adapter: StoredAdapter, rank: int | None) -> None:
    adapter.method.check_lora_form(adapter.directory, command("to_lora"), ConfigError)
    if adapter.unnamed or not set(adapter.parameters) <= set(adapter.config.target_parameters or ()):
        raise ConfigError(
            f"{adapter.directory} does not say which of its tensors is at which parameter; load it into its model "
            "(GraloraModel.from_pretrained), save it again, and convert that"
        )
    if rank is None and isinstance(adapter.method, Lora):
        raise ConfigError(
            f"{adapter.directory} is a LoRA adapter already; use it as it is, or give {option(rank=...)} to truncate it"
        )


def _converted(adapter: StoredAdapter, rank: int | None) -> tuple[dict[str, Pair], list[LoraSite], float]:
    """Return the LoRA pairs of scale 1 by site, a record of each site, and the error over all."""
    pairs: dict[str, Pair] = {}
    sites, lost, norm = [], 0.0, 0.0
    for path in adapter.sites:
        update = adapter.update(path)
        matrices = [update] if update.stack is None else [update.matrix(e) for e in range(update.stack)]
        cuts = [_cut(one, rank) for one in matrices]
        pairs[path] = (cuts[0].A, cuts[0].B) if update.stack is None else _stacked(cuts)
        own_lost, own_norm = math.hypot(*(cut.lost for cut in cuts)), math.hypot(*(cut.norm for cut in cuts))
        exact = matrices[0].lora_form()[0].shape[0]
        sites.append(LoraSite(path, exact, cuts[0].A.shape[0], own_lost / own_norm if own_norm else 0.0))
        lost, norm = math.hypot(lost, own_lost), math.hypot(norm, own_norm)
        if not all(bool(np.isfinite(array.astype(np.float64)).all()) for array in pairs[path]):
            raise CheckpointError(f"the update at {path} is too large for float32 once its scale is folded in")
    largest = max(site.exact_rank for site in sites)
    if rank is not None and rank > largest:
        raise ConfigError(
            f"{option(rank=rank)} is more than the rank of every update of {adapter.directory}, which is at most "
            f"{largest}; nothing is to be truncated, so give a lower rank, or none for the exact form"
        )
    dtype = functools.reduce(_wider, (array.dtype for pair in pairs.values() for array in pair))
    return (
        {path: (A.astype(dtype), B.astype(dtype)) for path, (A, B) in pairs.items()},
        sites,
        lost / norm if norm else 0.0,
    )


def _cut(update: Update, rank: int | None) -> Truncated:
    """Return the update of one matrix as a pair of scale 1, truncated to `rank` if its exact rank is higher."""
    A, B = (to_numpy(array) for array in update.lora_form())
    if rank is None or A.shape[0] <= rank:
        return Truncated(A, _scaled(B, update.scale), 0.0, update_norm(A, B, update.scale))
    return truncate(A, B, update.scale, rank)


def _stacked(matrices: Sequence[Truncated]) -> Pair:
    """Return the pairs of a stack as PEFT stores them: `A [stack * r, in]`, `B [out, r * stack]` (`Lora.of_stack`)."""
    B = np.stack([one.B for one in matrices], axis=-1)
    return np.concatenate([one.A for one in matrices]), B.reshape(len(B), -1)


def _wider(one: np.dtype[Any], other: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that holds the values of both; float32 for float16 with bfloat16."""
    if one == other:
        return one
    return np.promote_types(np.promote_types(one, np.float32), other)


def _scaled(B: NDArray[Any], scale: float) -> NDArray[Any]:
    """Return `scale * B`, in float32 if a half-precision dtype would round it."""
    exact = B.astype(np.float64) * scale
    with np.errstate(over="ignore"):
        product = exact.astype(B.dtype)
        is_half = B.dtype.itemsize < np.dtype(np.float32).itemsize
        return (
            exact.astype(np.float32) if is_half and not np.array_equal(product.astype(np.float64), exact) else product
        )


def _by_key(pairs: Mapping[str, Pair], parameters: Sequence[str]) -> dict[str, NDArray[Any]]:
    keys = parameter_keys(parameters, nests=True)
    return {
        f"{KEY_PREFIX}{keys.get(path, path)}.{_LORA.keys[field]}": tensor
        for path, pair in pairs.items()
        for field, tensor in zip(("A", "B"), pair, strict=True)
    }


def _lora_config(config: AdapterConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """Return PEFT's `LoraConfig` of scale 1 that selects the same layers."""
    shared = (
        *("exclude_modules", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "layers_pattern"),
        *("task_type", "base_model_name_or_path", "revision", "base_quantization"),
    )
    fields: dict[str, Any] = {name: getattr(config, name) for name in shared} | _targets(config, ranks)
    fields[ACTING] = list(config.acts_from) or None
    r, _ = Counter(ranks.values()).most_common(1)[0]
    pattern = {_pattern_key(path, ranks): rank for path, rank in ranks.items() if rank != r}
    return LoraConfig().changed(
        r=r,
        lora_alpha=r,
        lora_dropout=config.dropout,
        bias=LoraConfig.ADAPTED_BIASES if config.trains_adapted_biases else config.bias,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        inference_mode=True,
        **fields,
    )


def _targets(config: AdapterConfig, paths: Iterable[str]) -> dict[str, Any]:
    """Return the fields that select layers: the configuration's own if they select the saved ones, else paths."""
    if config.target_parameters:
        modules = [path for path in paths if not names_parameter(config, path)]
        shared = {"target_parameters": config.target_parameters}
        return shared | (
            _targets(config.changed(target_parameters=None), modules) if modules else {"target_modules": set()}
        )
    targets = config.target_modules
    if targets is not None and not config.adapts_all_linear:
        rule = rule_of(config, None)
        if all(rule.rejection(path) is None for path in paths):
            return {"target_modules": targets}
    return {"target_modules": set(paths), "layers_to_transform": None, "layers_pattern": None}


def _pattern_key(path: str, paths: Iterable[str]) -> str:
    """Return a key of PEFT's patterns that matches one path only: a regular expression for the end of a path."""
    is_plain = fullmatch(r"[\w.]+", path)
    key = path if is_plain else "".join(c if c.isalnum() or c in "._" else f"\\{c}" for c in path)
    return f"^{key}" if any(other.endswith(f".{path}") for other in paths) else key
