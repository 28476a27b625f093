"""llama.cpp's server as a process: `python benchmarks/llama_server.py FILE.gguf THREADS ROWS TOKENS`.

It prints its address, and serves until its standard input ends. The package is `xllamacpp`.
"""

from __future__ import annotations

import sys

import xllamacpp


def main(file: str, threads: str, rows: str, tokens: str) -> None:
    """Serve a model's file: `rows` concurrent requests with `tokens` positions in all."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_parallel, parameters.n_ctx, parameters.port = int(rows), int(tokens), 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.cache_prompt = False  # read each prompt in full, as on the other side
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
