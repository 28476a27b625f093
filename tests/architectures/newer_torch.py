"""Classes that the lowest torch cannot export; docs/versions.md names them."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

# torch 2.11 asks for the number of elements of a tensor with symbolic sizes; it gives the mask one size
NOT_IN_2_11 = ("Gemma3nForCausalLM", "XLMWithLMHeadModel", "NystromformerForSequenceClassification")


def skip_if_torch_is_too_old(name: str) -> None:
    """Skip the test of a class that the installed torch cannot export."""
    if name in NOT_IN_2_11 and Version(torch.__version__) < Version("2.12"):
        pytest.skip(f"torch {torch.__version__} cannot export {name}")
