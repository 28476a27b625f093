"""Threads follow the cores that the scheduler and the control groups leave to this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gralora_fx.run.sessions.run_options import available_threads


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "4:cpuset:/\n3:cpu,cpuacct:/pod/app\n"
GROUP = "sys/fs/cgroup/cpu,cpuacct/pod"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
        (  # the group around it allows less than its own
            {
                "proc/self/cgroup": "0::/pod/app\n",
                "sys/fs/cgroup/pod/app/cpu.max": "600000 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
            },
            3,
        ),
        (  # a container sees its own group as the root, under the path that the host knows
            {"proc/self/cgroup": "0::/../host/path\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"},
            4,
        ),
        ({"proc/self/cgroup": V1, f"{GROUP}/cpu.cfs_quota_us": "-1", f"{GROUP}/cpu.cfs_period_us": "100000"}, 8),
        ({"proc/self/cgroup": V1, f"{GROUP}/cpu.cfs_quota_us": "150000", f"{GROUP}/cpu.cfs_period_us": "50000"}, 3),
    ],
)
def test_a_quota_counts_whole_cores(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_threads(write(tmp_path, files)) == expected


def test_an_affinity_of_one_core_is_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    quota = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}
    assert available_threads(write(tmp_path, quota)) == 1


def test_this_machine_has_a_core() -> None:
    assert 1 <= available_threads() <= (os.cpu_count() or 1)
