"""What a user can ask of a run."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from tersor.contracts import Anatomy, Codec, Layer
from tersor.errors import BadInput
from tersor.kernels import trellis

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

SolverName = Literal["coordinate", "feedback", "nearest"]
SensitivityName = Literal["fisher", "flat"]
AllocatorName = Literal["exact", "lagrangian"]
DtypeName = Literal["bfloat16", "float32"]
EffortName = Literal["fast", "normal", "best"]

LEAST_TRELLIS = 256
"""Fewer inputs than this are left to scalar codecs: a trellis's scale for each row would weigh too much there."""

RUNTIME_TILE = 4 * 2**20
"""Bytes of decoded weights that a packed layer holds while it multiplies."""


@dataclass(frozen=True)
class Budget:
    """How many bytes a model may take.

    ``kind``: ``size`` (all weight files, headers included), ``memory`` (tensors in memory while running, and one
    decoded tile), or ``bpw`` (bits of the weight files per stored weight). ``amount``: bytes, a share of what the
    source's weights take (unpacked, where they are packed) when ``relative``, or bits.
    """

    kind: Literal["size", "memory", "bpw"]
    amount: float
    relative: bool = False

    def file_bytes(self, anatomy: Anatomy, header_bytes: int) -> int:
        """The budget as bytes of all weight files. ``header_bytes``: what the file holds besides tensors."""
        if self.kind == "bpw":
            return int(self.amount * anatomy.parameters / 8)
        amount = int(self.amount * anatomy.source_bytes) if self.relative else int(self.amount)
        return amount if self.kind == "size" else amount - RUNTIME_TILE + header_bytes

    def asking_for(self, file_bytes: int, anatomy: Anatomy, header_bytes: int) -> str:
        """The option that gives a budget of this kind for weight files of ``file_bytes`` bytes."""
        if self.kind == "bpw":
            bits = math.ceil(8e4 * file_bytes / anatomy.parameters) / 1e4
            enough = int(bits * anatomy.parameters / 8) >= file_bytes
            return f"--bpw {bits if enough else bits + 1e-4:.4f}"
        return f"--{self.kind} {file_bytes + (RUNTIME_TILE - header_bytes if self.kind == 'memory' else 0)}"

    def __str__(self) -> str:
        if self.kind == "bpw":
            return f"{self.amount:g} bits per weight"
        amount = f"{100 * self.amount:.10g}% of the source" if self.relative else f"{int(self.amount):,} bytes"
        return amount if self.kind == "size" else f"{amount} in memory"


