"""The adapters of a traced model: adding, switching, merging and removing them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from gralora_fx.core.adapters.adapter import ModelAdapter, drop
from gralora_fx.core.adapters.base import Base
from gralora_fx.core.adapters.folded_weights import SiteUpdate, check_foldable, check_not_shared, folded_weights
from gralora_fx.core.adapters.graph_with_history import GraphWithHistory
from gralora_fx.core.adapters.state_graph import GraphState
from gralora_fx.core.config.checks import check_acts_everywhere
from gralora_fx.core.methods import AdapterTensors
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.errors import ConfigError, MergeError, RewriteError, listed

if TYPE_CHECKING:
    from gralora_fx.base.sources.same_base import BaseComparison
    from gralora_fx.core.adapters.run_forms import RunForm
    from gralora_fx.core.methods.low_rank import Rows


class AdapterGraph(GraphWithHistory):
    """A graph whose state changes are each applied completely or not at all."""

    def _begin(self, base: Base) -> None:
        super()._begin(base)
        self._spare: dict[str, Tensor] = {}  # memory of former merged weights, to be reused
        self._depth = 0  # number of open `disabled()` blocks

    # -- adding and switching ---------------------------------------------------------------------------------------

    def add(self, name: str, planned: RewritePlan, *, factors: Mapping[str, AdapterTensors] | None = None) -> None:
        """Add an adapter with given or new tensors; the first adapter becomes active."""
        with self._lock:
            if name in self.adapters:
                raise ConfigError(f"adapter {name!r} exists already; delete it first or take another name")
            with_bias = [other for other, adapter in self.adapters.items() if adapter.config.bias != "none"]
            if planned.config.bias != "none" and with_bias:
                raise ConfigError(
                    f"adapter {with_bias[0]!r} trains biases already, and only one adapter may; set bias='none'"
                )
            self.check_not_merged("add an adapter")
            is_first = not self.adapters
            try:
                adapter = ModelAdapter.create(self.base.tree, name, planned, self.traced.tree, factors)
                adapter.requires_grad_(is_first)
                self.adapters = {**self.adapters, name: adapter}
                if is_first:
                    self._make(active=(name,))
            except BaseException:
                self._drop(name)
                raise
            _watch_first_step(self, name)
            self._show_adapters()

    def note_base(self, name: str, base: BaseComparison) -> None:
        """Remember how the base compared with the one that an adapter was made for."""
        with self._lock:
            self.adapters = {**self.adapters, name: dataclasses.replace(self.adapters[name], base=base)}

    def switch(self, names: Sequence[str]) -> None:
        """Activate exactly these adapters, and make them trainable."""
        with self._lock:
            for name in names:
                self[name]
            self.check_not_merged("switch adapters")
            if self._depth:
                raise RewriteError(
                    "cannot switch adapters within disable_adapter(), which restores the earlier ones; leave its block "
                    "first"
                )
            self.check_copies_not_shared(names)
            self.check_beside_each_other(names)
            if tuple(names) != self.state.active:
                self._make(active=tuple(names))
            for name, adapter in self.adapters.items():
                adapter.requires_grad_(name in names)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base's graph within the block, and until the last of several such blocks, in any threads, ends."""
        with self._lock:
            if not self._depth:
                self._suspend()
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._enable()

    def remove(self, name: str) -> None:
        """Remove an inactive adapter and its tensors."""
        with self._lock:
            self[name]
            if name in self.state.active:
                raise RewriteError(f"adapter {name!r} is active; set another one before deleting it")
            self._drop(name)

    def discard(self, name: str) -> None:
        """Remove an adapter, active or not, whose creation failed."""
        with self._lock:
            if name in self.state.active:
                self._make(active=tuple(other for other in self.state.active if other != name))
            self._drop(name)

    def clear(self) -> None:
        """Remove every adapter and every pass, so that the graph equals the base's node for node."""
        with self._lock:
            self._make(active=(), merged=(), weights={}, unties=False, passes=())
            self._drop_additions()
            for name in list(self.adapters):
                self._drop(name)
            self._spare = {}

    # -- merging ----------------------------------------------------------------------------------------------------

    def mergeable(self, names: Sequence[str] | None, *, again: bool = False) -> list[str]:
        """Return the adapters to merge: those named, or the active ones; merged ones again only with `again`."""
        state = self.state
        merged = () if again else state.merged
        chosen = [name for name in state.active if name not in merged] if names is None else list(names)
        for name in chosen:
            self[name]
            if chosen.count(name) > 1:
                raise MergeError(f"adapter {name!r} is named twice, and would be folded twice; name it once")
            if name in merged:
                raise MergeError(f"adapter {name!r} is merged already; unmerge first")
            if name not in state.active:
                raise MergeError(f"adapter {name!r} is not active, so merging it would change the output; set it first")
        if not chosen:
            raise MergeError("there is no active adapter left to merge")
        return chosen

    def merge(self, names: Sequence[str] | None, *, safe: bool = False, untie: bool = False) -> None:
        """Fold active adapters into copies of the weights, and remove their nodes from the graph."""
        with self._lock:
            state, chosen = self.state, self.mergeable(names)
            merged = (*state.merged, *chosen)
            work = self.updates(merged)
            check_foldable(self.traced.graph_module, [entry.site for entry in work])
            if not untie:
                check_not_shared(self.traced.graph_module, [e for e in work if e.site.path not in state.weights])
            weights = self._folded(merged, safe=safe)
            self._make(merged=merged, weights=weights, unties=untie or state.unties)
            self._spare = {}

    def unmerge(self) -> None:
        """Restore the base's own weights and the adapters' nodes; memory is kept for the next merge."""
        with self._lock:
            retired = self.current
            if not retired.state.merged:
                raise MergeError("nothing is merged, so there is nothing to unmerge")
            self._make(merged=(), weights={}, unties=False)
            if not retired.is_lent and not self._readers.is_read:
                self._spare = {path: weight.data for path, weight in retired.state.weights.items()}

    def fold_into_base(
        self, names: Sequence[str] | None, *, safe: bool = False, untie: bool = False
    ) -> dict[str, nn.Parameter]:
        """Fold adapters and their copies of parameters into the base's own parameters, after checking everything."""
        from gralora_fx.core.adapters.fold_in_place import fold_adapters

        with self._lock:
            self.check_adopted()
            chosen = self.mergeable(names, again=True)
            adapters, work = [self.adapters[name] for name in chosen], self.updates(chosen)
            return fold_adapters(self.traced, adapters, work, safe=safe, untie=untie)

    def updates(self, names: Sequence[str]) -> list[SiteUpdate]:
        """Return the adapters' weight updates, grouped by site."""
        chosen = [self[name] for name in names]
        for adapter in chosen:
            check_acts_everywhere(adapter.config.acts_from, f"adapter {adapter.name!r}", "merging", MergeError)
        self.check_beside_each_other(names)
        self.base.check_whole()
        return [
            SiteUpdate(site, updates)
            for site in self.traced.adaptable
            if (updates := tuple(a.update(site.path) for a in chosen if site.path in a.factors))
        ]

    def check_not_merged(self, action: str) -> None:
        """Raise if an adapter is merged, before a change that needs the base's own weights."""
        if merged := self.state.merged:
            raise MergeError(f"cannot {action} while {', '.join(merged)} is merged; call unmerge_adapter() first")

    def check_copies_not_shared(self, names: Sequence[str]) -> None:
        """Check that no two adapters train copies of one parameter, and that none adapts what another copies."""
        owners: dict[int, tuple[str, str]] = {}
        for name in names:
            for module, owned in self.adapters[name].copies.items():
                for base in owned:
                    parameter = id(self.traced.tree.parameters[base])
                    other, _ = owners.setdefault(parameter, (name, module))
                    if other != name:
                        raise RewriteError(
                            f"adapters {other!r} and {name!r} both train a copy of {module}; set one of them"
                        )
        for name in names:
            for planned in self.adapters[name].plan.selected:
                other, module = owners.get(id(planned.site.weight), (name, ""))
                if other != name:
                    raise RewriteError(
                        f"adapter {name!r} adapts {planned.site.path}, of which adapter {other!r} trains a copy; "
                        "set one of them"
                    )

    def check_beside_each_other(self, names: Sequence[str]) -> None:
        """Check that an adapter whose effect depends on the layer's output is the only one at its layers."""
        for name in names:
            if self.adapters[name].method.IS_ADDITIVE:
                continue
            for other in names:
                if other != name and (both := self.adapters[name].factors.keys() & self.adapters[other].factors.keys()):
                    raise RewriteError(
                        f"adapters {name!r} and {other!r} both adapt {listed(sorted(both), 3)}, and what "
                        f"{name!r} ({self.adapters[name].config.TITLE}) does there depends on the layer's output, so "
                        "that their order would count; set one of them, or merge one into a model of its own"
                    )

    # -- after tensors changed --------------------------------------------------------------------------------------

    def keep_up(self) -> None:
        """Rebuild the graph if tensors that it was built from were replaced, converted or written to."""
        with self._lock:
            state = self.state
            if not (self.base.is_current and self._is_valid(self.current)):
                self._make(weights=self._folded(state.merged) if state.merged else {})

    def check_convertible(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Check that a dtype conversion would round no adapter's update away."""
        for name, adapter in self.adapters.items():
            for path in self.traced.in_subgraphs.keys() & adapter.planned.keys():
                dtype = convert(adapter.planned[path].site.weight.new_empty(0)).dtype
                if dtype in (torch.float16, torch.bfloat16):
                    raise RewriteError(
                        f"adapter {name!r} changes the weight of {path} within the subgraph of "
                        f"{self.traced.in_subgraphs[path]}, and {dtype} would round the update away; merge it first"
                    )

    def run(
        self, inputs: Mapping[str, Any], form: RunForm | None = None, rows: Mapping[str, Rows] | None = None
    ) -> Any:
        """Run the graph of one state; rebuild it first if the trace was converted since."""
        if not torch.compiler.is_compiling() and not self.base.has_graph:
            self.keep_up()
        return super().run(inputs, form, rows)

    # -- within -----------------------------------------------------------------------------------------------------

    def _folded(self, names: Sequence[str], *, safe: bool = False) -> dict[str, nn.Parameter]:
        """Return weights with adapters folded into them, in spare memory if there is some."""
        work = self.updates(names)
        spare = {
            entry.site.path: memory
            for entry in work
            if (memory := self._spare.get(entry.site.path)) is not None
            and (memory.shape, memory.dtype, memory.device)
            == (entry.site.weight.shape, entry.site.weight.dtype, entry.site.weight.device)
        }
        return folded_weights(self.traced.graph_module, work, spare=spare, safe=safe, untie=True)

    def _suspend(self) -> None:
        """Switch to the base's graph, and remember the graph that ran."""
        self._suspended = self.state
        try:
            self._remember()
            self._make(active=(), merged=(), weights={}, unties=False)
        except BaseException:
            self._suspended = None
            raise

    def _enable(self) -> None:
        """Restore the state from before `disabled()`, without adapters that were deleted meanwhile."""
        assert self._suspended is not None
        edited = self.current.is_edited and self.current
        state, self._suspended = self._state_after_blocks(), None
        self.current = self._cached(state) or self._build(state)
        self._remember()
        if edited:
            raise RewriteError(
                "the graph was edited by hand within disable_adapter(), and the edit ended with the block; call "
                "adopt_edits() within the block"
            )

    def _state_after_blocks(self) -> GraphState:
        if self._suspended is None:
            return self.state
        now = self.state
        state = dataclasses.replace(
            self._suspended, training=now.training, passes=now.passes, checkpointing=now.checkpointing
        )
        if self._cached(state) is not None:
            return state
        active, merged = (
            tuple(name for name in names if name in self.adapters) for names in (state.active, state.merged)
        )
        weights = self._folded(merged) if merged else {}
        return dataclasses.replace(state, active=active, merged=merged, weights=weights)

    def _drop(self, name: str) -> None:
        drop(self.base.tree, name)
        self.adapters = {other: adapter for other, adapter in self.adapters.items() if other != name}
        self._show_adapters()


# -- an optimizer's first step: nothing is registered before there is an adapter ------------------------------------

# adapters that no optimizer has trained yet, by owner; a deleted owner is forgotten
_untrained: weakref.WeakKeyDictionary[AdapterGraph, set[str]] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []  # torch's handle of the hook, once there is one; a hook cannot be removed while hooks run


def _watch_first_step(owner: AdapterGraph, name: str) -> None:
    """Register a warning, at a torch optimizer's first step, for an adapter's sites that got no gradient."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
    _untrained.setdefault(owner, set()).add(name)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if _untrained and not torch.compiler.is_compiling():
        from gralora_fx.core.adapters.first_step import check_first_step

        check_first_step(optimizer, _untrained)
