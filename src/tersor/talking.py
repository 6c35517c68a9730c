"""Commands that write text with an artifact."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

Artifact = Annotated[str, typer.Argument(help="An artifact folder.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token every time.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn by chance.")]
Cache = Annotated[str, typer.Option(help="Type of the keys and values that are remembered: float16 or float32.")]
Trust = Annotated[bool, typer.Option(help="Allow code that comes with the model to run.")]


def run(
    artifact: Artifact,
    prompt: Annotated[str, typer.Argument(help="Text to continue; a chat model gets it as a user's turn.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    cache: Cache = "float16",
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Generate text with an artifact; says on standard error how fast."""
    from tersor import show, writing

    with show.progress():
        written = writing.write(
            artifact,
            prompt,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            cache=cache,
            on_text=None if as_json else show.stream,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        show.emit(True, lambda: {"prompt": prompt, **show.written_data(written)}, lambda: None)
    else:
        show.written_line(written)


def chat(
    artifact: Artifact,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    context: Annotated[
        int | None, typer.Option(help="Tokens of the whole conversation. Default: what the model takes, up to 8192.")
    ] = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    cache: Cache = "float16",
    trust_remote_code: Trust = False,
) -> None:
    """Talk with an artifact, a line at a time. /new begins anew, /exit or the end of the input ends it; Ctrl-C ends an
    answer, or the conversation where none is being given.
    """
    from tersor import show, writing

    try:
        with show.progress():
            talk = writing.chat(
                artifact,
                tokens=tokens,
                context=context,
                temperature=temperature,
                seed=seed,
                cache=cache,
                trust_remote_code=trust_remote_code,
            )
        show.talk(talk)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
