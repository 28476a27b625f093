"""Finds the limits of a trace: its guards are tried on sizes beyond them, and other sizes where there is no guard."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from gralora_fx.base.compat.torch_graphs import tree_map_with_path
from gralora_fx.core.tracing.check import difference, differs_in_training, other_sizes, refuse_size
from gralora_fx.core.tracing.draft import Captured
from gralora_fx.core.tracing.inputs.input_trees import key_text, tensor_paths
from gralora_fx.core.tracing.size_guards import Guard, varying_axes
from gralora_fx.errors import TraceError
from gralora_fx.format.input_names import PAST
from gralora_fx.format.size_limits import SizeLimit, Term, holds, sizes_in, value_of

_NEAR = 128  # sizes up to here are all looked at for one beyond a guard
_WORK = 2**33  # parameters times values of the inputs, above which a size is not tried for a guard
_SMALL = 2**27  # and where no guard asks for it
_PRIMES = (7, 13, 29, 61, 127, 257, 509)

Shapes = dict[str, tuple[int, ...]]


def with_limits(draft: Captured) -> Captured:
    """Return a draft with the limits of its sizes, within which it equals the model.

    A guard that makes no difference beyond it is none; where there are no guards, a difference is an error.
    """
    if not draft.dynamic:
        return draft
    sizes = _Sizes(draft)
    guards = [guard for guard in draft.guards if sizes.reads(guard.test)]
    own = [guard for guard in guards if not guard.is_of_operator]
    if not draft.has_values:
        return dataclasses.replace(draft, limits=sizes.limits(g.test for g in own if sizes.matters_above_one(g)))
    if PAST in draft.sample:  # of which only its own steps can be made
        limits = sizes.kept_by_steps([guard.test for guard in own])
    else:
        of_operators = [guard for guard in guards if guard.is_of_operator]
        kept = [guard for guard in own if sizes.makes_difference(guard, guards)]
        kept += [guard for guard in guards if sizes.is_tried(guard) and sizes.makes_difference(guard, guards)]
        limits = [sizes.broadcast(guard.test) for guard in kept]
        limits += sizes.unguarded(limits, [guard.test for guard in of_operators])
    for description, other in other_sizes(draft.model, draft.sample):
        within = all(holds(limit, _shapes(other)) for limit in limits)
        if within and (outcome := sizes.outcome(other)) not in ("same", "fails"):
            refuse_size(draft, description, outcome)
    return dataclasses.replace(draft, limits=sizes.limits(limits))


def _shapes(inputs: Mapping[str, Any]) -> Shapes:
    return {path: tuple(tensor.shape) for path, tensor in tensor_paths(inputs).items()}


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a draft's inputs, and comparisons with the model at others."""

    draft: Captured
    seen: dict[Any, str] = dataclasses.field(default_factory=dict)  # outcomes by shapes

    @cached_property
    def shapes(self) -> Shapes:
        """The sample's."""
        return _shapes(self.draft.sample)

    @cached_property
    def axes(self) -> dict[tuple[str, int], Term]:
        """The axes that vary, as terms over symbols."""
        return varying_axes(self.draft.graph_module.graph, self.draft.sample)

    @cached_property
    def parameters(self) -> int:
        """Number of values of the model's parameters."""
        return sum(parameter.numel() for parameter in self.draft.model.parameters())

    @cached_property
    def groups(self) -> list[list[tuple[tuple[str, int], ...]]]:
        """Axes that change together: those of equal size and place; those of one symbol; each alone."""
        alike: dict[Any, list[tuple[str, int]]] = {}
        tied: dict[Term, list[tuple[str, int]]] = {}
        for (path, axis), term in self.axes.items():
            if term[0] == "size":  # others follow
                alike.setdefault((axis, self.shapes[path][axis]), []).append((path, axis))
                tied.setdefault(term, []).append((path, axis))
        return [[*map(tuple, alike.values())], [*map(tuple, tied.values())], [(axis,) for axis in self.axes]]

    def limits(self, tests: Iterable[Term]) -> tuple[SizeLimit, ...]:
        """Return conditions as limits, the plainest and tightest first, without those of one size that others imply."""
        ranks = {path: len(shape) for path, shape in self.shapes.items()}
        kept: dict[str, Term] = {}
        for test in sorted(tests, key=lambda test: (len(re.sub(r"\d", "", str(test))), -len(_broken(test)))):
            (path, axis), *others = {*sizes_in(test)}
            alone = [other for other in kept.values() if {*sizes_in(other)} == {(path, axis)}]
            if others or any(all(holds(other, _all_sizes(other, size)) for other in alone) for size in _broken(test)):
                kept[SizeLimit.of(test, ranks).condition] = test
        return tuple(SizeLimit.of(test, ranks) for test in kept.values())

    def reads(self, test: Term) -> bool:
        """Return whether a condition reads sizes that vary, and no others."""
        read = set(sizes_in(test))
        return all(path in self.shapes for path, _ in read) and any(axis in self.axes for axis in read)

    def moved(self, group: tuple[tuple[str, int], ...], size: int) -> Shapes:
        """Return the shapes where the axes of a group have a size, and others follow."""
        sizes = {axis: self.shapes[axis[0]][axis[1]] for axis in self.axes} | dict.fromkeys(group, size)
        symbols = {term[1]: (sizes[axis],) for axis, term in self.axes.items() if term[0] == "size"}
        for axis, term in self.axes.items():
            if term[0] != "size" and axis not in group and all(name in symbols for name, _ in sizes_in(term)):
                sizes[axis] = value_of(term, symbols)
        return {
            path: tuple(sizes.get((path, axis), size) for axis, size in enumerate(shape))
            for path, shape in self.shapes.items()
        }

    def beyond(self, test: Term, others: Iterable[Term]) -> list[Shapes]:
        """Return shapes that break a condition, the nearest in each direction, within others where possible."""
        others = [other for other in others if other != test and holds(other, self.shapes)]
        read = set(sizes_in(test))
        for groups in self.groups:
            found: list[Shapes] = []
            for group in (group for group in groups if read & set(group)):
                now = self.shapes[group[0][0]][group[0][1]]
                sizes = sorted(_sizes_for(test, now), key=lambda size: abs(size - now))
                for way in ([size for size in sizes if size < now], [size for size in sizes if size > now]):
                    broken = [shapes for size in way if not holds(test, shapes := self.moved(group, size))]
                    broken.sort(key=lambda shapes: sum(not holds(other, shapes) for other in others))
                    found += [*broken[:2], *broken[4:40:35]]
            if found:
                return found
        return []

    def makes_difference(self, guard: Guard, others: Iterable[Guard]) -> bool:
        """Return whether the model differs from its graph, or fails, beyond a guard, or may do so."""
        relation, term, number = (*guard.test, None, None)[:3]
        if guard.is_of_operator and relation == ">=" and number == 2 and term[0] != "size":
            return False  # torch's assumption that a computed size is not 1
        tried = [self.at(shapes) for shapes in self.beyond(guard.test, (other.test for other in others))]
        outcomes = {outcome for outcome, _ in tried}
        if outcomes - {"same", "fails", "untried"}:
            return True
        if guard.is_of_operator:  # which raises errors of its own
            is_equality, is_plain = _form(guard.test)
            is_table = "untried" in outcomes and guard.test[0] == "<="
            return is_plain and ("fails" in outcomes or is_table) and (is_equality or "same" not in outcomes)
        return "same" not in outcomes or any(differs_in_training(self.draft, inputs) for _, inputs in tried if inputs)

    def is_tried(self, guard: Guard) -> bool:
        """Return whether the guard of an operator may be a limit: not how memory lies, nor what is checked anyway."""
        is_text = isinstance(self.draft.model, PreTrainedModel)  # whose inputs' common sizes are checked
        return guard.is_of_operator and guard.test[0] != "!=" and not (is_text and _form(guard.test)[0])

    def broadcast(self, test: Term) -> Term:
        """Return an equality of two axes with the sizes 1 that the model and its graph repeat."""
        if test[0] == "==" and all(isinstance(side, tuple) and side[0] == "size" for side in test[1:]):
            ones = [side for side in test[1:] if self.at(self.moved((side[1:],), 1))[0] == "same"]
            return ("or", test, *(("==", side, 1) for side in ones)) if ones else test
        return test

    def unguarded(self, limits: list[Term], of_operators: list[Term]) -> Iterator[Term]:
        """Compare other sizes within limits; yield the guards of operators that a difference is beyond.

        Raises:
            TraceError: There is a difference, and no guard.
        """
        added: list[Term] = []
        for group in self.groups[0]:
            now = self.shapes[group[0][0]][group[0][1]]
            prime = next((prime for prime in _PRIMES if prime > now + 1), now)
            for size in dict.fromkeys((1, 2, now - 1, now + 1, 2 * now, prime, 4 * now)):
                shapes = self.moved(group, size)
                if size < 1 or not all(holds(limit, shapes) for limit in (*limits, *added)):
                    continue
                outcome = self.at(shapes, _SMALL)[0]
                if outcome in ("same", "fails", "untried"):
                    continue
                broken = [test for test in of_operators if not holds(test, shapes)]
                if not broken and size > 1:
                    refuse_size(
                        self.draft, ", ".join(f"{path} {list(shape)}" for path, shape in shapes.items()), outcome
                    )
                least = [
                    (">=", ("size", *axis), 2) for axis in group
                ]  # torch assumes that no size is 1, without a guard
                best = sorted(broken, key=lambda test: (test[0] != "==", test[0] == "!=", len(str(test))))[:1]
                added += best or least
                yield from best or least

    def kept_by_steps(self, guards: list[Term]) -> list[Term]:
        """Return the guards that no step with a cache is beyond and equals the model nevertheless."""
        for _, step in other_sizes(self.draft.model, self.draft.sample):
            broken = [guard for guard in guards if not holds(guard, _shapes(step))]
            if broken and self.outcome(step) == "same":
                guards = [guard for guard in guards if guard not in broken]
        return guards

    def at(self, shapes: Shapes, most: int = _WORK) -> tuple[str, dict[str, Any]]:
        """Return the outcome for inputs of some shapes, "untried" if they are too large, and the inputs."""
        values = sum(math.prod(shape) for shape in shapes.values())
        if values * max(self.parameters, 2**10) > most:
            return "untried", {}
        inputs = _resized(self.draft.sample, shapes)
        return self.outcome(inputs), inputs

    def outcome(self, inputs: Mapping[str, Any]) -> str:
        """Return "same" if the graph equals the model on inputs, "fails" if the model does, or how they differ."""
        key = tuple(sorted(_shapes(inputs).items()))
        if PAST in inputs or key not in self.seen:
            try:
                self.seen[key] = difference(self.draft, inputs) or "same"
            except TraceError:
                self.seen[key] = "fails"
        return self.seen[key]

    def matters_above_one(self, guard: Guard) -> bool:
        """Return whether a guard is more than torch's assumption that sizes are not 1."""
        return any(min(map(min, shapes.values())) > 1 for shapes in self.beyond(guard.test, ()))


