"""Two adapters on one exported base: PEFT's GraLoRA and LoRA, switched in each call, compared with PEFT.

Run: python examples/two_adapters_one_base.py --output DIRECTORY
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gralora_fx import GraloraModel, trace
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.serving import load

PROMPT = torch.tensor([[5, 17, 42, 8, 23]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/two_adapters"), help="where to write")
    output = parser.parse_args(arguments).output

    # 1. Two adapters that PEFT saved. Random values take the place of training here.
    targets = ["q_proj", "v_proj", "down_proj"]
    gralora = peft.GraloraConfig(r=8, gralora_k=2, hybrid_r=4, target_modules=targets, init_weights=False)
    lora = peft.LoraConfig(r=16, use_rslora=True, target_modules=targets[:2], init_lora_weights=False)
    expected = {name: save(output / name, config) for name, config in (("formal", gralora), ("brief", lora))}

    # 2. One export of the base. It takes adapters at the layers that `formal` adapts, which is written beside it.
    traced = trace(base(), task="text-generation-with-past")
    model = GraloraModel.from_pretrained(traced, output / "formal", adapter_name="formal")
    report = export_onnx(model, output / "onnx", adapters="data")
    print(report.verification)

    # 3. Any other adapter becomes a small file, from its two files alone: no model is loaded.
    file = export_adapter(output / "brief", output / "onnx", "brief", overwrite=True)
    print(f"{file} has {file.stat().st_size:,} bytes; the base has {report.files['model.onnx_data']:,}")

    # 4. Serve both. Each call names its adapter, or none.
    served = load(output / "onnx")
    for name in ("formal", "brief", "formal"):
        logits = served(input_ids=PROMPT, adapter=name).logits[:, -1]
        difference = (logits - expected[name]).abs().max() / expected[name].abs().max()
        print(f"{name}: ONNX Runtime and PEFT differ by {difference:.1e} of the largest logit")
    with torch.no_grad():
        plain = base()(input_ids=PROMPT).logits[:, -1]
    print(f"without an adapter: {(served(input_ids=PROMPT).logits[:, -1] - plain).abs().max():.1e}")

    # 5. An adapter can go and come back while the model serves.
    served.unload_adapter("brief")
    served.load_adapter("brief", file)
    print(f"loaded: {', '.join(served.adapters)}")


def base() -> LlamaForCausalLM:
    """Return a small decoder with random weights, the same each time, in place of your own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=64, **sizes)).eval()


def save(folder: Path, config: peft.PeftConfig) -> torch.Tensor:
    """Save an adapter of the base as PEFT does.

    Returns:
        The logits of its next token, as PEFT computes them. Shape: [1, vocabulary].
    """
    model = peft.get_peft_model(base(), config).eval()
    model.save_pretrained(str(folder))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=PROMPT).logits[:, -1]
    return logits


if __name__ == "__main__":
    main()
