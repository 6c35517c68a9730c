"""Stage: an artifact behind transformers' own OpenAI-compatible server."""

from __future__ import annotations

import errno
import importlib.util
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tersor.errors import BadInput, UnknownArchitecture
from tersor.runtime import large_pages
from tersor.runtime.decoding import Decoder
from tersor.stages.context import Progress
from tersor.stages.foreign import refuse_foreign_code
from tersor.stages.opened import open_whole
from tersor.stages.text import tokenizer_in

_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
_USUAL = 8192
"""Tokens of a context that nobody asked to be longer: the keys and values of all of it are kept."""


@dataclass(frozen=True)
class Server:
    """An artifact in memory and an address that is taken for it.

    ``name``: what requests call the model. ``context``: tokens of prompt and answer together, at most.
    ``fallback``: why transformers' own passes run it and not a compiled step; None where the step does.
    """

    name: str
    address: str
    context: int
    fallback: str | None
    _model: Any
    _tokenizer: Any
    _decoder: Decoder | None
    _listener: socket.socket
    _created: int
    _waiting: int
    _largest: int

    def run(self, ready: Callable[[], None]) -> None:
        """Answer requests until Ctrl-C; ``ready`` is called once, when it listens. From the main thread only.

        Raises BadInput where another program has come to listen at the address meanwhile.
        """
        # Imported here: they need the extra's packages, and these take a second to import.
        from tersor.stages.serving.app import build_app, guard_template
        from tersor.stages.serving.calls import be_lenient
        from tersor.stages.serving.generation import OneByOne, OneModel
        from tersor.stages.serving.jobs import Line
        from tersor.stages.serving.server import listen

        manager = OneByOne(self._model, self._decoder, self.context, Line(self._waiting))
        guard_template(self._tokenizer)
        be_lenient(self._tokenizer)
        # It warns of every request that comes, and of fields that the check has judged already.
        logging.get_logger("transformers.cli.serving").setLevel(logging.ERROR)
        model = OneModel(self.name, self._model, self._tokenizer, self._created)
        app = build_app(model, manager, largest=self._largest)
        _open(self._listener)
        listen(app, self._listener, manager, ready)


def open_server(
    path: Path,
    *,
    host: str,
    port: int,
    context: int | None,
    waiting: int,
    largest: int,
    trust_remote_code: bool,
    progress: Progress,
) -> Server:
    """Take the address, then load the artifact. Raises BadInput where either cannot be had.

    The model is the folder's alone, named as the folder; nothing is ever fetched from a hub. ``context`` None: what the
    model takes, up to 8192 tokens. ``waiting``: requests that wait for their turn, and ``largest``: bytes of a request,
    at most; more is refused.
    """
    if waiting < 0:
        raise BadInput(f"--max-waiting {waiting} makes no sense; give 0 or more.")
    if largest < 1:
        raise BadInput(f"--max-body {largest} has no room for any request; give more.")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"Serving needs the missing {' and '.join(missing)}: pip install 'tersor[serve]'.")
    artifact = open_whole(path, progress)
    refuse_foreign_code(path, artifact.config, trust_remote_code=trust_remote_code)
    listener = _take(host, port)
    try:
        tokenizer = tokenizer_in(path, trust_remote_code=trust_remote_code)
        if not tokenizer.is_fast:
            raise BadInput(f"The tokenizer of {path} is a slow one, which cannot be streamed; add its tokenizer.json.")
        model = _load(path, tokenizer, trust_remote_code=trust_remote_code)
        context = _context(model, context)
        decoder, fallback = _decoder(model, context)
    except BaseException:
        listener.close()
        raise
    bound = listener.getsockname()
    shown = f"[{bound[0]}]" if listener.family == socket.AF_INET6 else bound[0]
    return Server(
        path.resolve().name,
        f"http://{shown}:{bound[1]}/v1",
        context,
        fallback,
        model,
        tokenizer,
        decoder,
        listener,
        int((path / "config.json").stat().st_mtime),
        waiting,
        largest,
    )


def _load(path: Path, tokenizer: Any, *, trust_remote_code: bool) -> Any:
    """As `tersor run` loads it, so that both write the same."""
    model = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=trust_remote_code, dtype=torch.float32, local_files_only=True
    ).eval()
    settings = model.generation_config
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        ends = settings.eos_token_id
        settings.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return model


def _context(model: Any, asked: int | None) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None
    if asked is None:
        return _USUAL if limit is None else min(limit, _USUAL)
    if asked < 2:
        raise BadInput(f"--context {asked} has no room for a prompt and an answer; give more.")
    if limit is not None and asked > limit:
        raise BadInput(f"--context {asked} is more than the {limit} tokens that the model takes; give {limit} or less.")
    return asked


def _decoder(model: Any, context: int) -> tuple[Decoder | None, str | None]:
    large_pages.move(model.modules())
    try:
        return Decoder.of(model, context=context, cache_dtype=torch.float16), None
    except UnknownArchitecture as error:
        return None, str(error)


def _take(host: str, port: int) -> socket.socket:
    """A socket bound to the address and not yet listening: whoever comes early is turned away, and not kept waiting."""
    if not 0 <= port < 2**16:
        raise BadInput(f"--port {port} makes no sense; give 1 to 65535, or 0 for a free one.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise BadInput(f"--host {host!r} is no address of this machine; give one, such as 127.0.0.1.") from None
    listener = socket.socket(family, kind, protocol)
    try:
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # An address whose last connections are still winding down counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise BadInput(f"--host {host!r} is no address of this machine; give one, such as 127.0.0.1.") from None
        raise _cannot_listen(error, host, port) from None
    return listener


def _open(listener: socket.socket) -> None:
    """Listen. Only from here on may its connections wind down beside a server that comes after it: had that been said
    before, two servers that both do not listen yet would both get the address.
    """
    host, port = listener.getsockname()[:2]
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.listen()
    except OSError as error:
        listener.close()
        raise _cannot_listen(error, host, port) from None


def _cannot_listen(error: OSError, host: str, port: int) -> BadInput:
    if error.errno == errno.EADDRINUSE:
        return BadInput(f"Port {port} of {host} is in use by another program; give another --port.")
    return BadInput(f"{host} port {port} cannot be listened on: {error.strerror}.")
