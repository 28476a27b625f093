"""The order of passes, checked from what each needs, leaves and ends when a pipeline is built."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from gralora_fx.core.graph.pipeline import PassLog, PassResult, Pipeline, contract
from gralora_fx.errors import RewriteError

SORTED, PLAIN = "terms are sorted", "every product is plain"


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().exp()


@contract(leaves={SORTED})
def sort_terms(graph: fx.Graph) -> PassResult[fx.Graph]:
    return PassResult(0)


@contract(needs={SORTED, PLAIN}, ends={PLAIN})
@dataclass(frozen=True)
class FuseProducts:
    width: int

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        return PassResult(self.width)


def count(graph: fx.Graph) -> PassResult[fx.Graph]:
    return PassResult(len(graph.nodes))


def test_an_order_that_meets_every_need_is_built_and_run() -> None:
    log = PassLog()
    passes = (count, sort_terms, FuseProducts(3), count)
    Pipeline("products", passes, given=frozenset({PLAIN})).run(fx.symbolic_trace(Net()).graph, log)
    assert [(report.name, report.changed) for report in log.reports] == [
        ("count", 4),
        ("sort_terms", 0),
        ("fuse_products", 3),
        ("count", 4),
    ]


def test_a_need_that_no_earlier_pass_leaves_is_named_with_the_pass() -> None:
    message = "the pass fuse_products of products needs 'terms are sorted', which no pass before it leaves"
    with pytest.raises(ValueError, match=message):
        Pipeline("products", (FuseProducts(3), sort_terms), given=frozenset({PLAIN}))


def test_a_need_that_an_earlier_pass_ends_is_named_with_both() -> None:
    message = "the pass fuse_products of products needs 'every product is plain', which the pass fuse_products ends"
    with pytest.raises(ValueError, match=message):
        Pipeline("products", (sort_terms, FuseProducts(3), FuseProducts(4)), given=frozenset({PLAIN}))


def test_a_pass_that_fails_is_reported_by_the_error_of_its_pipeline() -> None:
    def fail(graph: fx.Graph) -> PassResult[fx.Graph]:
        raise KeyError("missing")

    with pytest.raises(RewriteError, match="the pass fail of products failed: 'missing'"):
        Pipeline("products", (fail,)).run(fx.symbolic_trace(Net()).graph, PassLog())
