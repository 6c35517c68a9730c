"""`tersor serve` when things go wrong: texts that fail midway, clients that go away, too much of anything."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import command_line
from tiny_server import LIMIT, compressed, connect, post, served
from tiny_tokenizer import LETTERS

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CHAT, PLAIN, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
STEP = 0.1
SLOW = f"""
import time
from tersor.stages.serving.generation import OneByOne
go_on = OneByOne._go_on
def slowly(self, *given):
    time.sleep({STEP})
    go_on(self, *given)
OneByOne._go_on = slowly
"""
"""A token takes as long as one of a large model."""
FAILING = """
from tersor.errors import NotFinite
from tersor.stages.serving.generation import OneByOne
go_on = OneByOne._go_on
def failing(self, *given):
    self.count = 0 if self._job is not getattr(self, "last", None) else self.count + 1
    self.last = self._job
    if self.count == 12 and self._job.seed == 1:
        raise RuntimeError('a "quoted" reason\\nof the inside')
    if self.count == 12 and self._job.seed == 2:
        raise NotFinite("The model gave logits that are not finite numbers.")
    go_on(self, *given)
OneByOne._go_on = failing
"""
"""Texts with these seeds break off after some tokens."""


@pytest.fixture(scope="module")
def artifact(complete: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = complete("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=96)
    return compressed(model, tmp_path_factory.mktemp("trouble"), "30%")


@pytest.fixture(scope="module")
def failing(artifact: Path) -> Iterator[str]:
    with served(artifact, first=FAILING) as (process, found):
        yield found
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (0, "")
        assert 'RuntimeError: a "quoted" reason' in err
        assert err.splitlines()[-1] == "tersor: stopped."


@pytest.fixture(scope="module")
def slow(artifact: Path) -> Iterator[str]:
    """It has room for one that is answered, two that wait, and no large request."""
    with served(artifact, "--max-waiting", 2, "--max-body", "20KB", first=SLOW) as (process, found):
        yield found
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (0, "")
        assert err.splitlines()[-1] == "tersor: stopped."
        assert "Traceback" not in err


@pytest.fixture(scope="module")
def writing(complete: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    made = compressed(complete("qwen3", max_position_embeddings=128), tmp_path_factory.mktemp("writing"), "60%", QWEN)
    with served(made, first=f"LETTERS, TEXTS = {LETTERS!r}, {TEXTS!r}\n{WRITING}") as (process, found):
        yield found
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=LIMIT)[1]


def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key="any", max_retries=0, timeout=LIMIT)


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], "temperature": 0, **fields}).encode()


Z = {"logit_bias": {"28": 100}}
"""A letter and no end."""


def stream_of(address: str, kind: str, seed: int) -> Any:
    asked = {"model": "small model", "seed": seed, "stream": True, "temperature": 0}
    if kind == CHAT:
        return client(address).chat.completions.create(messages=[{"role": "user", "content": "hi"}], **asked, **Z)
    if kind == PLAIN:
        return client(address).completions.create(prompt="abc", **asked)
    seed = asked.pop("seed")
    return client(address).responses.create(input="hi", extra_body={"seed": seed}, **asked)


@pytest.mark.parametrize("kind", [CHAT, PLAIN, RESPONSES])
@pytest.mark.parametrize(
    ("seed", "sentence"),
    [
        (1, "The server failed at this request; its log says where."),
        (2, "The model gave logits that are not finite numbers."),
    ],
)
def test_a_stream_that_breaks_off_says_so(failing: str, kind: str, seed: int, sentence: str) -> None:
    """The client has what came before, and then an exception with the sentence."""
    came = []
    with pytest.raises(openai.APIError) as caught:
        came.extend(stream_of(failing, kind, seed))
    assert caught.value.message == sentence
    assert caught.value.body["type"] == "server_error"
    assert len(came) > 3
    assert all(getattr(piece, "type", "") != "response.completed" for piece in came)


def test_nothing_after_it_says_that_all_is_well(failing: str) -> None:
    connection = connect(failing)
    connection.request("POST", CHAT, chat(seed=1, stream=True, **Z), {"Content-Type": "application/json"})
    lines = [line for line in connection.getresponse().read().decode().splitlines() if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error == {
        "message": "The server failed at this request; its log says where.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert all("finish_reason" not in json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1])
    # The same connection, and the server, go on.
    connection.request("POST", CHAT, chat(seed=3, max_tokens=20), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize(("seed", "words"), [(1, "its log says where."), (2, "not finite numbers.")])
def test_an_answer_that_fails_says_so(failing: str, seed: int, words: str) -> None:
    with pytest.raises(openai.InternalServerError, match=words) as caught:
        client(failing).chat.completions.create(
            model="small model", messages=[{"role": "user", "content": "hi"}], seed=seed, temperature=0, **Z
        )
    assert caught.value.status_code == 500
    assert caught.value.type == "server_error"


def begin(address: str, body: bytes, *, read: bool) -> http.client.HTTPConnection:
    """Ask, and wait until it is being answered."""
    connection = connect(address)
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    if read:
        connection.getresponse().read(10)
    time.sleep(3 * STEP)
    return connection


def seconds(address: str) -> float:
    """How long a short answer takes, from now."""
    start = time.monotonic()
    assert post(address, CHAT, chat(max_tokens=1))[0] == 200
    return time.monotonic() - start


LONG = 50
"""Tokens, which take seconds."""


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_computed_for_who_has_gone(slow: str, stream: bool) -> None:
    connection = begin(slow, chat(max_tokens=LONG, stream=stream, **Z), read=stream)
    connection.close()
    assert seconds(slow) < LONG * STEP / 2


def test_who_leaves_the_line_makes_room(slow: str) -> None:
    """Two wait behind one that is answered, and go; others take their places, and are not kept waiting by them."""
    first = begin(slow, chat(max_tokens=LONG, **Z), read=False)
    waiting = [begin(slow, chat(max_tokens=LONG, stream=number == 0, **Z), read=False) for number in range(2)]
    assert post(slow, CHAT, chat())[0] == 429
    for connection in waiting:
        connection.close()
    time.sleep(2 * STEP)
    with ThreadPoolExecutor(1) as other:
        late = other.submit(seconds, slow)
        assert first.getresponse().status == 200
        end = time.monotonic()
        late.result()
        assert time.monotonic() - end < LONG * STEP / 2
    first.close()


def test_more_than_may_wait_are_told_when_to_come_again(slow: str) -> None:
    line = [begin(slow, chat(max_tokens=LONG, **Z), read=False) for _ in range(3)]
    assert client(slow).models.list().data[0].id == "small model"  # has no need to wait
    with pytest.raises(openai.RateLimitError, match=r"3 requests are before this one.*try again in \d+ s\.") as caught:
        client(slow).completions.create(model="small model", prompt="a")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert (caught.value.type, caught.value.code) == ("rate_limit_error", "too_many_requests")
    for connection in line:
        connection.close()
    time.sleep(2 * STEP)
    assert seconds(slow) < LONG * STEP / 2


def test_a_request_that_is_refused_takes_no_place(slow: str) -> None:
    for _ in range(5):
        assert post(slow, CHAT, chat(max_tokens=1000))[0] == 400
    assert post(slow, CHAT, chat(max_tokens=1))[0] == 200


@pytest.mark.parametrize("size", [20_001, 150_000, 3_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused(slow: str, size: int, chunked: bool) -> None:
    body = chat(messages=[{"role": "user", "content": "a" * size}])
    connection = connect(slow)
    try:
        connection.request(
            "POST",
            CHAT,
            iter([body]) if chunked else body,
            {"Content-Type": "application/json"},
            encode_chunked=chunked,
        )
    except (BrokenPipeError, ConnectionResetError):
        assert size > 8 * 20_000  # it is not read to its end
    else:
        response = connection.getresponse()
        message = json.loads(response.read())["error"]["message"]
        assert (response.status, message) == (
            413,
            "The request's body is larger than the 20000 bytes that are taken here.",
        )
    connection.close()
    assert post(slow, CHAT, chat(max_tokens=1))[0] == 200


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_breaks_streams_off_with_a_sentence(artifact: Path, presses: int) -> None:
    with served(artifact, first=SLOW.replace(str(STEP), "0.5")) as (process, address):
        stream = client(address).chat.completions.create(
            model="small model", messages=[{"role": "user", "content": "hi"}], stream=True, **Z
        )
        next(iter(stream))
        waiting = begin(address, chat(), read=False)
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        with pytest.raises(openai.APIError, match=r"The server is stopping\.") as caught:
            list(stream)
        assert caught.value.code == "stopping"
        response = waiting.getresponse()
        assert (response.status, json.loads(response.read())["error"]["message"]) == (503, "The server is stopping.")
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (0, "")
        assert err.splitlines()[-1] == "tersor: stopped."
        assert "Traceback" not in err


def test_two_servers_that_start_at_once_on_one_port(artifact: Path) -> None:
    """The second is told at once, while the first is still loading and does not listen yet."""
    from tersor import api
    from tersor.errors import BadInput
    from tersor.stages import serve

    listener = serve._take("127.0.0.1", 0)
    port = listener.getsockname()[1]
    said = f"Port {port} of 127.0.0.1 is in use by another program; give another --port."
    with pytest.raises(BadInput) as caught:
        api.open_server(artifact, port=port)
    assert str(caught.value) == said
    # Where the address was still being given back by connections of a server before, both may get as far as listening.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    second = socket.socket()
    second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    second.bind(("127.0.0.1", port))
    serve._open(listener)
    with pytest.raises(BadInput) as caught:
        serve._open(second)
    assert str(caught.value) == said
    listener.close()


def test_limits_that_make_no_sense(artifact: Path) -> None:
    for options, words in (
        (("--max-waiting", -1), "--max-waiting -1 makes no sense"),
        (("--max-body", "0"), "--max-body 0 has no room"),
        (("--max-body", "much"), "--max-body 'much' is not a size"),
    ):
        outcome = command_line.run("serve", artifact, "--port", 0, *options, cache=artifact.parent / "cache")
        assert words in outcome.sentence


@pytest.mark.parametrize("seed", [2**64, -1, 10**30])
def test_seeds_that_no_generator_takes(artifact: Path, seed: int) -> None:
    outcome = command_line.run("run", artifact, "hi", "--seed", seed, cache=artifact.parent / "cache")
    assert outcome.sentence == f"--seed {seed} cannot be used; give a whole number from 0 to 18446744073709551615."


def test_the_greatest_seed(artifact: Path) -> None:
    given = ("run", artifact, "hi", "--tokens", 3, "--temperature", 1, "--seed", 2**64 - 1)
    assert command_line.run(*given, cache=artifact.parent / "cache").code == 0


WRITING = """
import torch
from tersor.stages.serving import generation
def forced(self, input_ids, scores):
    self.at = getattr(self, "at", -1) + 1
    number = input_ids[0].tolist().index(LETTERS.index("@") + 3) + 1
    text = TEXTS[int(LETTERS[input_ids[0, number] - 3])]
    out = torch.full_like(scores, -1e9)
    out[0, LETTERS.index(text[self.at]) + 3 if self.at < len(text) else 2] = 0
    return out
