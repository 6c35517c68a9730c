"""What a report is made from: plain values only, so that it can be stored as JSON and rendered again later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tersor.contracts import Layer, Quality, RatePoint, TensorFate
from tersor.errors import BadInput
from tersor.report.plain import from_plain, to_plain

FORMAT = 1


@dataclass(frozen=True)
class LayerReport:
    """One layer as it was encoded.

    ``codec``: its text. ``nbytes``: bytes of its stored tensors, header entries not counted. ``predicted``: loss that
    the plan expected of it, nats of KL per token. ``relative_error``: ``‖W − Ŵ‖ / ‖W‖`` of what was stored, None when
    not measured. ``curve``: the measured choices; empty when the plan was not made from curves.
    """

    layer: Layer
    codec: str
    nbytes: int
    predicted: float | None = None
    relative_error: float | None = None
    curve: tuple[RatePoint, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.layer.parameters


@dataclass(frozen=True)
class Sample:
    """Text generated from ``prompt`` by the original and by the compressed model, with the same settings."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Stage:
    """A stage of the run and its wall time in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Note:
    """Something the reader should know. ``layer``: the layer it is about, if any."""

    level: Literal["info", "warning"]
    text: str
    layer: str | None = None


@dataclass(frozen=True)
class Check:
    """Something verified on the written artifact, with the number that decided it."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class TextRecord:
    """Text that was used. ``role``: what for ("calibration", "evaluation"). ``sha256``: of its token ids."""

    role: str
    description: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class FileDigest:
    """A file of the artifact: name, bytes, SHA-256 in hexadecimal."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. Only the first nine fields are required; a missing part is left out of the page.

    ``budget``: bytes asked for, None when the run had no byte budget. ``file_bytes``: exact size of all weight files.
    ``source_bytes``: the same for the source. ``parameters``: weights stored, tied ones once. ``kept_bytes``: bytes
    of the tensors stored as they were; what is left of ``file_bytes`` after layers and kept tensors is headers.
    ``layers``: in the order of computation. ``head``: name of the output layer, if it is a layer of its own.
    ``predicted``: total loss that the plan expected, nats per token; None when nothing was measured before planning.
    ``stages``: wall times in order. ``peak_memory``, ``memory_cap``: resident bytes. ``machine``: what it ran on.
    ``plan``: text of the plan file, exactly as it can be fed back. ``created``: date and time as they should be shown.
    """

    model: str
    model_type: str
    parameters: int
    source_bytes: int
    budget: int | None
    file_bytes: int
    kept_bytes: int
    layers: tuple[LayerReport, ...]
    tensors: tuple[TensorFate, ...]
    head: str | None = None
    quality: Quality | None = None
    predicted: float | None = None
    samples: tuple[Sample, ...] = ()
    stages: tuple[Stage, ...] = ()
    peak_memory: int | None = None
    memory_cap: int | None = None
    machine: Mapping[str, str] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    notes: tuple[Note, ...] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    texts: tuple[TextRecord, ...] = ()
    fingerprint: str = ""
    files: tuple[FileDigest, ...] = ()
    plan: str = ""
    created: str = ""

    def to_plain(self) -> dict[str, Any]:
        """The report as dictionaries, lists, strings and numbers that JSON can hold."""
        return {"format": FORMAT, **to_plain(self)}

    def to_json(self) -> str:
        """The same as text. Equal data give equal text."""
        return json.dumps(self.to_plain(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ReportData:
        """The inverse of :meth:`to_json`. Raises :class:`~tersor.errors.BadInput` naming the first wrong field."""
        try:
            plain = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(
                f"The report data are not valid JSON: {error}; write them with ReportData.to_json."
            ) from error
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            found = plain.get("format") if isinstance(plain, dict) else type(plain).__name__
            raise BadInput(f"The report data have format {found!r}, and this version of tersor reads format {FORMAT}.")
        del plain["format"]
        return from_plain(cls, plain, "report")
