"""Settings and fixtures of all tests: threads, workers that end together, the parity table."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "parity"))  # xdist's controller collects nothing that would insert it

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # without it each process compiles the package, each worker all tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub fails at once
os.environ["GRALORA_FX_PROGRESS"] = "0"  # which depends on how fast a machine is; tests of it set it otherwise
os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests start too: threads of torch spin where cores are busy
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # so that `serve` does not start over; its tests do

import numpy as np
import pytest
import torch
from made_once import PLACE
from scheduling import GroupScheduling, rank, sampled

collect_ignore_glob = ["clients/*.py"]  # scripts that run in environments of their own

sys.dont_write_bytecode = False
# pytest listens to loggers that pass nothing on, and torch describes every step of a trace to whoever listens: a sixth
# of the time of tests that trace
logging.getLogger("torch.__trace").propagate = True
torch.set_num_threads(1)  # so that parallel workers do not fight over the cores
gc.set_threshold(1_000_000, 20, 100)  # graphs are many small objects; usual thresholds look them through all the time


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was compared with PEFT, for each architecture, and what was left out."""
    from parity_table import print_table

    print_table(terminalreporter)
    if config.getoption("--sample"):
        terminalreporter.write_line(
            "left out: what takes longest (make test-slow), most of large grids (make test-all)"
        )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling | None:
    """Schedule by groups of files where the usual schedule is by files."""
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make test` and `make test-slow`."""
    parser.addoption("--sample", action="store_true", help="leave out much of what takes long (sampled.toml)")
    parser.addoption("--sample-slow", action="store_true", help="only what takes longest, and of grids a sample")


class Seeds:
    """A plug-in that gives each test, doctests too, random numbers of its own, the same in every run."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Seed before fixtures are made."""
        seed = zlib.crc32(item.nodeid.encode())
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)


def pytest_configure(config: pytest.Config) -> None:
    """Make a place for what is made once; in all but `make test-all`, draw fewer examples, and have faster traces.

    torch remembers what each operator gives for fake tensors, which pays from eight layers on: a trace of two has the
    same nodes without, in two thirds of the time. Workers and processes that tests start inherit all of this.
    """
    config.pluginmanager.register(Seeds())
    if not hasattr(config, "workerinput"):
        place = tempfile.mkdtemp(prefix="tests-made-once-")
        os.environ[PLACE] = place
        config.add_cleanup(lambda: shutil.rmtree(place, ignore_errors=True))
    if config.getoption("--sample") or config.getoption("--sample-slow"):
        os.environ["SAMPLE_EXAMPLES"] = "1"
    if _is_short(config):
        os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"


def _is_short(config: pytest.Config) -> bool:
    """Return whether a run is that of `make test`, `make test-slow` or `make quick`."""
    return config.getoption("--sample") or config.getoption("--sample-slow") or config.option.markexpr == "quick"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what takes long first, which workers keep to (`--no-loadscope-reorder`); share captures in short runs."""
    is_slow = config.getoption("--sample-slow")
    if is_slow or config.getoption("--sample"):
        items[:] = sampled(items, slow=is_slow)
    if _is_short(config):
        from captured_once import once  # where tests run: the process that starts the workers loads none of it

        from gralora_fx.core.tracing import capture

        capture.capture = once(capture.capture)
        _let_sessions_sleep()
    items.sort(key=rank)


def _let_sessions_sleep() -> None:
    """Have threads of ONNX Runtime that wait sleep: spinning, they take the cores of the tests beside."""
    import onnxruntime

    original = onnxruntime.InferenceSession.__init__

    def opened(
        session: onnxruntime.InferenceSession,
        model: Any,
        sess_options: onnxruntime.SessionOptions | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        options = onnxruntime.SessionOptions() if sess_options is None else sess_options
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        original(session, model, options, *args, **kwargs)

    onnxruntime.InferenceSession.__init__ = opened


def pytest_sessionfinish() -> None:
    """Spare pytest, which collects garbage five times at the end, all that a worker holds."""
    gc.freeze()


@pytest.fixture
def own_garbage() -> Iterator[None]:
    """Have `gc.collect`, which Trainer calls too, look at what the test makes alone: all of a worker takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def openvino() -> Any:
    """Return the device of OpenVINO's plug-in; it has none on a processor that is not Intel's."""
    pytest.importorskip("onnxruntime_ep_openvino", reason="pip install 'gralora-fx[openvino]'")
    from gralora_fx.errors import ServingError
    from gralora_fx.run.sessions.plugins import devices_of

    try:
        return devices_of("OpenVINOExecutionProvider")[0]
    except ServingError as error:
        info = Path("/proc/cpuinfo")
        if "runs on no device" in str(error) and info.exists() and "GenuineIntel" not in info.read_text():
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return exports that take adapters as data, each made once in a process: `adapters_as_data.Exports`."""
    from adapters_as_data import Exports

    return Exports(tmp_path_factory.mktemp("exports"))
