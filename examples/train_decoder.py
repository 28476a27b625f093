"""Train an adapter of a decoder in a loop of one's own: sharded by block, resumed, and asked for a text in between.

The texts are a package: pip install -e '.[demo]'. Runs of one process and of two, and one that goes on where an earlier
one ended, with as many processes or as few as you like:

    python examples/train_decoder.py --model HuggingFaceTB/SmolLM2-135M --output runs/decoder
    torchrun --nproc-per-node 2 examples/train_decoder.py --model HuggingFaceTB/SmolLM2-135M --output runs/decoder
    python examples/train_decoder.py --model HuggingFaceTB/SmolLM2-135M --output runs/decoder --epochs 4 --resume
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.demo.run import draw_losses

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of every process, so that any number resumes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a decoder: a directory or a hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/decoder"), help="where to write")
    parser.add_argument("--pieces", type=int, default=48, help="pieces of text to train on")
    parser.add_argument("--length", type=int, default=128, help="tokens of a piece")
    parser.add_argument("--batch", type=int, default=4, help="pieces of a step, of all processes together")
    parser.add_argument("--epochs", type=int, default=2, help="how often each piece is read")
    parser.add_argument("--prompt", default="The government said", help="the text to go on from after an epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the last epoch in the output")
    options = parser.parse_args(arguments)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group()

    # 1. Trace with the cache, so that the model generates; begin an adapter, or load the one to go on with.
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    traced = trace(base, task="text-generation-with-past")
    adapter, state = options.output / "adapter", options.output / "state.pt"
    config = GraloraConfig(r=16, gralora_k=2, alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = GraloraModel.from_pretrained(traced, adapter) if options.resume else rewrite(traced, config)
    model.gradient_checkpointing_enable()
    if rank == 0:
        model.print_trainable_parameters()

    # 2. Of several processes, each holds its part of every block.
    if world > 1:
        shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.0)
    done: dict[str, Any] = {"epochs": 0, "losses": []}
    if options.resume:
        done = torch.load(state, weights_only=True)
        set_optimizer_state_dict(model, optimizer, done["optimizer"], options=WHOLE)

    # 3. Train. Each process reads its share of a batch, and all see the mean loss.
    pieces, losses = read_pieces(tokenizer, options.pieces, options.length), done["losses"]
    metrics = options.output / "metrics.jsonl"
    options.output.mkdir(parents=True, exist_ok=True)
    for epoch in range(done["epochs"], options.epochs):
        model.train()
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(epoch))
        for batch in tqdm(pieces[order].split(options.batch), desc=f"epoch {epoch + 1}", disable=rank > 0):
            ids = batch[rank::world]
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(mean_of(loss.detach(), world))
            if rank == 0:
                log(metrics, epoch=epoch + 1, step=len(losses), loss=losses[-1])

        # 4. Between epochs: save what a later run goes on from, and see what the model writes by now.
        model.eval()
        model.save_pretrained(adapter)
        whole = get_optimizer_state_dict(model, optimizer, options=WHOLE)
        prompt = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        if rank == 0:
            torch.save({"epochs": epoch + 1, "losses": losses, "optimizer": whole}, state)
            print(f"epoch {epoch + 1}, loss {losses[-1]:.3f}: {tokenizer.decode(tokens[0], skip_special_tokens=True)}")
    if rank == 0:
        draw_losses(losses, options.output / "loss.png")
        print(f"wrote {adapter}, {metrics} and loss.png beside them")
    if world > 1:
        dist.destroy_process_group()


def read_pieces(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Tensor:
    """Token ids of news, one text after the other. Shape: [count, length]."""
    ids: list[int] = []
    for text, _ in load_news(0).train:
        if len(ids) >= count * length:
            break
        ids += tokenizer(text)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def shard(model: GraloraModel) -> None:
    for block in model.blocks.values():
        fully_shard(block)
    fully_shard(model)  # embeddings, head and adapters


def log(path: Path, *, step: int, **figures: float) -> None:
    """Write a line of JSON; the first step begins a new file."""
    with path.open("w" if step == 1 else "a", encoding="utf-8") as file:
        print(json.dumps({"step": step, **figures}), file=file)


def mean_of(loss: Tensor, world: int) -> float:
    """Return the mean of a value over the processes."""
    if world > 1:
        dist.all_reduce(loss)
    return float(loss) / world


if __name__ == "__main__":
    main()
