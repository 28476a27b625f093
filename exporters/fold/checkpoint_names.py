"""Names in the model of the tensors in a base's files, from its class or from the files alone.

A merge must know three things: which tensor is which parameter, which parameters are one (tied), and whether a weight
is stored `[in, out]`, as in transformers' `Conv1D`. If the files show all three, neither torch nor transformers is
imported; if not, the model is built.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.model_files import MODEL_FILE, read_json_object
from gralora_fx.base.sources.packed_tensors import RoundedTensor
from gralora_fx.base.sources.safetensors_files import StoredTensor
from gralora_fx.base.sources.saved_weights import SavedWeights
from gralora_fx.core.adapters.agreement import KnownLayers, disagreements
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.errors import CheckpointError, TraceError, bulleted, first_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from gralora_fx.base.sources.streamed_models import StackPart

_FIRST = 4096  # bytes of a tensor that are compared with those of others
_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Names:
    """The model's names of the tensors in the files."""

    model: PreTrainedModel | None  # the model without values; None for a class that transformers does not have
    keys: Mapping[str, str]  # keys in the files by the model's names
    parts: Set[str]  # names of parameters that are merged from several tensors of the files
    # without a model, whether layers store their weights `[in, out]`, if the files show it
    transposed: bool | None = None
    # the parts of each parameter in `parts` that is a stack of matrices, by name
    stacks: Mapping[str, Sequence[StackPart]] = field(default_factory=dict)

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by every name that they have."""
        return {} if self.model is None else dict(self.model.named_parameters(remove_duplicate=False))

    def stacks_transposed(self, name: str) -> bool:
        """Return whether the module that owns a parameter says that it stores matrices `[in, out]`."""
        if self.model is None:
            return False
        return getattr(self.model.get_submodule(name.rpartition(".")[0]), "is_transposed", False) is True

    @property
    def layers(self) -> KnownLayers | None:
        """The model's linear layers and parameters; None without a model."""
        if self.model is None:
            return None
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        modules = self.model.named_modules()
        paths = [path for path, module in modules if isinstance(module, (nn.Linear, Conv1D))]
        parameters = [name for name, _ in self.model.named_parameters()]  # of tied ones the first
        return KnownLayers(paths, self.model.config.model_type, parameters=parameters)

    @functools.cached_property
    def _groups(self) -> dict[int, list[str]]:
        groups: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(id(parameter), []).append(name)
        return groups

    def tied_with(self, name: str) -> list[str]:
        """Return all names of a tied parameter, the given one included."""
        return self._groups[id(self.parameters[name])] if name in self.parameters else [name]

    def key_of(self, name: str) -> str | None:
        """Return the key of a parameter's values: its own, or a tied parameter's."""
        return next((self.keys[other] for other in (name, *self.tied_with(name)) if other in self.keys), None)

    def is_transposed(self, path: str) -> bool | None:
        """Return whether a layer's weight is stored `[in, out]`; None if nothing shows it."""
        if self.model is None:
            return self.transposed
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.model.get_submodule(path), Conv1D)


def names_of(base: SavedWeights, needed: Iterable[str], task: str | None, num_labels: int | None) -> Names:
    """Return the model's names of a base's tensors, from the first class that has all that the adapter names.

    It tries the class for the adapter's task, the one that the configuration names, and the bare model.
    """
    from gralora_fx.base.sources.streamed_models import keys_by_name, stack_parts
    from gralora_fx.core.loading.models import make_empty  # they import torch and transformers

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
            keys, parts = keys_by_name(model, base.tensors)
            return Names(model, keys, set(parts.values()), stacks=stack_parts(model, base.tensors, parts))
    if all(name in base.tensors for name in needed):
        return Names(None, {key: key for key in base.tensors}, frozenset())
    if not tries:
        missing = bulleted(f"missing {name}" for name in needed if name not in base.tensors)
        raise CheckpointError(f"{reasons[0]}, and its files lack what the adapter changes:\n{missing}")
    missing = bulleted(f"missing {name}" for name in lacking)
    raise CheckpointError(
        f"{base.directory} ({type(model).__name__}) lacks what the adapter changes; give the base that it was made "
        f"for:\n{missing}"
    )