def _form(test: Term) -> tuple[bool, bool]:
    """Return whether a condition is an equality of sizes, and whether it is one that an error can name plainly."""
    read = [*sizes_in(test)]
    is_equality = test[0] == "==" and len(read) == 2 and not isinstance(test[2], int)
    return is_equality, is_equality or (test[0] != "!=" and len({*read}) == 1)


def _sizes_for(test: Term, now: int) -> set[int]:
    """Return sizes to look at for one beyond a condition: small ones, and those near its numbers."""
    near = {number + step for number in _numbers(test) for step in range(-2, 3)}
    sizes = {*range(1, _NEAR), *(2**power for power in range(7, 17)), *near, now - 1, now + 1, 2 * now, 4 * now}
    return {size for size in sizes if 0 < size <= 2**16}


def _broken(test: Term) -> list[int]:
    """Return sizes that break a condition, if all its axes have them."""
    return [size for size in _sizes_for(test, 1) if not holds(test, _all_sizes(test, size))]


def _all_sizes(test: Term, size: int) -> Shapes:
    return {path: (size,) * (axis + 1) for path, axis in sorted(sizes_in(test))}


def _numbers(term: Term) -> Iterator[int]:
    if isinstance(term, int):
        yield term
    elif isinstance(term, tuple) and term[0] != "size":
        for part in term[1:]:
            yield from _numbers(part)


def _resized(inputs: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Return inputs of other sizes: values are left out or repeated at random places, in their order."""
    generator = torch.Generator().manual_seed(0)

    def resized(keys: Any, value: Any) -> Any:
        shape = shapes.get(".".join(map(key_text, keys)))
        for axis, size in enumerate(() if shape is None else shape):
            if size != (old := value.shape[axis]):
                places = torch.randint(old, (size,), generator=generator).sort().values.to(value.device)
                is_count = not value.is_floating_point() and old > 1 and bool((value.diff(dim=axis) == 1).all())
                first = value.narrow(axis, 0, 1)
                steps = torch.arange(size, device=value.device).view(
                    [-1 if a == axis else 1 for a in range(value.ndim)]
                )
                value = first + steps if is_count else value.index_select(axis, places)
        return value

    result: dict[str, Any] = tree_map_with_path(resized, dict(inputs))
    return result
