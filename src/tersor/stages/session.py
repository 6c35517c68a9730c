"""An artifact in memory that writes text: by a compiled step where that reproduces the model, else by transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer

from tersor.artifact import Artifact
from tersor.errors import BadInput, UnknownArchitecture
from tersor.runtime import large_pages
from tersor.runtime.decoding import Chooser, Decoder, write_on
from tersor.runtime.decoding.blueprint import Blueprint, draw, rebuild
from tersor.runtime.memory import give_back
from tersor.stages import known
from tersor.stages.foreign import refuse_foreign_code
from tersor.stages.opened import open_whole

OnText = Callable[[str], None]
LONGEST = 8192
"""Tokens of the texts that a blueprint is drawn for, where the model takes as many and no longer one was asked for."""


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


@dataclass(frozen=True)
class Manner:
    """What a model's configurations say about writing: ``limit``, the positions that it has, if it says so; ``stops``,
    tokens that end a text; ``top_k`` and ``top_p``, which leave all tokens at 0 and 1.
    """

    limit: int | None
    stops: tuple[int, ...]
    top_k: int
    top_p: float


@dataclass
class Session:
    """An artifact and its tokenizer, and what its decoder remembers.

    ``blueprint``: of its step, from an earlier run.
    """

    artifact: Artifact
    tokenizer: Any
    manner: Manner
    trust_remote_code: bool = False
    blueprint: Blueprint | None = None
    decoder: Decoder | None = None
    fallback: str | None = None
    remembered: list[int] = field(default_factory=list)
    _model: Any = None
    _kept: bool = False

    @property
    def model(self) -> Any:
        """The model in transformers, loaded when it is first asked for."""
        if self._model is None:
            self._model = _load_model(self.artifact.folder, self.trust_remote_code)
        return self._model

    @property
    def limit(self) -> int | None:
        return self.manner.limit

    def prepare(self, context: int, cache_dtype: torch.dtype) -> None:
        """Make a decoder of texts of up to ``context`` tokens, or note why there is none."""
        if self.blueprint is not None:
            # What does not come out as it did is found out anew.
            with contextlib.suppress(UnknownArchitecture):
                self.decoder = rebuild(self.blueprint, self.artifact, context=context, cache_dtype=cache_dtype)
                return
            self.blueprint = None  # its file is about to be replaced
        large_pages.move(self.model.modules())
        try:
            self.decoder = Decoder.of(self.model, context=context, cache_dtype=cache_dtype)
        except UnknownArchitecture as error:
            self.fallback = str(error)

    def keep(self) -> None:
        """Keep what was found out for later runs, where there is something to keep and a place for it."""
        if self._kept or self.decoder is None or self._model is None or "auto_map" in self.artifact.config:
            return
        self._kept = True
        # RuntimeError: where there is no home, there is no place for it.
        with contextlib.suppress(UnknownArchitecture, OSError, RuntimeError):
            context = max(self.decoder.context, min(self.limit or LONGEST, LONGEST))
            found = draw(self._model, self.artifact.manifest.kept, context)
            found.data["manner"] = asdict(self.manner)
            found.data["tokenizer"] = known.describe_tokenizer(self.tokenizer)
            found.save(known.place(self.artifact))

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
            temperature=style.temperature, top_k=self.manner.top_k, top_p=self.manner.top_p, seed=style.seed
        )
        new: list[int] = []
        times = [perf_counter()]
        try:
            for token in write_on(self.decoder, ids[known:], choose, tokens=tokens, stops=self.manner.stops):
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
            new[-1] in self.manner.stops,
            tuple(new),
        )

    def _write_by_transformers(self, ids: list[int], tokens: int, style: Style, on_text: OnText | None) -> Written:
        times: list[float] = []
        pieces = _Pieces(self.tokenizer, on_text or _unheard, times)
        stops = sorted(self.manner.stops)
        pad = self.tokenizer.pad_token_id
        settings: dict[str, Any] = {"do_sample": False}
        if style.temperature > 0:
            settings = {
                "do_sample": True,
                "temperature": style.temperature,
                "top_k": self.manner.top_k,
                "top_p": self.manner.top_p,
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
        ended = new[-1] in self.manner.stops
        return Written(str(text), len(ids), len(new), first - start, last - first, self.fallback, ended, tuple(new))


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
    """Open an artifact to write with it. Raises BadInput or CorruptArtifact for what cannot be.

    The model itself is loaded when it is needed: not where an earlier run left a blueprint.
    """
    artifact = open_whole(path)
    refuse_foreign_code(path, artifact.config, trust_remote_code=trust_remote_code)
    blueprint = known.load(artifact)
    session = None if blueprint is None else _from_known(artifact, blueprint)
    session = _anew(artifact, trust_remote_code) if session is None else session
    give_back()
    return session


def _from_known(artifact: Artifact, blueprint: Blueprint) -> Session | None:
    tokenizer = known.open_tokenizer(artifact.folder, blueprint.data.get("tokenizer"))
    try:
        manner = Manner(**{**blueprint.data["manner"], "stops": tuple(blueprint.data["manner"]["stops"])})
    except (KeyError, TypeError):
        return None
    return None if tokenizer is None else Session(artifact, tokenizer, manner, blueprint=blueprint)


def _anew(artifact: Artifact, trust_remote_code: bool) -> Session:
    # Imported when there is no other way: it takes seconds, and 70 MB.
    from tersor.stages.text import tokenizer_in

    tokenizer = tokenizer_in(artifact.folder, trust_remote_code=trust_remote_code)
    give_back()  # reading a tokenizer takes twice what it keeps
    model = _load_model(artifact.folder, trust_remote_code)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    settings = model.generation_config
    ends = getattr(settings, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    top_k, top_p = getattr(settings, "top_k", None), getattr(settings, "top_p", None)
    manner = Manner(
        limit if isinstance(limit, int) and limit > 0 else None,
        tuple(sorted(set(ends if isinstance(ends, list) else [] if ends is None else [ends]))),
        0 if top_k is None else top_k,
        1.0 if top_p is None else top_p,
    )
    return Session(artifact, tokenizer, manner, trust_remote_code, _model=model)


def _load_model(path: Path, trust_remote_code: bool) -> Any:
    # Packed layers stay as they are; of the rest, which is small, the most exact type costs little.
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, dtype=torch.float32)
    return model.eval()
