"""`tersor serve` as OpenAI's clients meet it: a process of its own on a free port of this machine, ended by Ctrl-C."""

from __future__ import annotations

import http.client
import json
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import command_line
import tersor
import tiny_tokenizer
from tersor.kernels import step
from tiny_server import LIMIT, compressed, connect, post, served

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CONTEXT = 64
PROMPTS = (
    "the quick",
    "brown fox",
    "jumps over",
    "a lazy dog",
    "again",
    "and so",
    "on, and on",
    "until 9",
    "or X",
    "?",
)


@pytest.fixture(scope="module")
def artifact(complete: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = complete("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=96)
    return compressed(model, tmp_path_factory.mktemp("serve"), "30%")


@pytest.fixture(scope="module")
def address(artifact: Path) -> Iterator[str]:
    with served(artifact) as (process, found):
        yield found
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
        # All that was answered and refused is between it and its clients; without a compiler it said so at the start.
        assert err.splitlines()[0 if step.available else 1 :] == ["tersor: stopped."]
        assert (process.returncode, out) == (0, "")


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key="any", max_retries=0, timeout=LIMIT)


def ask(client: Any, prompt: str, *, stream: bool = False, **options: Any) -> str:
    """The answer's text, greedy unless told otherwise."""
    answer = client.chat.completions.create(
        model="small model",
        messages=[{"role": "user", "content": prompt}],
        stream=stream,
        **{"max_tokens": 12, "temperature": 0, **options},
    )
    if not stream:
        return str(answer.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


def test_the_artifact_is_the_only_model(client: Any) -> None:
    assert [model.id for model in client.models.list().data] == ["small model"]
    assert client.models.retrieve("small model").id == "small model"
    with pytest.raises(openai.NotFoundError, match="'small model' only"):
        client.models.retrieve("another")


def test_it_writes_what_run_writes(client: Any, artifact: Path) -> None:
    for prompt in PROMPTS[:2]:
        text = tersor.generate(artifact, prompt, tokens=12)
        assert text
        assert ask(client, prompt) == ask(client, prompt, stream=True) == text


def test_a_stream_comes_in_pieces_and_says_how_it_ended(client: Any) -> None:
    stream = client.chat.completions.create(
        model="small model", messages=[{"role": "user", "content": "hi"}], max_tokens=3, temperature=0, stream=True
    )
    chunks = list(stream)
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) == 3
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 3
    assert {chunk.model for chunk in chunks} == {"small model"}


def test_a_stream_ends_as_openai_s_do(address: str) -> None:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    assert (response.getheader("Content-Type") or "").startswith("text/event-stream")
    lines = [line for line in response.read().decode().splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])
    connection.close()


def test_ten_clients_at_once_get_what_each_gets_alone(client: Any) -> None:
    """Greedy and drawn by seed, streamed and whole."""
    wishes: list[dict[str, Any]] = [
        {"prompt": prompt, "stream": number % 2 == 0, **({"temperature": 1, "seed": number} if number % 3 == 0 else {})}
        for number, prompt in enumerate(PROMPTS)
    ]
    alone = [ask(client, **wish) for wish in wishes]
    assert len(set(alone)) > 5
    with ThreadPoolExecutor(10) as clients:
        together = list(clients.map(lambda wish: ask(client, **wish), wishes))
    assert together == alone


def test_a_seed_and_a_temperature_are_followed(client: Any) -> None:
    greedy = ask(client, "hello")
    drawn = {ask(client, "hello", temperature=1.5, seed=seed) for seed in range(4)}
    assert len(drawn | {greedy}) > 2
    assert ask(client, "hello", temperature=1e-9) == greedy
    assert ask(client, "hello", logit_bias={tiny_tokenizer.LETTERS.index("z") + 3: 100}) == "z" * 12


