"""Keep adapters from overwriting a layer's output that something else reads."""

from __future__ import annotations

from torch import fx

from gralora_fx.graph.annotations import annotation_of
from gralora_fx.graph.pipeline import PassResult
from gralora_fx.methods.low_rank import accumulate


def protect_outputs(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule]:
    """Make an adapter add out of place where another node reads the layer's output.

    Before: `y = linear(x, w, b); p = probe(y); ...; z = accumulate(blocks of y, ...)`
    After:  `y = linear(x, w, b); p = probe(y); ...; z = accumulate(blocks of y, ..., in_place=False)`

    Insertion redirects every reader to the adapter's result, so only a later pass can add such a reader.
    """
    changed = 0
    for node in graph_module.graph.find_nodes(op="call_function", target=accumulate):
        annotation = annotation_of(node)
        source = node.args[0]
        while isinstance(source, fx.Node) and node.kwargs.get("in_place", True):
            if any(annotation_of(user) != annotation for user in source.users):
                node.update_kwarg("in_place", False)
                changed += 1
            if annotation_of(source) is None or not source.args:
                break
            source = source.args[0]
    return PassResult(changed)
