"""Loads, traces and rewrites a base model by name, with its task and adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gralora_fx.base.features import parts
from gralora_fx.base.progress.stages import timed
from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.model_directories import check_model_files
from gralora_fx.base.sources.same_base import CONFIG, DIFFERENT, SAME, BaseSource, compare_bases
from gralora_fx.core.adapters.adapter_files import read_adapter
from gralora_fx.core.adapters.checkpoint import base_names, settled_base
from gralora_fx.core.adapters.saved_embeddings import VocabularySizeError
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.loading.adapter_facts import base_name, head_classes, needed_quantization
from gralora_fx.core.loading.load_report import LoadReport
from gralora_fx.core.loading.models import load_streamed, load_with_report, warn_of_another_head
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.cached_steps import NoStepError
from gralora_fx.core.tracing.inputs.samples import infer_task
from gralora_fx.core.tracing.trace import trace
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import (
    CheckpointError,
    GraloraError,
    Message,
    TargetError,
    TraceError,
    bulleted,
    marked,
    option,
    warn_caller,
)
from gralora_fx.format.tasks import task_of, with_past

_BARE = (None, "feature-extraction")  # tasks of a bare transformer


def load_traced(
    model: str | None,
    adapter: str | None,
    task: str | None,
    *,
    with_cache: bool = False,
    stream: bool = False,
    allow_random_head: bool = False,
    trace_options: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    strict_base: bool = False,
    others: Sequence[str] = (),
    base_quantization: BaseQuantization | Any = None,
) -> TracedModel | GraloraModel:
    """Load and trace a model; rewrite it with an adapter if one is given."""
    how: dict[str, Any] = {"stream": stream, "strict_base": strict_base, "base_quantization": base_quantization}
    base = load_base(model, adapter, task, others=others, **how)
    base.check(allow_random_head=allow_random_head)
    loaded = trace_base(base, with_cache=with_cache, options=trace_options, adapter_name=adapter_name)
    if others and isinstance(loaded, GraloraModel):
        names = [f"adapter_{index}" for index in range(2, len(others) + 2)]
        for name, other in zip(names, others, strict=True):
            loaded.load_adapter(other, name, strict_base=strict_base)
        loaded.set_adapter([adapter_name, *names])
    return loaded


@dataclass(frozen=True)
class LoadedBase:
    """A loaded base model, with its task and adapter."""

    name: str  # local directory or hub id
    model: PreTrainedModel
    task: str | None  # the requested task, or the adapter's; None for the model's own
    is_asked: bool  # whether the task was given explicitly
    adapter: str | None  # directory or hub id of the adapter, or None
    config: AdapterConfig | None  # the adapter's configuration, or None
    supplied: Set[str]  # names of the parameters that the adapter supplies
    arguments: Mapping[str, Any]  # arguments of `trace` for the task, from the files of the base or of the adapter
    num_labels: int | None  # number of classes of the adapter's head, or None
    # how the checkpoint fits the model; None if the weights are streamed, which checks it already
    report: LoadReport | None
    strict_base: bool = False  # whether adding an adapter that is not known to be of this base raises

    @property
    def made_for(self) -> str | None:
        """The base model named in the adapter's configuration."""
        return self.config.base_model_name_or_path if self.config else None

    def check(self, *, allow_random_head: bool = False) -> None:
        """Raise if the base has random values, except those that the adapter replaces."""
        if self.report is not None:
            with another_base_first(self.name, self.adapter, self.config):
                self.report.check(self.supplied, self.num_labels, self.made_for, allow_random_head=allow_random_head)


def load_base(
    model: str | None,
    adapter: str | None,
    task: str | None,
    *,
    stream: bool = False,
    strict_base: bool = False,
    others: Sequence[str] = (),
    base_quantization: BaseQuantization | Any = None,
) -> LoadedBase:
    """Load the base model for a task and an adapter; missing tensors get random values, the same in every run."""
    configs: dict[str, AdapterConfig] = {}
    num_labels: int | None = None
    supplied: set[str] = set()
    is_asked = task is not None
    with timed("loading"):
        for each in () if adapter is None else (adapter, *others):
            configs[each], tensors = read_adapter(each)
            task = task_of(configs[each], task, each)
            num_labels = num_labels or head_classes({key: tensor.shape for key, tensor in tensors.items()})
            supplied |= base_names(tensors)
            del tensors  # they are read again when the adapter is added to the model
        name, report = base_name(model, adapter), None
        if base_quantization is None and model is None and adapter is not None:
            base_quantization = needed_quantization(configs[adapter].base_quantization, name)
        check_model_files(name, TraceError, named_by=None if model else adapter)
        if strict_base:
            _check_bases(name, configs, base_quantization)
        task, arguments = inferred_task(task, (adapter, name), is_asked=is_asked)
        config = None if adapter is None else configs[adapter]
        with another_base_first(name, adapter, config), torch.random.fork_rng(devices=[]):
            how: dict[str, Any] = {"num_labels": num_labels, "base_quantization": base_quantization}
            torch.manual_seed(0)  # so that an export with a random head can be verified later
            if stream:
                loaded = load_streamed(name, task, supplied=supplied, **how)
            else:
                loaded, report = load_with_report(name, task, **how)
    if getattr(loaded.config, "num_labels", None) == 1:
        for note_function in parts("scores"):
            note_function(loaded.config, name)
    if not (report and report.problems()) and supplied.isdisjoint(loaded.state_dict()):
        warn_of_another_head(loaded, name)
    return LoadedBase(
        name, loaded, task, is_asked, adapter, config, supplied, arguments, num_labels, report, strict_base
    )


