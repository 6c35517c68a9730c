"""A compiled step behind transformers' ``generate``: the same texts, whatever was asked before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny_models
from tersor.kernels import step
from tersor.runtime.decoding import Decoder
from tersor.runtime.decoding.decoder import CHUNK
from tersor.stages.serving.quick import Quick


class Recorder:
    """A decoder that only notes what it is fed: where, and what."""

    def __init__(self) -> None:
        self.position = 0
        self.fed: list[tuple[int, int]] = []

    def rewind(self, position: int) -> None:
        assert position <= self.position
        self.position = position

    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        self.fed.append((self.position, len(ids)))
        self.position += len(ids)
        return torch.zeros(7)


def quick(decoder: Any) -> Quick:
    return Quick(decoder, lambda: None)


def ask(model: Quick, prompt: Sequence[int], answer: Sequence[int] = ()) -> None:
    model.begin()
    for end in range(len(answer) + 1):
        model.forward(torch.tensor([[*prompt, *answer[:end]]]))


def test_each_token_of_an_answer_is_one_step() -> None:
    recorder = Recorder()
    ask(quick(recorder), range(40), [1, 2, 3])
    assert recorder.fed == [(0, 40), (40, 1), (41, 1), (42, 1)]


def test_whole_chunks_of_the_prompt_before_are_kept() -> None:
    """Not what was fed in part of a chunk or token by token: its sums may have been rounded in another order."""
    recorder = Recorder()
    model = quick(recorder)
    prompt = list(range(2 * CHUNK + 5))
    ask(model, prompt, [1, 2, 3])
    recorder.fed.clear()
    ask(model, [*prompt, 1, 2, 3, *range(CHUNK)])
    assert recorder.fed == [(2 * CHUNK, 5 + 3 + CHUNK)]
    recorder.fed.clear()
    ask(model, prompt[: 2 * CHUNK])  # its last token is to be run, for its logits
    assert recorder.fed == [(CHUNK, CHUNK)]
    recorder.fed.clear()
    ask(model, [99, *prompt])
    assert recorder.fed == [(0, 2 * CHUNK + 6)]


def test_a_new_request_is_not_taken_for_the_next_token() -> None:
    recorder = Recorder()
    model = quick(recorder)
    ask(model, [1, 2, 3])
    recorder.fed.clear()
    ask(model, [1, 2, 3, 4])
    assert recorder.fed == [(0, 4)]


def test_what_was_stopped_midway_is_not_remembered() -> None:
    recorder = Recorder()
    stop = False

    def go_on() -> None:
        if stop and recorder.position:
            raise InterruptedError

    model = Quick(recorder, go_on)  # type: ignore[arg-type]
    prompt = list(range(40 * CHUNK))
    stop = True
    with pytest.raises(InterruptedError):
        ask(model, prompt)
    first = recorder.position
    assert 0 < first < len(prompt)
    stop = False
    recorder.fed.clear()
    ask(model, prompt)
    assert sum(count for _, count in recorder.fed) == len(prompt) - recorder.fed[0][0]
    assert recorder.fed[0][0] <= first
    assert recorder.position == len(prompt)


@pytest.mark.skipif(not step.available, reason="tersor was installed without a compiler")
def test_transformers_generates_the_same() -> None:
    """Greedy, with a penalty and sampled by seed: transformers' own choice of tokens, over its own passes and ours."""
    model: Any = tiny_models.build("llama", max_position_embeddings=256, vocab_size=100).eval()
    model.generation_config.eos_token_id = None
    decoder = Decoder.of(model, context=256)
    fast: Any = tiny_models.build("llama", max_position_embeddings=256, vocab_size=100).eval()
    fast.load_state_dict(model.state_dict())
    fast.generation_config.eos_token_id = None
    stand_in = quick(decoder)
    fast.forward = stand_in.forward
    draw = torch.Generator().manual_seed(5)
    start = torch.randint(3, 100, (1, 70), generator=draw)
    prompts = [start, start[:, :33], torch.cat([start, start], dim=1), start]
    for settings in ({"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.3}, {"do_sample": True}):
        for ids in prompts:
            torch.manual_seed(3)
            slow = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **settings)
            stand_in.begin()
            torch.manual_seed(3)
            quickly = fast.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, use_cache=False, **settings
            )
            assert torch.equal(slow, quickly)


@pytest.mark.skipif(not step.available, reason="tersor was installed without a compiler")
def test_logits_do_not_depend_on_what_was_asked_before() -> None:
    model: Any = tiny_models.build("llama", max_position_embeddings=256, vocab_size=100).eval()
    draw = torch.Generator().manual_seed(6)
    first, second = (torch.randint(0, 100, (1, 100), generator=draw) for _ in range(2))
    mixed = torch.cat([first[:, :80], second], dim=1)
    alone = quick(Decoder.of(model, context=256)).forward(mixed).logits
    used = quick(Decoder.of(model, context=256))
    for ids in (first, torch.cat([first, second[:, :3]], dim=1), second):
        used.begin()
        used.forward(ids)
    used.begin()
    used.forward(first)
    used.begin()
    assert torch.equal(used.forward(mixed).logits, alone)
