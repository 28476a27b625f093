"""`gralora-fx serve`: an export directory as an HTTP service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gralora_fx.cli.options import utf8
from gralora_fx.errors import ConfigError, ServingError, shown
from gralora_fx.progress.console import StageProgress
from gralora_fx.progress.timing import timed

if TYPE_CHECKING:
    from gralora_fx.serving.http.settings import ServiceSettings

_ENGINES = ("uvicorn", "ray")
_EXTRAS = {"fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve", "ray": "scale"}  # by their packages
_REPLICAS = 2

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="An export directory.", callback=utf8)]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=PATH",
        help="An .onnx_adapter file beside those of the export; may be repeated.",
        callback=utf8,
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on.", callback=utf8)]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")]
MaxBatch = Annotated[int | None, typer.Option(min=1, help="Most rows that run together.  [default: 8]")]
MaxQueue = Annotated[int, typer.Option(min=1, help="Most requests that wait; others are answered with 429.")]
MaxContext = Annotated[
    int | None,
    typer.Option(min=1, help="Of a decoder, most tokens of a prompt with its answer.  [default: the model's context]"),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of an operator.  [default: one on each core that may be used]")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="GRALORA_FX_API_KEY", help="Key that requests must give as Authorization: Bearer KEY.", callback=utf8
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join(_ENGINES)}]", help="What runs the service: this process, or Ray Serve with replicas of it."
    ),
]
Replicas = Annotated[
    int | None, typer.Option(min=1, help=f"Of --engine ray, processes that have the model.  [default: {_REPLICAS}]")
]


def serve(
    directory: Directory,
    adapter: Adapters = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: MaxBatch = None,
    max_queue: MaxQueue = 64,
    max_context: MaxContext = None,
    threads: Threads = None,
    api_key: ApiKey = None,
    engine: Engine = "uvicorn",
    replicas: Replicas = None,
) -> None:
    """Serve an export over HTTP: text by OpenAI's protocol, tensors by the Open Inference Protocol.

    A request chooses its adapter by the name of its model.
    """
    from gralora_fx.serving.http.settings import ServiceSettings, read_adapters

    settings = ServiceSettings(
        directory,
        adapters=read_adapters(adapter),
        max_batch=max_batch,
        max_queue=max_queue,
        max_context=max_context,
        threads=threads,
        api_key=api_key,
    )
    if engine not in _ENGINES:
        raise ConfigError(f"--engine is {' or '.join(_ENGINES)}, but got {shown(engine)}")
    if engine == "ray":
        _serve_replicas(settings, replicas or _REPLICAS, host, port)
        return
    if replicas is not None:
        raise ConfigError("--replicas has no effect without --engine ray; give that too, or leave it out")
    with StageProgress():
        with timed("import"), _named_packages():
            from gralora_fx.serving.http.app import create_app
            from gralora_fx.serving.http.runner import run
        with timed("open and warm up"):
            app = create_app(settings)
    run(app, host=host, port=port)


def _serve_replicas(settings: ServiceSettings, replicas: int, host: str, port: int) -> None:
    with StageProgress():
        with timed("import"), _named_packages():
            from gralora_fx.serving.scale.ray_environment import prepare

            prepare()
            from gralora_fx.serving.scale.ray_service import check, run_replicas
        with timed("open and warm up"):
            names, at_a_time = check(settings)
    run_replicas(settings, names, at_a_time, replicas=replicas, host=host, port=port)


@contextmanager
def _named_packages() -> Iterator[None]:
    """Say which package is not installed, if it is one of an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        raise ServingError(
            f"serve needs {error.name}, which is not installed; pip install 'gralora-fx[{extra}]'"
        ) from error
