"""An adapter method of your own: Kronecker products, trained, saved, merged and exported as the built-in methods are.

    A [p, q], B [out/p, in/q]        dW = scale * kron(A, B), with scale = alpha / p

The update has p*q + out*in/(p*q) values and, unlike LoRA's, can be of full rank. A method has three parts: a
configuration, the tensors of a layer, and the functions over them; `register` makes it known.

Run: python examples/own_method.py --output runs/own_method
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gralora_fx import GraloraModel, merge, plan, rewrite, trace
from gralora_fx.errors import ConfigError
from gralora_fx.exporters import export_onnx
from gralora_fx.methods import METHODS, AdapterConfig, AdapterMethod, LayerCall, register
from gralora_fx.serving import load

# 1. The configuration: the fields of `adapter_config.json`. `PEFT_TYPE` tells the file from those of other methods.


@dataclass(frozen=True)
class KroneckerConfig(AdapterConfig):
    """A Kronecker adapter: `p` and `q`, the sizes of the left factor, and the fields that every method has."""

    p: int = 4
    q: int = 4
    alpha: float = 4.0
    dropout: float = 0.0  # of the adapter's input, in training
    init_weights: bool = True  # False draws B too, as for a test of what an adapter changes
    target_modules: set[str] | str | None = None
    exclude_modules: set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    PEFT_TYPE, TITLE = "KRONECKER", "Kronecker"
    SIZE_FIELDS = ("p", "q", "alpha")  # without which the tensors have no meaning: saved beside them, and compared
    DROPOUT, ALPHA = "dropout", "alpha"

    def check_sizes(self) -> None:
        """Check the fields of this method."""
        for name in ("p", "q"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a positive integer, but got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), but got {self.dropout!r}")


# 2. The tensors of a layer, and its weight with them. This is what folds an adapter, in a model and in files.


class KroneckerFactors(NamedTuple):
    """Tensors of a Kronecker adapter at one layer."""

    A: Tensor  # [p, q]
    B: Tensor  # [out/p, in/q]

    @property
    def features(self) -> tuple[int, int]:
        """Widths `in` and `out` of the layer."""
        return self.A.shape[1] * self.B.shape[1], self.A.shape[0] * self.B.shape[0]

    @property
    def is_zero(self) -> bool:
        """True if they certainly change nothing."""
        return not (bool(self.A.any()) and bool(self.B.any()))

    def new_weight(self, weight: Tensor, scale: float) -> Tensor:
        """Return the layer's weight `[out, in]`, which is in float32 or better, with the adapter."""
        return weight + scale * torch.kron(self.A.to(weight.dtype), self.B.to(weight.dtype))


# 3. The functions. `forward` and `new_weight` run on the proxies of a graph too, so they read sizes from `sizes` and
#    `call.features`, never from the shape of a tensor.


class KroneckerSizes(NamedTuple):
    """Sizes of an adapter at a layer."""

    p: int
    q: int


class Kronecker(AdapterMethod):
    """The method."""

    config = KroneckerConfig
    tensors = KroneckerFactors
    keys = {"A": "kronecker_A", "B": "kronecker_B"}  # noqa: RUF012  # ends of the tensors' keys in the file

    def sizes(self, config: KroneckerConfig, value_of: Callable[[str], Any]) -> tuple[KroneckerSizes, float]:
        """Return sizes and scale of the adapter at a layer."""
        return KroneckerSizes(config.p, config.q), config.alpha / config.p

    def problems(self, in_features: int, out_features: int, sizes: KroneckerSizes) -> list[str]:
        """Say why a layer cannot have such an adapter, and what to do; a plan lists it."""
        if in_features % sizes.q == 0 and out_features % sizes.p == 0:
            return []
        return [f"p={sizes.p} has to divide out_features={out_features}, and q={sizes.q} in_features={in_features}"]

    def shapes(self, in_features: int, out_features: int, sizes: KroneckerSizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors at a layer."""
        return {"A": (sizes.p, sizes.q), "B": (out_features // sizes.p, in_features // sizes.q)}

    def initial(
        self, features: tuple[int, int], sizes: KroneckerSizes, config: KroneckerConfig, **layer: Any
    ) -> KroneckerFactors:
        """Return new tensors, which change nothing: `B` is zero. `layer` has the weight, for methods that need it."""
        shapes = self.shapes(*features, sizes)
        B = torch.zeros(shapes["B"]) if config.init_weights else 0.1 * torch.randn(shapes["B"])
        return KroneckerFactors(torch.randn(shapes["A"]) / sizes.q, B)

    def forward(
        self, call: LayerCall, factors: KroneckerFactors, scale: float, *, sizes: KroneckerSizes, dropout: float = 0.0
    ) -> Tensor:
        """Return `y + scale * kron(A, B) x` without the large matrix: it is `A X B.T`, with `x` as `X [q, in/q]`."""
        # a dropout is written as in training: the mode of the model decides later whether it acts
        x = nn.functional.dropout(call.x, dropout, training=True) if dropout else call.x
        blocks = x.reshape(-1, sizes.q, call.features[0] // sizes.q)
        update = torch.matmul(factors.A, torch.matmul(blocks, factors.B.t())).reshape(-1, call.features[1])
        if call.rows is not None:  # of a layer that is split, `y` has some of the columns
            update = update[:, call.rows[0] : call.rows[1]]
        return call.y + scale * update.reshape_as(call.y)

    def new_weight(self, weight: Tensor, factors: KroneckerFactors, scale: float, **layer: Any) -> Tensor:
        """Return the new weight within a graph, where a layer's own call cannot be changed, such as in a branch."""
        return weight + scale * torch.kron(factors.A, factors.B)

    def text(self, sizes: KroneckerSizes) -> str:
        """Return the sizes in words."""
        return f"p={sizes.p} q={sizes.q}"


# 4. Use it as the others.


class Network(nn.Module):
    """A small network, in place of your own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/own_method"))
    output = parser.parse_args(arguments).output
    torch.manual_seed(0)
    method = register(Kronecker())
    try:
        use(output)
    finally:
        METHODS.remove(method)  # only so that tests can run it again


def use(output: Path) -> None:
    network = Network().eval()
    traced = trace(network, (torch.randn(3, 16),))
    planned = plan(traced, KroneckerConfig(p=4, q=2, target_modules=["up", "down"]))
    print(planned)
    model = rewrite(traced, planned)

    x, y = torch.randn(64, 16), torch.arange(64) % 4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    for step in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()

    def outputs(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return module(x)

    expected = outputs(model)
    model.save_pretrained(output / "adapter")
    loaded = GraloraModel.from_pretrained(traced, output / "adapter")
    print(f"loss {loss.item():.3f}; saved and loaded: equal {torch.equal(outputs(loaded), expected)}")
    merged = merge(loaded)
    print(f"merged and unmerged differ by {(outputs(merged) - expected).abs().max():.1e}")
    report = export_onnx(loaded, output / "onnx", overwrite=True)
    (exported,) = load(output / "onnx")(x=x).values()
    print(f"exported, compared: {report.verification.passed}; it differs by {(exported - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
