"""The directory of an export: names of its files and their inputs, how it is recognised, and which links it may have.

No link may lead out of it, apart from those of the Hugging Face hub's cache, which keeps a repository's files in
`blobs/`, and a directory `snapshots/<revision>/` of symbolic links to them. A file with several hard links is always
refused, since nothing tells whether another of its names is outside.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from gralora_fx.base.sources.model_files import EXPORT_FILE, MODEL_FILE, described, read_json_object
from gralora_fx.errors import ExportError, GraloraError, first_line, option, remedy

MANIFEST_NAME = EXPORT_FILE
PLAIN_KIND, DECODER_KIND, ENCODER_DECODER_KIND = "plain", "decoder", "encoder-decoder"  # kinds of export
MODEL, ROWS = "model", "model_rows"  # file names without suffix: of most exports, and of the graph for rows that differ
MODEL_NAME, ROWS_NAME = f"{MODEL}.onnx", f"{ROWS}.onnx"
DATA_SUFFIX = ".onnx_data"  # of a file with the weights of one model or several
GENAI_CONFIG = "genai_config.json"
ENCODER, DECODER = "encoder_model", "decoder_model_merged"  # files of an encoder-decoder, without their suffix
FLAG = "use_cache_branch"  # input of its decoder: whether the step has a past
ADAPTERS = "adapters"  # folder of an export's adapter files
TRANSPOSED_STATES = "gralora_transposed_states"  # metadata: states whose last two axes are swapped, as in `0.recurrent`
TOKENS_APART = "gralora_tokens_apart"  # metadata: a token read alone is computed differently from one among several
QUERY_SEQLENS, PAST_SEQLENS = "query_seqlens", "past_seqlens"  # inputs of a decoder's rows: tokens to read, and before
# inputs with which a step of rows verifies proposed tokens; left out, it gives the logits after each row's last token
LOGITS_INDICES = "logits_indices"  # `[num_logits]` int64: the tokens that get logits, counted over those of all rows
ATTENTION_SEQLENS = "attention_seqlens"  # `[batch]` int32: the least tokens of a row by which attention picks a kernel
# `[batch]` int32: the length of each row's text as far as it is known, where rotary embeddings depend on it
TEXT_SEQLENS = "text_seqlens"
TEXT_SWITCH = "gralora_text_switch"  # metadata: the longest text of the first kind; whether longer ones begin anew
CPU_FUNCTION = "gralora_cpu_function"  # metadata of a node: the function of the model that computes it on the CPU
ROWS_FORM = "gralora_rows_form"  # metadata of a decoder's rows: the version of their graph; absent before 2

# the task with a cache that a class is exported for, by the end of its name
_TASKS = {"ForCausalLM": "text-generation-with-past", "LMHeadModel": "text-generation-with-past"}


def not_an_export(directory: Path) -> str:
    """Return why a directory is not an export, and what to do."""
    kind = described(directory)
    if kind == "is a file":
        return f"{directory} {kind}; give the directory of the export, {directory.parent}"
    if is_export(directory.parent):
        return f"{directory} is a part of an export; give the directory of the export, {directory.parent}"
    if kind == "is a model":
        name = class_of(directory)
        task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
        model = f"{name}.from_pretrained({str(directory)!r})"
        export = remedy(
            f"export_onnx(trace({model}), output_dir)"
            if task is None
            else f"export_onnx(trace({model}, task={task!r}), output_dir)",
            f"gralora-fx export --model {shlex.quote(str(directory))} --output DIR",
        )
        return f"{directory} {kind}, not an export; export it first: {export}"
    if kind == "is an adapter":
        return (
            f"{directory} {kind}, not an export; give the directory of an export, and this one as {option(adapter=...)}"
        )
    return f"no {MANIFEST_NAME} in {directory}, which {kind}; give the directory of an export"


def class_of(directory: Path) -> str:
    """Return the name of the class in transformers that a saved model is of; `AutoModel` if it names none."""
    names = read_json_object(directory / MODEL_FILE, ExportError).get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "AutoModel"


def is_export(directory: Path) -> bool:
    """Return whether a directory has a manifest, of any schema."""
    try:
        fields = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "schema_version" in fields


def check_own_file(path: Path, error: type[GraloraError]) -> None:
    """Check that a file is regular, with one name, and no link other than a hub snapshot's to its blob."""
    try:
        if path.is_symlink() and not _is_snapshot_link(path):
            raise error(f"{path} is a link; copy the file itself into the export directory")
        if not path.exists():
            return
        if not path.is_file():
            raise error(f"{path} is not a regular file; export the model again")
        names = path.stat().st_nlink
    except (OSError, RuntimeError) as failure:
        raise error(f"{path} cannot be read ({first_line(failure)}); export the model again") from failure
    if names > 1:
        raise error(f"{path} is a link; copy the file itself into the export directory (it has {names} names)")


def _is_snapshot_link(path: Path) -> bool:
    """Return whether a link in `<repository>/snapshots/<revision>/` leads straight to a file of its `blobs/`."""
    absolute = path.absolute()
    repositories = [folder.parent.parent for folder in absolute.parents if folder.parent.name == "snapshots"]
    return any(
        not (repository / "blobs").is_symlink() and path.resolve().parent == (repository / "blobs").resolve()
        for repository in repositories
    )
