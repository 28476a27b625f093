"""Train a tiny model with each method, distributed by block over the processes of torchrun: run by test_sharding.py.

Adapters are trained from the start, then trained on from a folder of them, which may be the first's own.

python -m torch.distributed.run --standalone --nproc-per-node N sharded_steps.py OUTPUT ADAPTERS
"""

from __future__ import annotations

import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from tiny_models import tiny_model
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from traces import fresh_trace

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, merge, rewrite, trace
from gralora_fx.errors import MergeError, RewriteError
from gralora_fx.loading import load_model

METHODS = {
    "gralora": GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", init_weights=False),
    "lora": LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False),
    "dora": DoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
}


def gradients(model: GraloraModel, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().mean().backward()
    return {
        n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def run(method: str, output: Path, resumed: Path | None) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    traced = fresh_trace("llama", tie_word_embeddings=False)
    torch.manual_seed(1)
    model = rewrite(traced, METHODS[method]).train()
    ids = torch.randint(0, 90, (4, 7), generator=torch.Generator().manual_seed(3))
    own = ids[rank * 4 // world : (rank + 1) * 4 // world]
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    for block in model.blocks.values():
        fully_shard(block)
    fully_shard(model)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    actual = gradients(model, own)
    assert actual.keys() == expected.keys()
    worst = max(float((actual[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)
    if resumed is not None:
        model.load_adapter(resumed / method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=own, attention_mask=torch.ones_like(own), labels=own).loss.backward()
        optimizer.step()
    model.save_pretrained(output / method)
    dist.barrier()
    model.eval()
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = model(**whole).logits
        alone = GraloraModel.from_pretrained(fresh_trace("llama", tie_word_embeddings=False), output / method)
        loaded = float((alone(**whole).logits - logits).abs().max())
        with model.disable_adapter():
            base = float(
                (model(**whole).logits - tiny_model("llama", tie_word_embeddings=False)(**whole).logits).abs().max()
            )
        tokens = model.generate(ids[:1, :3], attention_mask=whole["attention_mask"][:1, :3], max_new_tokens=2)
    with pytest.raises(MergeError, match="save the adapter with save_pretrained"):
        merge(model)
    model.save_pretrained(output / f"{method}-again")  # after a forward pass that left tensors whole
    return {"gradients": worst, "loaded": loaded, "base": base, "tokens": tokens.shape[1]}


def check_ddp() -> None:
    model = rewrite(fresh_trace("llama", tie_word_embeddings=False), METHODS["gralora"]).train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(0, 90, (4, 7), generator=torch.Generator().manual_seed(3))
    expected = gradients(model, ids)
    model.zero_grad()
    rank, world = dist.get_rank(), dist.get_world_size()
    own = ids[rank * 4 // world : (rank + 1) * 4 // world]
    wrapped = DistributedDataParallel(model)  # which sums gradients as long as it is there
    wrapped(input_ids=own, attention_mask=torch.ones_like(own)).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            difference = (parameter.grad - expected[name]).abs().max()
            assert difference <= 1e-6 * expected[name].abs().max(), name


def check_accelerate(output: Path) -> None:
    """Train as accelerate prepares a model for FSDP2; an Accelerator itself does so for no process of a CPU."""
    model = rewrite(fresh_trace("llama", tie_word_embeddings=False), METHODS["gralora"]).train()
    ids = torch.randint(0, 90, (4, 7), generator=torch.Generator().manual_seed(3))
    expected = gradients(model, ids)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),  # which accelerate 1.16 reads
        mixed_precision="no",
        is_main_process=True,
        torch_device_mesh=None,
    )
    prepared = fsdp2_prepare_model(accelerator, model)
    assert all(isinstance(block, FSDPModule) for block in prepared.blocks.values())
    rank, world = dist.get_rank(), dist.get_world_size()
    actual = gradients(prepared, ids[rank * 4 // world : (rank + 1) * 4 // world])
    worst = max(float((actual[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)
    assert worst <= 1e-6, worst
    own, view = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, prepared.base_model
    with torch.no_grad():
        logits = prepared(**own).logits
        view.forward = lambda **inputs: linear(  # as TRL's loss: without logits, from the head's own weight
            view.base_model(**inputs).last_hidden_state, prepared.get_output_embeddings().weight
        )
        assert torch.allclose(prepared(**own), logits, atol=1e-6)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    whole = get_model_state_dict(prepared, options=options)
    if rank == 0:  # which alone saves, as Trainer does
        prepared.save_pretrained(output / "accelerate", state_dict=whole)
    dist.barrier()
    prepared.save_pretrained(output / "gathered")


def check_packed(output: Path) -> None:
    """Over a base in few bits, whose buffers every process has whole, with checkpoints."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        tiny_model("llama", tie_word_embeddings=False).save_pretrained(output / "base")
    dist.barrier()
    ids = torch.randint(0, 90, (4, 7), generator=torch.Generator().manual_seed(3))
    for how in ("int8", *(["nf4"] if find_spec("bitsandbytes") else [])):
        traced = trace(load_model(output / "base", base_quantization=how, packed=True), task="text-generation")
        other = copy.deepcopy(traced)
        torch.manual_seed(1)
        model = rewrite(traced, METHODS["gralora"]).train()
        expected = gradients(model, ids)
        model.gradient_checkpointing_enable()
        for block in model.blocks.values():
            fully_shard(block)
        fully_shard(model)
        codes = [name for name, _ in model.named_buffers() if name.endswith("q_proj.packed_weight_codes")]
        assert len(codes) == len(model.blocks)
        actual = gradients(model, ids[rank * 4 // world : (rank + 1) * 4 // world])
        assert actual.keys() == expected.keys()
        worst = max(float((actual[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)
        assert worst <= 1e-6, (how, worst)
        model.save_pretrained(output / how)
        dist.barrier()
        alone = GraloraModel.from_pretrained(other, output / how).eval()
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            assert torch.allclose(model.eval()(**given).logits, alone(**given).logits, atol=1e-6)


def check_adapter_rows() -> None:
    """Rows with adapters of their own, of which each process has a part of the batch, sharded and by DDP."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(0, 90, (4, 7), generator=torch.Generator().manual_seed(3))
    names = ["lora", "gralora", "lora", "gralora"]  # each process has both, as much of each

    def made() -> GraloraModel:
        torch.manual_seed(1)
        model = rewrite(fresh_trace("llama"), METHODS["gralora"], adapter_name="gralora").train()
        model.add_adapter("lora", METHODS["lora"])
        model.set_requires_grad(["gralora", "lora"])
        return model

    def gradients_of(model: GraloraModel, rows: slice) -> dict[str, Tensor]:
        losses = model(input_ids=ids[rows], labels=ids[rows], adapter_names=names[rows], by_adapter=True)
        sum(losses.values()).backward()
        found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {name: getattr(grad, "full_tensor", lambda g=grad: g)() for name, grad in found.items()}

    expected = gradients_of(made(), slice(None))
    sharded = made()
    for block in sharded.blocks.values():
        fully_shard(block)
    fully_shard(sharded)
    for model in (sharded, DistributedDataParallel(made())):
        actual = gradients_of(model, slice(rank * 4 // world, (rank + 1) * 4 // world))
        assert actual.keys() == expected.keys()
        worst = max(float((actual[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)
        assert worst <= 1e-5, worst


def check_casts_are_refused() -> None:
    model = rewrite(fresh_trace("llama", tie_word_embeddings=False), METHODS["gralora"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.blocks.values():
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    ids = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(RewriteError, match="MixedPrecisionPolicy"):
        model(input_ids=ids, attention_mask=ids)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    output, adapters = Path(sys.argv[1]), Path(sys.argv[2])
    if dist.get_world_size() > 1:  # one process is there for what its adapters become
        check_ddp()
        check_accelerate(output)
        check_packed(output)
        check_adapter_rows()
        check_casts_are_refused()
    found = {method: run(method, output, None) for method in METHODS}
    run("gralora", output / "resumed", adapters)
    if dist.get_rank() == 0:
        (output / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
