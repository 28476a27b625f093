"""Quickstart: adapt a small classifier with GraLoRA, train it a little, fold the adapter in and check the result.

Run: python examples/quickstart.py
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

from gralora_fx import GraloraConfig, merge, plan, rewrite, trace


def main() -> None:
    torch.manual_seed(0)

    # 1. Any model: here a small BERT with random weights, in place of your own.
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=3)
    model = BertForSequenceClassification(config)

    # 2. Trace it to a torch.fx graph over its own parameters. The example inputs come from the model's configuration;
    #    batch and length stay free to vary.
    traced = trace(model)
    print(traced)

    # 3. Say what to adapt, and see what that means before anything changes.
    adapter = GraloraConfig(
        r=16, gralora_k=2, alpha=32, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    planned = plan(traced, adapter)
    print(planned)

    # 4. Rewrite: GraLoRA subgraphs are inserted at the targeted calls, and only they (and the classifier's copy) train.
    gralora = rewrite(traced, planned)
    gralora.print_trainable_parameters()

    # 5. Train as any module. With labels the result has a loss, by transformers' own function.
    ids = torch.randint(100, 1000, (24, 12))
    labels = torch.arange(24) % 3
    optimizer = torch.optim.AdamW([p for p in gralora.parameters() if p.requires_grad], lr=5e-3)
    gralora.train()
    for step in range(30):
        loss = gralora(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    gralora.eval()

    # 6. Fold the adapter into the weights: the base graph again, node for node, with new weights.
    merged = merge(gralora)
    with torch.no_grad():
        difference = (merged(input_ids=ids).logits - gralora(input_ids=ids).logits).abs().max().item()
    print(f"loss {loss.item():.3f} after training; merged and unmerged differ by {difference:.1e}")
    assert len(merged.graph_module.graph.nodes) == len(traced.graph_module.graph.nodes)


if __name__ == "__main__":
    main()
