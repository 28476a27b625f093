"""A report on how a checkpoint's tensors fit a model: missing, unexpected, or of another shape."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from gralora_fx.errors import CheckpointError, bulleted, option

_log = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """The loading report of transformers; tied and ignored tensors and integer buffers do not count as missing."""

    name: str  # local directory or hub id of the checkpoint
    class_name: str  # class of the model
    missing: Mapping[str, Shape]  # shapes of tensors missing in the checkpoint, which have random values in the model
    # differing shapes in the checkpoint and in the model, which has random values there
    mismatched: Mapping[str, tuple[Shape, Shape]]
    unexpected: tuple[str, ...]  # tensors of the checkpoint that the model lacks, such as the head of another task

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> LoadReport:
        """Return the report on a model loaded with `output_loading_info=True`."""
        tensors = dict(model.state_dict(keep_vars=True))
        is_counted = {key: key not in tensors or tensors[key].is_floating_point() for key in info["missing_keys"]}
        missing = {key: tuple(tensors[key].shape) if key in tensors else () for key, it in is_counted.items() if it}
        mismatched = {key: (tuple(stored), tuple(expected)) for key, stored, expected in info["mismatched_keys"]}
        return cls(
            name,
            type(model).__name__,
            dict(sorted(missing.items())),
            dict(sorted(mismatched.items())),
            tuple(sorted(info["unexpected_keys"])),
        )

    def problems(self, supplied: Collection[str] = ()) -> list[str]:
        """Return a sentence for each tensor with random values."""
        missing = [f"missing {key} {list(shape)}" for key, shape in self.missing.items() if key not in supplied]
        return missing + [
            f"{key} has shape {list(stored)} instead of {list(expected)}"
            for key, (stored, expected) in self.mismatched.items()
            if key not in supplied
        ]

    def check(
        self,
        supplied: Set[str] = frozenset(),
        num_labels: int | None = None,
        made_for: str | None = None,
        *,
        allow_random_head: bool = False,
    ) -> None:
        """Check that no tensor has random values; with `allow_random_head`, warn about each."""
        heads = {key for key, (_, shape) in self.mismatched.items() if shape[:1] == (num_labels,)}
        problems = self.problems(supplied)
        if allow_random_head and self.mismatched.keys() <= heads | set(supplied):
            for problem in problems:
                _log.warning("%s: %s, so it has random values", self.name, problem)
        elif problems:
            base = f"the base that the adapter was made for ({made_for})" if made_for else "a checkpoint that has them"
            raise CheckpointError(
                f"{self.name} does not hold all of {self.class_name}, so that it would have random values; give "
                f"{base}, {option(task=...)} as it was saved for, an adapter that brings them (modules_to_save), "
                f"or {option(allow_random_head=True)} for a head that is still to be trained:\n{bulleted(problems)}"
            )

    def describe(self, supplied: Collection[str] = ()) -> str:
        """Return a summary: numbers of missing, mismatched and unexpected tensors, and a line for each."""
        lines = self.problems(supplied)
        lines += [f"missing {key}, which the adapter brings" for key in self.missing if key in supplied]
        lines += [
            f"{key} has another shape, and the adapter brings its own" for key in self.mismatched if key in supplied
        ]
        lines += [f"unexpected {key}" for key in self.unexpected]
        counts = (
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, {len(self.mismatched)} of another shape"
        )
        return "\n".join([f"{self.name} as {self.class_name}: {counts}", *(f"- {line}" for line in lines)])
