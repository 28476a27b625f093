"""How a checkpoint's tensors fit a model: which are missing, unexpected, or of another shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from gralora_fx.errors import CheckpointError

_SHOWN = 20
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What transformers says after it has loaded a model, by the model's own names.

    Tied tensors, those that the model's class does not ask for, and integer buffers, which are computed, are not
    missing.

    Attributes:
        name: Local directory or hub id of the checkpoint.
        class_name: Class of the model.
        missing: Shapes of the tensors that the checkpoint lacks; the model has random values there.
        mismatched: Shapes in the checkpoint and in the model, where they differ; the model has random values there.
        unexpected: Tensors of the checkpoint that the model does not have, such as the head of another task.
    """

    name: str
    class_name: str
    missing: Mapping[str, Shape]
    mismatched: Mapping[str, tuple[Shape, Shape]]
    unexpected: tuple[str, ...]

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> LoadReport:
        """The report on a model that was loaded with `output_loading_info=True`."""
        tensors = dict(model.state_dict(keep_vars=True))
        is_counted = {key: key not in tensors or tensors[key].is_floating_point() for key in info["missing_keys"]}
        missing = {key: tuple(tensors[key].shape) if key in tensors else () for key, it in is_counted.items() if it}
        mismatched = {key: (tuple(found), tuple(own)) for key, found, own in info["mismatched_keys"]}
        return cls(
            name,
            type(model).__name__,
            dict(sorted(missing.items())),
            dict(sorted(mismatched.items())),
            tuple(sorted(info["unexpected_keys"])),
        )

    def problems(self, supplied: Collection[str] = ()) -> list[str]:
        """One sentence for each tensor with random values.

        Args:
            supplied: Tensors that come from elsewhere, such as an adapter's `modules_to_save`.
        """
        found = [f"missing {key} {list(shape)}" for key, shape in self.missing.items() if key not in supplied]
        return found + [
            f"{key} has shape {list(found)} instead of {list(own)}"
            for key, (found, own) in self.mismatched.items()
            if key not in supplied
        ]

    def check(self, supplied: Collection[str] = (), *, advice: str) -> None:
        """Refuse a model with random values.

        Args:
            supplied: Tensors that come from elsewhere.
            advice: What to do.

        Raises:
            CheckpointError: A tensor has random values; each is named.
        """
        if problems := self.problems(supplied):
            raise CheckpointError(
                f"{self.name} does not hold all of {self.class_name}, so that it would have random values; {advice}:\n"
                f"{listed(problems)}"
            )

    def describe(self, supplied: Collection[str] = ()) -> str:
        """How many tensors are missing, of another shape or unexpected, and a line for each.

        Args:
            supplied: Tensors that come from elsewhere.
        """
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


def listed(problems: Collection[str]) -> str:
    """Problems on a line each, the first twenty."""
    lines = [f"- {problem}" for problem in list(problems)[:_SHOWN]]
    return "\n".join([*lines, f"- and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else lines)
