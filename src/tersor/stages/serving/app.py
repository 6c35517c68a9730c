"""transformers' own server (``transformers serve``) for one model, with a check in front of each of its handlers.

What is ours: requests are checked, errors are sentences in OpenAI's form, a stream ends with ``[DONE]``, and no request
loads, unloads or downloads anything. Routes, templates, parsing of tool calls and the streams are transformers'.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import AsyncIterator, Callable
from functools import partial, wraps
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler
from transformers.utils.chat_template_utils import render_jinja_template as render

from tersor.errors import TersorError
from tersor.stages.serving import requests
from tersor.stages.serving.gate import Gate, answer
from tersor.stages.serving.generation import OneByOne, OneModel, OneQueue
from tersor.stages.serving.jobs import FAILED, JOB, Broken
from tersor.stages.serving.requests import Refused

SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
"""transformers' routes that are kept; others load or unload models, take sound, or answer other kinds of questions."""
_COLDEST = 0.01
"""Lower temperatures are taken for 0: dividing by them overflows, and the likeliest token has all the chances."""

_CALLED_WITH = frozenset({"self", "messages", "load_audio_from_video"})
_MISUSE = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What expressions in a template raise for values that are not what they expect."""


class _Checked(BaseHandler):  # type: ignore[misc]
    """In front of one of transformers' handlers."""

    shape: type[requests.Request]
    chat = True

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        name = self.model_manager.force_model
        body = requests.check(self.shape, body, name)
        model, tokenizer = self.model_manager.load_model_and_processor(name)
        if self.chat:
            _check_template(tokenizer, body, name)
        unknown = [key for key in body.get("logit_bias", ()) if int(key) >= model.config.get_text_config().vocab_size]
        if unknown:
            raise Refused(f"The request's logit_bias names token {unknown[0]}, which there is not.", where="logit_bias")
        counted = any(key in body for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"))
        job = JOB.get()
        job.seed, job.counted = body.pop("seed", None), counted
        self.generation_state.get_manager(name).line.enter(job)
        response = await super().handle_request(body, request_id)
        if isinstance(response, StreamingResponse):
            end = _responses_end if self.shape is requests.ResponseRequest else _chunks_end
            response.body_iterator = _with_end(response.body_iterator, end)
        return response

    def _validate_request(self, body: dict[str, Any]) -> None:
        unknown = sorted(body.keys() - getattr(self._valid_params_class, "__mutable_keys__", body.keys()))
        if unknown:
            raise Refused(
                f"The request's {unknown[0][:200]} is no field that there is; leave it out.",
                status=422,
                code="unknown_field",
                where=unknown[0][:200],
            )
        super()._validate_request(body)

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, **options: Any) -> Any:
        """Beside what transformers takes over: sampling is switched on by who asks for it, and nobody gets beams."""
        config = super()._build_generation_config(body, model_generation_config, **options)
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if temperature is not None and temperature < _COLDEST:
            config.do_sample, config.temperature = False, None
        elif temperature is not None or (top_p is not None and top_p < 1):
            config.do_sample = True
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        config.num_beams = 1  # they cannot be streamed
        return config


class _Chat(_Checked, ChatCompletionHandler):  # type: ignore[misc]
    shape = requests.ChatRequest


class _Completion(_Checked, CompletionHandler):  # type: ignore[misc]
    shape = requests.CompletionRequest
    chat = False


class _Response(_Checked, ResponseHandler):  # type: ignore[misc]
    shape = requests.ResponseRequest


def _check_template(tokenizer: Any, body: dict[str, Any], name: str) -> None:
    if not tokenizer.chat_template:
        raise Refused(f"{name} has no chat template; use /v1/completions.", code="no_chat_template")
    # A template is called with all of these; what the request calls so too would be there twice.
    taken = _CALLED_WITH.union(
        *(inspect.signature(part).parameters for part in (tokenizer.apply_chat_template, render))
    )
    taken = taken.intersection(body.get("chat_template_kwargs", ()))
    if taken:
        raise Refused(
            f"The request's chat_template_kwargs cannot set {min(taken)}, which the server sets.",
            where="chat_template_kwargs",
        )


def guard_template(tokenizer: Any) -> None:
    """What a template cannot do with what a request holds becomes one sentence, whatever Python makes of it."""
    plain = tokenizer.apply_chat_template

    @wraps(plain)
    def apply(*args: Any, **options: Any) -> Any:
        try:
            return plain(*args, **options)
        except _MISUSE as error:
            said = " ".join(str(error).split())[:300].rstrip(".")
            raise Refused(f"The chat template does not take these messages: {said}.", where="messages") from error

    tokenizer.apply_chat_template = apply


