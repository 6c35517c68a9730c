"""One model for all requests, and one generation at a time, in the order in which requests came.

The server of transformers loads whatever model a request names; here there is one, given. A request's seed is set where
its text is generated, so that requests side by side get what each would get alone.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import nn
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from tersor.runtime.decoding import Decoder
from tersor.stages.serving.quick import Quick
from tersor.stages.serving.requests import Refused


@dataclass(frozen=True)
class Wish:
    """What a request asked for that transformers' handlers do not hand on to the generation."""

    seed: int | None
    counted: bool


WISH: ContextVar[Wish] = ContextVar("WISH")
"""Set by the handler of each request, in that request's own context. ``counted``: it says how many tokens it wants."""


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
    ``context``: tokens of prompt and answer together, at most.
    """

    def __init__(self, model: Any, decoder: Decoder | None, context: int) -> None:
        super().__init__()
        self._stopping = Event()
        self._context = context
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

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any) -> Any:
        self._fit(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, **options)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any
    ) -> Any:
        self._fit(inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, **options)

    def _fit(self, inputs: Mapping[str, Any], gen_config: Any) -> None:
        """Keep prompt and answer within the context: refuse, or where no count was asked for, cut the answer."""
        given, limit = inputs["input_ids"].shape[-1], self._context
        gen_config.use_cache = self.quick is None
        if not given:
            raise Refused("The prompt is empty.", code="empty_prompt")
        wanted = gen_config.max_new_tokens if WISH.get().counted else 1
        if given + wanted > limit:
            raise Refused(
                f"The prompt's {given} tokens and {wanted} for the answer are more than the {limit} served here.",
                code="context_length_exceeded",
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, limit - given)

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """``call`` on the generating thread, with the request's seed or a fresh one."""
        seed = WISH.get().seed
        return self._queue(self._seeded, secrets.randbits(63) if seed is None else seed, call, args, kwargs)

    def async_submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        # Shielded: transformers' thread would end on an answer that nobody may receive any more.
        return asyncio.shield(asyncio.wrap_future(self.submit(call, *args, **kwargs)))

    def _seeded(self, seed: int, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.quick is not None:
            self.quick.begin()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return call(*args, **kwargs)

    def _queue(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = super().submit(call, *args)
        return future

    def end(self) -> None:
        """What is being generated, or waits for it, fails from here on, at the next block of the model."""
        self._stopping.set()

    def wait(self, seconds: float) -> None:
        """Until the thread has nothing left to do, and so long at most: Python cannot end while it computes."""
        wait([self._queue(bool)], timeout=seconds)


class OneQueue(GenerationState):  # type: ignore[misc]
    """All handlers generate through the same :class:`OneByOne`."""

    def __init__(self, manager: OneByOne) -> None:
        super().__init__()
        self._only = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> OneByOne:
        return self._only
