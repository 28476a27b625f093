"""What every test shares: few threads, so that parallel workers do not fight over the cores."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub fails at once

import torch

torch.set_num_threads(1)
