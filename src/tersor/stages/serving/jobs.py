"""A request's way through the server: whether there is room for it, whether anybody still waits, and how it failed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextvars import ContextVar
from threading import Event, Lock
from typing import Any

from tersor.errors import TersorError
from tersor.stages.serving.requests import Refused

_LONGEST_WAIT = 60
"""Seconds that a client is asked to wait at most: OpenAI's do not heed more."""
_LOG = logging.getLogger("uvicorn.error")


class Gone(Refused):
    """Nobody waits for this answer any more. 499 is how servers note that; no client ever sees it."""

    def __init__(self) -> None:
        super().__init__("The client has gone.", status=499, code="gone")


class Broken(Exception):
    """A stream that has begun cannot go on, in one sentence that its client may see."""

    def __init__(self, failure: BaseException | None) -> None:
        known = isinstance(failure, (Refused, TersorError))
        if not known:
            _LOG.error("A stream broke off.", exc_info=failure)
        self.sentence = failure.detail if isinstance(failure, Refused) else str(failure) if known else FAILED
        self.code = failure.code if isinstance(failure, Refused) else None
        super().__init__(self.sentence)


FAILED = "The server failed at this request; its log says where."


class Job:
    """One request for a text.

    ``seed``, ``counted`` (whether it says how many tokens it wants) and ``stops`` are what it asked for and what is not
    handed on to the generation by transformers' handlers. ``failure``: what its text ended with.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.counted = False
        self.stops: tuple[str, ...] = ()
        self.failure: BaseException | None = None
        self._gone = Event()
        self._work: Callable[[], Any] | None = None

    @property
    def gone(self) -> bool:
        """Whether its client has."""
        return self._gone.is_set()

    def leave(self) -> None:
        """Its client has gone: what has been begun is to stop, and what waits is let go at once with all it holds."""
        self._gone.set()
        self._work = None

    def hold(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """``work``, for later: what is returned does it once. Raises Gone then, if there is nobody to do it for."""
        self._work = work
        return self._take

    def _take(self) -> Any:
        work, self._work = self._work, None
        if work is None or self.gone:
            raise Gone
        return work()


JOB: ContextVar[Job] = ContextVar("JOB")
"""The request that is being handled; set before the handlers, in each request's own context."""


class Line:
    """Requests that wait or are being answered: one, and up to ``waiting`` that wait for their turn."""

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._jobs: set[Job] = set()
        self._lock = Lock()
        self._usual = 1.0

    def enter(self, job: Job) -> None:
        """Raises Refused where as many wait as may."""
        with self._lock:
            if len(self._jobs) > self._waiting:
                seconds = min(max(math.ceil(self._usual), 1), _LONGEST_WAIT)
                raise Refused(
                    f"The server is busy: {len(self._jobs)} requests are before this one, and no more may wait; try "
                    f"again in {seconds} s.",
                    status=429,
                    code="too_many_requests",
                    headers={"Retry-After": str(seconds)},
                )
            self._jobs.add(job)

    def leave(self, job: Job, seconds: float | None = None) -> None:
        """Make room, if there was any taken. ``seconds`` that it took, if it was answered."""
        with self._lock:
            self._jobs.discard(job)
            if seconds is not None:
                self._usual += (seconds - self._usual) / 4
