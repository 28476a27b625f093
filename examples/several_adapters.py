"""Several adapters on one base: add, switch, sum, combine, merge one, and look at the graph.

Run: python examples/several_adapters.py --picture model.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gralora_fx import GraloraConfig, rewrite, trace


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", type=Path, default=Path("runs/several_adapters/graph.html"))
    picture = parser.parse_args().picture
    torch.manual_seed(0)

    # 1. Any decoder: here a small Llama with random weights, in place of your own.
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, vocab_size=200
    )
    traced = trace(LlamaForCausalLM(config).eval())
    ids = torch.randint(3, 200, (2, 9))

    # 2. Two adapters of different sizes and targets. `init_weights=False` takes the place of training here: it draws
    # `B` too.
    formal = GraloraConfig(r=8, gralora_k=4, target_modules=["q_proj", "v_proj"], init_weights=False)
    brief = GraloraConfig(
        r=8,
        hybrid_r=4,
        target_modules="all-linear",
        exclude_modules=["o_proj"],
        rank_pattern={r"layers\.0\..*": 16},  # a regular expression for the end of a path
        alpha_pattern={r"layers\.0\..*": 128},
        init_weights=False,
    )
    model = rewrite(traced, formal, adapter_name="formal")
    model.add_adapter("brief", brief)
    print(model)

    # 3. One is active; switching edits the graph. Nodes of the other are not in it.
    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    with model.disable_adapter():
        base = logits()
    for name in ("formal", "brief"):
        model.set_adapter(name)
        moved = (logits() - base).abs().max()
        print(f"{name}: {len(model.graph_module.graph.nodes)} nodes, logits move by {moved:.3f}")

    # 4. Both at once add up; a weighted sum of them is an adapter of its own, exactly.
    model.set_adapter(["formal", "brief"])
    both = logits()
    model.add_weighted_adapter(["formal", "brief"], [1.0, 1.0], "mixed")
    model.set_adapter("mixed")
    print(f"the sum of two and the combined adapter differ by {(logits() - both).abs().max():.1e}")

    # 5. Merge one and keep the other beside it: the output stays. Unmerging gives every bit back.
    model.set_adapter(["formal", "brief"])
    model.merge_adapter("formal")
    print(f"with one of them merged they differ by {(logits() - both).abs().max():.1e}")
    model.unmerge_adapter()
    assert torch.equal(logits(), both)

    # 6. Ask, and look.
    site = "model.layers.0.self_attn.q_proj"
    print(f"at {site}: {', '.join(model.adapters_at(site))}")
    print(f"norms of the blocks of 'formal' there:\n{model.block_norms(site, 'formal').numpy().round(2)}")
    model.to_html(picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
