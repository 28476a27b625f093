"""What a directory is, told by the files in it, for a message about one that was given as something else."""

from __future__ import annotations

from pathlib import Path

ADAPTER_FILE, MODEL_FILE, EXPORT_FILE = "adapter_config.json", "config.json", "gralora_export.json"


def is_model(path: Path) -> bool:
    """Whether a directory holds a saved model, and is not an export, which holds the configuration of one."""
    return (path / MODEL_FILE).is_file() and not (path / EXPORT_FILE).is_file()


def described(directory: str | Path) -> str:
    """What is at a path, to go on from the path itself: `is empty`, `is an adapter`.

    Args:
        directory: The path.
    """
    path = Path(directory)
    try:
        if not path.exists():
            return "is a broken link" if path.is_symlink() else "does not exist"
        if not path.is_dir():
            return "is a file"
        if (path / EXPORT_FILE).is_file():
            return "is an export"
        if (path / ADAPTER_FILE).is_file():
            return "is an adapter"
        if is_model(path):
            return "is a model"
        if any(path.glob("*.onnx")):
            return f"holds an ONNX model of another program, without {EXPORT_FILE}"
        return "holds something else" if any(path.iterdir()) else "is empty"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
