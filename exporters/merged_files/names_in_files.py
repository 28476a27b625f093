"""What the files of a base show by themselves, so that a merge of linear layers alone needs no model of it.

A model says three things that a merge must know: which tensor is which parameter, which parameters are one (tied), and
whether a weight is stored `[in, out]`, as in transformers' `Conv1D`. Where the files show all three, nothing of torch
and transformers is imported; where they do not, the model is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from gralora_fx.adapters.agreement import KnownLayers, disagreements
from gralora_fx.adapters.stored import StoredAdapter
from gralora_fx.errors import CheckpointError
from gralora_fx.exporters.merged_files.base_files import BaseFiles, Names
from gralora_fx.sources.model_files import read_json_object

_FIRST = 4096  # bytes of a tensor that are compared with those of others
_NUMBER = re.compile(r"\.(\d+)\.")


def names_in_files(base: BaseFiles, adapter: StoredAdapter, handles: Mapping[str, int]) -> Names | None:
    """The names of a base's tensors where the files show all that a merge must know; None where they do not.

    Args:
        base: The base's files.
        adapter: The adapter.
        handles: Descriptors of the base's files.
    """
    keys = [f"{path}.weight" for path in adapter.sites]
    if adapter.copies or adapter.repeats or not all(key in base.shard_of for key in keys):
        return None
    if _ties_parts(base) or not all(_is_of_a_series(key, base.shard_of) for key in keys):
        return None
    if any(_has_a_twin(key, base, handles) for key in keys):
        return None
    if disagreements(adapter.config, adapter.sites, _known_layers(base)):
        return None  # the model's own layers decide
    layouts = {_is_transposed(path, base) for path in adapter.sites}
    if len(layouts) != 1 or None in layouts:
        return None
    return Names(None, {key: key for key in base.shard_of}, frozenset(), layouts.pop())


def _known_layers(base: BaseFiles) -> KnownLayers:
    """Matrices of numbered layers, which are those of linear layers but for parameters of a model's own."""
    fields = read_json_object(base.directory / "config.json", CheckpointError)
    weights = [key for key in base.shard_of if key.endswith(".weight") and _NUMBER.search(key)]
    matrices = [key for key in weights if len(base.extent(key).shape) == 2]
    return KnownLayers([key.removesuffix(".weight") for key in matrices], fields.get("model_type"))


def _ties_parts(base: BaseFiles) -> bool:
    """Whether the configuration says that parts of the model are one, other than the embedding and the head."""
    fields = read_json_object(base.directory / "config.json", CheckpointError)
    return any(name.startswith("tie_") and name != "tie_word_embeddings" and value for name, value in fields.items())


def _is_of_a_series(key: str, keys: Iterable[str]) -> bool:
    """Whether a key is in a numbered layer of which the files have every number, so that none is tied to an absent one.

    Embeddings, heads and single layers are not: what is tied to them may be absent from the files.
    """
    number = _NUMBER.search(key)
    if number is None:
        return False
    before, after = key[: number.start(1)], key[number.end(1) :]
    beside = [other.removeprefix(before).partition(".") for other in keys if other.startswith(before)]
    layers = {number for number, _, _ in beside if number.isdecimal()}
    own = {number for number, _, rest in beside if f".{rest}" == after}
    return own == layers == {str(index) for index in range(len(own))} and len(own) > 1


def _has_a_twin(key: str, base: BaseFiles, handles: Mapping[str, int]) -> bool:
    """Whether another tensor begins with the same values, as the second name of a tied weight does."""
    own = base.extent(key)
    count = min(_FIRST, own.nbytes)
    first = os.pread(handles[base.shard_of[key].file.name], count, own.begin)
    return any(
        os.pread(handles[shard.file.name], count, extent.begin) == first
        for shard in base.shards
        for other, extent in shard.tensors.items()
        if other != key and (extent.dtype, extent.shape) == (own.dtype, own.shape)
    )


def _is_transposed(path: str, base: BaseFiles) -> bool | None:
    """Whether a layer's weight is stored `[in, out]`; None if nothing shows it.

    Only `Conv1D` stores weights so, and it always has a bias, as long as the output. A square weight with a bias is
    judged by the other layers with biases beside it.
    """
    if f"{path}.bias" not in base.shard_of:
        return False
    number = _NUMBER.search(path)
    layer = path[: number.end()] if number else ""
    votes = {
        base.extent(f"{name}.bias").shape != shape[:1]
        for key in base.shard_of
        if key.startswith(layer) and key.endswith(".weight")
        for name, shape in [(key.removesuffix(".weight"), base.extent(key).shape)]
        if len(shape) == 2 and shape[0] != shape[1] and f"{name}.bias" in base.shard_of
    }
    return votes.pop() if len(votes) == 1 else None
