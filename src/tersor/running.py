"""Commands that keep an artifact running."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. Whoever can reach it can use the model.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer at most. Default: what the model takes, up to 8192.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that wait for their turn; more are told to come again.")
    ] = 64,
    max_body: Annotated[str, typer.Option(help="Size of a request at most, such as 4MB.")] = "4MB",
    trust_remote_code: Annotated[bool, typer.Option(help="Allow code that comes with the model to run.")] = False,
) -> None:
    """Answer OpenAI clients with an artifact, through transformers' own server, until Ctrl-C."""
    from tersor import api, show

    with show.progress() as progress:
        server = api.open_server(
            artifact,
            host=host,
            port=port,
            context=context,
            max_waiting=max_waiting,
            max_body=max_body,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if server.fallback is not None:
        sys.stderr.write(f"tersor: run by transformers, layer by layer: {server.fallback}.\n")
    server.run(lambda: show.stream(f"{server.name} is served at {server.address}; Ctrl-C stops it.\n"))
    sys.stderr.write("tersor: stopped.\n")
