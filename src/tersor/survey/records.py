"""What a survey keeps: one row for each recipe at each number of bits, in an SQLite database that it can go on with."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tersor.errors import BadInput

Status = Literal["measured", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """One recipe at one number of bits on one model.

    ``model``: fingerprint. ``setting``: digest of the texts, lengths and arithmetic; rows of different settings are not
    compared. ``recipe_settings``: JSON of codecs by shape and the solver. ``bits``: as asked; layers may take ``bits``
    and a quarter. ``nbytes``: what the block linears take, of ``weights`` weights. ``kl``, ``kl_error``: nats a token.
    ``sequences``: KL of each held-out sequence. ``output_error``: ``tr(E H Eᵀ) / tr(W H Wᵀ)``, mean over layers.
    ``seconds``: of processor time, which is the same however many recipes run side by side. ``memory``: peak resident
    bytes of the process. ``status``: ``skipped`` when no codec of the family fits. ``error``: why nothing was measured,
    or what went another way than asked.
    """

    model: str
    setting: str
    recipe: str
    recipe_settings: str
    bits: float
    status: Status
    nbytes: int | None = None
    weights: int | None = None
    kl: float | None = None
    kl_error: float | None = None
    sequences: tuple[float, ...] = ()
    output_error: float | None = None
    perplexity: float | None = None
    top1: float | None = None
    seconds: float | None = None
    memory: int | None = None
    version: str = ""
    error: str = ""
    created: str = ""

    @property
    def rate(self) -> float:
        """Bits per weight of the linears, everything counted. Only of what was measured."""
        assert self.nbytes is not None
        return 8 * self.nbytes / (self.weights or 1)

    @property
    def codecs(self) -> tuple[str, ...]:
        """The texts of its codecs for the shapes of layers, before a plan or the layers themselves change them."""
        return tuple(dict.fromkeys(json.loads(self.recipe_settings)["codecs"].values()))

    def plain(self) -> dict[str, Any]:
        return asdict(self)


_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    model TEXT NOT NULL, setting TEXT NOT NULL, recipe TEXT NOT NULL, recipe_settings TEXT NOT NULL, bits REAL NOT NULL,
    status TEXT NOT NULL, nbytes INTEGER, weights INTEGER, kl REAL, kl_error REAL, sequences TEXT NOT NULL,
    output_error REAL, perplexity REAL, top1 REAL, seconds REAL, memory INTEGER,
    version TEXT NOT NULL, error TEXT NOT NULL, created TEXT NOT NULL,
    PRIMARY KEY (model, setting, recipe, recipe_settings, bits)
)
"""
_COLUMNS = [field.name for field in fields(Outcome)]


class Database:
    """``survey.sqlite``. One process writes; each result is on disk when :meth:`add` returns."""

    def __init__(self, path: Path) -> None:
        try:
            self._connection = sqlite3.connect(path)
            self._connection.execute(_SCHEMA)
            present = {row[1] for row in self._connection.execute("PRAGMA table_info(results)")}
        except sqlite3.Error as error:
            raise BadInput(
                f"{path} cannot be used as a survey's database ({error}); give another --output folder."
            ) from error
        if not set(_COLUMNS) <= present:
            raise BadInput(f"{path} was written by another version of tersor; give another --output folder.")

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome, in place of an earlier one of the same kind."""
        values = [getattr(outcome, name) for name in _COLUMNS]
        values[_COLUMNS.index("sequences")] = json.dumps(outcome.sequences)
        marks = ", ".join("?" * len(_COLUMNS))
        with self._connection:
            self._connection.execute(f"INSERT OR REPLACE INTO results ({', '.join(_COLUMNS)}) VALUES ({marks})", values)

    def outcomes(self, model: str, setting: str) -> list[Outcome]:
        """All outcomes of a model in a setting, oldest first; of a recipe that has changed since, the newest."""
        rows = self._connection.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM results WHERE model = ? AND setting = ? ORDER BY created, rowid",
            (model, setting),
        )
        newest: dict[tuple[str, float], Outcome] = {}
        for row in rows:
            plain = dict(zip(_COLUMNS, row, strict=True))
            plain["sequences"] = tuple(json.loads(plain["sequences"]))
            outcome = Outcome(**plain)
            newest[outcome.recipe, outcome.bits] = outcome
        return list(newest.values())

    def find(self, like: Outcome) -> Outcome | None:
        """The outcome of the same model, setting, recipe as it is now, and bits; None when there is none."""
        found = [
            one
            for one in self.outcomes(like.model, like.setting)
            if (one.recipe, one.recipe_settings, one.bits) == (like.recipe, like.recipe_settings, like.bits)
        ]
        return found[0] if found else None

    def close(self) -> None:
        self._connection.close()
