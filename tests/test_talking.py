"""`tersor run` and `tersor chat` on tiny artifacts: what they say on either stream, and what a chat remembers."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import command_line
import tersor
import tiny_models
import tiny_runs
import tiny_tokenizer
from command_line import Outcome
from tersor import api, show
from tersor.errors import BadInput
from tersor.kernels import step
from tersor.stages.session import Written

compiled = pytest.mark.skipif(not step.available, reason="products were not compiled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("talking")


@pytest.fixture(scope="module")
def make(folder: Path, words: Path) -> Callable[[str], Path]:
    """The artifact of a tiny model of a family, with a tokenizer that has a chat template."""

    def build(family: str) -> Path:
        made = folder / family
        if not made.exists():
            source = folder / f"{family}-source"
            options = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
            tiny_models.build(family, **options).save_pretrained(source)
            tiny_tokenizer.build(chat=True).save_pretrained(source)
            tersor.compress(
                source,
                made,
                bpw=16,
                text=words,
                candidates=["int8:row"],
                cache_dir=folder / "cache",
                **tiny_runs.SETTINGS,
            )
        return made

    return build


@pytest.fixture(scope="module")
def artifact(make: Callable[[str], Path]) -> Path:
    return make("llama")


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """A command, with ``typed`` as its standard input."""

    def run(*arguments: object, typed: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return command_line.run(*arguments, cache=folder / "cache")

    return run


def by_transformers(artifact: Path, text: str, tokens: int) -> str:
    """What transformers' own generate makes of a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@compiled
def test_a_run_says_what_it_wrote_and_how_fast(artifact: Path, command: Callable[..., Outcome]) -> None:
    asked = ("run", artifact, "hi", "--tokens", 12, "--cache", "float32")
    data = json.loads(command(*asked, "--json").text)
    assert data["fallback"] is None
    assert data["prompt_tokens"] == len("[u]hi") + 1 + len("[a]")
    assert 1 <= data["tokens"] <= 12
    assert data["tokens_per_second"] > 0
    assert data["prompt_tokens_per_second"] > 0
    assert data["text"] == by_transformers(artifact, "[u]hi</s>[a]", 12)
    said = command(*asked)
    assert said.text == data["text"] + "\n"
    assert re.fullmatch(r"tersor: 9 tokens read at [\d.]+ a second, \d+ written at [\d.]+ a second\n", said.err)


def test_a_model_without_a_step_is_run_by_transformers_and_it_is_said_why(
    make: Callable[[str], Path], command: Callable[..., Outcome]
) -> None:
    asked = ("run", make("gpt2"), "hello", "--tokens", 12)
    data = json.loads(command(*asked, "--json").text)
    assert "GPT2MLP" in data["fallback"] or not step.available
    assert data["text"] == by_transformers(make("gpt2"), "[u]hello</s>[a]", 12)
    said = command(*asked)
    assert said.text == data["text"] + "\n"
    assert said.err.splitlines()[0] == f"tersor: run by transformers, layer by layer: {data['fallback']}."
    drawn = [command(*asked, "--temperature", 2, "--seed", seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@compiled
def test_drawing_leaves_the_state_of_torch_alone(artifact: Path) -> None:
    state = torch.get_rng_state()
    drawn = [api.write(artifact, "hello", tokens=20, temperature=2.0, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_makes_no_sense_is_refused(artifact: Path, folder: Path, command: Callable[..., Outcome]) -> None:
    assert "--tokens 0" in command("run", artifact, "x", "--tokens", 0).sentence
    assert "--temperature -1" in command("run", artifact, "x", "--temperature", -1).sentence
    assert "--cache 'int8'" in command("run", artifact, "x", "--cache", "int8").sentence
    assert "more than the 256 that the model takes" in command("run", artifact, "x" * 250).sentence
    assert "--tokens 0" in command("chat", artifact, "--tokens", 0).sentence
    assert "takes 1 to 256 tokens" in command("chat", artifact, "--context", 257).sentence
    bare = folder / "bare"
    shutil.copytree(artifact, bare, dirs_exist_ok=True)
    with pytest.raises(BadInput, match="no chat template"):
        _without_template(bare)


def _without_template(bare: Path) -> None:
    from tersor.stages import chat, session

    def opened(path: Path, *, trust_remote_code: bool) -> Any:
        found = session.open_session(path, trust_remote_code=trust_remote_code)
        found.tokenizer.chat_template = None
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "open_session", opened)
        api.chat(bare)


def test_a_chat_through_a_pipe(artifact: Path, command: Callable[..., Outcome]) -> None:
    said = command("chat", artifact, "--tokens", 12, "--cache", "float32", typed="hi\n\nmore\n/exit\nnever\n")
    first = by_transformers(artifact, "[u]hi</s>[a]", 12)
    # The tokenizer puts spaces between its tokens, one for each character, that are none of the answer.
    second = by_transformers(artifact, f"[u]hi</s>[a]{first.replace(' ', '')}</s>[u]more</s>[a]", 12)
    assert said.text == f"{first}\n{second}\n"
    anew = command("chat", artifact, "--tokens", 12, "--cache", "float32", typed="hi\n/new\nhi\n")
    assert anew.text == f"{first}\n{first}\n"


def test_a_chat_in_a_process_of_its_own_ends_with_its_input(artifact: Path, folder: Path) -> None:
    said = command_line.launch("chat", artifact, "--tokens", 4, cache=folder / "cache")  # standard input is empty
    assert (said.code, said.out) == (0, "")


@compiled
def test_only_what_is_new_is_run(artifact: Path) -> None:
    chat = api.chat(artifact, tokens=10, cache="float32")
    first = chat.say("hello there")
    assert first.prompt_tokens == len("[u]hello there") + 1 + len("[a]")
    second = chat.say("more")
    # The last token of an answer has not been run yet, if it did not end it; the template puts an end behind it.
    assert second.prompt_tokens == len("[u]more[a]") + 2 + (0 if first.ended else 1)
    assert chat.fallback is None
    chat.forget()
    again = chat.say("hello there")
    assert again.text == first.text
    assert again.prompt_tokens == 1  # all but the last token is still in the cache


@compiled
def test_a_full_context_is_told_and_a_chat_goes_on(artifact: Path, command: Callable[..., Outcome]) -> None:
    said = command("chat", artifact, "--context", 30, "--tokens", 99, typed=f"{'x' * 12}\n{'y' * 40}\n/new\nhi\n")
    assert said.code == 0
    lines = said.err.splitlines()
    assert lines[0] == "tersor: all 30 tokens of the conversation are taken; /new begins anew."
    assert re.match(r"tersor: The conversation has become \d+ tokens long, and there is room for 30; /new", lines[1])
    assert len(lines) == 3  # the last answer fills the context too


def test_ctrl_c_ends_an_answer_or_the_chat(
    artifact: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = show.stream, [True]

    def interrupted(text: str) -> None:
        if left:
            left.pop()
            raise KeyboardInterrupt
        real(text)

    monkeypatch.setattr(show, "stream", interrupted)
    said = command("chat", artifact, "--tokens", 5, typed="hi\nhi\n")
    assert said.code == 0
    assert said.err == "tersor: the answer was broken off and is forgotten.\n"
    assert said.out.count("\n") >= 1

    def stopped() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "_line", stopped)
    said = command("chat", artifact)
    assert (said.code, said.out, said.err) == (0, "\n", "")


def test_speeds_of_short_texts() -> None:
    assert Written("", 3, 1, 0.0, 0.0, None).speed == 0.0
    assert Written("", 3, 11, 1.5, 2.0, None).speed == 5.0
