"""luthier serve: a base with deltas, or an assembly, for OpenAI's clients."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.talk import Base, Deltas


def serve(
    base: Base,
    delta: Deltas = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="Model name for clients; default the folder's.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer where a request states none.")
    ] = 256,
) -> None:
    """Serve a base and its deltas, or an assembly, over HTTP as OpenAI's clients expect; Ctrl-C ends."""
    from luthier.cli.console import say
    from luthier.verbs.serve import serve as run

    run(base, delta or (), host=host, port=port, name=name, max_new_tokens=max_new_tokens, say=say)
