"""What every test shares: few threads, so that parallel workers do not fight over the cores; the parity table."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "parity"))  # xdist's controller collects nothing that would insert it

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub fails at once

import torch

torch.set_num_threads(1)
gc.set_threshold(100_000, 20, 100)  # graphs are many small objects; the usual threshold looks them through all the time


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was compared with PEFT, for each architecture."""
    from parity_table import print_table

    print_table(terminalreporter)
