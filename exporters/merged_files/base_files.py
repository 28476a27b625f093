"""The files of a base model: the layouts of its shards, and the names its tensors have in the model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_fx.adapters.agreement import KnownLayers
from gralora_fx.errors import CheckpointError, TraceError, bulleted, first_line
from gralora_fx.sources.safetensors_layout import Extent, Layout, opened_for_reading, read_layout
from gralora_fx.sources.stored_tensors import INDEX_NAME, SINGLE_NAME, stored_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FILES = (
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "*.tiktoken", "*.spm", "*.vocab"),
    *("*.bpe", "LICENSE*", "NOTICE*"),
)  # what of a hub repository is downloaded: no weights in other formats


@dataclass(frozen=True)
class BaseFiles:
    """The weights of a model directory.

    Attributes:
        directory: The directory.
        shards: Its safetensors files.
        shard_of: The shard of each key.
        has_index: Whether an index says which shard holds which tensor.
    """

    directory: Path
    shards: tuple[Layout, ...]
    shard_of: Mapping[str, Layout]
    has_index: bool

    def extent(self, key: str) -> Extent:
        """Where a tensor lies in its shard."""
        return self.shard_of[key].tensors[key]


def read_base(directory: Path) -> BaseFiles:
    """The layouts of a model's safetensors files, each checked to be whole.

    Raises:
        CheckpointError: There are none, one is damaged, or they are not what the index says.
    """
    stored = stored_tensors(directory)
    files = sorted({tensor.file for tensor in stored.values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}, which {INDEX_NAME} names; copy the model again")
    shards = tuple(read_layout(file) for file in files)
    shard_of: dict[str, Layout] = {}
    for shard in shards:
        for key in shard.tensors:
            if key in shard_of:
                raise CheckpointError(
                    f"{directory}: {key} is in {shard_of[key].file.name} and in {shard.file.name}; save the model again"
                )
            shard_of[key] = shard
    astray = [key for key, tensor in stored.items() if key not in shard_of or shard_of[key].file != tensor.file]
    if astray:
        raise CheckpointError(
            f"{directory}: {', '.join(astray[:3])} is not in the file that {INDEX_NAME} says; copy the model again"
        )
    return BaseFiles(directory, shards, shard_of, files != [directory / SINGLE_NAME])


@contextmanager
def open_shards(base: BaseFiles) -> Iterator[dict[str, int]]:
    """A descriptor for each shard, by file name."""
    with ExitStack() as stack:
        yield {shard.file.name: stack.enter_context(opened_for_reading(shard.file)) for shard in base.shards}


@dataclass(frozen=True)
class Names:
    """What the tensors of the files are in the model.

    Attributes:
        model: The model without values; None for a class that transformers does not have.
        keys: Keys in the files by the model's names.
        parts: Names of parameters that are put together from several tensors of the files.
        transposed: Without a model, whether layers store their weights `[in, out]`, if the files show it.
    """

    model: PreTrainedModel | None
    keys: Mapping[str, str]
    parts: Set[str]
    transposed: bool | None = None

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by every name that they have."""
        return {} if self.model is None else dict(self.model.named_parameters(remove_duplicate=False))

    @property
    def layers(self) -> KnownLayers | None:
        """The model's linear layers; None without a model."""
        if self.model is None:
            return None
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        modules = self.model.named_modules()
        paths = [path for path, module in modules if isinstance(module, (nn.Linear, Conv1D))]
        return KnownLayers(paths, self.model.config.model_type)

    @functools.cached_property
    def _groups(self) -> dict[int, list[str]]:
        groups: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(id(parameter), []).append(name)
        return groups

    def tied_with(self, name: str) -> list[str]:
        """The names of one parameter, itself included."""
        return self._groups[id(self.parameters[name])] if name in self.parameters else [name]

    def key_of(self, name: str) -> str | None:
        """The key of a parameter's values: its own, or that of one it is tied with."""
        return next((self.keys[other] for other in (name, *self.tied_with(name)) if other in self.keys), None)

    def is_transposed(self, path: str) -> bool | None:
        """Whether a layer's weight is stored `[in, out]`; None if nothing shows it."""
        if self.model is None:
            return self.transposed
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.model.get_submodule(path), Conv1D)


def names_of(base: BaseFiles, needed: Iterable[str], task: str | None, num_labels: int | None) -> Names:
    """The names of a base's tensors in the model that an adapter is for.

    That is the class for the adapter's task, the one that the configuration names, or the bare model: the first that
    has all the parameters that the adapter names.

    Args:
        base: The base's files.
        needed: Names of the parameters that the adapter changes.
        task: The adapter's task, or None.
        num_labels: Number of classes of the adapter's head, or None for the base's.

    Raises:
        CheckpointError: No model can be made, or none has these parameters; they are named.
    """
    from gralora_fx.loading.models import make_empty  # they import torch and transformers
    from gralora_fx.sources.safetensors_files import parameter_names

    needed = list(needed)
    tries: list[tuple[list[str], PreTrainedModel]] = []
    reasons: list[str] = []
    for candidate in dict.fromkeys([task, None, "feature-extraction"]):
        try:
            model = make_empty(base.directory, candidate, num_labels=num_labels)
        except TraceError as error:
            reasons.append(first_line(error))
            continue
        parameters = dict(model.named_parameters(remove_duplicate=False))
        lacking = [name for name in needed if name not in parameters]
        tries.append((lacking, model))
        if not lacking:
            break
    if tries:
        lacking, model = min(tries, key=lambda entry: len(entry[0]))
        if not lacking:
            keys, parts = parameter_names(model, base.shard_of)
            return Names(model, {name: key for key, name in keys.items()}, {keys[key] for key in parts})
    if all(name in base.shard_of for name in needed):
        return Names(None, {key: key for key in base.shard_of}, frozenset())
    if not tries:
        missing = bulleted(f"missing {name}" for name in needed if name not in base.shard_of)
        raise CheckpointError(f"{reasons[0]}, and its files lack what the adapter changes:\n{missing}")
    missing = bulleted(f"missing {name}" for name in lacking)
    raise CheckpointError(
        f"{base.directory} ({type(model).__name__}) lacks what the adapter changes; give the base that it was made "
        f"for:\n{missing}"
    )
