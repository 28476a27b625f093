"""Nothing is printed when the interpreter ends, whatever was trained and left untrained before."""

from __future__ import annotations

import subprocess
import sys

from fresh_process import fresh_process

# a model that is still alive when the interpreter takes the package's modules apart, as in a crowded process
_SCRIPT = """
import ctypes, os, sys, types, warnings
holder = sys.modules["holder"] = types.ModuleType("holder")
import torch
from torch import nn
from gralora_fx import rewrite, trace
from gralora_fx.core.adapters import adapter_graph
from gralora_fx.core.methods import METHODS

for module in (holder, adapter_graph):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
traced = trace(network, (torch.randn(1, 8),))
models = holder.models = [rewrite(traced, method.config(r=4, target_modules=["0"])) for method in METHODS]
for model, method in zip(models, METHODS):
    model.add_adapter("untrained", method.config(r=4, target_modules=["2"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
print(len(models), flush=True)
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which torch has
if child := os.fork():  # the one ends after an error, the other as usual
    assert os.waitpid(child, 0)[1] == 0
    raise SystemExit("stopped")
"""


def test_a_model_that_outlives_the_packages_modules_prints_nothing_and_an_error_is_all_that_is_printed() -> None:
    ended = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("3\n", "stopped\n", 1)


def test_an_example_prints_nothing_beside_its_output() -> None:
    ended = fresh_process()
    assert (ended.stderr, ended.status) == ("", 0)
    assert "merged and unmerged differ by" in ended.stdout.splitlines()[-1]
