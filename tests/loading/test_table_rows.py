"""Tables of which some rows are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gralora_fx.base.sources.lazy_tensors import lazy_parameter, reading
from gralora_fx.base.sources.table_rows import looked_up

ROWS, WIDTH = 60_000, 1024  # 246 MB in float32
on_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")


def own_memory() -> int:
    """Bytes of memory that this process has written."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(text.partition("Anonymous:")[2].split()[0]) * 1024


@on_linux
def test_rows_that_are_not_looked_up_take_no_memory() -> None:
    values = torch.zeros(1, WIDTH, dtype=torch.bfloat16).expand(ROWS, WIDTH)
    ids = torch.tensor([[5, 59_999], [7, 5]])
    before = own_memory()
    found = looked_up(values, ids, torch.float32)
    assert found.shape == (ROWS, WIDTH)
    assert own_memory() - before < 20e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lookup_of_a_lazy_table_is_the_tables(dtype: torch.dtype) -> None:
    values, ids = torch.randn(50, 6).to(dtype), torch.tensor([[3, 3, 49], [0, 1, 2]])
    layer = torch.nn.Embedding(50, 6, padding_idx=3)
    expected: Tensor = torch.nn.functional.embedding(ids, values.float())
    layer.weight = lazy_parameter(lambda: values, (50, 6), torch.float32)
    with reading(layer):
        assert torch.equal(layer(ids), expected)
    with reading(layer), pytest.raises(IndexError, match="out of bounds"):
        layer(torch.tensor([50]))
