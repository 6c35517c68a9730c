"""Text sampled from a model: its distribution, its seams, and that it is the same every time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
import tiny_tokenizer
from tersor.errors import NotFinite
from tersor.statistics import sampling
from tersor.statistics.sampling import ChatTurns, cached_sample, chat_turns, draw, sample_text
from tersor.statistics.text import TokenBatch

PLAIN = tiny_tokenizer.build(bos=True)
CHAT = tiny_tokenizer.build(bos=True, chat=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build("llama").eval()


def sample(model: Any, tokenizer: Any = None, **options: Any) -> TokenBatch:
    return sample_text(model, tokenizer, **{"sequences": 10, "length": 20, "seed": 1, "batch": 3, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_number_of_workers_changes_nothing(family: str, dtype: torch.dtype) -> None:
    model = tiny_models.build(family, dtype=dtype).eval()
    one, two, three = (sample(model, CHAT, workers=workers) for workers in (1, 2, 3))
    assert one.digest() == two.digest() == three.digest()
    assert one.ids.shape == (10, 20)
    assert sample(model, CHAT, seed=2).digest() != one.digest()


def test_sub_batches_and_seeds_are_independent(model: Any) -> None:
    whole = sample(model)
    assert torch.equal(sample(model, sequences=6).ids, whole.ids[:6])
    assert not torch.equal(whole.ids[:3], whole.ids[3:6])


def test_the_global_generator_is_left_alone(model: Any) -> None:
    before = torch.random.get_rng_state()
    sample(model)
    assert torch.equal(torch.random.get_rng_state(), before)


class Scripted(torch.nn.Module):
    """A model that always wants ``token`` next, and knows no attention."""

    def __init__(self, token: int, vocabulary: int = 100) -> None:
        super().__init__()
        self.token, self.vocabulary = token, vocabulary
        self.config = tiny_models.build("llama").config

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.full((*input_ids.shape, self.vocabulary), -30.0)
        logits[..., self.token] = 30.0
        return _Output(logits=logits, past_key_values=())


class _Output(dict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


def test_an_ended_text_is_followed_by_a_new_random_beginning() -> None:
    ids = sample(Scripted(2), PLAIN, sequences=40, length=9).ids
    assert torch.equal(ids[:, 0::3], torch.ones(40, 3, dtype=torch.int64))
    assert torch.equal(ids[:, 2::3], torch.full((40, 3), 2))
    starts = ids[:, 1::3].flatten()
    assert starts.min() >= 3
    assert len(starts.unique()) > 50


def test_without_a_tokenizer_only_the_configuration_tells_what_is_special() -> None:
    model = Scripted(7)
    model.config.eos_token_id = [7, 8]
    model.config.bos_token_id = 1
    ids = sample(model, sequences=40, length=8).ids
    assert torch.equal(ids[:, 1::2], torch.full((40, 4), 7))
    assert not set(ids[:, 0::2].flatten().tolist()) & {1, 7, 8}


def test_chat_turns_are_the_words_of_the_template() -> None:
    user, assistant = (tuple(PLAIN(text, add_special_tokens=False)["input_ids"]) for text in ("[u]", "[a]"))
    expected = ChatTurns(opening=user, reply=(2, *assistant), turn=(2, *user), ends=frozenset({2}))
    assert chat_turns(CHAT) == expected
    assert chat_turns(PLAIN) is None


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] | upper }}", "{{ raise_exception('no') }}", "a"])
def test_a_template_that_does_not_show_the_turns_is_not_used(template: str) -> None:
    tokenizer = tiny_tokenizer.build(chat=True)
    tokenizer.chat_template = template
    assert chat_turns(tokenizer) is None


def test_conversations_alternate_between_user_and_model() -> None:
    tokenizer = tiny_tokenizer.build(chat=True)
    ids = sample(Scripted(2), tokenizer, sequences=3, length=12, chat_share=1.0).ids
    assert [tokenizer.decode(row).replace(" ", "") for row in ids] == ["[u]</s>[a]</s>[u]</s>"] * 3


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 2), (0.5, 5), (1.0, 10)])
def test_the_share_of_conversations_is_spread_evenly(share: float, expected: int) -> None:
    ids = sample(Scripted(5), CHAT, chat_share=share).ids
    opening = torch.tensor(chat_turns(CHAT).opening)  # type: ignore[union-attr]
    chats = (ids[:, :3] == opening).all(1)
    assert int(chats.sum()) == expected
    assert abs(int(chats[:5].sum()) * 2 - expected) <= 1


def test_tokens_beyond_the_tokenizer_are_never_drawn(model: Any) -> None:
    small = tiny_tokenizer.build(letters=tiny_tokenizer.LETTERS[:40])
    assert int(sample(model).ids.max()) >= 43
    assert int(sample(model, small, sequences=30).ids.max()) < 43


def test_progress_counts_every_token(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    sample(model, workers=3, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (200, 200)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_run(bad: float) -> None:
    model = tiny_models.build("llama").eval()
    with torch.no_grad():
        model.model.norm.weight[3] = bad
    with pytest.raises(NotFinite, match="logits have NaN or Inf"):
        sample(model, workers=2)
    assert threading.active_count() < 10


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 400), st.floats(0.1, 8.0))
def test_draw_follows_the_softmax(seed: int, vocabulary: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=generator) * sharpness
    logits[torch.rand(vocabulary, generator=generator) < 0.2] = float("-inf")
    logits[0] = 0.0
    drawn = draw(logits.expand(4000, -1), generator)
    counts = torch.bincount(drawn, minlength=vocabulary)
    p = torch.softmax(logits.double(), -1)
    assert int(counts[p == 0].sum()) == 0
    # Chi-square of the tokens expected at least 5 times, the rest as one class; 6 standard deviations of freedom.
    often = p * 4000 >= 5
    observed = torch.cat([counts[often].double(), counts[~often].sum()[None].double()])
    expected = torch.cat([p[often] * 4000, (p[~often].sum() * 4000)[None]])
    kept = expected > 1e-9
    chi = float(((observed - expected)[kept] ** 2 / expected[kept].clamp(min=1.0)).sum())
    freedom = max(int(kept.sum()) - 1, 1)
    assert chi < freedom + 6 * (2 * freedom) ** 0.5 + 20


def test_draw_leaves_the_logits_alone_and_needs_one_number_a_row() -> None:
    logits = torch.randn(5, 7)
    before = logits.clone()
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    draw(logits, one)
    torch.rand(5, 1, generator=two)
    assert torch.equal(logits, before)
    assert torch.equal(one.get_state(), two.get_state())


def make(ids: torch.Tensor, made: list[int]) -> Any:
    def run() -> TokenBatch:
        made.append(1)
        return TokenBatch(ids, "made up", 7, ("a note",))

    return run


def test_a_cached_sample_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []
    ids = torch.randint(0, 70_000, (3, 5))
    key = {"model": "abc", "seed": 1}
    for _ in range(3):
        batch = cached_sample(tmp_path / "deep" / "cache", key, make(ids, made))
        assert torch.equal(batch.ids, ids)
        assert (batch.origin, batch.seed, batch.notes) == ("made up", 7, ("a note",))
    assert len(made) == 1
    cached_sample(tmp_path / "deep" / "cache", {"seed": 1, "model": "abc"}, make(ids, made))
    assert len(made) == 1
    cached_sample(tmp_path / "deep" / "cache", {**key, "seed": 2}, make(ids, made))
    assert len(made) == 2
    assert sorted(p.suffix for p in (tmp_path / "deep" / "cache").iterdir()) == [".safetensors"] * 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda data: data[:-3],
        lambda data: data[:-4] + b"\x01\x00\x00\x00",
        lambda data: data.replace(b"abc", b"abd", 1),
        lambda data: data.replace(b"digest", b"digesh", 1),
        lambda _: b"\xff" * 100,
    ],
)
def test_a_damaged_sample_is_made_again(tmp_path: Path, damage: Any) -> None:
    made: list[int] = []
    ids = torch.full((3, 5), 9)
    key = {"model": "abc"}
    cached_sample(tmp_path, key, make(ids, made))
    path = next(tmp_path.iterdir())
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    assert torch.equal(cached_sample(tmp_path, key, make(ids, made)).ids, ids)
    assert len(made) == 2
    assert path.read_bytes() == good


def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampling.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cached_sample(tmp_path, {}, make(torch.zeros(1, 2, dtype=torch.int64), []))
    assert not list(tmp_path.iterdir())
