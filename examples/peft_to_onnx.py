"""From a PEFT GraLoRA checkpoint to a verified ONNX model that answers on ONNX Runtime.

Run: python examples/peft_to_onnx.py --model BASE --adapter ADAPTER --output DIRECTORY

BASE and ADAPTER are local directories or hub ids. Without them a small random model and adapter are made with peft, in
the folder `peft_checkpoint` beside DIRECTORY.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from gralora_fx import GraloraModel, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model")
    parser.add_argument("--adapter", help="PEFT-format GraLoRA adapter")
    parser.add_argument("--output", type=Path, default=Path("runs/peft_to_onnx"), help="where to write")
    options = parser.parse_args(arguments)
    disable_progress_bar()  # transformers draws one for each file that it reads or writes
    if options.model is None or options.adapter is None:
        options.model, options.adapter = make_checkpoint(options.output.parent / "peft_checkpoint")

    # 1. Trace the base model and rewrite it as the checkpoint says; its tensors are checked and loaded.
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    gralora = GraloraModel.from_pretrained(trace(base), options.adapter)
    print(gralora.plans["default"])

    # 2. Export: the adapter is folded, the graph converted, and ONNX Runtime compared with PyTorch on inputs of other
    #    sizes and padded rows. Only a directory that passes is put in place.
    report = export_onnx(gralora, options.output)
    print(report)

    # 3. Serve it. Arrays go in, arrays come out; tensors are taken too.
    served = load(options.output)
    ids = torch.randint(3, base.config.vocab_size, (2, 10))
    with torch.no_grad():
        expected = gralora(input_ids=ids).logits
    difference = (served(input_ids=ids).logits - expected).abs().max().item()
    print(f"ONNX Runtime and PyTorch differ by {difference:.1e}")


def make_checkpoint(folder: Path) -> tuple[str, str]:
    """A small random Llama with a tokenizer of bytes, and a GraLoRA adapter of it, as transformers and peft save them.

    Args:
        folder: Gets the folders `base` and `adapter`.
    """
    import peft

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    settings = peft.GraloraConfig(
        r=16, gralora_k=2, alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers has renamed
        peft.get_peft_model(model, settings).save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Text as its UTF-8 bytes, after three special tokens."""
    special = ["<pad>", "<s>", "</s>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, start, end = special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end)


if __name__ == "__main__":
    main()
