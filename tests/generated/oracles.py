"""Oracles: PEFT on the eager module, or where PEFT does not take it, the eager module with dense updates."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gralora_fx import GraloraModel
from tests.generated.modules import Description

PREFIX = "graph_module.gralora.default."


class DenseOracle(nn.Module):
    """The eager module with `W + update` in the place of each adapted weight.

    Attributes:
        adapters: the adapters' parameters, by the names that they have in our model.
    """

    def __init__(self, module: nn.Module, model: GraloraModel, description: Description) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.how = description
        self.adapters = {
            name: nn.Parameter(parameter.detach().clone())
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.held = nn.ParameterList(self.adapters.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseOracle:
        made = DenseOracle.__new__(DenseOracle)
        nn.Module.__init__(made)
        made.module, made.how = copy.deepcopy(self.module, memo), self.how
        made.adapters = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in self.adapters.items()}
        made.held = nn.ParameterList(made.adapters.values())
        return made

    def forward(self, *inputs: Tensor) -> Any:
        """Call the module with the weights that the adapter makes."""
        weights = dict(self.module.named_parameters(remove_duplicate=False))
        changed = {}
        for path, factors in self._factors().items():
            name = path if path in weights else f"{path}.weight"
            changed[name] = self._weight(weights[name], factors, path)
        return torch.func.functional_call(self.module, changed, inputs, tie_weights=False)

    def _factors(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.adapters.items():
            path, _, factor = name.removeprefix(PREFIX).rpartition(".")
            found.setdefault(path, {})[factor.partition("_")[2]] = tensor
        return found

    def _weight(self, weight: Tensor, factors: Mapping[str, Tensor], path: str) -> Tensor:
        A, B = factors["A"], factors["B"]
        turned = self._is_turned(path)
        base = weight.T if turned else weight
        if A.ndim == 3:
            update = blocks(A, B)
            if "A_general" in factors:
                update = update + factors["B_general"] @ factors["A_general"]
        else:
            update = B @ A
        update = self.how.adapter.scale * update
        changed = base + update
        if "magnitude_vector" in factors:
            changed = changed * (factors["magnitude_vector"] / changed.detach().norm(dim=1))[:, None]
        return (changed.T if turned else changed).to(weight.dtype)

    def _is_turned(self, path: str) -> bool:
        """Return whether a weight is `[in, out]`: Conv1D's, and a parameter that einsum and bmm read so."""
        return isinstance(dict(self.module.named_modules()).get(path), Conv1D) or path in self.how.turned()


def blocks(A: Tensor, B: Tensor) -> Tensor:
    """Return GraLoRA's update `[out, in]`, block by block as the paper writes it."""
    k, s = A.shape[0], A.shape[2] // A.shape[0]
    return torch.cat(
        [
            torch.cat([B[j, n * s : (n + 1) * s].T @ A[n, :, j * s : (j + 1) * s].T for n in range(k)], dim=1)
            for j in range(k)
        ]
    )


class PeftOracle(nn.Module):
    """PEFT's model with the adapter that ours has saved.

    Attributes:
        adapters: the adapters' parameters, by the names that they have in our model.
    """

    def __init__(self, module: nn.Module, model: GraloraModel) -> None:
        super().__init__()
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(directory)
            self.module = PeftModel.from_pretrained(copy.deepcopy(module), directory, is_trainable=True).eval()
        theirs = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        self.names = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                same = [n for n, other in theirs.items() if torch.equal(other, parameter)]
                assert len(same) == 1, f"PEFT has {len(same)} parameters with the values of {name}"
                self.names[name] = same[0]
        assert len(self.names) == len(theirs), f"PEFT trains {len(theirs)} parameters, not {len(self.names)}"

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        """Return the adapters' parameters by our names."""
        parameters = dict(self.module.named_parameters())
        return {name: parameters[other] for name, other in self.names.items()}

    def forward(self, *inputs: Tensor) -> Any:
        """Call PEFT's model."""
        return self.module(*inputs)