async def _with_end(stream: Any, end: Callable[[Any, Broken | None], str]) -> AsyncIterator[Any]:
    """The stream, and after it what tells OpenAI's clients that it is whole, or that it is not."""
    last: Any = ""
    async with contextlib.aclosing(stream):
        try:
            async for piece in stream:
                yield piece
                last = piece
        except Broken as broken:
            yield end(last, broken)
            return
    yield end(last, None)


def _chunks_end(_last: Any, broken: Broken | None) -> str:
    """Of completions. Clients raise at ``error``, and hear of it only if it comes before what says that all is well."""
    if broken is None:
        return "data: [DONE]\n\n"
    said = {"message": broken.sentence, "type": "server_error", "param": None, "code": broken.code}
    return f"data: {json.dumps({'error': said})}\n\n"


def _responses_end(last: Any, broken: Broken | None) -> str:
    """Of responses, whose last event says how they ended. Theirs for errors has its fields at the top; clients look for
    ``error`` all the same.
    """
    if broken is None:
        return ""
    number = json.loads(last.rstrip().rpartition("\n\n")[2].removeprefix("data: "))["sequence_number"] + 1
    said = {"message": broken.sentence, "param": None, "code": broken.code or "server_error"}
    event = {"type": "error", "sequence_number": number, **said, "error": {**said, "type": "server_error"}}
    return f"data: {json.dumps(event)}\n\n"


def build_app(model: OneModel, manager: OneByOne, *, largest: int) -> FastAPI:
    """transformers' FastAPI application for this model. ``largest``: bytes of a request's body at most."""
    state = OneQueue(manager)
    ours = {
        "chat_handler": _Chat(model_manager=model, generation_state=state),
        "completion_handler": _Completion(model_manager=model, generation_state=state),
        "response_handler": _Response(model_manager=model, generation_state=state),
    }
    # Which others it wants differs between versions of transformers; their routes are taken away again below.
    wanted = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    app: FastAPI = build_server(model, **{name: ours.get(name) for name in wanted}, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in SERVED]
    app.add_api_route("/v1/models/{name:path}", partial(_one_model, model), methods=["GET"])
    app.add_api_route("/load_model", partial(_load_model, model), methods=["POST"])
    app.add_exception_handler(HTTPException, _sentence)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(TersorError, _told)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Gate, line=manager.line, largest=largest)  # the last that is added is the first that is passed
    return app


async def _one_model(model: OneModel, name: str) -> dict[str, Any]:
    model.process_model_name(name)
    return model.get_gen_models()[0]


async def _load_model(model: OneModel, body: dict[str, Any]) -> StreamingResponse:
    """How `transformers chat` waits for a model. transformers' own route takes anything for a name."""
    name = model.process_model_name(body.get("model"))
    return StreamingResponse(model.load_model_streaming(name), media_type="text/event-stream")


async def _sentence(request: Request, error: Exception) -> JSONResponse:
    """Every deliberate refusal, transformers' own too, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, error.headers
    if isinstance(error, Refused):
        return answer(error.status_code, str(error.detail), code=error.code, where=error.where, headers=headers)
    if error.status_code == 404:
        return answer(404, f"There is nothing at {path}; see /v1/models and /v1/chat/completions.")
    if error.status_code == 405:
        routes = [route for route in request.app.routes if getattr(route, "path", None) == path]
        known = ", ".join(sorted(set().union(*(route.methods for route in routes))))
        return answer(405, f"{request.method} is not answered at {path}; {known} is.", headers={"Allow": known})
    if error.status_code == 400:
        return answer(400, "The request's body could not be read as JSON.", headers=headers)
    return answer(error.status_code, str(error.detail), headers=headers)


async def _malformed(_request: Request, error: Exception) -> JSONResponse:
    """A body that FastAPI could not read as a JSON object."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return answer(400, f"The request is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}.")
    return answer(400, "The request must be a JSON object, sent with the header Content-Type: application/json.")


async def _told(_request: Request, error: Exception) -> JSONResponse:
    """What tersor raises on purpose while a text is written; it is a sentence already."""
    return answer(500, str(error))


async def _failed(_request: Request, _error: Exception) -> JSONResponse:
    """A fault of ours or of the model's; the server's own log, on standard error, has all of it."""
    return answer(500, FAILED)
