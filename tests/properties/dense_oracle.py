"""The meaning of an adapter, computed without the product: dense updates of the model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from drawn_nets import Case
from torch import Tensor
from torch.func import functional_call
from traces import run

from gralora_fx import GraloraModel, LinearSite, TracedModel
from gralora_fx.core.methods.gralora import Factors


def output(model: Callable[..., Any], case: Case) -> Tensor:
    """Return a model's output; its inputs are copied, for a model may write into them."""
    return run(model, {name: value.clone() for name, value in case.inputs.items()})


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value (or to 1, where all of them are small)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not actual.numel():
        return 0.0
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


def dense(factors: Factors, scale: float) -> Tensor:
    """Return the update `[out, in]` of an adapter, block by block as the paper writes it."""
    A, B = factors.A.detach().double(), factors.B.detach().double()
    k, s = A.shape[0], A.shape[2] // A.shape[0]
    rows = []
    for j in range(k):
        blocks = [B[j, n * s : (n + 1) * s].T @ A[n, :, j * s : (j + 1) * s].T for n in range(k)]
        rows.append(torch.cat(blocks, dim=1))
    update = torch.cat(rows)
    if factors.A_general is not None and factors.B_general is not None:
        update = update + factors.B_general.detach().double() @ factors.A_general.detach().double()
    return scale * update


def weight_name(site: LinearSite, parameters: Mapping[str, Tensor]) -> str:
    if f"{site.path}.weight" in parameters:
        return f"{site.path}.weight"
    return next(name for name, parameter in parameters.items() if parameter is site.weight)


@dataclass(frozen=True)
class Dense:
    """The meaning of an adapter: updates `[out, in]` by site path, and copies of parameters by name."""

    updates: Mapping[str, Tensor]
    copies: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: GraloraModel, name: str = "default") -> Dense:
        adapter = model.adapter(name)
        return cls(
            {path: dense(factors, adapter.planned[path].scale) for path, factors in adapter.factors.items()},
            {
                base: parameter.detach().clone()
                for owned in adapter.copies.values()
                for base, parameter in owned.items()
            },
        )


def with_dense(case: Case, adapters: Iterable[Dense]) -> Callable[..., Any]:
    """Return the source of a case with copies in place of its parameters, and updates added to its weights."""
    parameters = dict(case.source.named_parameters(remove_duplicate=False))
    dense = {name: parameter.detach().double() for name, parameter in parameters.items()}
    for adapter in adapters:
        dense |= {name: copied.double() for name, copied in adapter.copies.items()}
    for adapter in adapters:
        for path, update in adapter.updates.items():
            site = case.traced.site(path)
            name = weight_name(site, parameters)
            dense[name] = dense[name] + (update.T if site.kind == "conv1d" else update)
    values = {name: tensor.to(parameters[name].dtype) for name, tensor in dense.items()}
    return lambda **inputs: functional_call(case.source, values, (), inputs, tie_weights=False)


def text(model: GraloraModel | TracedModel) -> str:
    return str(model.graph_module.graph)


def meaning(model: GraloraModel, name: str = "default") -> Any:
    """Return what an adapter's plan says of every site."""
    applied_plan = model.plans[name]
    sites = {planned.site.path: (planned.sizes, planned.scale) for planned in applied_plan.selected}
    return (
        sites,
        applied_plan.saved_modules,
        applied_plan.trained_biases,
        applied_plan.config.gralora_dropout,
        applied_plan.config.init_weights,
    )
