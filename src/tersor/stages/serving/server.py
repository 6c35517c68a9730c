"""Listening, saying so, and stopping cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tersor.stages.serving.generation import OneByOne

_PATIENCE = 3
"""Seconds that answers under way get to finish after Ctrl-C."""
_LONGEST_STEP = 60
"""Seconds that one block of the model may take to end after that."""


class _Server(uvicorn.Server):
    """uvicorn, which says when it listens and ends answers under way when it stops."""

    def __init__(self, config: uvicorn.Config, manager: OneByOne, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._manager = manager
        self._ready = ready
        self._hurried = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ctrl-C; a second one takes the patience away, and a third what is left of order."""
        if self.should_exit and not self._hurried and self._loop is not None:
            self._hurried = True
            self._loop.call_soon_threadsafe(self._manager.end)
            return
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_PATIENCE, self._manager.end)
        await super().shutdown(sockets=sockets)


def listen(app: FastAPI, listener: socket.socket, manager: OneByOne, ready: Callable[[], None]) -> None:
    """Answer requests on a bound socket until Ctrl-C."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_PATIENCE + _LONGEST_STEP
    )
    try:
        # uvicorn stops at Ctrl-C, and then passes it on.
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, manager, ready).run(sockets=[listener])
    finally:
        manager.end()
        manager.wait(_LONGEST_STEP)