def test_plain_completions_and_responses(client: Any) -> None:
    answer = client.completions.create(model="small model", prompt="hello", max_tokens=5, temperature=0)
    assert answer.usage.completion_tokens == len(answer.choices[0].text) == 5
    pieces = client.completions.create(model="small model", prompt="hello", max_tokens=5, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text
    response = client.responses.create(model="small model", input="hello", max_output_tokens=12, temperature=0)
    assert response.output_text == ask(client, "hello")


def test_an_answer_is_cut_where_the_context_ends(client: Any) -> None:
    prompt = "a" * 50
    answer = client.chat.completions.create(
        model="small model",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        logit_bias={tiny_tokenizer.LETTERS.index("z") + 3: 100},
    )
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


def hello(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


CHAT = "/v1/chat/completions"
TOOL = [{"role": "tool", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (CHAT, b'{"messages": [', 400, "not JSON"),
        (CHAT, b'{"messages": "\xff"}', 400, "could not be read as JSON"),
        (CHAT, b"[" * 100_000, 400, "could not be read as JSON"),
        (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", 400, "could not be read as JSON"),
        (CHAT, b"[1]", 400, "must be a JSON object"),
        (CHAT, b"", 400, "must be a JSON object"),
        (CHAT, b"{}", 400, "has no messages"),
        (CHAT, hello(messages="hi"), 400, "messages"),
        (CHAT, hello(messages=[{"role": "user"}]), 400, "no content"),
        (CHAT, hello(messages=TOOL), 400, "no such role"),
        (CHAT, hello(max_tokens=-5), 400, "max_tokens cannot be used: input should be greater than or equal to 1"),
        (CHAT, hello(max_tokens="many"), 400, "max_tokens"),
        (CHAT, hello(max_tokens=1000), 400, "1000 for the answer are more than the 64"),
        (CHAT, hello(messages=[{"role": "user", "content": "a" * 100}]), 400, "more than the 64"),
        (CHAT, hello(temperature=-1), 400, "temperature"),
        (CHAT, hello(logit_bias={"100000": 1}), 400, "token 100000"),
        (CHAT, hello(max_tokens=0), 400, "max_tokens"),
        (CHAT, hello(max_tokens=10**30), 400, "more than the 64"),
        (CHAT, hello(messages=[]), 400, "messages"),
        (CHAT, hello(n=2), 400, "n is not served"),
        (CHAT, hello(logprobs=True), 400, "logprobs is not served"),
        (CHAT, hello(tools="all"), 400, "tools"),
        (CHAT, hello(seed=2**64), 400, "seed cannot be used: it must be a whole number from 0 to"),
        (CHAT, hello(seed=-1), 400, "seed cannot be used: it must be a whole number from 0 to"),
        (CHAT, hello(seed=0.5), 400, "seed cannot be used: it must be a whole number from 0 to"),
        (CHAT, hello(stop=["x"] * 17), 400, "stop"),
        (CHAT, hello(stop="x" * 257), 400, "stop"),
        (CHAT, hello(no_such_field=1, another=2), 422, "The request's another is no field that there is"),
        ("/v1/responses", b'{"input": "a", "parallel_tool_calls": "many"}', 400, "parallel_tool_calls"),
        *(
            (CHAT, hello(chat_template_kwargs={name: "x"}), 400, f"cannot set {name}, which")
            for name in ("tokenize", "messages", "self", "conversation", "conversations", "tools", "documents")
        ),
        (CHAT, hello(chat_template_kwargs={"raise_exception": 1}, messages=TOOL), 400, "template does not take"),
        (CHAT, hello(model="another/model"), 404, "'small model' only"),
        ("/v1/completions", b"{}", 400, "has no prompt"),
        ("/v1/completions", b'{"prompt": ""}', 400, "prompt is empty"),
        ("/v1/completions", b'{"prompt": ["a"]}', 400, "prompt"),
        ("/v1/responses", b'{"input": []}', 400, "input"),
        ("/load_model", b'{"model": "another/model"}', 404, "'small model' only"),
        ("/load_model", b'{"model": 5}', 404, "'small model' only"),
        ("/reset", b"{}", 404, "nothing at /reset"),
        ("/v1/embeddings", b"{}", 404, "nothing at /v1/embeddings"),
        ("/v1/models", b"{}", 405, "POST is not answered at /v1/models; GET, OPTIONS is."),
        ("/health", b"{}", 405, "POST is not answered at /health; GET is."),
    ],
)
def test_a_malformed_request_gets_one_sentence(address: str, path: str, body: bytes, status: int, words: str) -> None:
    found, answer = post(address, path, body)
    assert found == status, answer
    assert set(answer) == {"error"}
    assert answer["error"]["type"] == "invalid_request_error"
    message = answer["error"]["message"]
    assert words in message
    assert "\n" not in message
    assert "Traceback" not in message


def test_a_connection_stays_open_after_refusals(address: str) -> None:
    connection = connect(address)
    for method, path, body, status in [
        ("POST", CHAT, b"{", 400),
        ("HEAD", "/health", b"", 200),
        ("POST", "/nowhere", b"{}", 404),
        ("HEAD", "/v1/models", b"", 200),
        ("OPTIONS", CHAT, b"", 405),
        ("POST", CHAT, hello(seed=-1), 400),
        ("POST", CHAT, hello(max_tokens=1), 200),
    ]:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        sock = connection.sock
        response = connection.getresponse()
        assert response.status == status
        assert (response.read() == b"") == (method == "HEAD")
        assert connection.sock is sock is not None
        if status == 405:
            assert response.getheader("Allow") == "POST"
    connection.close()


def test_a_stop_ends_the_text_that_has_it(client: Any) -> None:
    """As a part of it, whatever it began with; streamed too. What the prompt says does not count."""
    whole = ask(client, "hello", temperature=1.5, seed=3, max_tokens=30)
    for stop in (whole[4:7], [whole[9:11], "nowhere"]):
        sought = stop if isinstance(stop, str) else stop[0]
        expected = whole[: whole.index(sought) + len(sought)]
        for stream in (False, True):
            text = ask(client, "hello" + sought, temperature=1.5, seed=3, max_tokens=30, stream=stream)
            assert ask(client, "hello", temperature=1.5, seed=3, max_tokens=30, stream=stream, stop=stop) == expected
            stopped = ask(
                client, "hello" + sought, temperature=1.5, seed=3, max_tokens=30, stream=stream, stop=sought + "\0"
            )
            assert stopped == text


def test_who_asks_for_the_model_to_be_loaded_is_told_that_it_is(address: str) -> None:
    """As `transformers chat` does before it begins."""
    assert post(address, "/load_model", b'{"model": "small model"}')[1]["status"] == "ready"


def test_openai_s_client_shows_the_sentence(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens cannot be used") as caught:
        ask(client, "hi", max_tokens=-1)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
    assert missing.value.code == "model_not_found"


def test_ctrl_c_ends_answers_under_way(complete: Callable[..., Path], tmp_path: Path) -> None:
    """Of a model that has no compiled step. Before that: who else wants its port is told so, at once."""
    artifact = compressed(complete("opt"), tmp_path, "60%")
    with served(artifact, "--context", "60") as (process, address):
        port = urlsplit(address).port
        refused = command_line.run("serve", artifact, "--port", port, cache=tmp_path / "cache")
        assert refused.sentence == f"Port {port} of 127.0.0.1 is in use by another program; give another --port."
        client = openai.OpenAI(base_url=address, api_key="any", max_retries=0, timeout=LIMIT)
        assert ask(client, "hi") == ask(client, "hi", stream=True) == tersor.generate(artifact, "hi", tokens=12)
        stream = client.chat.completions.create(
            model="small model", messages=[{"role": "user", "content": "hi"}], max_tokens=50, stream=True
        )
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (0, "")
        assert err.startswith("tersor: run by transformers, layer by layer: ")
        assert err.splitlines()[1:] == ["tersor: stopped."]


def refusal(artifact: Path, *options: object) -> str:
    return command_line.run("serve", artifact, *options, cache=artifact.parent / "cache").sentence


def test_an_address_that_cannot_be_had(artifact: Path) -> None:
    assert "--port 70000 makes no sense" in refusal(artifact, "--port", 70000)
    assert "no address of this machine" in refusal(artifact, "--host", "192.0.2.1", "--port", 0)
    assert "--context 1 has no room" in refusal(artifact, "--port", 0, "--context", 1)
    assert "more than the 64 tokens" in refusal(artifact, "--port", 0, "--context", 65)


def test_a_refused_command_gives_its_port_back(artifact: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refusal(artifact, "--port", port, "--context", 1)
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


def test_missing_packages_are_named(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.stages import serve

    monkeypatch.setattr(serve, "_PACKAGES", ("fastapi", "no_such_package"))
    assert refusal(artifact) == "Serving needs the missing no_such_package: pip install 'tersor[serve]'."


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in command_line.run("serve", tmp_path, cache=tmp_path / "cache").sentence