generation._Finite.__call__ = forced
"""
"""A model that writes the text whose number follows ``@`` in the prompt."""
QWEN = "{{ messages[0]['content'] + '<|im_start|>assistant\\n' }}"
"""Where answers begin for the family whose calls transformers knows how to read."""
TEXTS = (
    'so<tool_call>{"name":"f","arguments":{}}</tool_call>',
    "so<tool_call>{bad}</tool_call>",
    "so<tool_call>[1]</tool_call>",
    'so<tool_call>{"name":5,"arguments":{}}</tool_call>',
    'so<tool_call>{"name":"f"}</tool_call>',
    'so<tool_call>{"name":"f","arg',
)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_are_not_as_they_should_be_are_text(writing: str, stream: bool) -> None:
    for number, text in enumerate(TEXTS):
        answer = client(writing).chat.completions.create(
            model="small model",
            messages=[{"role": "user", "content": f"@{number}"}],
            stream=stream,
            max_tokens=len(text),
        )
        if stream:
            pieces = [chunk.choices[0].delta for chunk in answer]
            content = "".join(piece.content or "" for piece in pieces)
            calls = [call for piece in pieces for call in piece.tool_calls or ()]
        else:
            content, calls = answer.choices[0].message.content, answer.choices[0].message.tool_calls or []
        if number == 0:
            assert (content, [call.function.name for call in calls]) == ("so", ["f"])
        else:
            assert (content, calls) == (text, [])
