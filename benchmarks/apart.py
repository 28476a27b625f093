"""Run work on many models, each in its own process with a CPU time limit."""

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
Work = Callable[[str, Note], Result]  # takes a name, and a function that records each stage as it begins

LIMIT = 90  # CPU seconds that one name may take
PATIENCE = 10 * LIMIT  # wall-clock seconds, however busy the machine is


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The outcome for one name: a result, or the reason why there is none."""

    name: str
    seconds: float  # CPU time, or wall-clock time if the process was killed
    result: Result | None = None  # the result, or None
    stage: str = ""  # the last stage that was entered
    reason: str = ""  # why it failed; empty if it did not


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
    """Run work for all names, or those in `only`, and print each outcome's `verdict`; for the rest see `each_apart`.

    Raises a `ValueError` that calls an unknown name no `kind` of transformers.
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
    """Run work for each name in its own process, `at_once` at a time; yield the outcomes in the order of the names.

    `work` is at module level, so that other processes can import it; all share the imports of `module`. `limit` is the
    CPU seconds that each may take.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.warm", module])  # the imports, once
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda name: _apart(context, name, work, limit), names)


def _apart(context: Any, name: str, work: Work[Result], limit: int) -> Outcome[Result]:
    """Run work for one name in another process, which is killed at the limit."""
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
