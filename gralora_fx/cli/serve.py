"""`gralora-fx serve`: an export directory as an HTTP service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gralora_fx.cli.options import utf8
from gralora_fx.errors import ServingError
from gralora_fx.progress.console import StageProgress
from gralora_fx.progress.timing import timed

_PACKAGES = ("fastapi", "uvicorn", "httptools", "orjson", "prometheus_client")

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
AdapterRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Let requests load and unload adapters of this directory: .onnx_adapter files and PEFT's directories.",
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
Chunk = Annotated[
    int | None,
    typer.Option(min=1, help="Of a batched decoder, most tokens of prompts that a step reads.  [default: 64]"),
]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds after which a request is given up, and answered with 504.  [default: no limit]"),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of an operator.  [default: one on each core that may be used]")
]
MaxBody = Annotated[
    int, typer.Option(min=1, metavar="BYTES", help="Most bytes of a request's body, also once it is decompressed.")
]
MaxConnections = Annotated[int, typer.Option(min=1, help="Most connections that are served; on others it is 503.")]
ReadTimeout = Annotated[
    float, typer.Option(min=0.1, metavar="SECONDS", help="Time in which a request must arrive, its body too.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="GRALORA_FX_API_KEY", help="Key that requests must give as Authorization: Bearer KEY.", callback=utf8
    ),
]


def serve(
    directory: Directory,
    adapter: Adapters = None,
    adapter_root: AdapterRoot = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: MaxBatch = None,
    max_queue: MaxQueue = 64,
    max_context: MaxContext = None,
    chunk: Chunk = None,
    timeout: Timeout = None,
    threads: Threads = None,
    api_key: ApiKey = None,
    max_body: MaxBody = 16 * 2**20,
    max_connections: MaxConnections = 512,
    read_timeout: ReadTimeout = 30.0,
) -> None:
    """Serve an export over HTTP: text by OpenAI's protocol, tensors by the Open Inference Protocol.

    A request chooses its adapter by the name of its model.
    """
    from gralora_fx.serving.http.settings import ServiceSettings, read_adapters

    settings = ServiceSettings(
        directory,
        adapters=read_adapters(adapter),
        adapter_root=adapter_root,
        max_batch=max_batch,
        max_queue=max_queue,
        max_context=max_context,
        chunk=chunk,
        timeout=timeout,
        threads=threads,
        api_key=api_key,
        max_body=max_body,
    )
    with StageProgress():
        with timed("import"):
            try:
                from gralora_fx.serving.http.app import create_app
                from gralora_fx.serving.http.connections import ConnectionLimits
                from gralora_fx.serving.http.runner import bind, run
            except ModuleNotFoundError as error:
                if error.name not in _PACKAGES:
                    raise
                raise ServingError(
                    f"serve needs {error.name}, which is not installed; pip install 'gralora-fx[serve]'"
                ) from error
        sockets = bind(host, port)
        with timed("open and warm up"):
            app = create_app(settings)
    run(app, sockets, ConnectionLimits(max_connections, read_timeout))
