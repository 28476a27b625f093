"""Work on many models, each in a process of its own under a limit of processor time."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from benchmarks.harness import progress
from gralora_fx.errors import first_line

Result = TypeVar("Result")
Note = Callable[[str], None]
Work = Callable[[str, Note], Result]  # of a name; it notes each stage that it begins

LIMIT = 90  # seconds of processor time that one name may take
PATIENCE = 10 * LIMIT  # seconds on the clock, however busy the machine is


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one name: a result, or the reason why there is none.

    Attributes:
        name: What was worked on.
        seconds: Processor time, or time on the clock where the process was ended.
        result: The result, or None.
        stage: The last stage that began.
        reason: Why there is no result, or an empty string.
    """

    name: str
    seconds: float
    result: Result | None = None
    stage: str = ""
    reason: str = ""


def survey(
    known: Iterable[str],
    only: Sequence[str],
    work: Work[Result],
    verdict: Callable[[Outcome[Result]], str],
    *,
    kind: str,
    module: str,
    at_once: int,
) -> list[Outcome[Result]]:
    """Work on all names, or on some of them, and print what became of each.

    Args:
        known: All names.
        only: Those to work on; none for all.
        work: As in `each_apart`, as are `module` and `at_once`.
        verdict: Says of an outcome what to print.
        kind: What transformers has by these names, for an error.
        module: The module whose imports every process shares.
        at_once: How many processes run at a time.

    Raises:
        ValueError: A name is not known.
    """
    names = list(known)
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"transformers has no {kind} {', '.join(unknown)}")
    names = [name for name in names if not only or name in only]
    found: list[Outcome[Result]] = []
    for result in each_apart(names, work, module=module, at_once=at_once):
        found.append(result)
        progress(f"{len(found)} of {len(names)}, {result.name}, {result.seconds:.0f} s: {verdict(result)}")
    return found


def each_apart(
    names: Sequence[str], work: Work[Result], *, module: str, at_once: int, limit: int = LIMIT
) -> Iterator[Outcome[Result]]:
    """The outcome of each name, in their order.

    Args:
        names: What to work on.
        work: A function of a module, so that another process finds it.
        module: The module whose imports every process shares.
        at_once: How many processes run at a time.
        limit: Seconds of processor time that each may take.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.warm", module])  # the imports, once
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda name: _apart(context, name, work, limit), names)


def _apart(context: Any, name: str, work: Work[Result], limit: int) -> Outcome[Result]:
    """Work on one name in another process, which is ended at the limit."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, work, limit, sender), daemon=True)
    begin, stage = time.perf_counter(), ""
    process.start()
    sender.close()
    try:
        while receiver.poll(PATIENCE):
            message = receiver.recv()
            if isinstance(message, Outcome):
                return message
            stage = message
        return Outcome(name, PATIENCE, stage=stage, reason=f"it takes more than {PATIENCE} s")
    except EOFError:
        process.join()
        is_slow = process.exitcode == -signal.SIGXCPU
        reason = f"it takes more than {limit} s" if is_slow else f"its process ended with {process.exitcode}"
        return Outcome(name, time.perf_counter() - begin, stage=stage, reason=reason)
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(name: str, work: Work[Any], limit: int, sender: Connection) -> None:
    import torch
    import transformers

    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    begin = time.process_time()
    result, reason, stages = None, "", [""]

    def note(stage: str) -> None:
        stages.append(stage)
        sender.send(stage)

    try:
        result = work(name, note)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the reason
        reason = f"{type(error).__name__}: {first_line(error)}"
    sender.send(Outcome(name, time.process_time() - begin, result, stages[-1], reason))
