"""What a request may hold: checked before transformers' handlers see it, so that a wrong one gets one clear sentence.

The handlers take fields as they come: a prompt that is missing, a negative count or a null in a message would end in
"Internal Server Error", and a field that they do not know how to serve (``n``, ``logprobs``) is passed over in silence.
Fields are those of OpenAI's chat completions, completions and responses. Nulls count as absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

FIXED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "function_call": (),
    "functions": (),
    "generation_config": (),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Values that mean what the server does anyway, of fields where any other value would silently not be served."""


_DEEPEST = 64


class Refused(HTTPException):
    """A request that cannot be served, in one sentence. ``where``: the field, as OpenAI's clients show it."""

    def __init__(
        self,
        sentence: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        where: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, sentence, headers)
        self.code = code
        self.where = where


class Shape(BaseModel):
    """Fields named here have these types, with nothing converted; others are passed on for transformers to judge."""

    model_config = ConfigDict(strict=True, extra="allow")


class Part(Shape):
    """A piece of text in a message. Pictures and sounds are refused: what is served takes text."""

    type: Literal["text", "input_text", "output_text"]
    text: str


Content = str | list[Part]


def _arguments(text: str) -> str:
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise ValueError("it must be a string that holds a JSON object")
    return text


class Function(Shape):
    """A function that the model called, with its arguments as JSON."""

    name: str
    arguments: str
    _read = field_validator("arguments")(_arguments)


class Call(Shape):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Shape):
    """One turn of a conversation. Only an assistant's may be without content, where it called functions."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("it has no content")
        return self


class CallItem(Shape):
    """A function call among the inputs of a response."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    _read = field_validator("arguments")(_arguments)


class OutputItem(Shape):
    """What a function gave back, among the inputs of a response."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class Thought(Shape):
    """A piece of reasoning."""

    text: str


class ReasoningItem(Shape):
    """Thoughts of an earlier answer among the inputs of a response."""

    type: Literal["reasoning"]
    content: list[Thought] | None = None


def _kind(item: object) -> str | None:
    if not isinstance(item, dict):
        return None
    if "role" in item:
        return "message"
    kind = item.get("type")
    return "part" if kind in ("text", "input_text", "output_text") else kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[Part, Tag("part")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="it must be a message with a role, a text, a function call, its output, or reasoning",
    ),
]


class Tool(Shape):
    """A function that the model may call; responses name it beside its type, chat completions inside ``function``."""

    type: Literal["function"]
    name: str | None = None
    function: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_name(self) -> Tool:
        if not isinstance((self.function or {}).get("name", self.name), str):
            raise ValueError("the function has no name")
        return self


Tokens = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
# Each is looked for after every token.
Stops = Stop | Annotated[list[Stop], Field(max_length=16)]
# transformers turns it into a repetition penalty of 1 plus this, which must be above 0.
Penalty = Annotated[float, Field(gt=-1, le=2)]


class Request(Shape):
    """What all three kinds of request share."""

    model: str | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    tools: list[Tool] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

    @field_validator("seed", mode="before")
    @classmethod
    def _seeds_a_generator(cls, given: object) -> object:
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 2**64:
            raise ValueError("it must be a whole number from 0 to 18446744073709551615")
        return given


class ChatRequest(Request):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: Stops | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )


class CompletionRequest(Request):
    """``/v1/completions``."""

    prompt: str
    suffix: str | None = None
    max_tokens: Tokens | None = None
    stop: Stops | None = None
    frequency_penalty: Penalty | None = None


class ResponseRequest(Request):
    """``/v1/responses``."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None

    @field_validator("input")
    @classmethod
    def _one_form(cls, given: str | list[Any]) -> str | list[Any]:
        if not isinstance(given, str):
            parts = [isinstance(item, Part) for item in given]
            if any(parts) and not all(parts):
                raise ValueError("texts and messages cannot be mixed in one list")
            if not any(parts) and not isinstance(given[0], Message):
                raise ValueError("the first of several items must be a message")
        return given


def check(shape: type[Request], body: Mapping[str, Any], model: str) -> dict[str, Any]:
    """``body`` without nulls, found to be a request of this shape for ``model``. Raises Refused."""
    if _deeper(body, _DEEPEST):
        raise Refused(f"The request is nested more than {_DEEPEST} deep.")
    given = _without_nulls(body)
    try:
        json.dumps(given, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("The request holds half of a surrogate pair, which is no character.") from None
    try:
        read = shape.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given) from None
    if given.get("model", model) != model:
        raise Refused(
            f"The model {given['model'][:200]!r} is not served here; this server has {model!r} only.",
            status=404,
            code="model_not_found",
            where="model",
        )
    for name, same in FIXED.items():
        if name in given and given[name] not in same:
            only = " or ".join(json.dumps(value) for value in same)
            rest = f"it can be {only} only, which is what it is without it" if only else "leave it out"
            raise Refused(f"The request's {name} is not served here; {rest}.", code="unsupported_value", where=name)
    if given.get("tool_choice") == "none":
        given.pop("tools", None)
    given["stream"] = read.stream
    if "logit_bias" in given:  # transformers takes no whole numbers
        given["logit_bias"] = {token: float(bias) for token, bias in given["logit_bias"].items()}
    return given


def _deeper(body: object, most: int) -> bool:
    """Whether lists and objects lie more than ``most`` deep in each other: Python cannot go down without end."""
    level: list[object] = [body]
    for _ in range(most):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [part for parts in inner for part in parts if isinstance(part, (dict, list))]  # type: ignore[attr-defined]
        if not level:
            return False
    return True


def _without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """Clients that give an answer back send nulls and empty lists of calls, which transformers takes for calls."""
    given = {name: value for name, value in body.items() if value is not None}
    for name in ("messages", "input"):
        if isinstance(given.get(name), list):
            given[name] = [_without_empty(item) if isinstance(item, dict) else item for item in given[name]]
    for name in ("logit_bias", "stop", "tools"):
        if given.get(name) in ([], {}):
            del given[name]
    return given


def _without_empty(message: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in message.items()
        if value is not None and not (name == "tool_calls" and value == [])
    }


def _refusal(error: ValidationError, body: Mapping[str, Any]) -> Refused:
    """Of several complaints the deepest: where a value may be one of several things, the one it was closest to."""
    found = [(_steps(entry, body), entry) for entry in error.errors(include_url=False, include_input=False)]
    # Of several as deep, the one whose kind of value it was.
    steps, entry = max(found, key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")))
    if entry["type"] == "missing":
        owner = f"The request's {_path(steps[:-1])}" if steps[:-1] else "The request"
        return Refused(f"{owner} has no {steps[-1]}.", code="missing_value", where=_path(steps))
    said = entry["msg"].removeprefix("Value error, ").rstrip(".")
    where = _path(steps)
    return Refused(f"The request's {where} cannot be used: {said[:1].lower()}{said[1:]}.", where=where)


def _steps(entry: ErrorDetails, body: Any) -> list[str | int]:
    """The part of pydantic's location that leads through the request, without the names of its own alternatives."""
    steps: list[str | int] = []
    for step in entry["loc"]:
        if step in body if isinstance(body, dict) else isinstance(body, list) and isinstance(step, int):
            body = body[step]
            steps.append(step)
    return [*steps, entry["loc"][-1]] if entry["type"] == "missing" else steps


def _path(steps: Sequence[str | int]) -> str:
    """``messages[0].content``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")[:200]