def in_layers(base: SavedWeights, names: Names, rounding: BaseQuantization | None) -> SavedWeights:
    """Return a base's files with weights as the matrices `[out, in]` that the model's layers multiply by."""
    if names.model is None:
        raise CheckpointError(
            f"{base.directory} is of a class that transformers does not have, which would say how its layers hold "
            "weights of few bits; merge into a float base, without base_quantization"
        )
    from gralora_fx.base.sources.streamed_models import as_in_layers
    from gralora_fx.core.loading.quantized_layers import quantized_layers

    if rounding is None:
        return replace(base, others=as_in_layers(names.model, base.tensors))
    layers = quantized_layers(names.model, rounding)
    keys = {names.key_of(f"{path}.weight"): path for path in layers}
    return replace(
        base,
        others={
            key: RoundedTensor.of(base.tensors[key], rounding, is_turned=bool(names.is_transposed(path)))
            for key, path in keys.items()
            if key is not None
        },
    )


def names_in_files(base: SavedWeights, adapter: StoredAdapter) -> Names | None:
    """Return the model's names of a base's tensors, if the files show all that a merge must know; else None."""
    keys = [f"{path}.weight" for path in adapter.sites]
    if adapter.copies or adapter.repeats or adapter.config.target_parameters:
        return None
    if not all(key in base.tensors for key in keys):
        return None
    fields = read_json_object(base.directory / MODEL_FILE, CheckpointError)
    if _ties_parts(fields) or not all(_is_of_a_series(key, base.tensors) for key in keys):
        return None
    if _have_twins(keys, base):
        return None
    if disagreements(adapter.config, adapter.sites, _known_layers(base, fields)):
        return None  # the model's own layers decide
    layouts = {_is_transposed(path, base) for path in adapter.sites}
    if len(layouts) != 1 or None in layouts:
        return None
    return Names(None, {key: key for key in base.tensors}, frozenset(), layouts.pop())


def _known_layers(base: SavedWeights, fields: Mapping[str, Any]) -> KnownLayers:
    """Return the matrices of numbered layers: linear layers, except for a model's own parameters."""
    weights = [key for key in base.tensors if key.endswith(".weight") and _NUMBER.search(key)]
    matrices = [key for key in weights if len(base.tensors[key].shape) == 2]
    return KnownLayers([key.removesuffix(".weight") for key in matrices], fields.get("model_type"))


def _ties_parts(fields: Mapping[str, Any]) -> bool:
    """Return whether the configuration ties parts of the model other than the embedding and the head."""
    return any(name.startswith("tie_") and name != "tie_word_embeddings" and value for name, value in fields.items())


def _is_of_a_series(key: str, keys: Iterable[str]) -> bool:
    """Return whether a key is of numbered layers without gaps, so that no weight is tied to an absent one."""
    number = _NUMBER.search(key)
    if number is None:
        return False
    before, after = key[: number.start(1)], key[number.end(1) :]
    beside = [other.removeprefix(before).partition(".") for other in keys if other.startswith(before)]
    layers = {number for number, _, _ in beside if number.isdecimal()}
    own = {number for number, _, rest in beside if f".{rest}" == after}
    return own == layers == {str(index) for index in range(len(own))} and len(own) > 1


def _have_twins(keys: Iterable[str], base: SavedWeights) -> bool:
    """Return whether another tensor begins with the same values as a given one, as a tied weight's second name does."""
    kinds = {key: (tensor.dtype, tensor.shape) for key, tensor in base.tensors.items()}
    asked = {kinds[key] for key in keys}
    firsts = {key: (kind, _first_bytes(base.tensors[key])) for key, kind in kinds.items() if kind in asked}
    counts = Counter(firsts.values())
    return any(counts[firsts[key]] > 1 for key in keys)


def _first_bytes(tensor: StoredTensor) -> bytes:
    first = np.empty(min(_FIRST, tensor.nbytes), np.uint8)
    tensor.read_into(first)
    return first.tobytes()


def _is_transposed(path: str, base: SavedWeights) -> bool | None:
    """Return whether a layer's weight is stored `[in, out]`; None if nothing shows it.

    Only `Conv1D` stores weights so, and always has a bias. A square weight is judged by the other layers beside it.
    """
    if f"{path}.bias" not in base.tensors:
        return False
    number = _NUMBER.search(path)
    layer = path[: number.end()] if number else ""
    votes = {
        base.tensors[f"{name}.bias"].shape != shape[:1]
        for key in base.tensors
        if key.startswith(layer) and key.endswith(".weight")
        for name, shape in [(key.removesuffix(".weight"), base.tensors[key].shape)]
        if len(shape) == 2 and shape[0] != shape[1] and f"{name}.bias" in base.tensors
    }
    return votes.pop() if len(votes) == 1 else None
