"""The tasks that a model can be traced for, by optimum's names, and PEFT's task types of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gralora_fx.errors import ConfigError, TraceError, option

if TYPE_CHECKING:
    from gralora_fx.core.config.adapter_config import AdapterConfig

_PAST = "-with-past"  # ends the name of a task's variant with a cache


@dataclass(frozen=True)
class Task:
    """A task that a model can be traced for."""

    name: str  # its name, without a cache
    auto_class: str = ""  # the class of transformers that loads a model for it
    heads: tuple[str, ...] = ()  # ends of the names of transformers' classes for it
    # Main inputs, one of which its models take; empty for any. A model whose class also fits text2text-generation is
    # for the task if it takes the first.
    inputs: tuple[str, ...] = ()
    # which models have a variant with a cache, that generates; None for none
    cache: Literal["decoder", "encoder-decoder"] | None = None
    adapters: tuple[str, ...] = ()  # PEFT's types of tasks whose adapters may be used for it
    is_classification: bool = False  # whether its head serves only this task
    takes_embeddings: bool = False  # whether its decoders, or encoders, take embeddings beside ids
    # returns whether a model of a text2text-generation class is for this task
    is_of: Callable[[Any], bool] | None = None
    # whether it reads only an encoder's hidden states: an encoder-decoder's encoder is loaded, and a checkpoint may
    # lack the pooler, which is not read
    encoder_alone: bool = False
    example: str = ""  # example arguments of `generate` as Python code, if they are not a text
    # the same as options of the command, by their Python names
    example_options: Mapping[str, str] = field(default_factory=dict)


_TASKS = (
    Task("feature-extraction", "AutoModel", adapters=("FEATURE_EXTRACTION",)),
    Task("fill-mask", "AutoModelForMaskedLM", ("ForMaskedLM",)),
    Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
        adapters=("SEQ_CLS",),
        is_classification=True,
    ),
    Task(
        "token-classification",
        "AutoModelForTokenClassification",
        ("ForTokenClassification",),
        adapters=("TOKEN_CLS",),
        is_classification=True,
    ),
    Task(
        "question-answering",
        "AutoModelForQuestionAnswering",
        ("ForQuestionAnswering",),
        adapters=("QUESTION_ANS",),
        is_classification=True,
    ),
    Task(
        "text-generation",
        "AutoModelForCausalLM",
        ("ForCausalLM", "LMHeadModel"),
        cache="decoder",
        adapters=("CAUSAL_LM",),
    ),
    Task(
        "text2text-generation",
        "AutoModelForSeq2SeqLM",
        ("ForConditionalGeneration",),
        cache="encoder-decoder",
        adapters=("SEQ_2_SEQ_LM",),
    ),
)
_BY_NAME = {task.name: task for task in _TASKS}
# the task of an encoder and a decoder with a cache, which are two graphs
TEXT_TO_TEXT = "text2text-generation-with-past"
_PEFT_TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def all_tasks() -> Iterator[Task]:
    """Yield the tasks; those that features add come last, and are imported only when they are reached."""
    yield from _TASKS
    from gralora_fx.base.features import parts

    for added in parts("tasks"):
        yield from added


def task_names() -> list[str]:
    """Return the names of all tasks, each followed by that of its variant with a cache, if it has one."""
    return [name for task in all_tasks() for name in dict.fromkeys((task.name, with_past(task.name)))]


def find_task(name: str | None) -> Task | None:
    """Return the task with a name, or the task whose variant with a cache has it; None if there is none."""
    if name is None:
        return None
    base = name.removesuffix(_PAST)
    return _BY_NAME.get(base) or next((task for task in all_tasks() if task.name == base), None)


def task_of_class(name: str) -> str:
    """Return the task of a transformers class by its name; `feature-extraction` if it names no head."""
    found = next((task for task in all_tasks() if task.heads and name.endswith(task.heads)), None)
    return "feature-extraction" if found is None else found.name


def classifies(task: str) -> bool:
    """Return whether the head of a task's models serves only this task."""
    known = find_task(task)
    return known is not None and known.is_classification


def check_task(task: str | None) -> None:
    """Check the name of a task."""
    if task is None:
        return
    known = find_task(task)
    if known is None or (known.cache is None and task != known.name):
        raise TraceError(f"unknown task {task!r}; take one of {', '.join(task_names())}")


def with_past(task: str) -> str:
    """Return the name of a task's variant with a cache, or its own if it has none."""
    known = find_task(task)
    return f"{task}{_PAST}" if known is not None and known.cache is not None and task == known.name else task


def generates(task: str | None) -> bool:
    """Return whether a task is a variant with a cache, whose exports answer prompts."""
    known = find_task(task)
    return known is not None and known.cache is not None and task != known.name


def is_encoder_decoder(task: str | None) -> bool:
    """Return whether a task is for an encoder and a decoder with a cache, which are two graphs."""
    known = find_task(task) if generates(task) else None
    return known is not None and known.cache == "encoder-decoder"


def is_decoder(task: str | None) -> bool:
    """Return whether a task is for a decoder with a cache, which is one graph."""
    return generates(task) and not is_encoder_decoder(task)


def tasks_beside_ids() -> list[str]:
    """Return the tasks of decoders with a cache that take embeddings beside ids."""
    return [with_past(task.name) for task in all_tasks() if task.takes_embeddings and task.cache == "decoder"]


def requested_task(task_type: object, task: str | None, *, with_cache: bool) -> str | None:
    """Return the task that `load_traced` will trace for, if it is known without the base."""
    if task is not None:
        return task
    adapter_task = _PEFT_TASKS.get(str(task_type))
    if adapter_task == "feature-extraction":
        return None  # the files of the base may show another task
    return with_past(adapter_task) if with_cache and adapter_task else adapter_task


def task_of(config: AdapterConfig, task: str | None, adapter: str) -> str | None:
    """Return the requested task after checking it against the adapter's, or the adapter's own."""
    check_adapter_task(config.task_type, task, adapter)
    return task or _PEFT_TASKS.get(config.task_type or "")


def check_adapter_task(task_type: str | None, task: str | None, adapter: str) -> None:
    """Check that an adapter may be used for a task."""
    adapter_task = _PEFT_TASKS.get(task_type or "")
    if task is None or adapter_task is None:
        return
    check_task(task)
    known = find_task(task)
    if known is None or task_type not in known.adapters:
        raise ConfigError(
            f"the adapter {adapter} was trained for task_type {task_type}, which is {option(task=adapter_task)}, not "
            f"{task}; give {option(task=adapter_task)}, or another adapter"
        )
