"""`gralora-fx verify`: an export compared with its digests, then with the PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import gralora_fx.cli.options as opt
from gralora_fx.base.progress.console import CommandProgress
from gralora_fx.base.progress.stages import gc_pause, timed
from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.cli.values import check_rounding, file_name, model_names, model_option, text_option
from gralora_fx.cli.wording import show
from gralora_fx.core.config.option import MODEL
from gralora_fx.core.loading.adapter_facts import base_name, needed_quantization
from gralora_fx.errors import ConfigError, ExportError
from gralora_fx.exporters.options import LEVELS, check_choice
from gralora_fx.format.adapter_paths import own_adapters
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.format.tasks import is_decoder

FoldedAdapters = Annotated[
    list[str] | None,
    model_option(
        "--adapter",
        help="Compare with this GraLoRA, LoRA or DoRA adapter, as PEFT saves it: a local directory or a Hugging Face "
        "hub id; given once for each that is in the export.",
        callback=model_names,
        rich_help_panel=MODEL,
    ),
]
Verified = Annotated[
    Path, text_option("--onnx", "--output", metavar="DIR", help="Compare the export in this directory.")
]
VerifiedName = Annotated[
    str | None,
    text_option(
        "--adapter-name",
        metavar="NAME",
        help="Compare with the adapter that has this name in the export.  [default: the only one, or default]",
        callback=file_name,
        rich_help_panel=MODEL,
    ),
]
ExportedHead = Annotated[
    bool,
    typer.Option(
        "--allow-random-head",
        help="Accept a last layer of random values, as the export was made with.",
        rich_help_panel=MODEL,
    ),
]
Level = Annotated[
    str | None,
    typer.Option(
        "--verify",
        metavar=f"[{'|'.join(LEVELS)}]",
        help="Compare on few inputs, or on many and long ones.  [default: full]",
    ),
]
Prompts = Annotated[
    list[str] | None,
    text_option(metavar="TEXT", help="Compare on this prompt too, for an export that generates; may be repeated."),
]
Files = Annotated[
    bool, typer.Option("--files", help="Compare the files with their recorded checksums alone, without the model.")
]
Stream = Annotated[bool, typer.Option("--stream", help="Read the model's weights one by one, to need less memory.")]
Provider = Annotated[
    str | None,
    text_option(metavar="NAME", help="Run the export on this execution provider of ONNX Runtime.  [default: the CPU]"),
]
ProviderOption = Annotated[
    list[str] | None, text_option(metavar="KEY=VALUE", help="Set an option of the provider; may be repeated.")
]


def verify(
    onnx: Verified,
    model: opt.Model = None,
    adapter: FoldedAdapters = None,
    adapter_name: VerifiedName = None,
    task: opt.Task = None,
    allow_random_head: ExportedHead = False,
    level: Level = None,
    prompt: Prompts = None,
    provider: Provider = None,
    provider_option: ProviderOption = None,
    files: Files = False,
    base_quantization: opt.BaseQuantization = None,
    strict_base: opt.StrictBase = False,
    stream: Stream = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compare an ONNX export with its PyTorch model.

    The files are compared with their checksums, then the outputs on new inputs, and the tokens of a model that
    generates. --provider runs the export as it will be served.
    """
    check_choice("verify", level or "full", LEVELS)
    of_provider = _provider_options(provider, provider_option)
    if files:
        others: dict[str, object] = {"--model": model, "--adapter": adapter, "--task": task, "--prompt": prompt}
        others |= {"--provider": provider, "--adapter-name": adapter_name, "--base-quantization": base_quantization}
        others |= {"--verify": level, "--stream": stream}
        _verify_files(onnx, [name for name, value in others.items() if value])
        return
    if provider is not None:
        from gralora_fx.run.sessions.run_options import runtime_of

        runtime_of(provider, of_provider, None, None)
    manifest, given = read_manifest(onnx), adapter or []  # all of this before anything slow is imported
    exported = manifest.task
    if exported is not None and task not in (None, exported):
        raise ExportError(f"{onnx} was exported for the task {exported}, not {task}; leave --task out")
    if prompt and not is_decoder(exported):
        raise ExportError(f"{onnx} was exported for the task {exported}, which generates no text; leave --prompt out")
    if adapter_name is not None and not given:
        raise ConfigError(f"--adapter-name {adapter_name} has no effect without --adapter; give it, or leave it out")
    named = _exported_name(onnx, manifest, adapter_name)
    rounding = base_quantization or _recorded(manifest, model, given)
    check_rounding(rounding)
    with CommandProgress(), gc_pause():
        with timed("importing"):
            from gralora_fx.core.loading.bases import load_traced
            from gralora_fx.core.model.model_class import without_trainer
            from gralora_fx.exporters import verify_onnx
            from gralora_fx.exporters.verify.same_model import check_exported_adapters
            from gralora_fx.format.export_checks import check_files
        check_exported_adapters(manifest, str(onnx), given)
        if manifest.files:  # a comparison runs some tokens only, and would not see every changed byte
            with timed("reading files"):
                check_files(onnx, manifest, digests=True)
        with without_trainer():
            loaded = load_traced(
                model,
                given[0] if given else None,
                exported or task,
                allow_random_head=allow_random_head,
                trace_options=manifest.trace_options,
                stream=stream,
                strict_base=strict_base,
                others=given[1:],
                base_quantization=rounding,
            )
        with timed("comparing"):
            options: dict[str, Any] = {"level": level or "full", "prompts": prompt or None, "check": False}
            options |= {"providers": provider, "provider_options": of_provider}
            options["adapter_name"] = named if given else None  # a base alone has no adapter to look for
            report = verify_onnx(onnx, loaded, **options)
    show(report, verbose=verbose)
    if not report.passed:
        raise typer.Exit(1)


def _recorded(manifest: Manifest, model: str | None, adapters: Sequence[str]) -> BaseQuantization | None:
    """Return how to quantize the base as it was for the export; None if it needs none."""
    if manifest.base is None or manifest.base.quantization is None:
        return None
    return needed_quantization(manifest.base.quantization, base_name(model, adapters[0] if adapters else None))


def _verify_files(output: Path, others: list[str]) -> None:
    from gralora_fx.format.export_checks import check_files

    if others:
        raise ExportError(f"--files compares files alone, so {', '.join(others)} would have no effect; leave it out")
    with CommandProgress(), timed("reading files"):
        count = check_files(output, read_manifest(output), digests=True)
    print(f"{count} files of {output} are unchanged since the export")


def _exported_name(directory: Path, manifest: Manifest, name: str | None) -> str | None:
    """Return the name that the adapter has in the export; None without adapters as data."""
    if manifest.adapter_inputs is None:
        if name is not None:
            raise ExportError(f"{directory} holds no adapters as data; leave --adapter-name {name} out")
        return None
    there = own_adapters(directory, ExportError)
    return name or (next(iter(there)) if len(there) == 1 else "default")


def _provider_options(provider: str | None, options: list[str] | None) -> dict[str, str] | None:
    """Parse provider options; None if there are none."""
    if not options:
        return None
    if provider is None:
        raise ConfigError(f"--provider-option {options[0]} needs --provider; name the provider that it is for")
    found: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise ConfigError(f"--provider-option takes KEY=VALUE, but got {option!r:.80}")
        if key in found:
            raise ConfigError(f"--provider-option {key} is given twice; give it once")
        found[key] = value
    return found
