"""What a request may hold, and the one sentence that a wrong one gets."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi")

from tersor.stages.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Refused,
    Request,
    ResponseRequest,
    check,
)

HELLO = [{"role": "user", "content": "hello"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def refusal(shape: type[Request], **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        check(shape, fields, "mine")
    sentence = str(caught.value.detail)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert 400 <= caught.value.status_code < 500
    return caught.value


def nested(depth: int) -> dict[str, Any]:
    """Objects in objects."""
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"inner": inner}
    return inner


@pytest.mark.parametrize(
    ("fields", "where", "words"),
    [
        ({}, "messages", "The request has no messages."),
        ({"messages": None}, "messages", "has no messages"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hello"}, "messages", "valid list"),
        ({"messages": ["hello"]}, "messages[0]", "dictionary"),
        ({"messages": [{"content": "hello"}]}, "messages[0].role", "The request's messages[0] has no role."),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "no content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "has no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
            "has no arguments",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "JSON object",
        ),
        ({"messages": HELLO, "max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": HELLO, "max_tokens": "7"}, "max_tokens", "integer"),
        ({"messages": HELLO, "max_tokens": True}, "max_tokens", "integer"),
        ({"messages": HELLO, "max_completion_tokens": 1.5}, "max_completion_tokens", "integer"),
        ({"messages": HELLO, "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"messages": HELLO, "temperature": float("nan")}, "temperature", ""),
        ({"messages": HELLO, "temperature": "warm"}, "temperature", "number"),
        ({"messages": HELLO, "top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"messages": HELLO, "seed": 2**64}, "seed", "whole number from 0 to 18446744073709551615."),
        ({"messages": HELLO, "seed": 10**1000}, "seed", "whole number from 0"),
        ({"messages": HELLO, "seed": -1}, "seed", "whole number from 0"),
        ({"messages": HELLO, "seed": 1.5}, "seed", "whole number from 0"),
        ({"messages": HELLO, "seed": "7"}, "seed", "whole number from 0"),
        ({"messages": HELLO, "seed": True}, "seed", "whole number from 0"),
        ({"messages": HELLO, "stream": "yes"}, "stream", "boolean"),
        ({"messages": HELLO, "stop": [""]}, "stop[0]", "at least 1 character"),
        ({"messages": HELLO, "stop": "x" * 257}, "stop", "at most 256 characters"),
        ({"messages": HELLO, "stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"messages": HELLO, "tools": [nested(100)]}, None, "nested more than 64 deep"),
        ({"messages": HELLO, "frequency_penalty": -1}, "frequency_penalty", "greater than -1"),
        ({"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias", ""),
        ({"messages": HELLO, "logit_bias": {"1": 1000}}, "logit_bias.1", ""),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {}}]}, "tools[0]", "no name"),
        ({"messages": HELLO, "tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"messages": HELLO, "chat_template_kwargs": {"a": []}}, "chat_template_kwargs.a", ""),
        ({"messages": HELLO, "n": 3}, "n", "1 only"),
        ({"messages": HELLO, "logprobs": True}, "logprobs", "false or 0 only"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format", '"text"'),
        ({"messages": HELLO, "generation_config": "{}"}, "generation_config", "leave it out"),
        ({"messages": HELLO, "model": 7}, "model", "string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
    ],
)
def test_chat_requests_that_are_refused(fields: dict[str, Any], where: str | None, words: str) -> None:
    refused = refusal(ChatRequest, **fields)
    assert refused.status_code == 400
    found = refused.where
    assert found == where or (words == "" and found is not None and where is not None and found.startswith(where))
    assert words in str(refused.detail)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 1}, "logprobs"),
    ],
)
def test_completions_that_are_refused(fields: dict[str, Any], where: str) -> None:
    assert refusal(CompletionRequest, **fields).where == where


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, "input"),
        ({"input": 5}, "input"),
        ({"input": {}}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "input_image", "image_url": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input"),
        ({"input": [{"type": "input_text", "text": "a"}, {"role": "user", "content": "b"}]}, "input"),
        ({"input": [*HELLO, {"type": "function_call", "call_id": "1", "name": "f"}]}, "input[1].arguments"),
        ({"input": "a", "max_output_tokens": -5}, "max_output_tokens"),
        ({"input": "a", "instructions": 3}, "instructions"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_responses_that_are_refused(fields: dict[str, Any], where: str) -> None:
    assert refusal(ResponseRequest, **fields).where == where


def test_another_model_is_not_found() -> None:
    refused = refusal(ChatRequest, messages=HELLO, model="somebody/else")
    assert (refused.status_code, refused.code, refused.where) == (404, "model_not_found", "model")
    assert "'mine'" in str(refused.detail)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": HELLO},
        {"messages": HELLO, "model": "mine", "max_tokens": 1, "temperature": 0, "top_p": 1, "seed": 2**64 - 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, *HELLO]},
        {"messages": HELLO, "n": 1, "logprobs": False, "response_format": {"type": "text"}, "presence_penalty": 0},
        {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"messages": HELLO, "logit_bias": {"3": -100}, "stop": ["a", "b"], "frequency_penalty": 0.5},
        {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_chat_requests_that_are_taken(fields: dict[str, Any]) -> None:
    assert check(ChatRequest, fields, "mine") == {"stream": False, **fields}


def test_responses_that_are_taken() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = [
        *HELLO,
        {"type": "reasoning", "content": [{"text": "so"}]},
        call,
        {"type": "function_call_output", "call_id": "1", "output": "2"},
    ]
    for given in ("hello", [{"type": "input_text", "text": "a"}], items):
        assert check(ResponseRequest, {"input": given}, "mine") == {"input": given, "stream": False}


def test_an_answer_can_be_given_back_as_it_came() -> None:
    """Clients send an answer's nulls and empty lists along; transformers would take them for calls of functions."""
    answer = {"role": "assistant", "content": "hi", "tool_calls": [], "function_call": None, "refusal": None}
    read = check(ChatRequest, {"messages": [*HELLO, answer, *HELLO], "stop": None, "logit_bias": {}}, "mine")
    assert read["messages"][1] == {"role": "assistant", "content": "hi"}
    assert "stop" not in read
    assert "logit_bias" not in read


def test_a_request_is_left_as_it_was() -> None:
    body = {"messages": [{"role": "assistant", "content": "x", "tool_calls": None}], "tools": None, "seed": 1}
    check(ChatRequest, body, "mine")
    assert body == {"messages": [{"role": "assistant", "content": "x", "tool_calls": None}], "tools": None, "seed": 1}


def test_no_tools_where_none_are_to_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "tools" not in check(ChatRequest, {"messages": HELLO, "tools": tools, "tool_choice": "none"}, "mine")
