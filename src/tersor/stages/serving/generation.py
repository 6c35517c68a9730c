"""One model for all requests, and one generation at a time, in the order in which requests came.

The server of transformers loads whatever model a request names; here there is one, given. A request's seed is set where
its text is generated, so that requests side by side get what each would get alone.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from threading import Event
from time import monotonic
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from tersor.errors import NotFinite
from tersor.runtime.decoding import Decoder
from tersor.stages.serving.calls import Lenient
from tersor.stages.serving.jobs import JOB, Broken, Gone, Job, Line
from tersor.stages.serving.quick import Quick
from tersor.stages.serving.requests import Refused


class OneModel(ModelManager):  # type: ignore[misc]
    """The model that is served, under its one name. Loads nothing, unloads nothing, whatever is asked.

    ``created``: seconds since 1970, for the list of models.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, created: int) -> None:
        super().__init__(device="cpu", model_timeout=-1)
        self.force_model = name
        self._model = model
        self._tokenizer = tokenizer
        self._created = created

    def process_model_name(self, model_id: object) -> str:
        """The served name; refuses others. This is where every one of transformers' ways to load a model begins."""
        if not isinstance(model_id, str) or model_id not in (self.force_model, self.force_model.partition(":")[0]):
            raise Refused(
                f"The model {str(model_id)[:200]!r} is not served here; this server has {self.force_model!r} only.",
                status=404,
                code="model_not_found",
                where="model",
            )
        return str(self.force_model)

    def load_model_and_processor(
        self, model_id: str, progress_callback: Callable[[dict[str, Any]], None] | None = None, **_options: Any
    ) -> tuple[Any, Any]:
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id, "cached": True})
        return self._model, self._tokenizer

    def get_gen_models(self, _cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": self._created, "owned_by": "tersor"}]

    def shutdown(self) -> None:
        """Nothing: the model stays until the process ends."""


class OneByOne(GenerateManager):  # type: ignore[misc]
    """Generates on one thread, request after request; refuses a prompt that leaves no room for an answer.

    ``decoder``: a compiled step of ``model``, which then runs in place of its forward; None: there is none.
    ``context``: tokens of prompt and answer together, at most. ``line``: where requests wait.
    """

    def __init__(self, model: Any, decoder: Decoder | None, context: int, line: Line) -> None:
        super().__init__()
        self.line = line
        self._stopping = Event()
        self._context = context
        self._job: Job | None = None
        self.quick = None if decoder is None else Quick(decoder, self._go_on)
        if self.quick is not None:
            model.forward = self.quick.forward
            return
        # Between two tokens would be too seldom: a long prompt is one step of many seconds.
        for stack in model.modules():
            if isinstance(stack, nn.ModuleList):
                for block in stack:
                    block.register_forward_pre_hook(self._go_on)

    def _go_on(self, *_ignored: Any) -> None:
        if self._stopping.is_set():
            raise Refused("The server is stopping.", status=503, code="stopping")
        if self._job is not None and self._job.gone:
            raise Gone

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any) -> Any:
        job = JOB.get()
        self._fit(inputs, gen_config, job)
        if options.get("response_parser") is not None:
            options["response_parser"] = Lenient(options["response_parser"], processor.all_special_tokens)
        queue, streamer = super().generate_streaming(
            _Watched(self, model, job), processor, inputs, gen_config, **options
        )
        return Told(queue, job), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any
    ) -> Any:
        job = JOB.get()
        self._fit(inputs, gen_config, job)
        return await super().generate_non_streaming(
            _Watched(self, model, job), processor, inputs, gen_config, **options
        )

    def _fit(self, inputs: Mapping[str, Any], gen_config: Any, job: Job) -> None:
        """Keep prompt and answer within the context: refuse, or where no count was asked for, cut the answer."""
        given, limit = inputs["input_ids"].shape[-1], self._context
        gen_config.use_cache = self.quick is None
        stops, gen_config.stop_strings = gen_config.stop_strings, None
        job.stops = (stops,) if isinstance(stops, str) else tuple(stops or ())
        if not given:
            raise Refused("The prompt is empty.", code="empty_prompt")
        wanted = gen_config.max_new_tokens if job.counted else 1
        if given + wanted > limit:
            raise Refused(
                f"The prompt's {given} tokens and {wanted} for the answer are more than the {limit} served here.",
                code="context_length_exceeded",
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, limit - given)

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """``call`` on the generating thread, if the client is still there when its turn comes."""
        return self._queue(JOB.get().hold(partial(call, *args, **kwargs)))

    def async_submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        future = asyncio.wrap_future(self.submit(call, *args, **kwargs))
        # Who is shielded and has gone does not look any more at how it ended, and asyncio complains of that.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Shielded: transformers' thread would end on an answer that nobody may receive any more.
        return asyncio.shield(future)

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """On the generating thread: while this text is being written, drawn with the request's seed or a fresh one."""
        self._job, start = job, monotonic()
        try:
            self._go_on()
            if self.quick is not None:
                self.quick.begin()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(secrets.randbits(63) if job.seed is None else job.seed)
                yield
        except BaseException as failure:
            job.failure = failure
            raise
        finally:
            self._job = None
            self.line.leave(job, monotonic() - start)

    def _queue(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = super().submit(call, *args)
        return future

    def end(self) -> None:
        """What is being generated, or waits for it, fails from here on, at the next block of the model."""
        self._stopping.set()

    def wait(self, seconds: float) -> None:
        """Until the thread has nothing left to do, and so long at most: Python cannot end while it computes."""
        wait([self._queue(bool)], timeout=seconds)


class _Watched:
    """A model for ``GenerateManager``, which takes nothing of it but ``generate``; its text is a job's."""

    def __init__(self, manager: OneByOne, model: Any, job: Job) -> None:
        self._manager, self._model, self._job = manager, model, job

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **options: Any) -> Any:
        given = options["input_ids"].shape[-1]
        if self._job.stops:
            seen = StopTexts(options["tokenizer"], self._job.stops, given)
            options["stopping_criteria"] = StoppingCriteriaList([seen])
        options["logits_processor"] = LogitsProcessorList([_Finite()])
        with self._manager.turn(self._job):
            return self._model.generate(**options)


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Raises NotFinite where a text would go on from what are no numbers."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool(scores.max().isfinite()):
            raise NotFinite("The model gave logits that are not finite numbers.")
        return scores


class StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends a text once one of ``stops`` is in what comes after its first ``given`` tokens.

    transformers' own looks at how every token of the vocabulary may overlap with each of them before it begins, which
    takes a second for 64 characters of them and a vocabulary of 49152.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], given: int) -> None:
        self._tokenizer, self._stops, self._given = tokenizer, stops, given
        # A character may be four tokens of a byte each. What came before the last token has been looked at.
        self._tail = 4 * max(map(len, stops)) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> torch.Tensor:
        new = input_ids[0, max(self._given, input_ids.shape[1] - self._tail) :]
        text = self._tokenizer.decode(new, clean_up_tokenization_spaces=False)
        return torch.tensor([any(stop in text for stop in self._stops)])


class Told:
    """The queue of a stream's pieces. What broke it off is raised, in place of transformers' wording of it."""

    def __init__(self, queue: asyncio.Queue[Any], job: Job) -> None:
        self._queue, self._job = queue, job
        self._broken = False

    async def get(self) -> Any:
        """The next piece; None at the end. Raises Broken."""
        item = None if self._broken else await self._queue.get()
        if self._broken or isinstance(item, _StreamError):
            raise Broken(self._job.failure)
        return item

    def get_nowait(self) -> Any:
        """As :meth:`get`, and pieces that are there already come first. Raises QueueEmpty."""
        if self._broken:
            raise asyncio.QueueEmpty
        item = self._queue.get_nowait()
        if isinstance(item, _StreamError):
            self._broken = True
            raise asyncio.QueueEmpty
        return item


class OneQueue(GenerationState):  # type: ignore[misc]
    """All handlers generate through the same :class:`OneByOne`."""

    def __init__(self, manager: OneByOne) -> None:
        super().__init__()
        self._only = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> OneByOne:
        return self._only