def inferred_task(
    task: str | None, names: Iterable[str | None], *, is_asked: bool
) -> tuple[str | None, Mapping[str, Any]]:
    """Return the task, given or inferred from the files of an adapter or a base, and arguments of `trace` for it."""
    may_be_any = not is_asked and task in _BARE
    for infer in parts("inferred tasks", None if may_be_any else {task or ""}):
        if (found := infer([name for name in names if name is not None])) is not None:
            inferred: tuple[str, Mapping[str, Any]] = found
            return inferred
    return task, {}


def _check_bases(name: str, configs: Mapping[str, AdapterConfig], base_quantization: Any) -> None:
    """Raise for adapters of another base before anything is loaded.

    For a hub id, which may not be downloaded or may have moved, only proven differences are refused here; the rest is
    checked when the adapter is added to the loaded model.
    """
    used = BaseSource(name, record=base_quantization)
    for adapter, config in configs.items():
        compared = compare_bases(config.made_for, used)
        if compared.is_proven_different or Path(name).is_dir():
            compared.settle(adapter, strict=True, error=CheckpointError)


def trace_base(
    base: LoadedBase,
    *,
    with_cache: bool = False,
    options: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
) -> TracedModel | GraloraModel:
    """Trace a base, and rewrite it with its adapter if it has one."""
    task = base.task or infer_task(base.model)
    if with_cache and not base.is_asked:
        task = with_past(task)
    with timed("tracing"):
        try:
            with another_base_first(base.name, base.adapter, base.config):
                traced = trace(base.model, task=task, **base.arguments, **(options or {}))
        except NoStepError:
            raise
        except TraceError as error:
            if not base.is_asked and task.endswith("-with-past"):
                without = task.removesuffix("-with-past")
                told = marked(error)
                raise error.reworded(f"{told}; take {option(task=without)} for an export without a cache") from error
            raise
    traced = dataclasses.replace(traced, tokenizer_source=traced.tokenizer_source or base.name)
    if base.adapter is None:
        return traced
    if base.strict_base and base.config is not None:
        settled_base(base.config, traced, base.adapter, strict=True)
    with timed("adding adapters"):
        try:
            rewritten = GraloraModel.from_pretrained(traced, base.adapter, adapter_name=adapter_name)
        except VocabularySizeError:
            raise
        except (TargetError, CheckpointError) as error:
            raise error.reworded(_misfit(error, base)) from error
    if all(rewritten.adapter(name).is_zero for name in rewritten.configs):
        warn_caller(
            f"{base.adapter} changes nothing: all of its updates are zero, as those of an untrained adapter are"
        )
    return rewritten


@contextmanager
def another_base_first(name: str, adapter: str | None, config: AdapterConfig | None) -> Iterator[None]:
    """Let errors within the block begin with the reason if an adapter was made for a base of another configuration."""
    try:
        yield
    except GraloraError as error:
        compared = None if config is None else compare_bases(config.made_for, BaseSource(name))
        if compared is not None and compared.outcome == DIFFERENT and CONFIG in compared.compared:
            remedy = f"give that base as {option(model=...)}, or another as {option(adapter=...)}"
            lines = bulleted([marked(error)])
            error.args = (Message(f"the adapter {marked(compared.text(adapter))}; {remedy}:\n{lines}"),)
        raise


def _misfit(error: GraloraError, base: LoadedBase) -> str:
    """Return the message for an adapter that does not fit its base: a headline, then a line for each problem."""
    lines = marked(error).splitlines()
    problems = [line.removeprefix("- ") for line in lines if line.startswith("- ")] or lines
    if base.config is not None and base.made_for:
        if compare_bases(base.config.made_for, BaseSource(base.name)).outcome == SAME:
            return (
                f"the adapter {base.adapter} does not fit {base.name} ({type(base.model).__name__}), the base that it "
                "was made for: its adapter_config.json contradicts its tensors, or both this model; save it "
                f"again, or give another as {option(adapter=...)}:\n" + bulleted(problems)
            )
    hint = f"it was made for {base.made_for}" if base.made_for else "it does not say which base it was made for"
    return (
        f"the adapter {base.adapter} does not fit {base.name} ({type(base.model).__name__}); {hint}, "
        f"so give that base as {option(model=...)}, or another as {option(adapter=...)}:\n" + bulleted(problems)
    )
