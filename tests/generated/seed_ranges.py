"""Runs ranges of seeds in processes of their own, so that one that crashes is a fault of its seed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.generated.checks import Verdict, examine
from tests.generated.modules import drawn


def _examined(seeds: range, names: Sequence[str] | None, results: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    for seed in seeds:
        results.send(examine(drawn(seed), None if names is None else list(names)))
    results.send(None)


class Worker:
    """A process that examines a range of seeds, and the one that goes on behind a seed that crashes."""

    def __init__(self, seeds: range, names: Sequence[str] | None) -> None:
        self.seeds, self.names = seeds, names
        self._start()

    def _start(self) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self.results, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_examined, args=(self.seeds, self.names, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def received(self) -> list[Verdict] | None:
        """Return the verdicts of the next seed; `None` at the end."""
        try:
            verdicts: list[Verdict] | None = self.results.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            verdicts = [Verdict(self.seeds[0], "rewriting", "FAULT", f"the process crashed: exit code {code}")]
            self.seeds = self.seeds[1:]
            self._start()
            return verdicts
        self.seeds = self.seeds[1:]
        return verdicts


def run(seeds: range, names: Sequence[str] | None = None, workers: int = 2) -> Iterator[list[Verdict]]:
    """Yield the verdicts of each seed, as they come."""
    running = [Worker(seeds[start::workers], names) for start in range(min(workers, len(seeds)))]
    while running:
        ready = wait([worker.results for worker in running])
        for worker in [worker for worker in running if worker.results in ready]:
            verdicts = worker.received()
            if verdicts is None:
                running.remove(worker)
            else:
                yield verdicts
