"""transformers' own server (``transformers serve``) for one model, with a check in front of each of its handlers.

What is ours: requests are checked, errors are sentences in OpenAI's form, a stream ends with ``[DONE]``, and no request
loads, unloads or downloads anything. Routes, templates, parsing of tool calls and the streams are transformers'.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator
from functools import partial
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

from tersor.stages.serving import requests
from tersor.stages.serving.generation import WISH, OneByOne, OneModel, OneQueue, Wish
from tersor.stages.serving.requests import Refused

SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
"""transformers' routes that are kept; others load or unload models, take sound, or answer other kinds of questions."""
_COLDEST = 0.01
"""Lower temperatures are taken for 0: dividing by them overflows, and the likeliest token has all the chances."""


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
        WISH.set(Wish(body.pop("seed", None), counted))
        try:
            response = await super().handle_request(body, request_id)
        except TemplateError as error:
            raise Refused(f"The chat template does not take these messages: {error}.", where="messages") from error
        if isinstance(response, StreamingResponse) and self.shape is not requests.ResponseRequest:
            response.body_iterator = _with_end(response.body_iterator)
        return response

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
    own = {"conversations", *inspect.signature(tokenizer.apply_chat_template).parameters}
    taken = own.intersection(body.get("chat_template_kwargs", ()))
    if taken:
        raise Refused(
            f"The request's chat_template_kwargs cannot set {min(taken)}, which the server sets.",
            where="chat_template_kwargs",
        )


async def _with_end(stream: Any) -> AsyncIterator[Any]:
    """The stream, and after it the line by which OpenAI's clients know that it is whole."""
    async with contextlib.aclosing(stream):
        async for piece in stream:
            yield piece
    yield "data: [DONE]\n\n"


def build_app(model: OneModel, manager: OneByOne) -> FastAPI:
    """transformers' FastAPI application for this model."""
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
    app.add_api_route("/load_model", partial(_load_model, model), methods=["POST"])
    app.add_exception_handler(HTTPException, _sentence)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(Exception, _failed)
    return app


async def _load_model(model: OneModel, body: dict[str, Any]) -> StreamingResponse:
    """How `transformers chat` waits for a model. transformers' own route takes anything for a name."""
    name = model.process_model_name(body.get("model"))
    return StreamingResponse(model.load_model_streaming(name), media_type="text/event-stream")


def _answer(status: int, message: str, *, code: str | None = None, where: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": where, "code": code}}, status)


async def _sentence(request: Request, error: Exception) -> JSONResponse:
    """Every deliberate refusal, transformers' own too, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    if isinstance(error, Refused):
        return _answer(error.status_code, str(error.detail), code=error.code, where=error.where)
    if error.status_code == 404:
        return _answer(404, f"There is nothing at {request.url.path}; see /v1/models and /v1/chat/completions.")
    return _answer(error.status_code, str(error.detail))


async def _malformed(_request: Request, error: Exception) -> JSONResponse:
    """A body that FastAPI could not read as a JSON object."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _answer(400, f"The request is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}.")
    return _answer(400, "The request must be a JSON object, sent with the header Content-Type: application/json.")


async def _failed(_request: Request, _error: Exception) -> JSONResponse:
    """A fault of ours or of the model's; the server's own log, on standard error, has all of it."""
    return _answer(500, "The server failed at this request; its log says where.")
