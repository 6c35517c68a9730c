"""What a request passes before transformers' application sees any of it: how much it sends, and whether it stays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from tersor.stages.serving.jobs import JOB, Job, Line

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_UPLOAD = 60
"""Seconds that a body may take to come."""
_READ_ON = 8
"""Times the largest body that are still read, and forgotten: a client that is writing does not hear that it is too
much, and takes a connection that is closed meanwhile for a broken one."""


def answer(
    status: int, message: str, *, code: str | None = None, where: str | None = None, headers: Any = None
) -> JSONResponse:
    """A sentence in the form that OpenAI's clients show."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    said = {"error": {"message": message, "type": kind, "param": where, "code": code}}
    return JSONResponse(said, status, headers=headers)


class Gate:
    """An ASGI application before another. Bodies are of up to ``largest`` bytes; who disconnects is not answered on.

    HEAD is answered as GET is, whose body the server then keeps to itself.
    """

    def __init__(self, app: App, *, line: Line, largest: int) -> None:
        self._app = app
        self._line = line
        self._largest = largest

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(scope, receive), _UPLOAD)
        except asyncio.TimeoutError:  # two different things before Python 3.11
            said = f"The request's body did not come within {_UPLOAD} s."
            await answer(408, said, code="timeout", headers={"Connection": "close"})(scope, receive, send)
            return
        except _TooLarge:
            said = f"The request's body is larger than the {self._largest} bytes that are taken here."
            await answer(413, said, code="too_large", headers={"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._answered(scope, body, receive, send)

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
        """All of it, or None where the client has gone. Raises _TooLarge, if it can when it has all been sent."""
        declared = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
        if declared > _READ_ON * self._largest:
            raise _TooLarge
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            piece = message.get("body", b"")
            size += len(piece)
            if size <= self._largest:
                pieces.append(piece)
            elif size > _READ_ON * self._largest:
                raise _TooLarge
            else:
                pieces.clear()
            if not message.get("more_body", False):
                break
        if size > self._largest:
            raise _TooLarge
        return b"".join(pieces)

    async def _answered(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        job = Job()
        JOB.set(job)
        given, whole, never = False, False, asyncio.Event()

        async def hand_on() -> Message:
            nonlocal given
            if given:  # whether the client is still there is seen to here
                await never.wait()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def note(message: Message) -> None:
            nonlocal whole
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        answering = asyncio.create_task(self._called(scope, hand_on, note))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not whole:
                job.leave()
                self._line.leave(job)
                answering.cancel()
            await asyncio.wait({answering})
            if not answering.cancelled():
                answering.result()
        finally:
            leaving.cancel()
            answering.cancel()
            job.leave()
            self._line.leave(job)

    async def _called(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _TooLarge(Exception):
    """More than is taken."""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
