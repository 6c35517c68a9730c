"""An artifact in memory that writes text: by a compiled step where that reproduces the model, else by transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer

from tersor.errors import BadInput, UnknownArchitecture
from tersor.runtime.decoding import Chooser, Decoder, write_on
from tersor.stages.evaluate import open_whole
from tersor.stages.foreign import refuse_foreign_code
from tersor.stages.text import tokenizer_in

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """A text and what it took.

    ``prompt_tokens``: tokens that were run before the first new one, without those remembered from before; ``tokens``:
    new ones, the one that ends the text included. ``seconds``: from the first new token to the last.
    ``fallback``: why transformers wrote it and not a compiled step; None where the step did. ``ended``: whether the
    model ended it, and not the number of tokens that was asked for. ``ids``: the new tokens.
    """

    text: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    seconds: float
    fallback: str | None
    ended: bool = False
    ids: tuple[int, ...] = ()

    @property
    def prompt_speed(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def speed(self) -> float:
        """New tokens per second, after the first, which the prompt gave; 0 for a single one."""
        return (self.tokens - 1) / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Style:
    """How tokens are chosen: at ``temperature`` 0 the likeliest, else drawn with ``seed``.

    They are drawn among those that the top-k and top-p settings of the model's own generation_config leave. Other
    settings that a model comes with play no part.
    """

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise BadInput(
                f"--temperature {self.temperature:g} makes no sense; give 0 for the likeliest text, or more."
            )
        # What torch's generators take. Python's whole numbers have no end.
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise BadInput(f"--seed {self.seed} cannot be used; give a whole number from 0 to {2**64 - 1}.")


@dataclass
class Session:
    """A model and its tokenizer, and what its decoder remembers.

    ``limit``: positions that the model has, if it says so.
    """

    model: Any
    tokenizer: Any
    limit: int | None
    stops: frozenset[int]
    decoder: Decoder | None = None
    fallback: str | None = None
    remembered: list[int] = field(default_factory=list)

    def prepare(self, context: int, cache_dtype: torch.dtype) -> None:
        """Make a decoder of texts of up to ``context`` tokens, or note why there is none."""
        try:
            self.decoder = Decoder.of(self.model, context=context, cache_dtype=cache_dtype)
        except UnknownArchitecture as error:
            self.fallback = str(error)

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a user's turn, up to where the model's answer begins; of the text itself where the tokenizer has no
        template.
        """
        if self.tokenizer.chat_template:
            return self.tokenize(self.render([{"role": "user", "content": prompt}]))
        return list(self.tokenizer(prompt)["input_ids"])

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as the tokenizer's template has it, up to where the model's answer begins."""
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text that brings its own special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def write(self, ids: list[int], *, tokens: int, style: Style, on_text: OnText | None = None) -> Written:
        """Continue ``ids`` by up to ``tokens`` tokens. What a decoder remembers of them is not run again."""
        if self.decoder is None:
            return self._write_by_transformers(ids, tokens, style, on_text)
        known = _common(self.remembered[: self.decoder.position], ids[:-1])
        self.decoder.rewind(known)
        pieces = None if on_text is None else _Pieces(self.tokenizer, on_text)
        choose = Chooser(
            temperature=style.temperature, top_k=self._setting("top_k", 0), top_p=self._setting("top_p", 1.0),
            seed=style.seed,
        )  # fmt: skip
        new: list[int] = []
        times = [perf_counter()]
        try:
            for token in write_on(self.decoder, ids[known:], choose, tokens=tokens, stops=self.stops):
                times.append(perf_counter())
                new.append(token)
                if pieces is not None:
                    pieces.put(torch.tensor([token]))
        finally:
            self.remembered = [*ids, *new][: self.decoder.position]
            if pieces is not None:
                pieces.end()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Written(
            str(text),
            len(ids) - known,
            len(new),
            times[1] - times[0],
            times[-1] - times[1],
            None,
            new[-1] in self.stops,
            tuple(new),
        )

    def _write_by_transformers(self, ids: list[int], tokens: int, style: Style, on_text: OnText | None) -> Written:
        times: list[float] = []
        pieces = _Pieces(self.tokenizer, on_text or _unheard, times)
        stops = sorted(self.stops)
        pad = self.tokenizer.pad_token_id
        settings: dict[str, Any] = {"do_sample": False}
        if style.temperature > 0:
            settings = {
                "do_sample": True,
                "temperature": style.temperature,
                "top_k": self._setting("top_k", 0),
                "top_p": self._setting("top_p", 1.0),
            }
        config = GenerationConfig(
            max_new_tokens=tokens,
            eos_token_id=stops or None,
            pad_token_id=pad if pad is not None else next(iter(stops), None),
            **settings,
        )
        given = torch.tensor([ids])
        start = perf_counter()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(style.seed)
            output = self.model.generate(
                given, attention_mask=torch.ones_like(given), generation_config=config, streamer=pieces
            )
        new = output[0, len(ids) :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        first, last = times[1], times[-1]  # the prompt is handed on too
        ended = new[-1] in self.stops
        return Written(str(text), len(ids), len(new), first - start, last - first, self.fallback, ended, tuple(new))

    def _setting(self, name: str, default: Any) -> Any:
        value = getattr(self.model.generation_config, name, None)
        return default if value is None else value


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands text on as it is decoded, instead of printing it. ``times``: takes note of when tokens come, if given;
    transformers' generate hands on the prompt first, which is left out then.
    """

    def __init__(self, tokenizer: object, hand_on: OnText, times: list[float] | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=times is not None, skip_special_tokens=True)
        self._hand_on, self._times = hand_on, times

    def put(self, value: torch.Tensor) -> None:
        if self._times is not None:
            self._times.append(perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._hand_on(text + ("\n" if stream_end else ""))


def _unheard(_text: str) -> None:
    """For a streamer whose text nobody wants: it still tells when tokens come."""


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def open_session(path: Path, *, trust_remote_code: bool) -> Session:
    """Load an artifact to write with it. Raises BadInput or CorruptArtifact for what cannot be."""
    refuse_foreign_code(path, open_whole(path).config, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_in(path, trust_remote_code=trust_remote_code)
    # Packed layers stay as they are; of the rest, which is small, the most exact type costs little.
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, dtype=torch.float32).eval()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    stops = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return Session(model, tokenizer, limit if isinstance(limit, int) and limit > 0 else None, stops)
