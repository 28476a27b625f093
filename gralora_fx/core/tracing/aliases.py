"""A model's modules as a trace needs them: each under one name, and afterwards without what the trace left on them.

torch.export records by which name a module is called, but loses parts of the names of modules registered twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gralora_fx.base.compat.torch_graphs import FakeTensor, tree_leaves


@contextmanager
def own_modules(model: nn.Module) -> Iterator[None]:
    """Within the block, register a copy with the same tensors in each place but the first of a module."""
    changed: list[tuple[nn.Module, str, nn.Module]] = []
    modules: list[tuple[str, nn.Module]] = list(model.named_modules(remove_duplicate=False))[1:]
    seen: set[nn.Module] = set()
    try:
        for path, module in modules:
            owner, _, name = path.rpartition(".")
            parent = model.get_submodule(owner)
            if module in seen and parent._modules[name] is module:  # else its parent is a copy
                changed.append((parent, name, module))
                parent._modules[name] = _copy(module)
            seen.add(module)
        yield
    finally:
        for parent, name, module in changed:
            parent._modules[name] = module


@contextmanager
def without_traces(model: nn.Module) -> Iterator[None]:
    """After the block, let attributes that its trace has set, such as a mask that the forward keeps, be as before."""
    before = [(part, dict(vars(part))) for part in model.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            for name, value in list(vars(part).items()):
                if value is not attributes.get(name) and any(isinstance(v, FakeTensor) for v in tree_leaves(value)):
                    del vars(part)[name]
                    vars(part).update({name: attributes[name]} if name in attributes else {})


def _copy(module: nn.Module) -> nn.Module:
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_parameters"] = dict(module._parameters)
    copy.__dict__["_buffers"] = dict(module._buffers)
    copy.__dict__["_modules"] = {name: child and _copy(child) for name, child in module._modules.items()}
    return copy
