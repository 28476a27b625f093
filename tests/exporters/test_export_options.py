"""Options of an export check themselves: every bad value is one error, before anything is done."""

from __future__ import annotations

from typing import Any

import pytest

from gralora_fx.errors import ExportError
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.options import ExportOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": "loose"}, "adapters='loose' is not available; take 'merged'"),
        ({"precision": "fp8"}, "precision='fp8' is not available; take 'fp32' or 'fp16' or 'bf16'"),
        ({"precision": None}, "precision=None is not available"),
        (
            {"quantize": "int3"},
            "quantize='int3' is not available; take 'int4' or 'int8' or 'int8-dynamic' or 'kept' or 'float', or leave "
            "it out",
        ),
        ({"block_size": 24}, "block_size=24 is not a block size; take a power of two, 16 or more"),
        ({"accuracy_level": 2.0}, "accuracy_level=2.0 is not an accuracy level; take 0"),
        (
            {"quantize": "int4", "bits": 3.9},
            "bits=3.9 cannot be the mean of layers of 4 and of 8 bits; take 4 to 8, such",
        ),
        ({"quantize": "int4", "bits": 8.1}, "bits=8.1 cannot be the mean"),
        ({"quantize": "int4", "bits": "5"}, "bits='5' cannot be the mean"),
        ({"quantize": "int4", "bits": float("nan")}, "bits=nan cannot be the mean"),
        (
            {"quantize": "int8", "bits": 5},
            "bits=5 is the budget of quantize='int4', and quantize='int8' has 8 bits every",
        ),
        (
            {"quantize": "int8-dynamic", "bits": 5},
            "bits=5 is the budget of quantize='int4', and quantize='int8-dynamic'",
        ),
        ({"bits": 5}, "bits=5 is the budget of quantize='int4', and nothing is quantized; leave it out"),
        ({"quantize": "int4", "texts": ["one"], "tokenizer": "."}, r"texts=\.\.\. has one text, and int4 needs two"),
        ({"logits": "first"}, "logits='first' is not available; take 'last' or 'all'"),
        ({"verify": "slow"}, "verify='slow' is not available; take 'quick' or 'full'"),
        ({"verify": None}, "verify=None is not available"),
        ({"overwrite": "yes"}, "overwrite must be True or False, but got 'yes'"),
        ({"dump": 5}, "dump must be the path of a directory or None, but got 5"),
        ({"tokenizer": 5}, "5 is not a tokenizer; give one of transformers, or the directory of one"),
    ],
)
def test_a_bad_value_is_one_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        ExportOptions(**options)


def test_options_say_what_they_mean() -> None:
    assert [ExportOptions(verify=value).level for value in (True, "quick", "full", False)] == [
        "quick",
        "quick",
        "full",
        None,
    ]
    assert ExportOptions().format is None
    assert ExportOptions(quantize="int4", block_size=64).format == Blocks(4, 64, rounding="searched", scale_bits=16)
