"""Tiny bases that bitsandbytes quantized on the CPU, and adapters that PEFT made on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_fx.features.nf4.four_bits import FourBits

VOCABULARY = 101
# widths are whole numbers of blocks: bitsandbytes' kernel for AVX-512 reads other rows wrong
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 1, "n_head": 4, "n_positions": 64}
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, ["q_proj", "v_proj", "down_proj"]),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, ["c_attn", "c_proj"]),
    "BertForSequenceClassification": ("BertConfig", BERT, ["query", "value", "intermediate.dense"]),
    "T5ForConditionalGeneration": ("T5Config", T5, ["q", "v", "wi"]),
}
METHODS = {
    "GraLoRA": lambda targets: peft.GraloraConfig(r=8, gralora_k=2, target_modules=targets, init_weights=False),
    "LoRA": lambda targets: peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
    "DoRA": lambda targets: peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=True),
}


def bnb_config(quantization: FourBits) -> Any:
    """Return transformers' configuration of a quantization, whose block size it cannot say."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        llm_int8_skip_modules=None if quantization.skip_modules is None else list(quantization.skip_modules),
    )


def float_base(directory: Path, name: str) -> Path:
    """Return a random model, saved in float32."""
    config, sizes, _ = BASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    model.save_pretrained(directory)
    return directory


def in_four_bits(base: Path, quantization: FourBits) -> PreTrainedModel:
    """Return the model as bitsandbytes quantizes it, in float32 products on every processor."""
    bnb = pytest.importorskip("bitsandbytes")
    name = transformers.AutoConfig.from_pretrained(base).architectures[0]
    model = getattr(transformers, name).from_pretrained(
        base, quantization_config=bnb_config(quantization), dtype=torch.float32
    )
    floats = getattr(transformers, name).from_pretrained(base, dtype=torch.float32)
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # where it would multiply in bfloat16
            if quantization.block_size != 64:  # which transformers does not let one choose
                weight = floats.get_submodule(path).weight.detach()
                module.weight = bnb.nn.Params4bit(
                    weight if isinstance(floats.get_submodule(path), nn.Linear) else weight.T.contiguous(),
                    requires_grad=False,
                    blocksize=quantization.block_size,
                    compress_statistics=quantization.double,
                    quant_type=quantization.kind,
                    module=module,
                ).to("cpu")
    return model.eval()


def in_eight_bits(base: Path) -> PreTrainedModel:
    """Return the model as bitsandbytes quantizes it with `load_in_8bit`."""
    pytest.importorskip("bitsandbytes")
    name = transformers.AutoConfig.from_pretrained(base).architectures[0]
    how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(
        base, quantization_config=how, dtype=torch.float32
    )
    return model


def trained(model: PreTrainedModel, method: str, directory: Path) -> Any:
    """Return an adapter that PEFT made on a model and trained one step, saved; the result is PEFT's model."""
    targets = BASES[type(model).__name__][2]
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, METHODS[method](targets))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    outputs = wrapped(**inputs(model))
    (outputs.logits if "logits" in outputs else outputs[0]).float().square().mean().backward()
    optimizer.step()
    wrapped.save_pretrained(directory)
    return wrapped.eval()


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows of token ids."""
    torch.manual_seed(2)
    ids = {"input_ids": torch.randint(3, VOCABULARY, (2, 9))}
    return ids | (
        {"decoder_input_ids": torch.randint(3, VOCABULARY, (2, 5))} if model.config.is_encoder_decoder else {}
    )