def parse_bytes(text: str, what: str) -> int:
    """``60MB``, ``1.5GiB``, ``67265138`` to bytes. Decimal units are powers of ten, as disks and hubs count."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _UNITS:
        raise BadInput(f"{what} {text!r} is not a size: write bytes, or a number with KB, MB, GB, KiB, MiB or GiB.")
    return int(Decimal(match[1]) * _UNITS[unit])


def parse_budget(size: str | None, memory: str | None, bpw: float | None) -> Budget:
    """Exactly one of the three. ``size`` and ``memory`` also take a share of the source's weights, such as ``25%``; of
    packed ones as they are unpacked, to 16 bits as a rule."""
    given = [name for name, value in (("--size", size), ("--memory", memory), ("--bpw", bpw)) if value is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise BadInput(f"Give exactly one budget, --size, --memory or --bpw; found {found}.")
    if bpw is not None:
        if not 0 < bpw <= 64:
            raise BadInput(f"--bpw {bpw:g} is not a number of bits per weight between 0 and 64.")
        return Budget("bpw", float(bpw))
    text = size if size is not None else memory
    assert text is not None
    kind: Literal["size", "memory"] = "size" if size is not None else "memory"
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share:
        return Budget(kind, float(share[1]) / 100, relative=True)
    return Budget(kind, parse_bytes(text, f"--{kind}"))


def share_note(budget: Budget | None, anatomy: Anatomy, stored: str | None) -> str | None:
    """What a share of the source is a share of, where that is not what its files take; None where nothing is to say.

    ``stored``: how a source was packed, None for one that was not.
    """
    if budget is None or not budget.relative or stored is None:
        return None
    amount = f"{100 * budget.amount:.10g}%"
    return (
        f"--{budget.kind} {amount} is a share of the {anatomy.source_bytes:,} bytes that the source's weights take "
        f"unpacked ({int(budget.amount * anatomy.source_bytes):,} bytes), not of its files, which are {stored}."
    )


_CHOICES = {
    "solver": SolverName,
    "sensitivity": SensitivityName,
    "allocator": AllocatorName,
    "dtype": DtypeName,
    "effort": EffortName,
}
_COUNTS = {
    "sequences": (2, None),
    "length": (8, None),
    "eval_sequences": (1, None),
    "samples": (0, 2),
    "seed": (0, 2**32 - 1),
    "tensor_parallel": (1, None),
    "onnx_accuracy_level": (0, 4),
    "workers": (1, None),
    "max_memory": (1, None),
}
"""Least and most of the options that count something."""


@dataclass(frozen=True)
class Options:
    """Everything that decides the bytes of an artifact, and a few things (last four) that do not.

    ``text``: calibration text (None: sampled from the model itself). ``sequences``, ``length``: how much of it.
    ``candidates``: codec texts to choose from (None: the default list, which ``effort`` decides: ``fast`` without
    trellises, ``best`` with longer ones). ``solver``: ``coordinate``, ``feedback`` or ``nearest``. ``tune``: tune each
    block's scales and rounding against what the original block puts out (None: with ``effort`` best).
    ``sensitivity``: ``fisher`` or ``flat``. ``propagate``: statistics for a block come from the already compressed
    blocks before it. ``share_fused``: layers that engines fuse get one codec.
    ``eval_text``: what the final quality is measured on (None: text held out from the calibration). ``engine``: what is
    to run it, whose rules planning keeps. ``tensor_parallel``: processors over which that engine splits each layer.
    ``onnx_accuracy_level``: in what arithmetic ONNX Runtime may multiply, 0 to 4 (None: 1, float32).
    ``like``: a file of that engine's which the result shall be no larger than, unless there is a budget, and no slower,
    by what the engine takes for each codec. ``token_time``: that time in microseconds a token, once the file was read.
    """

    budget: Budget | None
    text: str | None = None
    text_field: str | None = None
    text_split: str = "train"
    sequences: int = 64
    length: int = 256
    seed: int = 0
    candidates: tuple[str, ...] | None = None
    effort: EffortName = "normal"
    solver: SolverName = "coordinate"
    tune: bool | None = None
    sensitivity: SensitivityName = "fisher"
    allocator: AllocatorName = "exact"
    propagate: bool = True
    share_fused: bool = False
    dtype: DtypeName = "bfloat16"
    eval_text: str | None = None
    eval_sequences: int = 16
    samples: int = 2
    engine: str = "transformers"
    tensor_parallel: int = 1
    onnx_accuracy_level: int | None = None
    like: str | None = None
    token_time: float | None = None
    workers: int | None = None
    max_memory: int | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"--{name} {getattr(self, name)!r} is unknown; use {', '.join(get_args(kind))}.")
        for name, (least, most) in _COUNTS.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least or (most is not None and value > most)):
                span = f"of at least {least}" if most is None else f"from {least} to {most}"
                raise BadInput(f"--{name.replace('_', '-')} {value!r} cannot be used; give a whole number {span}.")
        if self.candidates is not None and not self.candidates:
            raise BadInput("--candidates names no codec; write them comma-separated, such as int3:g64,int4:g64,bf16.")

    @property
    def tuned(self) -> bool:
        """Whether blocks are tuned after they are encoded."""
        return self.effort == "best" if self.tune is None else self.tune

    @property
    def guided(self) -> bool:
        """Whether tokens count by the loss's gradients where codes are solved; nearest rounding goes by no text."""
        return self.sensitivity == "fisher" and self.solver != "nearest"

    def identity(self) -> dict[str, Any]:
        """What an interrupted run must share with the command that continues it."""
        plain = asdict(self)
        for free in ("workers", "max_memory", "trust_remote_code", "revision"):
            plain.pop(free)
        return plain


def default_candidates(in_features: int, effort: EffortName = "normal") -> tuple[str, ...]:
    """Codecs worth measuring for a layer with ``in_features`` inputs; see docs/LOG.md for the choice."""
    scalars = _scalar_candidates(in_features)
    if in_features < LEAST_TRELLIS or not searches(effort):
        return scalars
    window = {"normal": 10, "best": 12}[effort]
    # Points cost a search each: the rate of 1 bit, of use below 2.5 bits overall, is for those who take the time.
    trellises = [f"rot(trellis{bits}:L{window})" for bits in ((2, 3, 4) if effort == "normal" else (1, 2, 3, 4))]
    if effort == "best":
        trellises += [f"trellis{bits}:L{window}" for bits in range(1, 5)]
    # Above 4 bits a trellis is no longer worth its search, below it no scalar codec is near it.
    return (*trellises, *(text for text in scalars if re.match(r"int[568]|bf16", text)))


def searches(effort: EffortName) -> bool:
    """Whether trellises are among the default candidates: without a compiled search only when they are asked for."""
    return effort == "best" or (effort == "normal" and trellis.compiled)


def _scalar_candidates(in_features: int) -> tuple[str, ...]:
    groups = [g for g in (64, 32) if in_features % g == 0]
    forms = (
        [f"g{g}:s8" for g in groups] or [f"g{g}:s8" for g in (48, 40, 24, 16) if in_features % g == 0][:1] or ["row"]
    )
    texts: list[str] = []
    for bits in (2, 3, 4, 5, 6):
        texts += [f"int{bits}:{form}" for form in forms]
        if groups and bits <= 5:
            texts.append(f"int{bits}:g{groups[-1]}:asym:s8")
    texts.append(f"int8:{forms[0]}")
    if in_features >= 512:
        texts += ["lut2:row", "lut3:row", "lut4:row"]
    return (*texts, "bf16")


def usable(codecs: dict[str, Codec], layer: Layer) -> list[str]:
    """The candidates that can take a layer; no tile of rows may lie across two copies."""
    return [
        text
        for text, codec in codecs.items()
        if codec.accepts(layer.stored_shape)
        and (layer.copies == 1 or layer.shape[0] % codec.tile(layer.stored_shape[0]) == 0)
    ]
