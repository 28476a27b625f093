"""The parameters that a tree of modules holds, replaced."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def map_parameters(root: nn.Module, new: Callable[[nn.Parameter, str], nn.Parameter]) -> None:
    """Let modules hold other parameters; one that has several places is made once, so that what is tied stays tied.

    Args:
        root: The modules; they are changed in place, their parameters are not.
        new: Gives what to hold in the place of a parameter, itself where it shall stay, by it and its first path.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tensor is equal to itself alone as a key
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = new(parameter, f"{path}.{name}".lstrip("."))
                module._parameters[name] = made[parameter]
