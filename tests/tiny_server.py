"""An artifact of a tiny model, and `tersor serve` with it as a process of its own, for tests."""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tokenizers import decoders

import command_line
import tersor
import tiny_runs
import tiny_tokenizer

LIMIT = 180
"""Seconds for the start of a server, and for its end, on a machine that is busy with other tests."""


def compressed(model: Path, folder: Path, size: str, template: str | None = None) -> Path:
    """An artifact of a tiny model, with a tokenizer of one token a character and a chat template."""
    tokenizer = tiny_tokenizer.build(chat=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer._tokenizer.decoder = decoders.Fuse()
    shutil.copytree(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = tiny_runs.text(folder / "words.txt")
    settings = {**tiny_runs.SETTINGS, "cache_dir": folder / "cache"}
    tersor.compress(folder / "model", folder / "small model", size=size, text=words, **settings)
    return folder / "small model"


@contextmanager
def served(artifact: Path, *options: object, first: str = "pass") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and its address. Whatever happens, the process ends.

    ``first``: statements that it runs before it begins, such as to make something fail.
    """
    paths = os.pathsep.join([str(command_line.SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    # No proxy, and no hub: what is served is on the disk.
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
    command = [sys.executable, "-c", f"{first}\nfrom tersor import cli\ncli.main()", "serve", str(artifact)]
    command += ["--port", "0", *map(str, options)]
    process = subprocess.Popen(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], LIMIT)
        line = process.stdout.readline() if ready else ""
        if " is served at " not in line:
            process.kill()
            pytest.fail(f"the server did not start: {line}{process.communicate()[1]}")
        yield process, line.split(" is served at ")[1].split(";")[0]
    finally:
        process.kill()
        process.communicate()


def connect(address: str) -> http.client.HTTPConnection:
    """A connection that stays open from request to request."""
    parts = urlsplit(address)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT)


def post(address: str, path: str, body: bytes, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer."""
    connection = connect(address)
    connection.request("POST", path, body, {"Content-Type": kind})
    response = connection.getresponse()
    read = json.loads(response.read().removeprefix(b"data: "))
    connection.close()
    return response.status, read
