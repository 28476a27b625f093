"""The cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_V1_FOLDERS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")  # where control groups of the first version are mounted


def available_threads(root: Path = Path("/")) -> int:
    """How many cores this process may use: those it may be scheduled on, or fewer by the quota of a control group.

    A quota of two and a half cores counts as two, and one below a core as one: of more threads than the quota has
    cores, all would be stopped each time it is used up.

    Args:
        root: The directory that holds `proc` and `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each control group around this process allows it; none on a system without control groups."""
    groups, mount = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    if not groups.is_file():
        return
    for line in groups.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _quotas_within(mount, path, ("cpu.max",))
        elif "cpu" in controllers.split(","):
            for name in _V1_FOLDERS:
                yield from _quotas_within(mount / name, path, ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def _quotas_within(mount: Path, path: str, names: tuple[str, ...]) -> Iterator[float]:
    """The quotas of a group and of those that it is in; in a container its own group may be the mount itself."""
    group = mount / path.strip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(mount) and all((folder / name).is_file() for name in names):
            quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
